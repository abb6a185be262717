"""What a run starts from: whether `init_from` and `tokenizer.checkpoint` can give it, and putting it in."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from beit_pretrain.checkpoint import record
from beit_pretrain.checkpoint.adapt import CLASSIFIER, Layout, Report, adapt, class_difference
from beit_pretrain.checkpoint.finite import counted, not_finite
from beit_pretrain.errors import CheckpointError
from beit_pretrain.stages.base import Stage
from beit_pretrain.tokenizer import collapse
from beit_pretrain.wording import bracket, is_whole, pair, show

# What two encoders must have in common for the weights of one to fit into the other.
SHAPES = ("patch_size", "width", "depth", "heads", "mlp_ratio", "abs_pos")
WEIGHTS = ("raw", "ema")
HEADS = {"classify": "head.head", "segment": "head.decode_head"}  # a part that only this stage's head has
AVERAGE = "ema.module."  # where a checkpoint keeps the running average of its weights

Faults = Iterator[str]


def start_faults(cfg: DictConfig, explicit: Collection[str]) -> Faults:
    """What is wrong with the checkpoints of a configuration, before anything is built."""
    stage = cfg.stage.name
    scores = {
        "stage=knn": stage == "knn",
        "stage=probe": stage == "probe",
        "mode=evaluate": cfg.mode == "evaluate",
    }
    if not cfg.init_from and (asked := next((a for a, given in scores.items() if given), None)):
        yield f"{asked} needs weights to score: set init_from to a run folder or a checkpoint"
    if stage == "probe" and cfg.mode == "evaluate":
        yield "stage=probe trains its classifiers and has nothing to evaluate without: leave mode=evaluate out"
    if stage == "pretrain" and untrained(cfg):
        yield (
            "tokenizer.checkpoint is not given, and this tokenizer has no weights of its own: train one with "
            "stage=tokenizer and set tokenizer.checkpoint to its run folder, or set tokenizer=dalle"
        )
    elif stage == "pretrain" and "checkpoint" in cfg.tokenizer:
        yield from _read("tokenizer.checkpoint", cfg.tokenizer.checkpoint, "tokenizer")[1]
    if cfg.init_from:
        part = "tokenizer" if stage == "tokenizer" else "encoder"
        if stage in HEADS and cfg.mode == "evaluate":
            part = HEADS[stage]
        saved, faults = _read("init_from", cfg.init_from, part)
        yield from faults
        if saved and stage == "pretrain" and cfg.mode == "evaluate" and "foreign" in saved:
            yield (
                f"mode=evaluate compares with what pre-training counted on the way, and init_from={cfg.init_from} is "
                "of another program, which did not: set it to a run of stage=pretrain"
            )
        elif saved and stage != "tokenizer":
            yield from _agrees(cfg, saved, explicit)


def start_remarks(cfg: DictConfig) -> Iterator[str]:
    """What one should know of the checkpoints of a training before it begins."""
    if cfg.stage.name == "pretrain" and cfg.mode == "fit" and (path := cfg.tokenizer.get("checkpoint")):
        saved = record.read(path, key="tokenizer.checkpoint")["beit_pretrain"]
        size = saved["config"]["tokenizer"].get("vocab_size")  # of a user's own class it may be no option
        if is_whole(size, 1) and (remark := collapse(saved.get("held_out") or {}, size)):
            yield f"tokenizer.checkpoint={path}: {remark}"


def untrained(cfg: DictConfig) -> bool:
    return "checkpoint" in cfg.tokenizer and not cfg.tokenizer.checkpoint


def _read(key: str, path: str, part: str) -> tuple[dict[str, Any] | None, list[str]]:
    """What a checkpoint says about itself, or None and why it cannot give this part."""
    try:
        checkpoint = record.read(path, key=key)
    except CheckpointError as error:
        return None, [str(error)]
    if part == "tokenizer" and "foreign" in checkpoint["beit_pretrain"]:
        return None, [f"{key}={path} is an encoder, not a tokenizer: set {key} to a run of stage=tokenizer"]
    try:
        record.part(checkpoint, part, key=f"{key}={path}")
    except CheckpointError as error:
        stages = {"tokenizer": "tokenizer", **{head: stage for stage, head in HEADS.items()}}
        needed = stages.get(part, "pretrain")
        return None, [f"{error}: set {key} to a run of stage={needed}"]
    return checkpoint["beit_pretrain"], []


def _agrees(cfg: DictConfig, saved: dict[str, Any], explicit: Collection[str]) -> Faults:
    """What the encoder of `init_from` was made for: pixels of this scale, an encoder of this shape."""
    # Files of others may not say how they were normalised.
    stated = [name for name in ("mean", "std") if saved["preprocessing"].get(name) is not None]
    then = {name: [float(v) for v in saved["preprocessing"][name]] for name in stated}
    now = {name: [float(v) for v in cfg.data.normalize[name]] for name in stated}
    # Fine-tuning gets used to other pixels, at a price; whoever sets them by hand has thought of it, and so have the
    # published recipes for segmentation, which normalise as ImageNet whatever the encoder saw before.
    on_purpose = cfg.stage.name in HEADS and any(key.startswith("data.normalize") for key in explicit)
    on_purpose = on_purpose or (cfg.stage.name == "segment" and "experiment" in explicit)
    if then != now and not on_purpose:
        values = [f"'data.normalize.{n}={bracket(then[n])}'" for n in then if then[n] != now[n]]
        yield (
            f"init_from={cfg.init_from} saw images normalised with {_scale(then)}, here they are with {_scale(now)}: "
            f"set {' '.join(values)}"
        )
    model = OmegaConf.to_container(cfg.model, resolve=True)
    before = saved["config"]["model"]
    assert isinstance(model, dict)
    other = [key for key in SHAPES if model.get(key) != before.get(key)]
    if bool(model.get("layer_scale")) != bool(before.get("layer_scale")):
        other.append("layer_scale")
    tables = before.get("rel_pos"), model.get("rel_pos")
    if tables == ("per_layer", "shared"):
        yield (
            f"init_from={cfg.init_from} has a relative position table for each block, which cannot become the one "
            "that model.rel_pos=shared asks for: start from a pre-training run"
        )
    elif tables[0] != tables[1] and tables != ("shared", "per_layer"):
        other.append("rel_pos")
    if other:
        pairs = ", ".join(f"model.{key}={show(model.get(key))} ({show(before.get(key))})" for key in other)
        yield (
            f"init_from={cfg.init_from} holds another encoder than this one; here (there): {pairs}: "
            f"set model={before.get('name')} and what else is different as there"
        )


def _scale(normalize: Mapping[str, Sequence[float]]) -> str:
    return " and ".join(f"{name} {bracket(values)}" for name, values in normalize.items())


# --- putting it in ------------------------------------------------------------------------------------------


def load_weights(
    stage: Stage, cfg: DictConfig, classes: Sequence[str] | None
) -> tuple[dict[str, Any], Report | None]:
    """Put the weights of `init_from` into the stage; returns the file for the lineage and what became of each key.

    Encoders are adapted to another grid and from one shared table to one per block. A tokenizer that goes on, and
    a pre-training that is only scored (with what it counted on the way), must fit as they are: no account then.
    """
    path = cfg.init_from
    saved = record.read(path, key="init_from")
    origin = record.parent(path, saved, key="init_from")
    evaluate = cfg.mode == "evaluate"
    if cfg.stage.name == "tokenizer" or (cfg.stage.name == "pretrain" and evaluate):
        names = {name.split(".")[0] for name, _ in stage.trained_parameters()}
        names.update(stage.statistics if evaluate else ())
        for name in sorted(names):
            load_strictly(getattr(stage, name), record.part(saved, name, key="init_from"), "init_from")
        return origin, None
    parts = ("encoder",) if "encoder" in stage.frozen else ("encoder", "head")
    about = saved["beit_pretrain"]
    state, report = adapt(
        part_weights(saved, parts, cfg.init_weights),
        {name: value for name, value in stage.state_dict().items() if name.split(".")[0] in parts},
        source=Layout(grid=grid_of(about["config"]), classes=_classes(about)),
        target=Layout(grid=cast(Any, stage).encoder.grid, classes=classes),
    )
    known = _classes(about)
    difference = class_difference(known, classes or ())
    if known is None and (lost := [name for name in report.fresh if name in CLASSIFIER]):
        difference = f"{len(classes or ())} here, and {lost[0]} has another number of them"
    if evaluate and difference:
        raise CheckpointError(
            f"init_from={path} tells other classes apart than data={cfg.data.name} has ({difference}): evaluate on "
            "images of the same classes"
        )
    report.notes += about.get("foreign", {}).get("notes", [])
    if about["preprocessing"].get("mean") is None:
        scale = _scale({name: list(values) for name, values in cfg.data.normalize.items()})
        report.notes.append(
            f"it does not say how its images were normalised: here with {scale} (data.normalize)"
        )
    for part in parts:
        own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        load_strictly(getattr(stage, part), own, "init_from")
    return origin, report


def part_weights(saved: Mapping[str, Any], parts: Sequence[str], which: str) -> dict[str, Tensor]:
    """The parts' weights under the names of the stage; with `which` ema, their running average."""
    prefix = AVERAGE if which == "ema" else ""
    state = {
        name.removeprefix(prefix): value
        for name, value in saved["state_dict"].items()
        if name.startswith(tuple(f"{prefix}{part}." for part in parts))
    }
    if not state:
        raise CheckpointError(
            "init_weights=ema, but the checkpoint of init_from keeps no running average: set init_weights=raw"
        )
    return state


def encoder_weights(saved: Mapping[str, Any], which: str) -> dict[str, Tensor]:
    """The encoder's weights, or (`which` is ema) their running average, without a prefix."""
    return {
        name.removeprefix("encoder."): value
        for name, value in part_weights(saved, ("encoder",), which).items()
    }


def grid_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches that a saved configuration's encoder was built for."""
    rows, columns = (side // config["model"]["patch_size"] for side in pair(config["image_size"]))
    return rows, columns


def _classes(about: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes that a checkpoint's head tells apart, if it has such a head."""
    return about["preprocessing"].get("class_names") if about["config"]["stage"]["name"] in HEADS else None


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], key: str) -> None:
    """`load_state_dict`, with every key that does not fit named in one line; weights must be finite."""
    check_fit(module, state, key)
    if spoilt := not_finite(state, {name for name, _ in module.named_parameters()}):
        raise CheckpointError(
            f"{key}: the weights hold {counted(spoilt)}: give a checkpoint from before the training went wrong"
        )
    module.load_state_dict(state)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], key: str) -> None:
    """CheckpointError, in one line, if `state` has not precisely the names and shapes of the module."""
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own.keys() - state.keys()]
    faults += [f"{name} has no place" for name in state.keys() - own.keys()]
    faults += [
        f"{name} is {tuple(state[name].shape)}, needed {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if faults:
        raise CheckpointError(f"{key}: the weights do not fit: {'; '.join(sorted(faults))}")
