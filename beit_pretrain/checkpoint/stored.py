"""What stands in a file is data: it is looked at before anything is built or configured from it.

A stored `_target_` is compared with the one of a yaml and never imported, nothing stored is resolved, and what a file
makes this program build is no larger than the weights in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, TypeGuard

from torch import Tensor

from beit_pretrain.checkpoint.adapt import TABLE
from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.rel_pos import table_rows

ENCODER = "beit_pretrain.models.beit.Beit"
SPECIAL = "_"  # keys that begin with it are instructions to Hydra's `instantiate`
BUDGET = 20_000_000  # letters of a record, a value counting as EACH of them; 22,000 classes are a million
EACH = 16
DEPTH = 64  # containers within each other in a record
WHOLE = 2**63  # whole numbers of a record are below it
SIDE = 2**15  # pixels along an image
PATCHES = 2**16  # of an image
BLOCKS = 512  # of an encoder
CLASSES = 200_000
LEAST_CROP = 0.05  # share of an image's side; below it, resized images take gigabytes

Scalar = str | int | float | bool | None


# --- what a node names --------------------------------------------------------------------------------------


def unlike(stored: Any, own: Any, key: str) -> str | None:
    """The first place, as key=value, where a stored node instructs Hydra otherwise than `own`, the same node from yaml.

    None if all keys with an underscore, `_target_` above all, are those of the yaml at every depth. Then the stored
    node names no class but those of the yaml.
    """
    if isinstance(stored, Mapping):
        yaml = own if isinstance(own, Mapping) else {}
        for name in sorted({str(n) for n in (*stored, *yaml) if str(n).startswith(SPECIAL)}):
            if stored.get(name) != yaml.get(name):
                return f"{key}.{name}={stored.get(name)}"
        pairs = [(f"{key}.{name}", value, yaml.get(name)) for name, value in stored.items()]
    elif isinstance(stored, list | tuple):
        values = own if isinstance(own, list | tuple) else []
        both = zip_longest(stored, values[: len(stored)])
        pairs = [(f"{key}[{i}]", value, mine) for i, (value, mine) in enumerate(both)]
    else:
        return None
    return next((found for name, value, mine in pairs if (found := unlike(value, mine, name))), None)


# --- what a record says -------------------------------------------------------------------------------------


def check_record(about: Any, state: Mapping[str, Any], given: str) -> None:
    """CheckpointError, in one line, if the record of a checkpoint with the weights `state` cannot be what it is.

    It holds plain values only, no interpolation (`${...}`) in the configuration, the entries that every run's record
    has, and an encoder of the size that the weights have.
    """
    fault = next(_record_faults(about, state), None)
    if fault is not None:
        raise CheckpointError(f"{given}: {fault}; nothing of it was used, give another checkpoint")


def _record_faults(about: Any, state: Mapping[str, Any]) -> Iterator[str]:
    yield from _not_plain(about)
    config = about.get("config") if isinstance(about, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(about.get("preprocessing"), Mapping):
        yield "its record has no configuration and preprocessing"
    else:
        yield from _interpolations(config, "config")
        yield from _config_faults(config)
        yield from _preprocessing_faults(about["preprocessing"], "preprocessing")
        yield from _encoder_faults(config, state)
        yield from _head_faults(config, state)


def _not_plain(about: Any) -> Iterator[str]:
    left, todo = BUDGET, [("record", about, 0)]
    while todo:
        key, value, depth = todo.pop()
        left -= EACH + (len(value) if isinstance(value, str | list | tuple | Mapping) else 0)
        if left < 0 or depth > DEPTH:
            yield f"its record is too large or nested too deeply ({key})"
            return
        if isinstance(value, Mapping):
            if odd := [name for name in value if not isinstance(name, Scalar)]:
                yield f"{key} has a key of type {type(odd[0]).__name__}"
            todo += [(f"{key}.{name}", inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list | tuple):
            todo += [(key, inner, depth + 1) for inner in value]
        elif not isinstance(value, Scalar):
            yield f"{key} is a {type(value).__name__}, no plain value"
        elif isinstance(value, int) and abs(value) >= WHOLE:
            yield f"{key} is a whole number of {value.bit_length()} bits"


def _interpolations(node: Any, key: str) -> Iterator[str]:
    """Texts that a configuration would not take as they are, but resolve: with a variable of the environment, say."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _interpolations(str(name), key)
            yield from _interpolations(value, f"{key}.{name}")
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _interpolations(value, key)
    elif isinstance(node, str) and "${" in node:
        yield f"{key}={node} is an interpolation, which a stored value must not be"


def _config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    groups = {
        name: config[name] for name in ("stage", "model", "masking", "tokenizer", "data") if name in config
    }
    if wrong := [name for name, node in groups.items() if not isinstance(node, Mapping)]:
        yield f"config.{wrong[0]} is no group of options"
        return
    stage, data = groups.get("stage", {}), groups.get("data", {})
    if not isinstance(stage.get("name"), str):
        yield "config.stage.name is missing"
    if stage.get("name") != "tokenizer" and "model" not in groups:
        yield "config.model is missing"
    yield from _size_faults(config.get("image_size"), "config.image_size")
    normalize = data.get("normalize")
    if not isinstance(normalize, Mapping) or not {"mean", "std"} <= normalize.keys():
        yield "config.data.normalize has no mean and std"
    else:
        yield from _preprocessing_faults(normalize, "config.data.normalize")
    for group in ("model", "tokenizer"):
        yield from _name_faults(groups.get(group, {}).get("name"), f"config.{group}.name")
    views = stage.get("eval_views")
    crop = views.get("crop_pct") if isinstance(views, Mapping) else None
    if (crop is not None or stage.get("name") == "classify") and not (
        _is_number(crop) and crop >= LEAST_CROP
    ):
        yield f"config.stage.eval_views.crop_pct={crop} is no share of an image from {LEAST_CROP}"


def _name_faults(name: Any, key: str) -> Iterator[str]:
    """A name becomes part of a run folder's."""
    if name is not None and not (
        isinstance(name, str) and name.isprintable() and not set("/\\") & set(name) and len(name) <= 200
    ):
        yield f"{key}={str(name)[:200]!r} is no name"


def _size_faults(size: Any, key: str) -> Iterator[str]:
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(_is_whole(side) and side <= SIDE for side in sides):
        yield f"{key}={size} is no size of an image, [height, width] in pixels up to {SIDE:,}"


def _preprocessing_faults(node: Mapping[str, Any], key: str) -> Iterator[str]:
    for name in ("mean", "std"):
        values = node.get(name)
        if values is not None and not (
            isinstance(values, list | tuple) and len(values) == 3 and all(map(_is_number, values))
        ):
            yield f"{key}.{name}={values} is not three numbers, for red, green and blue"
    names = node.get("class_names")
    if names is not None and not (
        isinstance(names, list | tuple) and len(names) <= CLASSES and all(isinstance(n, str) for n in names)
    ):
        yield f"{key}.class_names is no list of up to {CLASSES:,} names"


# --- how large it is ----------------------------------------------------------------------------------------


def _encoder_faults(config: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[str]:
    """What of an encoder's options is no size, or another one than that of the weights."""
    model = config.get("model")
    if model is None or model.get("_target_") != ENCODER:
        return
    if nested := [n for n, value in model.items() if n != "image_size" and not isinstance(value, Scalar)]:
        yield f"config.model.{nested[0]} is no plain value"
    limits = {"patch_size": SIDE, "width": SIDE, "depth": BLOCKS, "heads": SIDE}
    for name, most in limits.items():
        if not (_is_whole(value := model.get(name)) and value <= most):
            yield f"config.model.{name}={value} is no whole number from 1 to {most:,}"
            return
    ratio = model.get("mlp_ratio", 4.0)
    if not (_is_number(ratio) and 0 < ratio * model["width"] <= SIDE * 8):
        yield f"config.model.mlp_ratio={ratio} is no ratio"
        return
    size = config["image_size"]
    rows, columns = (
        side // model["patch_size"] for side in (size if isinstance(size, list | tuple) else [size] * 2)
    )
    if rows * columns > PATCHES:
        yield f"config.image_size={size} in patches of {model['patch_size']} is more than {PATCHES:,} of them"
        return
    for prefix in ("encoder.", "ema.module.encoder."):
        own = {n.removeprefix(prefix): v for n, v in state.items() if str(n).startswith(prefix)}
        for name, said, held in _held(model, int(model["width"] * ratio), (rows, columns), own):
            if said != held:
                yield f"{name} is {said} in its configuration, and its weights have {held}"


def _head_faults(config: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[str]:
    """A segmentation's channels, which its scoring builds anew; all else of heads is built from the weights' shapes."""
    weight = state.get("head.decode_head.bottleneck.conv.weight")
    if config["stage"]["name"] == "segment" and weight is not None:
        channels, shape = config["stage"].get("channels"), tuple(weight.shape)
        if shape[:1] != (channels,) or shape[1:2] < (4 * channels,):
            yield f"config.stage.channels={channels}, and its weights have {' x '.join(map(str, shape))}"


def _held(
    model: Mapping[str, Any], hidden: int, grid: tuple[int, int], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Any, Any]]:
    """Name, what the configuration says, what the weights of an encoder have; for all that memory depends on."""
    width, heads, rows = model["width"], model["heads"], table_rows(grid)
    if (patch := state.get("patch_embed.proj.weight")) is not None:
        size = model["patch_size"]
        yield "the patch embedding", (width, 3, size, size), tuple(patch.shape)
    shapes = {
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc2.weight": (width, hidden),
    }
    blocks = {name: value for name, value in state.items() if name.startswith("blocks.")}
    for inner, shape in shapes.items():
        found = [value for name, value in blocks.items() if name.endswith(inner)]
        if blocks:
            yield f"the number of blocks with {inner}", model["depth"], len(found)
        yield from ((f"a block's {inner}", shape, tuple(value.shape)) for value in found)
    for name, value in state.items():
        if name.endswith(TABLE):
            yield name, (rows, heads), tuple(value.shape)
    if (positions := state.get("pos_embed")) is not None:
        yield "pos_embed", (1, 1 + math.prod(grid), width), tuple(positions.shape)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
