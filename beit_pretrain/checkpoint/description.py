"""The configuration that a file of another program stands for, from its weights and what lies beside it.

Letters: D width, H heads, R rows of a table, N patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.checkpoint import formats
from beit_pretrain.checkpoint.adapt import TABLE
from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.rel_pos import Grid, relative_position_index, table_rows

NAMES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}  # of width and depth
HEAD_WIDTH = 64  # of every published BEiT; where a file says nothing of heads
IMAGE_SIZE = 224  # of an encoder without any positions
RELEASED_BLOCKS = {12: [3, 5, 7, 11], 24: [7, 11, 15, 23]}  # for segmentation, counted from 0, by depth

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Beside:
    """What is known of a file beyond its weights: `config.json` and `preprocessor_config.json`, empty where there is
    none, and what the place it came from says, or the file itself beside its weights (mean, std, crop_pct, image_size,
    class_names, blocks, reduce_zero_label, lineage, source)."""

    config: Facts
    processor: Facts
    place: Facts


def describe(
    ours: Mapping[str, Tensor], index: Tensor | None, beside: Beside, *, given: str
) -> tuple[dict[str, Any], list[str]]:
    """A made-up record of weights under our names, and what a user should know of it, a line each.

    index: a table's index (L, L) if the file holds one; it shows the grid.
    The normalisation that nobody states is None. CheckpointError, which calls the file `given`, if there is no whole
    encoder or a grid that is not square and nowhere stated.
    """
    notes: list[str] = []
    config = beside.config
    stage = formats.stage_of(ours)
    depth = depth_of(ours)
    known = {
        **beside.place,
        **_timm_facts(config),
        **_processor_facts(beside.processor),
        **_marked(config),
    }
    patch = ours.get("encoder.patch_embed.proj.weight")
    if patch is None or depth == 0:
        raise CheckpointError(f"{given} holds no whole encoder: give a file with patch_embed and blocks")
    width, patch_size = patch.shape[0], patch.shape[-1]
    tables = [value for name, value in ours.items() if name.endswith(TABLE)]
    shared = f"encoder.rel_pos_bias.{TABLE}" in ours
    rows = len(tables[0]) if tables else None
    heads = tables[0].shape[1] if tables else _heads(config, width, notes)
    grid = _grid(ours, index, config, known, patch_size, rows, given)
    if config.get("layer_norm_eps", 1e-6) != 1e-6:
        notes.append(
            f"its config.json says layer_norm_eps={config['layer_norm_eps']}, with which Transformers runs it; BEiT "
            "was trained with 1e-06, which is used here"
        )
    size = [grid[0] * patch_size, grid[1] * patch_size]
    node = {
        "_target_": "beit_pretrain.models.beit.Beit",
        "name": NAMES.get((width, depth), "other"),
        "image_size": size,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": ours["encoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
        # What gammas begin with, and only whether there are any: their values are in the weights.
        "layer_scale": (0.1 if depth <= 12 else 1e-5) if "encoder.blocks.0.gamma_1" in ours else 0.0,
        "drop_path": 0.1,
        "rel_pos": "shared" if shared else "per_layer" if tables else "none",
        "mask_token": "encoder.mask_token" in ours,
        "abs_pos": "encoder.pos_embed" in ours,
        "attention": "auto",
        "checkpointing": False,
        "init_std": 0.02,
        "init_cut": 0.02,
    }
    normalize = {name: known.get(name) for name in ("mean", "std")}
    about = {
        "config": {
            "stage": {"name": stage, **_stage_options(ours, stage, depth, config, known, notes)},
            "model": node,
            "image_size": size,
            "data": {"name": None, "normalize": normalize},
        },
        "preprocessing": {
            **normalize,
            "image_size": size,
            "class_names": _classes(ours, stage, config, known),
            "reduce_zero_label": bool(known.get("reduce_zero_label")),
        },
        "lineage": {"parents": known.get("lineage") or {}, "versions": {}, "git_commit": None},
    }
    return about, notes


def _heads(config: Facts, width: int, notes: list[str]) -> int:
    """H of a model without tables, whose weights do not show it."""
    stated = config.get("num_attention_heads") or (config.get("model_args") or {}).get("num_heads")
    if stated is None:
        stated = max(1, width // HEAD_WIDTH)
        notes.append(
            f"the file does not say how many heads it has: {stated}, each {HEAD_WIDTH} wide, is taken"
        )
    return stated


def _stage_options(
    ours: Mapping[str, Tensor], stage: str, depth: int, config: Facts, known: Facts, notes: list[str]
) -> dict[str, Any]:
    if stage == "classify":
        pooling = "mean" if "head.fc_norm.weight" in ours else "cls"
        return {"pooling": pooling, "eval_views": {"crop_pct": known.get("crop_pct") or 0.875}}
    if stage != "segment":
        return {}
    channels = ours["head.decode_head.bottleneck.bn.weight"].shape[0]
    if "blocks" in known:
        blocks = known["blocks"]
    elif "out_indices" in config:
        # Transformers looks at hidden state i - 1, of which 0 is the embedding: block i - 2, counted from 0.
        blocks = [index - 2 for index in config["out_indices"]]
        released = RELEASED_BLOCKS.get(depth)
        notes.append(
            f"the head looks at blocks {blocks}, as Transformers does with out_indices={config['out_indices']}"
        )
        if config["out_indices"] == released:
            notes[-1] += f"; the published weights were trained with blocks {released}"
    else:
        blocks = RELEASED_BLOCKS.get(depth)
    return {"blocks": blocks, "blocks_stated": "blocks" in known, "channels": channels}


def _grid(
    ours: Mapping[str, Tensor],
    index: Tensor | None,
    config: Facts,
    known: Facts,
    patch_size: int,
    rows: int | None,
    given: str,
) -> Grid:
    """Rows and columns of patches that tables and positions are for."""
    positions = ours.get("encoder.pos_embed")
    patches = None if positions is None else positions.shape[1] - 1

    def fits(grid: Grid) -> bool:
        return (rows is None or table_rows(grid) == rows) and (patches is None or math.prod(grid) == patches)

    for grid in _grids(index, config, known, patch_size, rows, patches):
        if fits(grid):
            return grid
    raise CheckpointError(
        f"{given} has positions for a grid that is not square and that it does not state"
        f" ({f'tables of {rows} rows' if rows else f'{patches} positions'}): convert it from a folder with its"
        " config.json, or from a file that holds relative_position_index"
    )


def _grids(
    index: Tensor | None,
    config: Facts,
    known: Facts,
    patch_size: int,
    rows: int | None,
    patches: int | None,
) -> Iterator[Grid]:
    """Grids that may be meant, the surest first."""
    stated = [known.get("image_size"), config.get("image_size")]
    for size in stated:
        if size is not None:
            height, width = size if isinstance(size, list | tuple) else (size, size)
            yield height // patch_size, width // patch_size
    if index is not None:
        patches = len(index) - 1
        for height in (n for n in range(1, patches + 1) if patches % n == 0):
            grid = height, patches // height
            if table_rows(grid) == int(index.max()) + 1 and torch.equal(index, relative_position_index(grid)):
                yield grid
    if rows is not None:
        side = (math.isqrt(rows - 3) + 1) // 2
        yield side, side
    elif patches is not None:
        yield math.isqrt(patches), math.isqrt(patches)
    else:
        yield IMAGE_SIZE // patch_size, IMAGE_SIZE // patch_size


def depth_of(state: Mapping[str, Tensor]) -> int:
    """Blocks in a state of ours."""
    return 1 + max((int(n.split(".")[2]) for n in state if n.startswith("encoder.blocks.")), default=-1)


def _classes(ours: Mapping[str, Tensor], stage: str, config: Facts, known: Facts) -> list[str] | None:
    """Names of the classes in order, where somebody has given them."""
    head = {"classify": "head.head.weight", "segment": "head.decode_head.conv_seg.weight"}.get(stage)
    if head is None:
        return None
    names = known.get("class_names")
    if names is None and (labels := config.get("id2label")):
        names = [labels[key] for key in sorted(labels, key=int)]
        if all(name.startswith("LABEL_") for name in names):  # Transformers' own stopgap
            return None
    return list(names) if names is not None and len(names) == len(ours[head]) else None


# --- what lies beside it ------------------------------------------------------------------------------------------


def _timm_facts(config: Facts) -> dict[str, Any]:
    """What a config.json of timm's says."""
    cfg = config.get("pretrained_cfg")
    if cfg is None:
        return {}
    facts = {name: cfg.get(name) for name in ("mean", "std", "crop_pct") if cfg.get(name) is not None}
    if cfg.get("input_size"):
        facts["image_size"] = list(cfg["input_size"][1:])
    if names := cfg.get("label_names") or config.get("label_names"):
        facts["class_names"] = names
    return facts


def _processor_facts(processor: Facts) -> dict[str, Any]:
    """What a preprocessor_config.json of Transformers says."""
    facts: dict[str, Any] = {}
    if processor.get("do_normalize", True):
        facts = {name: processor[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in processor}
    size, crop = processor.get("size"), processor.get("crop_size")
    if processor.get("do_center_crop") and isinstance(size, Mapping) and "shortest_edge" in size:
        sides = crop if isinstance(crop, Mapping) else {"height": crop}
        facts["crop_pct"] = sides["height"] / size["shortest_edge"]
    elif size is not None:
        facts["crop_pct"] = 1.0
    if "do_reduce_labels" in processor:
        facts["reduce_zero_label"] = processor["do_reduce_labels"]
    return facts


def _marked(config: Facts) -> dict[str, Any]:
    """What this project has written into a config.json beside what its format has a place for."""
    marked = config.get("beit_pretrain") or {}
    return {
        name: marked[name]
        for name in ("image_size", "blocks", "crop_pct", "lineage")
        if marked.get(name) is not None
    }
