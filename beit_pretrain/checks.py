"""What must agree between the groups of a configuration, looked at before anything is built.

Every check yields its faults, one line each: what was given, under which key, what to set. A check that needs
what another one found broken stays silent.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from beit_pretrain.errors import CheckpointError, ConfigError

STAGES = ("tokenizer", "pretrain", "knn")
MODES = ("fit", "evaluate")
PRECISIONS = ("auto", "32", "32-true", "bf16-mixed", "16-mixed")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
REL_POS = ("shared", "per_layer", "none")
KERNELS = ("auto", "sdpa", "plain")
DIGITS_TO_TRAIN = 1120  # images in the training part of the embedded digits
DALLE_STRIDE = 8  # pixels per token of the published weights
# What two encoders must have in common for the weights of one to fit into the other.
SHAPES = ("image_size", "patch_size", "width", "depth", "heads", "mlp_ratio", "rel_pos", "abs_pos")

Faults = Iterator[str]


def check(cfg: DictConfig) -> None:
    """Raises ConfigError with everything that is wrong, or returns without a word."""
    if faults := list(_missing(cfg)):
        # Without a stage, or with an interpolation that leads nowhere, nothing else can be said.
        raise ConfigError(faults)
    for one in (_numbers, _choices, _model, _grids, _masks, _recipe, _start, _folders, _device, _batch):
        faults += one(cfg)
    if faults:
        raise ConfigError(faults)


def _missing(cfg: DictConfig) -> Faults:
    if cfg.stage is None or "_target_" not in cfg.stage:
        if cfg.stage is None and cfg.chain is not None:
            yield f"chain={cfg.chain.name} cannot be one job of a sweep: sweep over a stage"
        else:
            given = "stage is not given" if cfg.stage is None else "options of a stage are given, but no stage"
            yield f"{given}: set {_either([f'stage={name}' for name in STAGES])}"
        return
    if missing := list(_blanks(OmegaConf.to_container(cfg, resolve=False))):
        yield from (f"{key} is not given: set {key}=..." for key in missing)
        return
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError, ArithmeticError) as error:
        # Sizes are what others are computed from.
        yield from list(_sizes(cfg)) or [" ".join(str(error).split())]


def _blanks(node: Any, key: str = "") -> Iterator[str]:
    """Keys of values that have to be given and are not."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _blanks(child, f"{key}.{name}" if key else str(name))
    elif node == "???":
        yield key


# --- single values ------------------------------------------------------------------------------------------------


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _sides(value: Any) -> list[int] | None:
    """[height, width] of a size in pixels, or None if it is none."""
    sides = list(value) if OmegaConf.is_list(value) or isinstance(value, list | tuple) else [value, value]
    return sides if len(sides) == 2 and all(_is_whole(side, 1) for side in sides) else None


def _sizes(cfg: DictConfig) -> Faults:
    example = {"image_size": "224 or [192,160]", "tokenizer.image_size": "112 or [96,80]"}
    for key, sizes in example.items():
        value = OmegaConf.select(cfg, key)
        if _sides(value) is None:
            yield f"{key}={_show(value)} is no size in pixels: set {key}={sizes}"
    for key in ("model.patch_size", *(["tokenizer.layers"] if "layers" in cfg.tokenizer else [])):
        value = OmegaConf.select(cfg, key)
        if not _is_whole(value, 1):
            yield f"{key}={_show(value)}: set a whole number from 1"


def _numbers(cfg: DictConfig) -> Faults:
    yield from _sizes(cfg)
    keys = ["batch_size", "trainer.num_nodes", "trainer.evaluate_every"]
    keys += ["stage.epochs", "stage.log_every", "stage.max_bad_steps"] if cfg.stage.name != "knn" else ["stage.k"]
    keys += ["model.width", "model.depth", "model.heads"] if cfg.stage.name != "tokenizer" else []
    for key in keys:
        if not _is_whole(value := OmegaConf.select(cfg, key), 1):
            yield f"{key}={_show(value)}: set a whole number from 1"
    if cfg.micro_batch_size is not None and not _is_whole(cfg.micro_batch_size, 1):
        yield f"micro_batch_size={_show(cfg.micro_batch_size)}: set a whole number from 1, or null"
    if not _is_whole(cfg.data.workers, 0):
        yield f"data.workers={_show(cfg.data.workers)}: set 0 (load in the training process) or more"
    if not _is_whole(cfg.seed, 0):
        yield f"seed={_show(cfg.seed)}: set a whole number from 0"


def _choices(cfg: DictConfig) -> Faults:
    yield from _choice("mode", cfg.mode, MODES)
    yield from _choice("trainer.precision", cfg.trainer.precision, PRECISIONS)
    yield from _choice("trainer.accelerator", cfg.trainer.accelerator, ACCELERATORS)
    if cfg.stage.name != "tokenizer":
        yield from _choice("model.rel_pos", cfg.model.rel_pos, REL_POS)
        yield from _choice("model.attention", cfg.model.attention, KERNELS)
    flags = ["overwrite", "debug", "dry_run", "trainer.compile"]
    flags += ["model.abs_pos", "model.checkpointing"] if cfg.stage.name != "tokenizer" else []
    for key in flags:
        if not isinstance(value := OmegaConf.select(cfg, key), bool):
            yield f"{key}={_show(value)}: set true or false"


def _choice(key: str, value: Any, known: Sequence[str]) -> Faults:
    if str(value) not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        yield f"{key}={_show(value)} is unknown: set {f'{near[0]}, or ' if near else ''}one of {', '.join(known)}"


# --- the encoder, its grid, the tokenizer's, the masks ------------------------------------------------------------


def _model(cfg: DictConfig) -> Faults:
    m = cfg.model
    if cfg.stage.name == "tokenizer" or not all(_is_whole(n, 1) for n in (m.width, m.heads)):
        return
    if m.width % m.heads:
        width, heads = _nearest(m.width, m.heads), [n for n in range(1, m.width + 1) if m.width % n == 0]
        yield (
            f"model.width={m.width} cannot be shared by model.heads={m.heads}: set model.width={_either(width)}, "
            f"or model.heads={_either(_around(m.heads, heads))}"
        )
    if m.rel_pos == "none" and m.abs_pos is False:
        yield (
            "model.rel_pos=none with model.abs_pos=false leaves the encoder blind to where a patch lies: "
            "set model.rel_pos=shared or model.abs_pos=true"
        )


def _stride(cfg: DictConfig) -> int | None:
    """Pixels per token; None for a tokenizer of the user's own, which is asked when it is built."""
    if "layers" in cfg.tokenizer:
        return 2**cfg.tokenizer.layers if _is_whole(cfg.tokenizer.layers, 1) else None
    return DALLE_STRIDE if cfg.tokenizer.name == "dalle" else None


def _grids(cfg: DictConfig) -> Faults:
    tokens = None
    if cfg.stage.name != "knn" and (stride := _stride(cfg)) and (view := _sides(cfg.tokenizer.image_size)):
        fault = _indivisible("tokenizer.image_size", view, "the tokenizer's stride", stride)
        tokens = None if fault else [side // stride for side in view]
        yield from fault
    sides, patch = _sides(cfg.image_size), cfg.model.patch_size
    if cfg.stage.name == "tokenizer" or sides is None or not _is_whole(patch, 1):
        return
    if fault := _indivisible("image_size", sides, "model.patch_size", patch):
        yield from fault
        return
    patches = [side // patch for side in sides]
    if cfg.stage.name == "pretrain" and tokens and tokens != patches:
        stride = _stride(cfg) or 1
        yield (
            f"the tokenizer makes {_by(tokens)} tokens (tokenizer.image_size={_size(cfg.tokenizer.image_size)}, "
            f"{stride} pixels each), the encoder {_by(patches)} patches (image_size={_size(cfg.image_size)}, "
            f"model.patch_size={patch}), and each patch needs one token: set image_size="
            f"{_size([n * patch for n in tokens])} or tokenizer.image_size={_size([n * stride for n in patches])}"
            + (
                "; a trained tokenizer has the size it was trained with"
                if cfg.tokenizer.get("checkpoint")
                else ""
            )
        )


def _indivisible(key: str, sides: Sequence[int], name: str, unit: int) -> list[str]:
    if not any(side % unit for side in sides):
        return []
    around = [_nearest(side, unit) for side in sides]
    good = [_size(pair) for pair in zip(around[0], around[-1], strict=False)]
    return [f"{key}={_size(sides)} cannot be divided by {name}={unit}: set {key}={_either(good)}"]


def _masks(cfg: DictConfig) -> Faults:
    """The generator says for itself what it cannot do; it is cheap to make."""
    sides, patch = _sides(cfg.image_size), cfg.model.patch_size
    if cfg.stage.name != "pretrain" or sides is None or not _is_whole(patch, 1) or any(s % patch for s in sides):
        return
    yield from _built("masking", cfg.masking)


def _recipe(cfg: DictConfig) -> Faults:
    if cfg.stage.name != "knn":
        yield from _built("stage.optim", cfg.stage.optim)


def _built(key: str, node: DictConfig) -> Faults:
    try:
        instantiate(OmegaConf.to_container(node, resolve=True))
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            yield from cause.faults
        else:
            yield f"{key}: {' '.join(str(cause or error).split())}"
    except ConfigError as error:
        yield from error.faults


# --- where it starts from -----------------------------------------------------------------------------------------


def _start(cfg: DictConfig) -> Faults:
    stage = cfg.stage.name
    for asked, given in (("stage=knn", stage == "knn"), ("mode=evaluate", cfg.mode == "evaluate")):
        if given and not cfg.init_from:
            yield f"{asked} needs weights to score: set init_from to a run folder or a checkpoint"
            break
    if stage == "pretrain" and "checkpoint" in cfg.tokenizer:
        if cfg.tokenizer.checkpoint:
            yield from _checkpoint("tokenizer.checkpoint", cfg.tokenizer.checkpoint, "tokenizer", _nothing)
        else:
            yield (
                f"tokenizer={cfg.tokenizer.name} has no weights to make tokens with: train one with "
                "stage=tokenizer and set tokenizer.checkpoint to its run folder, or set tokenizer=dalle"
            )
    if not cfg.init_from:
        return
    if stage == "tokenizer":
        yield from _checkpoint("init_from", cfg.init_from, "tokenizer", _nothing)
    else:
        yield from _checkpoint("init_from", cfg.init_from, "encoder", lambda saved: _agrees(cfg, saved))


def _checkpoint(key: str, path: str, part: str, more: Callable[[dict[str, Any]], Faults]) -> Faults:
    from beit_pretrain.checkpoint import record

    try:
        checkpoint = record.read(Path(path), key=key)
        record.part(checkpoint, part, key=key)
    except CheckpointError as error:
        advice = f": set {key} to a run of stage={'tokenizer' if part == 'tokenizer' else 'pretrain'}"
        holds_another = f"holds no {part}" in str(error)
        yield f"{key}={path}: {str(error).removeprefix(f'{key}: ')}{advice}" if holds_another else str(error)
        return
    yield from more(checkpoint["beit_pretrain"])


def _nothing(saved: dict[str, Any]) -> Faults:
    yield from ()


def _agrees(cfg: DictConfig, saved: dict[str, Any]) -> Faults:
    """What the encoder of `init_from` was made for: pixels of this scale, an encoder of this shape."""
    then = {name: [float(v) for v in saved["preprocessing"][name]] for name in ("mean", "std")}
    now = {name: [float(v) for v in cfg.data.normalize[name]] for name in ("mean", "std")}
    if then != now:
        values = [f"'data.normalize.{name}={_list(then[name])}'" for name in then if then[name] != now[name]]
        yield (
            f"init_from={cfg.init_from} saw images normalised with mean {_list(then['mean'])} and std "
            f"{_list(then['std'])}, here they are {_list(now['mean'])} and {_list(now['std'])}: "
            f"set {' '.join(values)}"
        )
    model = OmegaConf.to_container(cfg.model, resolve=True)
    before = saved["config"]["model"]
    assert isinstance(model, dict)
    other = [key for key in SHAPES if model.get(key) != before.get(key)]
    if other:
        pairs = ", ".join(f"model.{key}={_show(model.get(key))} ({_show(before.get(key))})" for key in other)
        yield (
            f"init_from={cfg.init_from} holds another encoder than this one; here (there): {pairs}: "
            f"set model={before.get('name')} and image_size={_size(before.get('image_size'))} as there"
        )


# --- images -------------------------------------------------------------------------------------------------------


def _folders(cfg: DictConfig) -> Faults:
    """Folders named by data.root hold at least one image each; data sets by name are looked at when opened."""
    if cfg.data.name != "folder":
        return
    roots = [cfg.data.root] if isinstance(cfg.data.root, str) else cfg.data.root
    if not OmegaConf.is_list(roots) and not isinstance(roots, list):
        yield f"data.root={_show(roots)}: set a folder of images, a glob pattern, or a list of them"
        return
    if not roots:
        yield "data.root is an empty list: set at least one folder of images"
    for root in roots:
        path = os.path.abspath(os.path.expanduser(str(root)))
        starts = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        if not starts:
            what = "matches nothing" if glob.has_magic(path) else "does not exist"
            yield f"data.root={root} {what}: set data.root to a folder of images"
        elif os.path.isfile(path):
            yield f"data.root={root} is a file: set data.root to a folder of images"
        elif not any(_holds_image(start) for start in starts):
            yield f"data.root={root} holds no image, in sub-folders neither: set data.root to a folder that does"


def _holds_image(start: str) -> bool:
    from beit_pretrain.data.folder import SUFFIXES

    def is_image(name: str) -> bool:
        return not name.startswith(".") and name.lower().endswith(SUFFIXES)

    if os.path.isfile(start):
        return is_image(os.path.basename(start))
    for _, folders, files in os.walk(start, followlinks=True):
        if any(is_image(name) for name in files):
            return True
        folders[:] = [name for name in folders if not name.startswith(".")]
    return False


# --- where it runs ------------------------------------------------------------------------------------------------


def _accelerator(asked: str) -> str:
    """cpu, cuda or mps: what Lightning will take."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if asked == "gpu":
        return "mps" if torch.backends.mps.is_available() else "cuda"
    return asked


def devices(cfg: DictConfig) -> int | None:
    """Devices of one node that the configuration asks for; None if that cannot be told."""
    asked = cfg.trainer.devices
    there = torch.cuda.device_count() if _accelerator(cfg.trainer.accelerator) == "cuda" else 1
    if asked in ("auto", -1, "-1"):
        return there
    if OmegaConf.is_list(asked) and asked and all(_is_whole(number, 0) for number in asked):
        return len(set(asked))
    return asked if _is_whole(asked, 1) else None


def _device(cfg: DictConfig) -> Faults:
    t = cfg.trainer
    if t.accelerator not in ACCELERATORS:
        return
    kind = _accelerator(t.accelerator)
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind)
    if there == 0:
        yield f"trainer.accelerator={t.accelerator}, but there is no GPU here: set trainer.accelerator=auto or cpu"
    asked = devices(cfg)
    if asked is None:
        yield f"trainer.devices={_show(t.devices)}: set a number from 1, a list such as [0,2], or auto"
    elif there and (asked > there or (OmegaConf.is_list(t.devices) and max(t.devices) >= there)):
        yield f"trainer.devices={_show(t.devices)}, but there are {there} here: set trainer.devices={there} or auto"
    if kind == "cpu" and t.precision == "16-mixed":
        yield "trainer.precision=16-mixed needs a GPU: set trainer.precision=32, bf16-mixed or auto on a CPU"


def _batch(cfg: DictConfig) -> Faults:
    batch, micro, nodes = cfg.batch_size, cfg.micro_batch_size, cfg.trainer.num_nodes
    here = devices(cfg) if cfg.trainer.accelerator in ACCELERATORS else None
    if not here or not all(_is_whole(n, 1) for n in (batch, nodes, 1 if micro is None else micro)):
        return
    # kNN is measured by one process, whatever there is.
    world = 1 if cfg.stage.name == "knn" else here * nodes
    unit = world * (micro or 1)
    if batch % unit:
        advice = [f"batch_size={_either(_nearest(batch, unit))}"]
        if micro is not None and batch % world == 0:
            share = [n for n in range(1, batch // world + 1) if batch // world % n == 0]
            advice.append(f"micro_batch_size={_either(_around(micro, share))}")
        times = f" x micro_batch_size={micro}" if micro is not None else ""
        yield (
            f"batch_size={batch} (over all devices) is no multiple of {world} devices (trainer.devices x "
            f"trainer.num_nodes){times} = {unit}: set {', or '.join(advice)}"
        )
    if cfg.data.name == "digits" and cfg.stage.name != "knn" and batch > DIGITS_TO_TRAIN:
        yield (
            f"batch_size={batch} is more than the {DIGITS_TO_TRAIN} training images of data=digits: "
            f"set batch_size={DIGITS_TO_TRAIN // unit * unit or unit} or less, such as 64"
        )


# --- words --------------------------------------------------------------------------------------------------------


def _nearest(value: int, unit: int) -> list[int]:
    """The multiples of `unit` on either side, without 0."""
    down = value // unit * unit
    return [n for n in (down, down + unit) if n > 0]


def _around(value: int, options: Sequence[int]) -> list[int]:
    """The options on either side of a value."""
    below, above = [n for n in options if n <= value], [n for n in options if n > value]
    return [*below[-1:], *above[:1]]


def _either(values: Sequence[object]) -> str:
    words = [str(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _by(grid: Sequence[int]) -> str:
    return " x ".join(str(n) for n in grid)


def _list(values: Sequence[object]) -> str:
    return f"[{','.join(str(v) for v in values)}]"


def _size(value: Any) -> str:
    """A size as one would type it: 224 or [192,160]."""
    sides = _sides(value)
    if sides is None:
        return _show(value)
    return str(sides[0]) if sides[0] == sides[1] else _list(sides)


def _show(value: Any) -> str:
    """A value as one would type it."""
    if OmegaConf.is_list(value) or isinstance(value, list | tuple):
        return _list([_show(v) for v in value])
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
