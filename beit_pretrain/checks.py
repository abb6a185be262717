"""What must agree between the groups of a configuration, looked at before anything is built.

Every check yields its faults, one line each: what was given, under which key, what to set. A check that needs
what another one found broken stays silent.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from beit_pretrain.compose import explicit_keys, name_fault
from beit_pretrain.devices import batch_faults, device_faults, devices, nodes, processes
from beit_pretrain.errors import ConfigError
from beit_pretrain.origins import start_faults, untrained
from beit_pretrain.tokenizer import TrainableTokenizer
from beit_pretrain.values import Faults, choices, numbers, sizes
from beit_pretrain.wording import either, is_whole, nearest, show, sides_of, size, times

# What only the configuration of a node uses, not the class it names.
UNSEEN = ("name", "checkpoint", "cache", "views")
STAGES = ("tokenizer", "pretrain", "classify", "probe", "segment", "knn")


def check(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Raises ConfigError with everything that is wrong, or returns without a word.

    `overrides` are what the user set by hand: some things are allowed only on purpose.
    """
    if faults := list(_missing(cfg)):
        # Without a stage, or with an interpolation that leads nowhere, nothing else can be said.
        raise ConfigError(faults)
    if fault := name_fault(cfg.name, by_hand=False):
        faults.append(fault)
    for one in (numbers, choices, _model, _grids, _masks, _recipe, _mixing, _pooling):
        faults += one(cfg)
    faults += [*start_faults(cfg, explicit_keys(overrides)), *_folders(cfg)]
    faults += [*device_faults(cfg), *batch_faults(cfg)]
    if faults:
        raise ConfigError(faults)


def _missing(cfg: DictConfig) -> Faults:
    if cfg.stage is None or "_target_" not in cfg.stage:
        if cfg.stage is None and cfg.chain is not None:
            yield f"chain={cfg.chain.name} cannot be one job of a sweep: sweep over a stage"
        else:
            given = "options of a stage, but no stage" if cfg.stage is not None else "no stage"
            yield f"{given} is given: set {either([f'stage={name}' for name in STAGES])}"
        return
    if missing := list(_blanks(OmegaConf.to_container(cfg, resolve=False))):
        yield from (f"{key} is not given: set {key}=..." for key in missing)
        return
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError, ArithmeticError) as error:
        # Sizes are what others are computed from.
        what, _, where = " ".join(str(error).split()).partition(" full_key: ")
        yield from list(sizes(cfg)) or [f"{where.split(' ')[0]}: {what}"]


def _blanks(node: Any, key: str = "") -> Iterator[str]:
    """Keys of values that have to be given and are not."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _blanks(child, f"{key}.{name}" if key else str(name))
    elif node == "???":
        yield key


# --- the encoder, its grid, the tokenizer's, the masks ------------------------------------------------------


def _model(cfg: DictConfig) -> Faults:
    """The encoder says for itself what it cannot be; without memory it is made in an instant."""
    if cfg.stage.name == "tokenizer":
        return
    shape = {key: cfg.model[key] for key in ("width", "depth", "heads")}
    if wrong := {key: value for key, value in shape.items() if not is_whole(value, 1)}:
        yield from (f"model.{key}={show(value)}: set a whole number from 1" for key, value in wrong.items())
    elif _fits(cfg):
        yield from _built("model", cfg.model)[1]
    if cfg.model.rel_pos == "none" and cfg.model.abs_pos is False:
        yield (
            "model.rel_pos=none with model.abs_pos=false leaves the encoder blind to where a patch lies: "
            "set model.rel_pos=shared or model.abs_pos=true"
        )


def _uncut(cfg: DictConfig) -> list[str]:
    """The fault of an image that cannot be cut into patches."""
    return _indivisible(
        "image_size", sides_of(cfg.image_size) or [], "model.patch_size", cfg.model.patch_size
    )


def _fits(cfg: DictConfig) -> bool:
    """Whether the image is whole patches; where not, other checks say so."""
    return bool(sides_of(cfg.image_size)) and is_whole(cfg.model.patch_size, 1) and not _uncut(cfg)


def _tokenizer(cfg: DictConfig) -> tuple[list[int] | None, int, list[str]]:
    """Tokens as [rows, cols] and pixels per token, or None and the faults the tokenizer finds in its options.

    One that can be trained has no weights to fetch and is made without memory; another one says on its class
    how many pixels a token has, or is asked when the stage is built.
    """
    try:
        kind = get_class(cfg.tokenizer._target_)
    except (ImportError, ValueError) as error:
        return None, 1, [f"tokenizer._target_={cfg.tokenizer._target_}: {' '.join(str(error).split())}"]
    if issubclass(kind, TrainableTokenizer):
        made, faults = _built("tokenizer", cfg.tokenizer)
        return (None, 1, faults) if made is None else (list(made.grid), made.stride, [])
    if cfg.stage.name == "tokenizer":
        return None, 1, [f"stage=tokenizer cannot train a {kind.__name__}: set tokenizer=dvae"]
    stride, view = vars(kind).get("stride"), sides_of(cfg.tokenizer.image_size)
    if stride is None or view is None:
        return None, 1, []
    if faults := _indivisible("tokenizer.image_size", view, "the tokenizer's stride", stride):
        return None, stride, faults
    return [side // stride for side in view], stride, []


def _grids(cfg: DictConfig) -> Faults:
    uses_tokens = cfg.stage.name in ("tokenizer", "pretrain")
    tokens, stride, faults = _tokenizer(cfg) if uses_tokens else (None, 1, [])
    yield from faults
    sides, patch = sides_of(cfg.image_size), cfg.model.patch_size
    if cfg.stage.name == "tokenizer" or sides is None or not is_whole(patch, 1):
        return
    if uncut := _uncut(cfg):
        yield from uncut
        return
    patches = [side // patch for side in sides]
    # A tokenizer that is still to be trained has no size yet: that is its fault to name.
    if cfg.stage.name != "pretrain" or not tokens or tokens == patches or untrained(cfg):
        return
    here = f"image_size={size([n * patch for n in tokens])}"
    there = f"tokenizer.image_size={size([n * stride for n in patches])}"
    yield (
        f"the tokenizer makes {times(tokens)} tokens (tokenizer.image_size={size(cfg.tokenizer.image_size)}, "
        f"{stride} pixels each) and the encoder {times(patches)} patches (image_size={size(cfg.image_size)}, "
        f"model.patch_size={patch}), but each patch needs one token: set {here}, or "
        + (f"train a tokenizer with {there}" if cfg.tokenizer.get("checkpoint") else there)
    )


def _indivisible(key: str, sides: Sequence[int], name: str, unit: int) -> list[str]:
    if not any(side % unit for side in sides):
        return []
    around = [nearest(side, unit) if side % unit else [side, side] for side in sides]
    good = [size(pair) for pair in zip(around[0], around[-1], strict=False)]
    return [f"{key}={size(sides)} cannot be divided by {name}={unit}: set {key}={either(good)}"]


def _masks(cfg: DictConfig) -> Faults:
    """The generator says for itself what it cannot do."""
    if cfg.stage.name == "pretrain" and _fits(cfg):
        yield from _built("masking", cfg.masking)[1]


def _recipe(cfg: DictConfig) -> Faults:
    if cfg.stage.name != "knn":
        yield from _built("stage.optim", cfg.stage.optim)[1]
    if cfg.stage.name == "segment" and _fits(cfg):
        for part in ("predict", "views"):
            yield from _built(f"stage.{part}", cfg.stage[part])[1]


def _mixing(cfg: DictConfig) -> Faults:
    """Mixup and CutMix pair the images of a pass with one another."""
    if cfg.stage.name != "classify" or not (cfg.stage.mixup or cfg.stage.cutmix) or cfg.mode == "evaluate":
        return
    share = _share(cfg)
    if share is not None and share % 2:
        yield (
            f"stage.mixup and stage.cutmix mix images in pairs, but a device takes {share} at a time: set batch_size "
            "or micro_batch_size so that it takes an even number"
        )


def _pooling(cfg: DictConfig) -> Faults:
    """The coarsest pooling of UPerNet leaves one value of an image, and batch norm needs two to tell a spread."""
    if cfg.stage.name != "segment" or cfg.mode == "evaluate":
        return
    if _share(cfg) == 1 and processes(cfg) == 1:
        yield (
            "stage=segment normalises over the images that are seen at a time, of which there is one: set "
            "micro_batch_size (or batch_size) to 2 or more, or train on several devices, which normalise together"
        )


def _share(cfg: DictConfig) -> int | None:
    """Images that a device takes at a time; None where another check finds the fault."""
    share = cfg.micro_batch_size
    if (
        share is None
        and all(is_whole(n, 1) for n in (cfg.batch_size, nodes(cfg)))
        and (count := devices(cfg))
    ):
        share = cfg.batch_size // (count * nodes(cfg))
    return share if is_whole(share, 1) else None


def _built(group: str, node: DictConfig) -> tuple[Any, list[str]]:
    """What a node describes, without memory for its weights; or None and why it cannot be made."""
    options = OmegaConf.to_container(node, resolve=True)
    assert isinstance(options, dict)
    try:
        with torch.device("meta"):
            return instantiate({k: v for k, v in options.items() if k not in UNSEEN}), []
    except ConfigError as error:
        return None, error.faults
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ConfigError):
            return None, cause.faults
        reason = " ".join(str(cause).split())
        return None, [f"{group}: an option is of a wrong kind ({reason}); see {group}.* in the configuration"]


# --- images -------------------------------------------------------------------------------------------------


def _folders(cfg: DictConfig) -> Faults:
    """Every data.root holds an image; data sets that have a name are looked at when they are opened."""
    if cfg.data.name != "folder":
        return
    roots = [cfg.data.root] if isinstance(cfg.data.root, str) else cfg.data.root
    if not OmegaConf.is_list(roots) and not isinstance(roots, list):
        yield f"data.root={show(roots)}: set a folder of images, a glob pattern, or a list of them"
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
            yield f"data.root={root} holds no image, not in its sub-folders either: set data.root to another"


def _holds_image(start: str) -> bool:
    from beit_pretrain.data.folder import SUFFIXES

    def is_image(name: str) -> bool:
        return not name.startswith(".") and name.lower().endswith(SUFFIXES)

    if os.path.isfile(start):
        return is_image(os.path.basename(start))
    seen: set[str] = set()
    for here, folders, files in os.walk(start, followlinks=True):
        if any(is_image(name) for name in files):
            return True
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        seen.add(real)  # links may lead in a circle
    return False
