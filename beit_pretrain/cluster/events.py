"""`events.csv`: when a run began, was interrupted and went on. Nothing in it is ever cut off."""

from __future__ import annotations

import csv
import io
import os
from datetime import UTC, datetime
from pathlib import Path

from beit_pretrain.cluster.launch import job_id, restarts
from beit_pretrain.errors import BeitError

FIELDS = ("time", "step", "event", "job", "restart", "ranks", "detail")


def record(run_dir: Path, event: str, *, step: int, ranks: int, detail: str = "") -> None:
    """Append one line: `start`, `signal`, `requeue`, `stop` or `finish`, after `step` updates."""
    path = Path(run_dir) / "events.csv"
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists():
        writer.writerow(FIELDS)
    writer.writerow([now, step, event, job_id() or "", restarts(), ranks, detail])
    # One write to the end of the file: a kill leaves the line or not, hardly ever a part of it.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, text.getvalue().encode())
    finally:
        os.close(descriptor)


def read(run_dir: Path) -> list[dict[str, str]]:
    """The lines of a run's events.csv, oldest first; torn ones are left out. BeitError if it is another file."""
    path = Path(run_dir) / "events.csv"
    if not path.exists():
        return []
    try:
        whole = path.read_bytes().rpartition(b"\n")[0].decode()
        table = csv.DictReader(io.StringIO(whole))
        rows = list(table)
        if missing := set(FIELDS) - set(table.fieldnames or ()):
            raise ValueError(f"it has no column {min(missing)}")
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        reason = " ".join(str(error).split())
        raise BeitError(f"{path} is damaged ({reason}): mend or move the file away") from error
    return [
        row for row in rows if None not in row.values() and _number(row["step"]) and _number(row["restart"])
    ]


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def requeue_unsaid(run_dir: Path) -> bool:
    """Whether this job went back into the queue and Slurm ended its last life before that could say so."""
    rows = read(run_dir)
    last = rows[-1] if rows else {"event": ""}
    return last["event"] == "signal" and last["job"] == job_id() and int(last["restart"]) < restarts()


def starts_in_vain(run_dir: Path, step: int) -> int:
    """Starts of this Slurm job in a row that began after `step` and did not get beyond it; 0 outside of Slurm."""
    job = job_id()
    if job is None:
        return 0
    count = 0
    for row in reversed(read(run_dir)):
        if row["event"] == "start" and (row["job"] != job or int(row["step"]) != step):
            break
        if row["event"] == "start":
            count += 1
    return count
