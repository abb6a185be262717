"""A run folder as the report sees it: read once, checked, and never written to.

A file that is not there leaves its part empty (a run may have been stopped at any moment); a file that is
there and cannot be read is one `BeitError` that names it.
"""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.errors import BeitError
from beit_pretrain.report.events import Event, read_events, restarts
from beit_pretrain.run_files import CONFIG, RESULTS, read_config, read_json


class Series(NamedTuple):
    """One column of a CSV file without its empty cells."""

    step: np.ndarray
    value: np.ndarray

    @property
    def last(self) -> float:
        return float(self.value[-1])

    def finite(self) -> Series:
        """The rows that can be drawn."""
        keep = np.isfinite(self.value)
        return Series(self.step[keep], self.value[keep])


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run folder holds."""

    path: Path
    results: Mapping[str, Any]
    config: Mapping[str, Any]
    config_text: str
    metrics: Mapping[str, Series]
    timing: Mapping[str, Series]
    events: list[Event]
    sheets: list[Path]
    masks: Path | None

    @property
    def name(self) -> str:
        return text(self.results, "name") or text(self.config, "name") or self.path.name

    @property
    def stage(self) -> str:
        config = mapping(self.config, "stage", self.path / "config.yaml")
        return text(self.results, "stage") or text(config, "name")

    @property
    def status(self) -> str:
        return text(self.results, "status") or "unfinished"

    @property
    def restarts(self) -> list[int]:
        """The steps after which the run went on."""
        return restarts(self.events)

    def section(self, *keys: str) -> Mapping[str, Any]:
        """The mapping inside `results.json` at the path `keys`; empty if the run did not write it."""
        inner = self.results
        for key in keys:
            inner = mapping(inner, key, self.path / "results.json")
        return inner

    def number(self, *keys: str) -> float | None:
        """A number of `results.json` at the path `keys`; None if the run did not write it."""
        return number(self.section(*keys[:-1]), keys[-1], self.path / "results.json")

    def metric(self, name: str) -> float | None:
        """The final value of a metric: what the run put down as its result, else the last one it logged."""
        final = self.number("metrics", name)
        if final is None and name in self.metrics:
            final = self.metrics[name].last
        return final


def read_run(path: Path) -> Run:
    """Everything the report needs from the run folder at `path`."""
    if not path.is_dir():
        raise BeitError(f"There is no run folder {path}: give the folder that holds the run's results.json")
    config_text, config = read_config(path / CONFIG)
    masks = path / "pictures" / "masks.png"
    sheets = [sheet for sheet in (path / "pictures").glob("step-*.png") if sheet_step(sheet) >= 0]
    return Run(
        path=path,
        results=read_json(path / RESULTS),
        config=config,
        config_text=config_text,
        metrics=read_series(path / "metrics.csv"),
        timing=read_series(path / "timing.csv"),
        events=read_events(path / "events.csv"),
        sheets=sorted(sheets, key=sheet_step),
        masks=masks if masks.is_file() else None,
    )


def sheet_step(sheet: Path) -> int:
    """The optimiser step in the name of a picture, `step-00000500.png`; -1 if there is none."""
    found = re.fullmatch(r"step-(\d+)", sheet.stem)
    return int(found[1]) if found else -1


def read_series(path: Path) -> dict[str, Series]:
    """The columns of a CSV file with a `step` column, each with the steps at which it has a value.

    A last line without an end was cut off while it was written and is left out.
    """
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        lines = (line for line in file if line.endswith("\n"))
        try:
            return _columns(csv.reader(lines), path)
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise BeitError(f"{path} is damaged ({error}): mend or move the file away") from error


def _columns(rows: Any, path: Path) -> dict[str, Series]:
    header = next(rows, None)
    if header is None:
        return {}
    if "step" not in header:
        raise ValueError("its first line has no column 'step'")
    where = header.index("step")
    others = [(index, name) for index, name in enumerate(header) if index != where]
    steps = {name: array("d") for _, name in others}
    values = {name: array("d") for _, name in others}
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(f"line {rows.line_num} has {len(row)} cells and the first line {len(header)}")
        step = float(row[where])
        for index, name in others:
            if row[index]:
                steps[name].append(step)
                values[name].append(float(row[index]))
    # frombuffer shares the memory: a log of a million steps is large enough once
    return {
        name: Series(np.frombuffer(steps[name]), np.frombuffer(values[name]))
        for name in values
        if values[name]
    }


def text(values: Mapping[str, Any], key: str) -> str:
    """A piece of text, or nothing where the key is missing or holds something else."""
    value = values.get(key)
    return value if isinstance(value, str) else ""


def mapping(values: Mapping[str, Any], key: str, source: Path) -> Mapping[str, Any]:
    """A mapping inside a mapping; empty if missing, an error if it is something else."""
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BeitError(f"{source}: '{key}' should be a mapping, got {value!r}: mend or move the file away")
    return value


def rows(values: Mapping[str, Any], key: str, source: Path) -> list[Any]:
    """A list inside a mapping; empty if missing, an error if it is something else."""
    value = values.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BeitError(f"{source}: '{key}' should be a list, got {value!r}: mend or move the file away")
    return value


def records(values: Mapping[str, Any], key: str, source: Path) -> list[Mapping[str, Any]]:
    """A list of mappings inside a mapping; empty if missing, an error if it is something else."""
    found = rows(values, key, source)
    for row in found:
        if not isinstance(row, dict):
            raise BeitError(
                f"{source}: each of '{key}' should be a mapping, got {row!r}: mend or move the file away"
            )
    return found


def counts(values: Sequence[Any], key: str, source: Path) -> np.ndarray:
    """Whole numbers from 0 on as an int64 array, an error if there is anything else."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
            raise BeitError(
                f"{source}: '{key}' should hold counts, got {value!r}: mend or move the file away"
            )
    return np.array(values, dtype=np.int64)


def number(values: Mapping[str, Any], key: str, source: Path) -> float | None:
    """A number inside a mapping; None if missing or not finite, an error if it is something else."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BeitError(f"{source}: '{key}' should be a number, got {value!r}: mend or move the file away")
    return float(value) if math.isfinite(value) else None
