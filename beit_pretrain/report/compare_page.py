"""The page on which runs stand side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from beit_pretrain.report.compare import Entry, Group, curves, other_epochs, say
from beit_pretrain.report.folder import text
from beit_pretrain.report.html import View, render, view, write
from beit_pretrain.report.sections import stage_words
from beit_pretrain.report.words import compact, duration, whole

UPRIGHT = 6  # runs that have a column each among the options; more have a row each
NAMED = 8  # options with the same values that are named


class RunView(NamedTuple):
    """A row of the table: `cells` are (text, whether it is the best of its column)."""

    label: str
    href: str
    status: str
    colour: str
    dash: str
    cells: list[tuple[str, bool]]


class GroupView(NamedTuple):
    """The runs of one stage; `options` is the table of what differs, its head first, None with a single run."""

    title: str
    count: int
    best: str
    command: str
    head: list[str]
    runs: list[RunView]
    options: list[list[str]] | None
    alike: list[str]
    charts: list[View]
    by_epoch: list[View]


def make_comparison(groups: Sequence[Group], path: Path, *, left_out: Sequence[str] = ()) -> Path:
    """Writes the page to `path` and returns it; `left_out` says which runs are missing, and why.

    Raises `BeitError` if it cannot be written.
    """
    views = [_group(group, path) for group in groups]
    return write(path, render("compare.html.j2", title="Runs compared", groups=views, left_out=left_out))


def best_words(group: Group) -> str:
    """Which run is best, and by what."""
    if group.best is None or group.main is None or len(group.ranked(group.main)) < 2:
        return ""
    which = (
        "finished runs" if group.best.run.status == "finished" else "runs so far, none of which is finished"
    )
    value = say(group.main, group.best.run.metric(group.main))
    return f"Best {group.main} of the {which}: {group.best.label}, {value}"


def _group(group: Group, path: Path) -> GroupView:
    words = best_words(group)
    restarted = any(entry.run.restarts for entry in group.entries)
    head = [
        "run",
        "status",
        "steps",
        *group.metrics,
        "time",
        "images/s",
        *(["restarts"] if restarted else []),
    ]
    return GroupView(
        title=stage_words(group.entries[0].run) or "runs of an unknown stage",
        count=len(group.entries),
        best=words,
        command=text(group.best.run.results, "command") if words and group.best else "",
        head=head,
        runs=[_run(entry, group, path, restarted) for entry in group.entries],
        options=_options(group) if len(group.entries) > 1 else None,
        alike=[_alike(found.keys) for found in group.differences if len(found.keys) > 1],
        charts=[view(chart) for chart in curves(group)],
        by_epoch=[view(chart) for chart in curves(group, "epoch")] if other_epochs(group) else [],
    )


def _run(entry: Entry, group: Group, path: Path, restarted: bool) -> RunView:
    there = entry.run.path / "report.html"
    href = Path(os.path.relpath(there.resolve(), path.resolve().parent)).as_posix() if there.is_file() else ""
    cells = [("" if entry.steps is None else whole(entry.steps), False)]
    for metric in group.metrics:
        cells.append((say(metric, entry.run.metric(metric)), entry.label in group.winners(metric)))
    cells.append(("" if entry.seconds is None else duration(entry.seconds), False))
    cells.append(("" if entry.speed is None else compact(entry.speed), False))
    cells += [(whole(len(entry.run.restarts)), False)] if restarted else []
    return RunView(entry.label, quote(href), entry.run.status, entry.colour, entry.dash, cells)


def _options(group: Group) -> list[list[str]]:
    """Options down and runs across, or the other way round where there are many runs."""
    if not group.differences:
        return []
    labels = [entry.label for entry in group.entries]
    upright = [["option", *labels], *([found.keys[0], *found.values] for found in group.differences)]
    if len(labels) <= UPRIGHT:
        return upright
    across = [list(row) for row in zip(*upright, strict=True)]
    return [["run", *across[0][1:]], *across[1:]]


def _alike(keys: Sequence[str]) -> str:
    first, *others = keys
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return f"Like {first}: {', '.join(others[:NAMED])}{more}"
