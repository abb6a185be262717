"""What tools build from a checkpoint's configuration: its values, in classes that the yaml files here name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from beit_pretrain.build import PLACES
from beit_pretrain.checkpoint.stored import unlike
from beit_pretrain.compose import choice_of, choices, compose, config_dir, node_of
from beit_pretrain.errors import CheckpointError

Node = Mapping[str, Any]


def known_tokenizer(stored: Node, given: str) -> dict[str, Any]:
    """The tokenizer's options; where files lie and come from is as here, but for a folder that exists."""
    own = node_of("tokenizer", stored.get("_target_"))
    _compare(stored, own, "tokenizer", given)
    node = {**stored, **{name: value for name, value in own.items() if name in PLACES}}
    if "checkpoint" in own:
        node["checkpoint"] = stored.get("checkpoint")
    if (
        "weights" in own
        and isinstance(folder := stored.get("weights"), str)
        and Path(folder).expanduser().is_dir()
    ):
        node["weights"] = folder
    if "offline" in own:
        node["offline"] = bool(own["offline"] or stored.get("offline"))
    return node


def known_masking(stored: Node, given: str) -> dict[str, Any]:
    """The options of a mask."""
    _compare(stored, node_of("masking", stored.get("_target_")), "masking", given)
    return dict(stored)


def known_run(config: Node, given: str) -> DictConfig:
    """A whole configuration whose stage can be built."""
    name = config["stage"]["name"]
    if name not in choices("stage"):
        raise CheckpointError(f"{given} is of stage={name}, which is none of this version: give another file")
    overrides = [f"stage={name}"]
    for group in ("tokenizer", "masking"):
        choice = choice_of(group, (config.get(group) or {}).get("_target_"))
        overrides += [] if choice is None else [f"{group}={choice}"]
    own = OmegaConf.to_container(compose(overrides), resolve=True)
    assert isinstance(own, dict)
    for group in ("stage", "model"):
        _compare(config.get(group), own[group], group, given)
    if name in ("tokenizer", "pretrain"):
        return DictConfig({**config, "tokenizer": known_tokenizer(config["tokenizer"], given)})
    return DictConfig(config)


def _compare(stored: Any, own: Any, group: str, given: str) -> None:
    if (found := unlike(stored, own, group)) is not None:
        raise CheckpointError(
            f"{given} was made with {found}, which no yaml file here names at this place, and no class is taken from a "
            f"file: put its yaml into {config_dir() / group}, or give another file"
        )
