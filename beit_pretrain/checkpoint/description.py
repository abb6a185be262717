"""The configuration that a file of another program stands for, from its weights and what lies beside it.

Letters: D width, H heads, R rows of a table, N patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.checkpoint import files, formats, processor
from beit_pretrain.checkpoint.adapt import TABLE
from beit_pretrain.checkpoint.processor import Facts, entry
from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.rel_pos import Grid, relative_position_index, table_rows

NAMES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}  # of width and depth
WIDTHS = {width for width, _ in NAMES}
HEAD_WIDTH = 64  # of every published BEiT
IMAGE_SIZE = 224  # of an encoder without any positions
RELEASED_BLOCKS = {12: [3, 5, 7, 11], 24: [7, 11, 15, 23]}  # for segmentation, counted from 0, by depth


@dataclass(frozen=True)
class Beside:
    """What is known of a file beyond its weights: `config.json` and `preprocessor_config.json`, empty where there is
    none, and what the place it came from says, or the file itself beside its weights (mean, std, crop_pct, image_size,
    class_names, blocks, heads, reduce_zero_label, lineage, weights, source)."""

    config: Facts
    processor: Facts
    place: Facts


def describe(
    ours: Mapping[str, Tensor], index: Tensor | None, beside: Beside, *, given: str
) -> tuple[dict[str, Any], list[str]]:
    """A made-up record of weights under our names, and what a user should know of it, a line each.

    index: a table's index (L, L) if the file holds one; it shows the grid.
    The normalisation that nobody states is None. CheckpointError, which calls the file `given`, if there is no whole
    encoder, a grid that is not square and nowhere stated, a number of heads that nobody states, or an entry in what
    lies beside the file that cannot be.
    """
    notes: list[str] = []
    config = beside.config
    stage = formats.stage_of(ours)
    depth = depth_of(ours)
    known, said = _known(ours, beside, given)
    notes += said
    patch = ours.get("encoder.patch_embed.proj.weight")
    if patch is None or depth == 0:
        raise CheckpointError(f"{given} holds no whole encoder: give a file with patch_embed and blocks")
    width, patch_size = patch.shape[0], patch.shape[-1]
    tables = [value for name, value in ours.items() if name.endswith(TABLE)]
    shared = f"encoder.rel_pos_bias.{TABLE}" in ours
    rows = len(tables[0]) if tables else None
    heads = tables[0].shape[1] if tables else _heads(config, known, width, given, notes)
    sizes = known.get("image_size"), _size(config, given)
    grid = _grid(ours, index, sizes, patch_size, rows, given)
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
            "stage": {"name": stage, **_stage_options(ours, stage, depth, config, known, given, notes)},
            "model": node,
            "image_size": size,
            "data": {"name": None, "normalize": normalize},
        },
        "preprocessing": {
            **normalize,
            "image_size": size,
            "class_names": _classes(ours, stage, config, known, given, notes),
            "reduce_zero_label": bool(known.get("reduce_zero_label")),
        },
        "lineage": {"parents": dict(known["lineage"]), "versions": {}, "git_commit": None},
    }
    return about, notes


def _heads(config: Facts, known: Facts, width: int, given: str, notes: list[str]) -> int:
    """H of a model without tables, whose weights do not show it. CheckpointError where nobody states it."""
    where = f"{given}: config.json"
    stated = (
        entry(config, "num_attention_heads", int, where),
        entry(_inner(config, "model_args"), "num_heads", int, where),
        known.get("heads"),
    )
    heads = next((number for number in stated if number is not None), None)
    if heads is None and width not in WIDTHS:
        raise CheckpointError(
            f"{given} does not say how many heads its encoder of width {width} has, and has no tables that show it: "
            "give the number (--heads, heads= in Python; to train, convert it first with --heads)"
        )
    if heads is None:
        heads = width // HEAD_WIDTH
        notes.append(
            f"the file does not say how many heads it has: {heads}, each {HEAD_WIDTH} wide, is taken, as in the "
            f"published models of width {width}; --heads (heads= in Python) sets another number"
        )
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{given}: heads={heads}: give a number (--heads) that divides the width, {width}"
        )
    return heads


def _stage_options(
    ours: Mapping[str, Tensor],
    stage: str,
    depth: int,
    config: Facts,
    known: Facts,
    given: str,
    notes: list[str],
) -> dict[str, Any]:
    if stage == "classify":
        pooling = "mean" if "head.fc_norm.weight" in ours else "cls"
        return {"pooling": pooling, "eval_views": {"crop_pct": known.get("crop_pct") or 0.875}}
    if stage != "segment":
        return {}
    channels = ours["head.decode_head.bottleneck.bn.weight"].shape[0]
    if "blocks" in known:
        blocks = known["blocks"]
    elif (indices := entry(config, "out_indices", list, f"{given}: config.json")) is not None:
        # Transformers looks at hidden state i - 1, of which 0 is the embedding: block i - 2, counted from 0.
        blocks = [index - 2 for index in _whole_numbers(indices, 4, "out_indices", given)]
        released = RELEASED_BLOCKS.get(depth)
        notes.append(f"the head looks at blocks {blocks}, as Transformers does with out_indices={indices}")
        if indices == released:
            notes[-1] += f"; the published weights were trained with blocks {released}"
    else:
        blocks = RELEASED_BLOCKS.get(depth)
        if blocks is None:
            notes.append(
                "the file does not say which blocks its head looks at: those after a third, half, two thirds and all "
                "of the depth are taken; --blocks of beit-tools segment (blocks= in Python, stage.blocks) sets others"
            )
    return {"blocks": blocks, "blocks_stated": "blocks" in known, "channels": channels}


def _grid(
    ours: Mapping[str, Tensor],
    index: Tensor | None,
    sizes: Sequence[Sequence[int] | None],
    patch_size: int,
    rows: int | None,
    given: str,
) -> Grid:
    """Rows and columns of patches that tables and positions are for."""
    positions = ours.get("encoder.pos_embed")
    patches = None if positions is None else positions.shape[1] - 1

    def fits(grid: Grid) -> bool:
        return (rows is None or table_rows(grid) == rows) and (patches is None or math.prod(grid) == patches)

    for grid in _grids(index, sizes, patch_size, rows, patches):
        if fits(grid):
            return grid
    raise CheckpointError(
        f"{given} has positions for a grid that is not square and that it does not state"
        f" ({f'tables of {rows} rows' if rows else f'{patches} positions'}): convert it from a folder with its"
        " config.json, or from a file that holds relative_position_index"
    )


def _grids(
    index: Tensor | None,
    sizes: Sequence[Sequence[int] | None],
    patch_size: int,
    rows: int | None,
    patches: int | None,
) -> Iterator[Grid]:
    """Grids that may be meant, the surest first."""
    for size in sizes:
        if size is not None:
            height, width = size
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


def _classes(
    ours: Mapping[str, Tensor], stage: str, config: Facts, known: Facts, given: str, notes: list[str]
) -> list[str] | None:
    """Names of the classes in order, where somebody has given them."""
    head = {"classify": "head.head.weight", "segment": "head.decode_head.conv_seg.weight"}.get(stage)
    if head is None:
        return None
    names = known.get("class_names")
    if names is None and (labels := entry(config, "id2label", Mapping, f"{given}: config.json")):
        if not all(str(key).isdecimal() for key in labels):
            raise CheckpointError(
                f"{given}: config.json: id2label names no numbers of classes: correct it there"
            )
        names = [str(labels[key]) for key in sorted(labels, key=int)]
        if all(name.startswith("LABEL_") for name in names):  # Transformers' own stopgap
            return None
    if names is not None and len(names) != (count := len(ours[head])):
        notes.append(
            f"the file names {len(names):,} classes, and its head has {count:,}: the names are not used"
        )
        return None
    return None if names is None else list(names)


# --- what lies beside it ------------------------------------------------------------------------------------------


def _known(ours: Mapping[str, Tensor], beside: Beside, given: str) -> tuple[dict[str, Any], list[str]]:
    """What is stated beyond the weights, the surest source last, and what a user should know of it."""
    stated, other_pixels = processor.facts_of(beside.processor, given)
    mark = _inner(beside.config, "beit_pretrain")
    known = {**beside.place, **_timm_facts(beside.config, given), **stated}
    known |= {name: mark[name] for name in ("lineage", "weights") if mark.get(name) is not None}
    once = {name: value for name, value in ours.items() if name.startswith(("encoder.", "head."))}
    changed = "weights" in known and known["weights"] != files.weight_hash(once)
    marked = _marked(mark, beside, formats.stage_of(ours), given, changed)
    notes = [] if "crop_pct" in marked else other_pixels
    known["lineage"] = _inner(known, "lineage")
    origin = _inner(known["lineage"], "converted_from")
    if changed and origin:
        known["lineage"] = {"trained_elsewhere_from": origin}
        notes.append(
            "its weights are others than this project wrote: trained or changed elsewhere since; converted from "
            f"{origin.get('path')}"
        )
    return {**known, **marked}, notes


def _marked(mark: Facts, beside: Beside, stage: str, given: str, changed: bool) -> dict[str, Any]:
    """What this project has written beside the entries of the format, which have no place for it.

    An entry that was changed since wins: other programs keep the mark of a folder that they go on from.
    """
    config, found = beside.config, {}
    size, crop_pct, blocks = (mark.get(name) for name in ("image_size", "crop_pct", "blocks"))
    if not isinstance(size, list) or len(size) != 2 or "pretrained_cfg" in config:  # timm's needs no mark
        return {}
    # Transformers has one number, or the width first (`tools/convert_huggingface`).
    written = [size[::-1], *(size[:1] if size[0] == size[1] else [])]
    if config.get("image_size") not in written:
        return {}
    found["image_size"] = size
    if isinstance(blocks, list) and config.get("out_indices") == [block + 2 for block in blocks]:
        found["blocks"] = blocks
    if isinstance(crop_pct, int | float):
        view = size[0], size[1]
        agrees = processor.fits(beside.processor, stage, view, crop_pct, given)
        found |= {"crop_pct": crop_pct} if (agrees if beside.processor else not changed) else {}
    return found


def _timm_facts(config: Facts, given: str) -> dict[str, Any]:
    """What a config.json of timm's says."""
    cfg, where = _inner(config, "pretrained_cfg"), f"{given}: config.json"
    stated = {name: processor.three(cfg, name, None, where) for name in ("mean", "std")}
    stated["crop_pct"] = entry(cfg, "crop_pct", (int, float), where)
    facts: dict[str, Any] = {name: value for name, value in stated.items() if value is not None}
    if not 0 < facts.get("crop_pct", 1) <= 1:
        raise CheckpointError(f"{where}: crop_pct={facts['crop_pct']}: set a share above 0 and at most 1")
    if size := entry(cfg, "input_size", list, where):
        facts["image_size"] = _whole_numbers(size[1:], 2, "input_size", given)
    if cfg and (names := entry(cfg, "label_names", list, where) or entry(config, "label_names", list, where)):
        facts["class_names"] = names
    return facts


def _size(config: Facts, given: str) -> list[int] | None:
    """[height, width] of `image_size`."""
    size = entry(config, "image_size", (int, list), f"{given}: config.json")
    if size is None:
        return None
    return _whole_numbers(size if isinstance(size, list) else [size, size], 2, "image_size", given)


def _whole_numbers(values: Sequence[Any], count: int, name: str, given: str) -> list[int]:
    if len(values) != count or not all(isinstance(value, int) and value > 0 for value in values):
        raise CheckpointError(
            f"{given}: config.json: {name}={values}: {count} whole numbers are needed there"
        )
    return list(values)


def _inner(config: Facts, name: str) -> Facts:
    """A group of entries, empty where there is none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}
