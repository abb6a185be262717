"""Runs side by side: a page, a table for other programs, and the short of it on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from beit_pretrain.errors import BeitError
from beit_pretrain.report.compare import Group, compare_runs, say, table
from beit_pretrain.report.compare_page import best_words, make_comparison
from beit_pretrain.report.folder import Run, read_run, text
from beit_pretrain.report.html import write
from beit_pretrain.report.words import duration, whole
from beit_pretrain.tools.run_folders import run_folders
from beit_pretrain.wording import printable

ROWS = 15  # runs of a stage that the terminal shows
METRICS = 2  # of them


def compare(paths: Sequence[Path], *, out: Path, csv: Path | None) -> None:
    """Compare the runs that `paths` stand for; one that cannot be read is named and left out."""
    runs: list[Run] = []
    left_out: list[str] = []
    for folder in run_folders(paths):
        try:
            runs.append(read_run(folder))
        except BeitError as error:
            left_out.append(str(error))
            print(f"left out: {error}", file=sys.stderr)
    if len(runs) < 2:
        raise BeitError(f"{len(runs)} run to compare in {', '.join(map(str, paths))}: give at least two")
    groups = compare_runs(runs)
    written = [make_comparison(groups, out, left_out=left_out)]
    if csv is not None:
        written.append(write(csv, table(groups)))
    console = Console()
    for group in groups:
        _show(console, group)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True, highlight=False, markup=False)


def _show(console: Console, group: Group) -> None:
    metrics = group.metrics[:METRICS]
    rows = Table(title=Text(printable(group.stage or "unknown stage")), title_justify="left")
    for head in ("run", *metrics, "steps", "time"):
        numbers = head != "run"
        rows.add_column(
            Text(printable(head)), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold"
        )
    for entry in group.entries[:ROWS]:
        values = [say(metric, entry.run.metric(metric)) for metric in metrics]
        steps = "" if entry.steps is None else whole(entry.steps)
        steps += "" if entry.run.status == "finished" else f" {entry.run.status}"
        time = "" if entry.seconds is None else duration(entry.seconds)
        rows.add_row(*(Text(printable(cell)) for cell in (entry.label, *values, steps, time)))
    console.print(rows)
    said = [f"and {len(group.entries) - ROWS} more"] if len(group.entries) > ROWS else []
    if words := best_words(group):
        said.append(words)
        said += (
            [f"  {command}"] if group.best and (command := text(group.best.run.results, "command")) else []
        )
    for line in said:
        console.print(printable(line), soft_wrap=True, highlight=False, markup=False)
