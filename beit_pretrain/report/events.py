"""What `events.csv` tells: when a run started, at which step it went on, and how each part of it ended."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from beit_pretrain.errors import BeitError

COLUMNS = ["time", "step", "event", "job", "restart", "ranks", "detail"]
LATEST = 30  # starts that a page shows at first


class Event(NamedTuple):
    """One line of `events.csv`."""

    time: str  # UTC, 2026-01-31T12:00:00Z
    step: int
    event: str  # start, signal, requeue, stop or finish
    job: str  # Slurm's number, empty without Slurm
    restart: int  # how often Slurm had put the job back into the queue
    ranks: int
    detail: str


class Start(NamedTuple):
    """A row of the page: when and where training began or went on, and how the part before it ended."""

    time: str
    step: str
    job: str
    ranks: str
    before: str


def read_events(path: Path) -> list[Event]:
    """The lines of `events.csv` in order; none without the file.

    A line that was cut off by a kill is left out, with the one that was appended to it.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = (line for line in file if line.endswith("\n"))
        try:
            header, *body = list(csv.reader(lines)) or [COLUMNS]
            if header != COLUMNS:
                raise ValueError(f"its first line should be {','.join(COLUMNS)}")
            return [_event(row) for row in body if len(row) == len(COLUMNS)]
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise BeitError(f"{path} is damaged ({error}): mend or move the file away") from error


def _event(row: list[str]) -> Event:
    time, step, event, job, restart, ranks, detail = row
    return Event(time, int(step), event, job, int(restart), int(ranks), detail)


def restarts(events: Sequence[Event]) -> list[int]:
    """The steps after which a run went on, one for each start but the first."""
    return [event.step for event in events if event.event == "start"][1:]


def starts(events: Sequence[Event]) -> list[Start]:
    """A row for each start, in order; none if the run started only once."""
    rows: list[Start] = []
    since: list[Event] = []  # what happened since the last start
    for event in events:
        if event.event == "start":
            job = f"{event.job}, restart {event.restart}" if event.job and event.restart else event.job
            when = event.time.replace("T", " ").removesuffix("Z")
            before = _ending(since) if rows else ""
            rows.append(Start(when, f"{event.step:,}", job, f"{event.ranks:,}", before))
            since = []
        else:
            since.append(event)
    return rows if len(rows) > 1 else []


def _ending(since: Sequence[Event]) -> str:
    """How a part of a run ended, from what it wrote after its start."""
    said = []
    for event in since:
        if event.event == "signal":
            said.append(f"signal {event.detail} after step {event.step:,}")
        elif event.event == "requeue":
            said.append("put back into the queue")
        elif event.event == "stop":
            said.append(f"stopped: {event.detail}" if event.detail else "stopped")
        elif event.event == "finish":
            said.append("finished")
    return ", ".join(said) or "killed, or its node failed"
