"""The files of a run's folder: their names, reading the small ones, and clearing them away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from beit_pretrain.errors import BeitError, ConfigError

CONFIG = "config.yaml"
RESULTS = "results.json"
REPORT = "report.html"
LOCK = ".lock"
# Folders that a run makes in its own.
FOLDERS = ("checkpoints", "pictures", "pictures/worst", "bad_steps", "tensorboard", "wandb")
# Everything a run writes, as patterns seen from its folder. The results come first, as no other file says that a run
# is finished, and the configuration last, as it says that the folder is a run's: what a kill leaves can be cleared.
FILES = (
    RESULTS,
    REPORT,
    "metrics.csv",
    "timing.csv",
    "events.csv",
    "init_from.json",
    "bad_samples.csv",
    "wandb_id",
    "features.f32",
    "rehearsal.json",
    "order-[0-9]*.jsonl",
    "checkpoints/last.ckpt",
    "checkpoints/best.ckpt",
    "checkpoints/step-[0-9]*.ckpt",
    "checkpoints/step-[0-9]*.ckpt.bad",
    "pictures/masks.png",
    "pictures/step-[0-9]*.png",
    "pictures/worst/[0-9]*.png",
    "bad_steps/step-[0-9]*-rank[0-9]*.pt",
    "tensorboard/events.out.tfevents.*",
    "tensorboard/hparams.yaml",
    CONFIG,
)
# Of a folder in which several runs lie: a run's own files would take the place of some of theirs.
OF_SEVERAL = {"chain.json": "a chain", "sweep.json": "a search"}
NAMED = 3  # foreign files that a message names


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them stand for more values than memory holds, and runs write none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name)")
        return super().compose_node(parent, index)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, empty without the file. BeitError, in one line, if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise BeitError(f"{path} is not valid JSON ({error}): mend or move the file away") from error
    return _mapping(content, path)


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a YAML file and the mapping in it, as `read_json`."""
    if not path.is_file():
        return "", {}
    try:
        content = path.read_text(encoding="utf-8")
        config = yaml.load(content, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise BeitError(f"{path} is not valid YAML ({reason}): mend or move the file away") from error
    return content, _mapping({} if config is None else config, path)


def _mapping(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise BeitError(
            f"{path} should hold a mapping, got {type(content).__name__}: mend or move the file away"
        )
    return content


def holds_run(folder: Path) -> bool:
    """Whether the configuration in a folder is one that a run has written, or its events.csv is there."""
    try:
        config = read_config(folder / CONFIG)[1]
    except BeitError:  # damaged
        config = {}
    if isinstance(config.get("stage"), dict) and "run_dir" in config:
        return True
    # The first line of events.csv, as `cluster.events` writes it.
    try:
        with (folder / "events.csv").open("rb") as file:
            return file.read(11) == b"time,step,e"
    except OSError:
        return False


def holds_several(folder: Path) -> str:
    """`a chain` or `a search` if the folder is that of one, else nothing."""
    return next((what for name, what in OF_SEVERAL.items() if (folder / name).is_file()), "")


def clear(folder: Path) -> None:
    """Remove what a run has left in its folder; other files stay, and runs in folders below it.

    ConfigError if the folder holds other files and no run.
    """
    others = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
    if others and not holds_run(folder):
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise ConfigError(
            f"{folder} holds {holds_several(folder) or 'no run'} ({', '.join(others[:NAMED])}{more}), and only what a "
            "run has left is thrown away: give this run another name=, or empty the folder yourself"
        )
    for name in FOLDERS:
        if (folder / name).is_symlink():
            (folder / name).unlink()  # what it points to is not ours
    if (folder / "wandb").is_dir():
        shutil.rmtree(folder / "wandb")  # W&B's own files
    for pattern in FILES:
        for path in _matches(folder, pattern):
            path.unlink(missing_ok=True)
    for name in reversed(FOLDERS):
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()


def _matches(folder: Path, pattern: str) -> Iterator[Path]:
    """Files by the name, and what a killed writer has left of them beside it."""
    above, _, name = pattern.rpartition("/")
    drafts = [f".{name}.{end}" for end in ("*.tmp", "part", "*[0-9]")]
    drafts += [f"{name.removesuffix('.png')}.part"] if name.endswith(".png") else []
    for found in (name, *drafts):
        yield from (
            path for path in list((folder / above).glob(found)) if path.is_symlink() or path.is_file()
        )
