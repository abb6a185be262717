"""From overrides to a complete configuration, the same way for every command.

A configuration that starts from a checkpoint takes the shape of what is in it (the tokenizer's architecture, the
encoder's size) from the checkpoint, which describes itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from beit_pretrain.errors import ConfigError

# Decided by whoever starts the program, or by where a checkpoint lies; never taken over from a checkpoint.
NOT_ADOPTED = {"checkpoint", "cache", "offline"}


def config_dir() -> Path:
    """The folder with the yaml files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def pair(size: Any) -> list[int]:
    """`224` or `[192, 160]` as [height, width]."""
    return [int(s) for s in size] if OmegaConf.is_list(size) or isinstance(size, list | tuple) else [int(size)] * 2


def register_resolvers() -> None:
    OmegaConf.register_new_resolver("pair", pair, replace=True)
    OmegaConf.register_new_resolver(
        "grid", lambda size, patch: [s // int(patch) for s in pair(size)], replace=True
    )


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration for these Hydra overrides, taken over from checkpoints where it names some, with a name.

    Raises ConfigError, in one line, for an unknown group, choice or key, with the nearest known one.
    """
    register_resolvers()
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            cfg = hydra_compose("train", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides)) from error
    return complete(cfg, overrides)


def complete(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Fill in what depends on other choices: checkpoints' own shapes, and the run's name."""
    with open_dict(cfg):
        for group in ("stage", "chain"):  # Hydra leaves no key where a group has no choice
            cfg.setdefault(group, None)
        if cfg.stage is not None and "_target_" in cfg.stage:
            _adopt_checkpoints(cfg, explicit_keys(overrides))
        if cfg.name is None:
            cfg.name = default_name(cfg)
        if cfg.debug:
            cfg.name += "-debug"
    return cfg


def default_name(cfg: DictConfig) -> str | None:
    if cfg.chain is not None:
        return str(cfg.chain.name)
    if cfg.stage is None:
        return None
    model = cfg.tokenizer.name if cfg.stage.get("name") == "tokenizer" else cfg.model.name
    return f"{cfg.stage.get('name')}-{cfg.data.name}-{model}"


def explicit_keys(overrides: Sequence[str]) -> dict[str, str]:
    """Key to value of the plain overrides, without Hydra's prefixes."""
    return {o.split("=", 1)[0].lstrip("+~"): o.split("=", 1)[1] for o in overrides if "=" in o}


def _adopt_checkpoints(cfg: DictConfig, explicit: dict[str, str]) -> None:
    if cfg.stage.name == "pretrain" and cfg.tokenizer.get("checkpoint"):
        saved = _config_of(cfg.tokenizer.checkpoint, "tokenizer.checkpoint")
        _adopt(cfg, "tokenizer", saved, explicit, "tokenizer.checkpoint")
    if cfg.stage.name == "knn" and cfg.init_from:
        saved = _config_of(cfg.init_from, "init_from")
        _adopt(cfg, "model", saved, explicit, "init_from")
        if "image_size" not in explicit:
            cfg.image_size = saved["image_size"]
        cfg.data.normalize = saved["data"]["normalize"]


def _config_of(path: str, key: str) -> dict[str, Any]:
    from beit_pretrain.checkpoint import record  # brings torch, which --help and a mistyped key need not wait for

    return record.read(Path(path), key=key)["beit_pretrain"]["config"]


def _adopt(cfg: DictConfig, node: str, saved: dict[str, Any], explicit: dict[str, str], key: str) -> None:
    """Overwrite a node by the checkpoint's; what the user set by hand must agree with it."""
    if node not in saved:
        raise ConfigError(f"{key}: the checkpoint's configuration has no {node}")
    faults = []
    for name, value in saved[node].items():
        if name in NOT_ADOPTED:
            continue
        given = explicit.get(f"{node}.{name}")
        if given is not None and OmegaConf.create({"v": OmegaConf.select(cfg, f"{node}.{name}")}).v != value:
            faults.append(f"{node}.{name}={given}, but {key} was made with {value}: leave {node}.{name} out")
        cfg[node][name] = value
    if faults:
        raise ConfigError(faults)


def flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a configuration, unresolved."""
    if OmegaConf.is_dict(node) and not node._is_none() and not node._is_missing():
        for key in node:
            name = f"{prefix}{key}"
            yield name
            child = node._get_node(key)
            if OmegaConf.is_dict(child):
                yield from flat_keys(child, f"{name}.")


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        # A short key given without its group: `lr` for `stage.optim.lr`.
        close = [k for k in known if k.split(".")[-1] == word.split(".")[-1]][:1]
    return f"; did you mean {close[0]}?" if close else ""


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's complaint in one line, with the nearest name that exists."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = list(error.options or [])
        return f"{group}={choice}: there is no such choice{_nearest(choice, options)} (known: {', '.join(options)})"
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        return f"{key}: there is no such option{_nearest(key, _known_keys(overrides, key))}"
    if found := re.search(r"Key '([^']+)' not in|Could not (?:append|delete)[^']*'([^']+)'", text):
        key = found.group(1) or found.group(2)
        return f"{key}: there is no such option{_nearest(key, _known_keys(overrides, key))}"
    return text


def _known_keys(overrides: Sequence[str], bad: str) -> list[str]:
    """The keys there would be without the bad override."""
    good = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") != bad]
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return list(flat_keys(hydra_compose("train", overrides=good)))
    except (HydraException, OmegaConfBaseException):
        return []


def recipe_diff(cfg: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """What a run changed against its recipe (the chosen groups without single keys): key, recipe, this run."""
    register_resolvers()
    groups = [o for o in overrides if "." not in (k := o.split("=", 1)[0].lstrip("+~")) and _is_group(k)]
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        recipe = hydra_compose("train", overrides=groups)
    rows = []
    for key in flat_keys(cfg):
        if key.split(".")[0] in {"name", "run_dir", "runs", "resume_step", "logger", "dry_run", "overwrite"}:
            continue
        ours, theirs = (_raw(c, key) for c in (cfg, recipe))
        if ours != theirs and not isinstance(ours, dict):
            rows.append([key, str(theirs), str(ours)])
    return rows


def _raw(cfg: DictConfig, key: str) -> Any:
    """A value before interpolation (so that a changed image_size shows once, not wherever it is used)."""
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def _is_group(name: str) -> bool:
    return (config_dir() / name).is_dir()
