"""Files of others as checkpoints of ours: what a file is, is found from the names in it, never from its own name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.checkpoint import files, formats
from beit_pretrain.checkpoint.adapt import INDEX, TABLE
from beit_pretrain.checkpoint.description import Beside, Facts, depth_of, describe
from beit_pretrain.errors import CheckpointError

# Where training scripts keep the weights in their files, and their running average.
WRAPPERS = ("model", "module", "state_dict")
AVERAGES = ("model_ema", "state_dict_ema")
PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
)  # of data-parallel and compiled models, and of what holds a model


def weights_file(folder: Path) -> Path | None:
    """The one file of weights in a folder of others: Transformers', timm's, or one that holds nothing else."""
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if (folder / name).is_file():
            return folder / name
    found = [path for path in folder.iterdir() if path.suffix in (".pth", ".pt", ".bin", ".safetensors")]
    return found[0] if len(found) == 1 else None


def content(file: Path, *, key: str) -> dict[str, Any]:
    """The dictionary in a file of weights of any kind; of weights in several files, which `file` lists, all of them."""
    if file.suffix != ".json":
        # The authors' scripts save their command line along, in the plainest of classes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return files.read(file, key)
    listed = _json(file, f"{key}={file}").get("weight_map")
    parts = sorted(set(map(str, listed.values()))) if isinstance(listed, Mapping) else []
    if not parts or any(Path(part).name != part for part in parts):
        raise CheckpointError(f"{key}={file} lists no files of weights beside it (weight_map): copy it again")
    return {name: value for part in parts for name, value in files.read(file.with_name(part), key).items()}


def read(content: Mapping[str, Any], file: Path, facts: Facts, *, given: str) -> dict[str, Any]:
    """The checkpoint of ours that a file's content stands for, with what lies beside it (`config.json`).

    facts: what the place it came from, or the user, knows beyond the file: mean, std, crop_pct, image_size, heads,
    source.
    given: what messages call the file.
    Raises CheckpointError, in one line, if it holds no BEiT, or weights that no BEiT has.
    """
    known = {"source": str(file), **facts}
    if isinstance(content.get("preprocessing"), Mapping):  # where this project's `convert` says it
        known |= content["preprocessing"]
    if isinstance(meta := content.get("meta"), Mapping):  # of mmsegmentation
        known |= {
            ours: meta[its]
            for ours, its in (("class_names", "CLASSES"), ("blocks", "out_indices"))
            if its in meta
        }
    config, processor = (
        _json(file.with_name(f"{name}.json"), given) for name in ("config", "preprocessor_config")
    )
    return as_ours(content, Beside(config, processor, known), given=given)


def as_ours(content: Mapping[str, Any], beside: Beside, *, given: str) -> dict[str, Any]:
    """A checkpoint of ours from the content of a file of others.

    `beit_pretrain` is what `describe` makes up, with `foreign`: what the file was, what was left out and what a user
    should know.
    """
    wrappers, state = _unwrap(content)
    if not state:
        raise CheckpointError(f"{given} holds no weights: give a file of a BEiT")
    if bare := [n for n, value in state.items() if value.is_meta or value.layout != torch.strided]:
        raise CheckpointError(
            f"{given} holds tensors that are sparse or without values ({_few(bare)}): save them as plain ones"
        )
    kind = _kind(state, given)
    convert = formats.from_hugging_face if kind == "huggingface" else formats.from_original
    ours, left, unknown = convert(state)
    if unknown:
        raise CheckpointError(
            f"{given} holds weights that no BEiT has ({len(unknown)} of {len(state)}: {_few(unknown)}): give a file of "
            "a BEiT"
        )
    ours = _without_idle(ours, beside.config)
    average = next((content[name] for name in AVERAGES if isinstance(content.get(name), Mapping)), None)
    if average is not None and wrappers[:1] not in [[name] for name in AVERAGES]:
        twin, _, _ = convert(_unwrap(average)[1])
        ours |= {f"ema.module.{name}": value for name, value in twin.items()}
    for name in [name for name in ours if name.endswith("running_mean")]:
        # Files from before torch counted batches; nothing depends on it.
        ours.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    index = next((value for name, value in state.items() if name.endswith(INDEX)), None)
    about, notes = describe(ours, index, beside, given=given)
    about["foreign"] = {
        "format": "timm" if kind == "original" and "architecture" in beside.config else kind,
        "source": beside.place.get("source"),
        "wrappers": wrappers,
        "left_out": left,
        "notes": notes,
    }
    return {
        "state_dict": {
            name: value.float() if value.is_floating_point() else value for name, value in ours.items()
        },
        "beit_pretrain": about,
    }


# --- what is in a file -------------------------------------------------------------------------------------------


def _json(path: Path, given: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{given}: {path} is no JSON ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{given}: {path} holds a {type(found).__name__}, not an object: copy it again")
    return found


def _unwrap(content: Mapping[str, Any]) -> tuple[list[str], dict[str, Tensor]]:
    """What lies around a file's weights, and the weights under their bare names."""
    wrappers = []
    while (inner := _wrapper(content)) is not None:
        wrappers.append(inner)
        content = content[inner]
    state = {name: value for name, value in content.items() if _is_weight(name, value)}
    while state and (prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in state)), None)):
        wrappers.append(prefix)
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if any(name.startswith("blocks.") and "._orig_mod." in name for name in state):
        wrappers.append("_orig_mod.")
        state = {name.replace("._orig_mod.", "."): value for name, value in state.items()}
    heads = ("decode_head.", "auxiliary_head.")
    if any(name.startswith("backbone.") for name in state) and not any(n.startswith(heads) for n in state):
        wrappers.append("backbone.")
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
    return wrappers, state


def _wrapper(content: Mapping[str, Any]) -> str | None:
    """Below which name the weights are; the running average's where there is nothing else."""
    names = (*WRAPPERS, *(() if any(_is_weight(*item) for item in content.items()) else AVERAGES))
    return next(
        (n for n in names if isinstance(content.get(n), Mapping) and _holds_weights(content[n])), None
    )


def _holds_weights(content: Mapping[str, Any]) -> bool:
    return _wrapper(content) is not None or any(_is_weight(*item) for item in content.items())


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _kind(state: Mapping[str, Tensor], given: str) -> str:
    """`original`, which timm's names are as well, or `huggingface`; CheckpointError for anything but a BEiT."""
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
        key_bias = next(
            (n for n in state if n.endswith(("attention.key.bias", "attention.k_proj.bias"))), None
        )
        if key_bias is None:
            return "huggingface"
        raise CheckpointError(
            f"{given} is a vision transformer but no BEiT (its keys have a bias, {key_bias}): give a file of a BEiT"
        )
    names = {name.removeprefix("backbone.") for name in state}
    if "patch_embed.proj.weight" in names and any(name.startswith("blocks.0.") for name in names):
        marks = (
            "blocks.0.attn.q_bias",
            "blocks.0.gamma_1",
            f"blocks.0.attn.{TABLE}",
            f"rel_pos_bias.{TABLE}",
        )
        if not names.isdisjoint(marks):
            return "original"
        raise CheckpointError(
            f"{given} is a vision transformer but no BEiT (no q_bias, no gamma_1, no relative positions): give a file "
            "of a BEiT"
        )
    tokenizer = any(name.startswith("quantize.") for name in state)
    what = (
        "the tokenizer of BEiT v2, not its encoder"
        if tokenizer
        else f"no vision transformer ({_few(list(state))})"
    )
    raise CheckpointError(f"{given} is {what}: give a file of a BEiT")


def _without_idle(state: dict[str, Tensor], config: Facts) -> dict[str, Tensor]:
    """A segmentation without the layers that were added so that Transformers can look at the last true one.

    One that was trained since is no longer of zeros, and stays.
    """
    mark = config.get("beit_pretrain")
    count = mark.get("idle_layers") if isinstance(mark, Mapping) else 0
    for _ in range(min(count, depth_of(state)) if isinstance(count, int) else 0):
        last = f"encoder.blocks.{depth_of(state) - 1}."
        if any(value.any() for name, value in state.items() if name.startswith(last)):
            break
        state = {name: value for name, value in state.items() if not name.startswith(last)}
    return state


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
