"""The table of a search on the terminal, and the command of its best run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beit_pretrain.tools.sweep_study import Search, option, trial_name, within
from beit_pretrain.wording import printable

WORDS = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


def show_sweep(search: Search, overrides: Sequence[str]) -> None:
    """Print all trials, finished ones first, the best on top; then the best run's whole command."""
    settings, trials = search.settings, search.trials()
    name = settings["name"]
    best_first = sorted(trials, key=lambda trial: _rank(trial, settings["direction"]))
    table = Table(title=Text(f"{name}: {len(trials)} of {settings['trials']} trials"), title_justify="left")
    for column in ("trial", "state", "epoch", settings["metric"], *settings["parameters"]):
        table.add_column(Text(column))
    for trial in best_first:
        values = [_value(trial), *(trial.params.get(key) for key in settings["parameters"])]
        cells = [
            trial_name(trial.number),
            WORDS[trial.state],
            str(trial.last_step or ""),
            *map(_cell, values),
        ]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console = Console()
    console.print(table)
    if best_first and best_first[0].state == TrialState.COMPLETE:
        best, space = best_first[0], settings["parameters"]
        # A journal may come from elsewhere, and its options would be pasted into a command.
        if best.params.keys() != space.keys() or not all(
            within(best.params[k], how) for k, how in space.items()
        ):
            console.print(
                "best: its options are not those of this search, so no command is given", markup=False
            )
            return
        drawn = [option(key, best.params[key]) for key in space]
        command = shlex.join(["beit-train", *overrides, *drawn, f"name={name}/{trial_name(best.number)}"])
        console.print(f"best: {printable(command)}", soft_wrap=True, highlight=False, markup=False)


def _value(trial: FrozenTrial) -> float | None:
    """The number of the last evaluation, also of a trial that did not come to its end."""
    if trial.value is not None:
        return trial.value
    return trial.intermediate_values[trial.last_step] if trial.last_step is not None else None


def _rank(trial: FrozenTrial, direction: str) -> tuple[bool, float, int]:
    value = _value(trial)
    unfinished = trial.state != TrialState.COMPLETE
    sign = -1 if direction == "max" else 1
    return unfinished, float("inf") if value is None or value != value else sign * value, trial.number


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
