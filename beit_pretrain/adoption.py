"""What a configuration takes over from the checkpoints it starts from, which describe themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from beit_pretrain.errors import ConfigError
from beit_pretrain.wording import pair

# Decided by whoever starts the program, or by where files lie; never taken over from a checkpoint.
NOT_ADOPTED = {"checkpoint", "cache", "views", "weights", "files", "offline"}
# What of an encoder is in its weights; the rest (drop path, kernel, kind of tables) is up to the stage.
SHAPE = ("name", "patch_size", "width", "depth", "heads", "mlp_ratio", "layer_scale", "abs_pos", "init_std")
# And what of a head that is only scored.
HEAD = {"classify": ("pooling",), "segment": ("blocks", "channels")}


# The node that the choice of a group with this class composes to; empty if no choice of the group names the class.
Choice = Callable[[str, Any], Mapping[str, Any]]


def adopt_checkpoints(cfg: DictConfig, explicit: Mapping[str, str], choice: Choice) -> None:
    """Take over, in place, what `tokenizer.checkpoint` and `init_from` decide; `explicit` is what the user set.

    Values are taken over, classes never: a checkpoint's are compared with those of the composed configuration, or of
    another `choice` of the same group. Raises ConfigError where the two contradict each other.
    """
    if cfg.stage.name == "pretrain" and cfg.tokenizer.get("checkpoint"):
        key = "tokenizer.checkpoint"
        saved = _config_of(cfg.tokenizer.checkpoint, key)
        _raise_if(_adopt(cfg, "tokenizer", saved, explicit, key, choice))
    if cfg.init_from and cfg.stage.name in ("knn", "probe"):
        _adopt_frozen(cfg, explicit, choice)
    elif cfg.init_from and cfg.stage.name in ("classify", "segment"):
        _adopt_tuned(cfg, explicit)


def _adopt_frozen(cfg: DictConfig, explicit: Mapping[str, str], choice: Choice) -> None:
    """An encoder that is used as it is: its shape, the size and the scale of its pixels."""
    key = "init_from"
    saved = _config_of(cfg.init_from, key)
    faults = _adopt(cfg, "model", saved, explicit, key, choice)
    given = {k: OmegaConf.select(cfg, k) for k in explicit if k.startswith("data.normalize")}
    if "image_size" in explicit:
        given["image_size"] = pair(cfg.image_size)
    cfg.image_size = pair(saved["image_size"])
    _adopt_scale(cfg, saved, ("mean", "std"))
    _raise_if(faults + _disagreement(cfg, given, explicit, key))


def _adopt_tuned(cfg: DictConfig, explicit: Mapping[str, str]) -> None:
    """An encoder that is fine-tuned, or scored with its head: its shape, and its image size if no other is asked for.

    A recipe says for itself what it is for; the checks then compare the two.
    """
    if cfg.mode != "evaluate" and "experiment" in explicit:
        return
    key = "init_from"
    saved = _config_of(cfg.init_from, key)
    if "model" not in saved:
        return  # no encoder: the checks name it
    _raise_if(_other_class(saved["model"], plain(cfg.model), "model", key))
    faults = _other_choice("model", saved, explicit, key)
    decided = [f"model.{name}" for name in SHAPE]
    if cfg.mode == "evaluate":
        decided += ["model.rel_pos"]
        if cfg.stage.name == saved["stage"]["name"]:
            # Which blocks a head looks at, files of other programs may leave open.
            free = {"blocks"} if not saved["stage"].get("blocks_stated", True) else set()
            free = {name for name in free if f"stage.{name}" in explicit}
            decided += [f"stage.{name}" for name in HEAD[cfg.stage.name] if name not in free]
        _adopt_pixels(cfg, saved, explicit)
    elif saved["model"].get("rel_pos") == "none" and "model.rel_pos" not in explicit:
        cfg.model.rel_pos = "none"
    if "image_size" not in explicit:
        cfg.image_size = pair(saved["image_size"])
    given = {k: OmegaConf.select(cfg, k) for k in explicit if k in decided}
    for name in decided:
        group, _, option = name.partition(".")
        _set(cfg, name, saved[group].get(option), key)
    _raise_if(faults + _disagreement(cfg, given, explicit, key))


def _adopt_pixels(cfg: DictConfig, saved: dict[str, Any], explicit: Mapping[str, str]) -> None:
    """Scale and crop of the images that a model was scored on so far, where the user asks for no other."""
    given = {"data.normalize"} & explicit.keys()
    _adopt_scale(
        cfg, saved, [n for n in ("mean", "std") if not given and f"data.normalize.{n}" not in explicit]
    )
    classifies = cfg.stage.name == saved["stage"]["name"] == "classify"
    if classifies and "stage.eval_views.crop_pct" not in explicit:
        _set(cfg, "stage.eval_views.crop_pct", saved["stage"]["eval_views"]["crop_pct"], "init_from")


def _adopt_scale(cfg: DictConfig, saved: dict[str, Any], names: Sequence[str]) -> None:
    """Mean or std of the images that a model knows; files of other programs may not say them."""
    for name in names:
        if saved["data"]["normalize"][name] is not None:
            cfg.data.normalize[name] = saved["data"]["normalize"][name]


def _raise_if(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigError(faults)


def _config_of(path: str, key: str) -> dict[str, Any]:
    from beit_pretrain.checkpoint import (
        record,
    )  # brings torch, which --help and a mistyped key need not wait for

    return record.read(path, key=key)["beit_pretrain"]["config"]


def _adopt(
    cfg: DictConfig, node: str, saved: dict[str, Any], explicit: Mapping[str, str], key: str, choice: Choice
) -> list[str]:
    """Replace a node by the checkpoint's; returns where it disagrees with what the user set by hand."""
    if node not in saved:
        return [f"{key}: the checkpoint's configuration has no {node}"]
    faults = _other_choice(node, saved, explicit, key)
    known = plain(cfg[node])
    if saved[node].get("_target_") != known.get("_target_"):
        known = choice(node, saved[node].get("_target_")) or known
    if other := _other_class(saved[node], known, node, key):
        return faults + other
    own = {k: v for k, v in cfg[node].items() if k in NOT_ADOPTED}
    given = {k: OmegaConf.select(cfg, k) for k in explicit if k.startswith(f"{node}.")}
    # Not key by key: what only the default choice has would be left in.
    cfg[node] = {**{k: v for k, v in saved[node].items() if k not in NOT_ADOPTED}, **own}
    return faults + _disagreement(cfg, given, explicit, key)


def _set(cfg: DictConfig, name: str, value: Any, key: str) -> None:
    """Replace one value by the checkpoint's; ConfigError if that would build another class than the configuration."""
    _raise_if(_other_class(value, plain(OmegaConf.select(cfg, name)), name, key))
    OmegaConf.update(cfg, name, value, merge=False)


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _other_class(value: Any, own: Any, name: str, key: str) -> list[str]:
    """The fault of a stored value that names a class which the configuration does not have at the same place."""
    from beit_pretrain.checkpoint.stored import unlike

    group = name.partition(".")[0]
    if (found := unlike(value, own, name)) is None:
        return []
    return [
        f"{key} was made with {found}, which {group}= does not name here, and no class is taken from a file: set "
        f"{group}= to the choice whose yaml names it, or give another checkpoint"
    ]


def _other_choice(node: str, saved: dict[str, Any], explicit: Mapping[str, str], key: str) -> list[str]:
    """The fault of a choice that the user made by hand and that is not the checkpoint's."""
    if node not in explicit or explicit[node] == saved[node].get("name"):
        return []
    return [f"{node}={explicit[node]}, but {key} was made with {saved[node].get('name')}: leave {node}= out"]


def _disagreement(cfg: DictConfig, given: dict[str, Any], explicit: Mapping[str, str], key: str) -> list[str]:
    """Values that the user set by hand and the checkpoint knows better."""
    faults = []
    for name, value in given.items():
        adopted = OmegaConf.select(cfg, name)
        # [32, 32] from a checkpoint is the 32 that a user types.
        if value != adopted and not (OmegaConf.is_list(adopted) and pair_or_none(value) == list(adopted)):
            faults.append(f"{name}={explicit[name]}, but {key} was made with {adopted}: leave {name} out")
    return faults


def pair_or_none(size: Any) -> list[int] | None:
    return pair(size) if isinstance(size, int) else None
