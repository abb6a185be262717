"""Metrics as CSV files that outlive restarts: `metrics.csv` for what repeats, `timing.csv` for the rest.

One row per optimiser step: everything logged at the same step lands in the same row, however many calls it
took. So a run that was killed and resumed leaves the same file as one that was not.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from beit_pretrain.errors import DataError

TIME = "time/"  # metrics below this prefix differ from run to run
FIXED = ["step", "epoch"]


class CsvLog(Logger):
    """Writes `metrics.csv` and `timing.csv` into the run folder, each row on disk at once.

    Before the first row is written, both files are cut back to `resume_step`, the step of the checkpoint that
    the run goes on from; without one, to step 0.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        super().__init__()
        self._run_dir = Path(run_dir)
        self._metrics = _Table(self._run_dir / "metrics.csv", resume_step or 0)
        self._timing = _Table(self._run_dir / "timing.csv", resume_step or 0)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._run_dir)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add numbers to the row of `step`; numbers already there under the same name are replaced."""
        if step is None:
            raise ValueError("a metric needs the optimiser step it belongs to")
        epoch = {"epoch": metrics["epoch"]} if "epoch" in metrics else {}
        rest = {name: value for name, value in metrics.items() if name not in FIXED}
        timing = {name.removeprefix(TIME): value for name, value in rest.items() if name.startswith(TIME)}
        steady = {name: value for name, value in rest.items() if not name.startswith(TIME)}
        for table, values in ((self._metrics, steady), (self._timing, timing)):
            if values:
                table.put(step, {name: _number(value) for name, value in (epoch | values).items()})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run folder holds `config.yaml`."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of such a file, empty cells left out, without a last line that was never finished.

    No file means no rows. Raises DataError for a file that isn't such a table.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    try:
        header, *body = list(csv.reader(io.StringIO(whole.decode()))) or [["step"]]
    except (UnicodeDecodeError, csv.Error):
        header, body = [], []
    sound = header[:1] == ["step"] and all(len(line) == len(header) and line[0].isdecimal() for line in body)
    if not sound:
        raise DataError(
            f"{path} is not a table of metrics (a header that begins with `step`, then as many cells in "
            "every line): move it away, or start anew with overwrite=true or another name="
        )
    return [{n: v for n, v in zip(header, line, strict=True) if v} for line in body]


class _Table:
    """A CSV file with growing columns, keyed by step; never left half-rewritten."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.resume_step = resume_step
        self.columns: list[str] = []  # none: the file has not been looked at yet
        self.last: dict[str, str] = {}  # the file's last row
        self.last_offset = 0  # where that row begins, in bytes

    def put(self, step: int, values: Mapping[str, str]) -> None:
        if not self.columns:
            self._open()
        row = {"step": str(step), **values}
        merged = self.last.get("step") == row["step"]
        if merged:
            row = self.last | row
        new = [name for name in row if name not in self.columns]
        if not merged and not new:
            self._append(row)
        elif new:
            rows = read_rows(self.path)
            self._write(self.columns + new, [*(rows[:-1] if merged else rows), row])
        else:
            head = self.path.read_bytes()[: self.last_offset]
            _replace(self.path, head + _line(row, self.columns))
            self.last = row

    def _open(self) -> None:
        """Take up the rows up to `resume_step` and the columns that still hold something; or begin."""
        rows = [row for row in read_rows(self.path) if int(row["step"]) <= self.resume_step]
        names = dict.fromkeys(name for row in rows for name in row)
        self._write(list(dict.fromkeys([*FIXED, *names])), rows)

    def _append(self, row: Mapping[str, str]) -> None:
        with self.path.open("ab") as file:
            self.last_offset = file.seek(0, os.SEEK_END)
            file.write(_line(row, self.columns))
        self.last = dict(row)

    def _write(self, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
        rows = list(rows)
        lines = [_line(dict(zip(columns, columns, strict=True)), columns)]
        lines += [_line(row, columns) for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.path, b"".join(lines))
        self.columns = list(columns)
        self.last = dict(rows[-1]) if rows else {}
        self.last_offset = sum(len(line) for line in lines[:-1])


def _line(row: Mapping[str, str], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in columns])
    return text.getvalue().encode()


def _number(value: Tensor | float) -> str:
    """All digits, so that equal text means equal numbers."""
    plain = value.item() if isinstance(value, Tensor) else value
    return repr(int(plain)) if isinstance(plain, int) else repr(float(plain))


def _replace(path: Path, content: bytes) -> None:
    """The old file or the new one, never a part of either."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
