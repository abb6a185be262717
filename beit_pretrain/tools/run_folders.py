"""Which folders hold a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from beit_pretrain.errors import BeitError
from beit_pretrain.run_files import CONFIG, FOLDERS


def is_run(folder: Path) -> bool:
    """Whether a run has begun in this very folder."""
    return (folder / CONFIG).is_file()


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The runs that `paths` stand for, each once: a folder that is a run, else all runs below it, by name."""
    found: dict[Path, Path] = {}
    for path in paths:
        below = [path] if is_run(path) else sorted(_below(path))
        if not below:
            there = "holds no run" if path.is_dir() else "is not there"
            raise BeitError(f"{path} {there}: give folders of runs (with a config.yaml), or one above them")
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _below(path: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(path):
        # W&B's files have a config.yaml of their own.
        inner[:] = [name for name in inner if name not in FOLDERS and not name.startswith(".")]
        if CONFIG in files:
            yield Path(folder)
