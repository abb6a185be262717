"""Runs side by side: their results, the options in which they differ, and their curves in one chart."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.report.comparison import COLOURS
from beit_pretrain.report.curves import DASHES, Chart, Line
from beit_pretrain.report.folder import Run, Series
from beit_pretrain.report.words import compact, percent, plain
from beit_pretrain.wording import cell

# What a run of each stage is judged by, the first that is there. On test images only where nothing else is held out:
# choosing by them would spoil them.
MAIN = {
    "classify": ("val/top1", "test/top1"),
    "segment": ("val/miou", "test/miou"),
    "probe": ("val/best", "test/best"),
    "knn": ("knn/trained",),
}
OTHERS = ("val/loss",)  # of the stages that are not named above
LOWER = {"loss", "recon"}
SHARES = {"accuracy", "top1", "top5", "miou", "macc", "aacc", "best", "trained", "untrained", "pixels"}
SHARES |= {"codebook_use"}
REFERENCES = {"untrained", "pixels"}  # what a run is compared with; none of its merits
HIDDEN = re.compile(r".*(_se|/images|/tokens|/temperature|block_?\d*)$")
HELD_OUT = ("val/", "val_ema/", "test/", "knn/")
# Where a run lies and how it was started, not what it is.
IGNORED = {"name", "runs", "run_dir", "overwrite", "debug", "dry_run", "resume_step", "chain", "experiment"}
CROWD = 6  # runs that are drawn in full; more are thin lines
LEGEND = 12  # entries of a legend that are not folded away
ABSENT = "–"  # noqa: RUF001 (a dash)


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A run in a comparison; `config` is flat, without what only says where the run lies."""

    label: str
    run: Run
    config: Mapping[str, Any]
    steps: float | None
    seconds: float | None
    speed: float | None
    colour: str = ""
    dash: str = ""


class Difference(NamedTuple):
    """Options that differ, and differ alike; `values` has one for each run."""

    keys: list[str]
    values: list[str]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one stage, best first as far as they can be ranked."""

    stage: str
    entries: list[Entry]
    metrics: list[str]  # the main one first, if there is one
    main: str | None
    differences: list[Difference]

    @property
    def best(self) -> Entry | None:
        """The finished run with the best main metric."""
        return next(iter(self.ranked(self.main)), None) if self.main else None

    def ranked(self, metric: str) -> list[Entry]:
        """The runs that can be compared by a metric, best first: the finished ones, if there are any."""
        done = [entry for entry in self.entries if entry.run.status == "finished"] or self.entries
        known = [(value, entry) for entry in done if (value := entry.run.metric(metric)) is not None]
        known = [(value, entry) for value, entry in known if np.isfinite(value)]
        return [entry for _, entry in sorted(known, key=lambda pair: _sign(metric) * pair[0])]

    def winners(self, metric: str) -> set[str]:
        """Labels of the runs with the best value of a metric; none if all have it, or if it has no better and worse."""
        if metric.split("/")[-1] not in (LOWER | SHARES) - REFERENCES:
            return set()
        ranked = self.ranked(metric)
        best = {entry.label for entry in ranked if entry.run.metric(metric) == ranked[0].run.metric(metric)}
        return best if len(best) < len(ranked) else set()


def compare_runs(runs: Sequence[Run]) -> list[Group]:
    """A group for each stage, in the order of the first run of each."""
    stages = dict.fromkeys(run.stage for run in runs)
    return [_group(stage, [run for run in runs if run.stage == stage]) for stage in stages]


def say(metric: str, value: float | None) -> str:
    """A value as its kind is written."""
    if value is None:
        return ABSENT
    return percent(value) if metric.split("/")[-1] in SHARES else compact(value)


def _entry(run: Run, label: str) -> Entry:
    last = max((series.step[-1] for series in run.metrics.values()), default=None)
    steps, seconds = run.number("steps"), run.number("seconds")
    timed, speed = (run.timing.get(name) for name in ("seconds", "images_per_second"))
    known = None if speed is None else speed.finite().value
    return Entry(
        label=label,
        run=run,
        config=_flat(run),
        steps=last if steps is None else steps,
        seconds=timed.last if seconds is None and timed is not None else seconds,
        speed=float(np.median(known)) if known is not None and len(known) else None,
    )


def _group(stage: str, runs: list[Run]) -> Group:
    above = os.path.commonpath([run.path.resolve().parent for run in runs])
    entries = [_entry(run, os.path.relpath(run.path.resolve(), above)) for run in runs]
    metrics = _metrics(entries)
    main = next((name for name in MAIN.get(stage, OTHERS) if name in metrics), None)
    if main is not None:
        metrics = [main, *(name for name in metrics if name != main)]
    group = Group(stage=stage, entries=entries, metrics=metrics, main=main, differences=[])
    first = group.ranked(main) if main is not None else []
    order = [*first, *(entry for entry in entries if entry not in first)]
    looks = cycle((colour, dash) for dash, colour in product(DASHES, COLOURS))
    dressed = [replace(entry, colour=c, dash=d) for entry, (c, d) in zip(order, looks, strict=False)]
    return replace(group, entries=dressed, differences=differences(dressed))


def _metrics(entries: Sequence[Entry]) -> list[str]:
    """The held-out numbers that all finished runs have; without a finished one, all that any has."""
    done = [entry.run for entry in entries if entry.run.status == "finished"]
    names = dict.fromkeys(name for entry in entries for name in _held_out(entry.run))
    return [name for name in names if all(run.metric(name) is not None for run in done)]


def _held_out(run: Run) -> Iterator[str]:
    for name in (*run.section("metrics"), *run.metrics):
        if name.startswith(HELD_OUT) and not HIDDEN.match(name):
            yield name


# --- options ------------------------------------------------------------------------------------------------


def _flat(run: Run) -> dict[str, Any]:
    """The configuration by dotted keys, the run's own name and folder by what they are."""
    own = {key: run.config.get(key) for key in ("name", "run_dir")}

    def leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict) and node:
            for name, inner in node.items():
                yield from leaves(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(node, str) and node == own["name"]:
            yield key, "${name}"
        elif isinstance(node, str) and own["run_dir"] and f"{node}/".startswith(f"{own['run_dir']}/"):
            yield key, node.replace(own["run_dir"], "${run_dir}", 1)
        else:
            yield key, node

    config = {key: value for key, value in run.config.items() if key not in IGNORED}
    return dict(leaves(config, ""))


def differences(entries: Sequence[Entry]) -> list[Difference]:
    """The options that are not the same in all runs; those that follow the same values are one."""
    found: dict[tuple[str, ...], list[str]] = {}
    for key in dict.fromkeys(key for entry in entries for key in entry.config):
        values = tuple(plain(entry.config[key]) if key in entry.config else ABSENT for entry in entries)
        if len(set(values)) > 1:
            found.setdefault(values, []).append(key)
    return [
        Difference(sorted(keys, key=lambda key: key.count(".")), _shortened(values))
        for values, keys in found.items()
    ]


def _shortened(values: Sequence[str]) -> list[str]:
    """Paths and dotted names without the folders that all have in common."""
    shared = os.path.commonprefix([value for value in values if value != ABSENT])  # noqa: RUF071 (letters are meant)
    cut = max(shared.rfind("/"), shared.rfind(".")) + 1
    if cut < 12:
        return list(values)
    return [value if value == ABSENT else f"…{value[cut:]}" for value in values]


# --- curves -------------------------------------------------------------------------------------------------


def curves(group: Group, along: str = "step") -> list[Chart]:
    """Training loss, held-out loss and the main metric of all runs, over steps or epochs."""
    names = {"train/loss": "Training loss", "val/loss": "Held-out loss"}
    if group.main is not None:
        names.setdefault(group.main, group.main)
    made = []
    for name, title in names.items():
        known = [(entry, series) for entry in group.entries if (series := _series(entry.run, name, along))]
        if max((len(series.value) for _, series in known), default=0) < 2:
            continue
        crowd = len(known) > CROWD
        lines = [
            Line(
                label=entry.label,
                series=series,
                colour=entry.colour,
                dash=entry.dash,
                smooth=name.startswith("train/"),
                markers=not crowd,
                crowd=crowd and entry is not group.entries[0],
            )
            for entry, series in known
        ]
        share = name.split("/")[-1] in SHARES
        note = "numbers: the last value"
        made.append(Chart(title=title, lines=lines, along=along, percent=share, fold=LEGEND, note=note))
    return made


def other_epochs(group: Group) -> bool:
    """Whether the runs take different numbers of steps for an epoch, so that epochs show something else."""
    ends = [entry.run.metrics["epoch"].finite() for entry in group.entries if "epoch" in entry.run.metrics]
    rates = [
        float(series.step[-1] / series.value[-1]) for series in ends if len(series.value) and series.last > 0
    ]
    return len(rates) > 1 and max(rates) > 1.001 * min(rates)


def _series(run: Run, name: str, along: str) -> Series | None:
    series = run.metrics.get(name)
    known = None if series is None else series.finite()
    if known is None or not len(known.value):
        return None
    if along == "step":
        return known
    epoch = run.metrics.get("epoch")
    return None if epoch is None else Series(np.interp(known.step, *epoch.finite()), known.value)


# --- the table ----------------------------------------------------------------------------------------------


def table(groups: Sequence[Group]) -> str:
    """All runs as CSV: one row each, every digit, and the options that differ within a stage."""
    rows = []
    for group in groups:
        for entry in group.entries:
            row: dict[str, Any] = {"name": entry.label, "stage": group.stage, "status": entry.run.status}
            row |= {"steps": entry.steps, "seconds": entry.seconds, "images_per_second": entry.speed}
            row |= {"restarts": len(entry.run.restarts), "folder": entry.run.path}
            row |= {name: entry.run.metric(name) for name in group.metrics}
            row |= {key: entry.config.get(key) for found in group.differences for key in found.keys}
            rows.append(row)
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writerow({name: cell(name) for name in columns})
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _sign(metric: str) -> int:
    """Multiplied with it, the best value is the lowest."""
    return 1 if metric.split("/")[-1] in LOWER else -1
