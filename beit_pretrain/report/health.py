"""Whether a run is well: its speed, what it waits for, memory, gradients, and steps that were refused."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from beit_pretrain.report.charts import drawable
from beit_pretrain.report.curves import Chart, Line
from beit_pretrain.report.events import LATEST, Start, starts
from beit_pretrain.report.folder import Run, Series


class Health(NamedTuple):
    """The charts, and the starts of a run that was interrupted: the latest, and those folded away."""

    charts: list[Chart]
    starts: list[Start]
    earlier: list[Start]


def health(run: Run) -> Health | None:
    """None if the run wrote nothing of the kind."""
    made = (speed(run), waiting(run), memory(run), utilisation(run), gradient_norm(run))
    found = drawable(run, (*made, loss_scale(run), skipped(run)))
    table = starts(run.events)
    return Health(found, table[-LATEST:], table[:-LATEST]) if found or table else None


def speed(run: Run) -> Chart | None:
    line = _typical(run.timing.get("images_per_second"))
    return None if line is None else Chart(title="Images per second", lines=[line], zero=True)


def waiting(run: Run) -> Chart | None:
    line = _typical(run.timing.get("data_wait_share"))
    if line is None:
        return None
    return Chart(title="Waiting for data", lines=[line], percent=True, zero=True, note="share of the time")


def memory(run: Run) -> Chart | None:
    """Of the process (and GPU) that takes most."""
    looks = (("gpu_memory_gb", "GPU", "training"), ("memory_gb", "main memory, so far", "baseline"))
    known = [(_known(run.timing.get(name)), label, colour) for name, label, colour in looks]
    lines = [
        Line(label=label, series=series, colour=colour, number=float(series.value.max()))
        for series, label, colour in known
        if series is not None
    ]
    note = "peak in GB; numbers: highest"
    return Chart(title="Memory", lines=lines, zero=True, note=note) if lines else None


def utilisation(run: Run) -> Chart | None:
    line = _typical(run.timing.get("gpu_utilisation"))
    if line is None:
        return None
    note = "of the least busy; share of the time"
    return Chart(title="GPU utilisation", lines=[line], percent=True, zero=True, note=note)


def gradient_norm(run: Run) -> Chart | None:
    """On a logarithmic axis once spikes would hide everything else."""
    line = _typical(run.metrics.get("train/grad_norm"))
    if line is None:
        return None
    values = line.series.value
    spiky = bool(values.min() > 0 and values.max() > 20 * np.median(values))
    return Chart(title="Gradient norm", lines=[line], log=spiky, zero=not spiky, note="before clipping")


def loss_scale(run: Run) -> Chart | None:
    """It goes by powers of two, so on a logarithmic axis."""
    series = _known(run.timing.get("loss_scale"))
    if series is None:
        return None
    return Chart(title="Loss scale", lines=[Line(label="last", series=series)], log=True, note="of 16-mixed")


def skipped(run: Run) -> Chart | None:
    """Nothing to see while there are none."""
    series = _known(run.metrics.get("train/bad_steps"))
    if series is None or not series.value.any():
        return None
    note = "loss or gradient not finite, all so far"
    return Chart(title="Refused steps", lines=[Line(label="last", series=series)], zero=True, note=note)


def _known(series: Series | None) -> Series | None:
    known = None if series is None else series.finite()
    return known if known is not None and len(known.value) else None


def _typical(series: Series | None) -> Line | None:
    """A noisy quantity, its median in the legend."""
    known = _known(series)
    if known is None:
        return None
    return Line(label="median", series=known, smooth=True, number=float(np.median(known.value)))
