"""A chart as one piece of inline SVG that follows the page's colours, light or dark.

Matplotlib draws it through its object interface; every colour of the palette then becomes a CSS variable and
every font the page's own, so the page alone decides how a chart looks.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from beit_pretrain.report.folder import Series
from beit_pretrain.report.words import compact, whole

# The light colours. Each is unique because it is replaced by var(--name); style.css holds both sets.
PALETTE = {
    "training": "#1f6fb2",
    "heldout": "#c2501a",
    "third": "#2c7d55",
    "fourth": "#7a4fa3",
    "baseline": "#646c76",
    "faint": "#a9b4c1",
    "mark": "#b98a2e",
    "ink": "#555d66",
    "grid": "#e3e7ec",
    "paper": "#fefefe",
}
DASHES = {"solid": "-", "dashed": (0, (5, 2.5)), "dotted": (0, (1.2, 2))}
BUCKETS = 800  # more points than this are finer than the pixels of a chart
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "path.simplify": True,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. `smooth` puts a moving average over a faint trace of what was measured."""

    label: str
    series: Series
    colour: str = "training"
    dash: str = "solid"
    smooth: bool = False
    markers: bool = False
    quiet: bool = False  # drawn, but neither thick nor in the legend
    crowd: bool = False  # one of many: thin, and a smooth one without its trace
    number: float | None = None  # beside the label in the legend; the last value if not given


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line to compare with."""

    label: str
    value: float
    colour: str = "baseline"
    dash: str = "dashed"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What one chart shows; `percent` takes shares of one, `log` a logarithmic value axis."""

    title: str
    lines: list[Line]
    levels: list[Level] = field(default_factory=list)
    note: str = ""
    along: str = "step"
    percent: bool = False
    log: bool = False
    zero: bool = False  # the value axis starts at zero
    every: bool = False  # one tick for each position along the chart (blocks)
    marks: list[int] = field(default_factory=list)  # where along the chart the run was started again
    fold: int | None = None  # entries of the legend that are not folded away

    def legend(self) -> list[tuple[str, str, str, str]]:
        """(label, last value, colour, dash) for each line that has a name, and the number of restarts."""
        shown = [
            (line.label, line.series.last if line.number is None else line.number, line.colour, line.dash)
            for line in self.lines
            if not line.quiet
        ]
        shown += [(level.label, level.value, level.colour, level.dash) for level in self.levels]
        entries = [(label, self.value(number), colour, dash) for label, number, colour, dash in shown]
        restarts = [
            ("restarts" if len(self.marks) > 1 else "restart", whole(len(self.marks)), "mark", "mark")
        ]
        return entries + (restarts if self.marks else [])

    def value(self, number: float) -> str:
        return f"{100 * number:.1f}%" if self.percent else compact(number)


def thin(series: Series, buckets: int = BUCKETS) -> tuple[Series, Series]:
    """(means, extremes) of a series over at most `buckets` runs of neighbouring rows.

    The extremes keep each run's lowest and highest value in the order they occurred, so a spike of a single
    step stays visible however long the run was. A short series comes back as it is, twice.
    """
    count = len(series.value)
    if count <= buckets:
        return series, series
    edges = np.linspace(0, count, buckets + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, count))
    means = Series(np.add.reduceat(series.step, edges) / sizes, np.add.reduceat(series.value, edges) / sizes)
    bounds = zip(edges, np.append(edges[1:], count), strict=True)
    kept = [sorted((a + series.value[a:b].argmin(), a + series.value[a:b].argmax())) for a, b in bounds]
    rows = np.unique(np.array(kept).ravel())
    return means, Series(series.step[rows], series.value[rows])


def moving_average(values: np.ndarray, window: float) -> np.ndarray:
    """Exponential moving average over about `window` (at least 1) values on either side.

    The mean of one pass forwards and one backwards, each corrected for its start as Adam's moments are: a
    single pass would lag behind a falling loss and place it above the held-out one.
    """
    return (_one_way(values, window) + _one_way(values[::-1], window)[::-1]) / 2


def _one_way(values: np.ndarray, window: float) -> np.ndarray:
    keep = 1 - 2 / (window + 1)
    smooth = np.empty(len(values))
    total = weight = 0.0
    for index, value in enumerate(values):
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smooth[index] = total / weight
    return smooth


def common_range(values: np.ndarray) -> np.ndarray:
    """(lowest, highest) without the outermost hundredth at each end, of few values without at least one."""
    return np.array([np.percentile(values, 1, method="higher"), np.percentile(values, 99, method="lower")])


def tame(values: np.ndarray) -> np.ndarray:
    """Values cut at three times their common range, so that a wild one does not bend an average."""
    low, high = common_range(values)
    return np.clip(values, low - (high - low), high + (high - low))


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(5.2, 2.45), facecolor="none")
        axes = figure.add_axes((0.118, 0.1, 0.847, 0.875), facecolor="none")
        if chart.log:
            axes.set_yscale("log")
        for step in sorted(set(chart.marks)):
            axes.axvline(step, color=PALETTE["mark"], linewidth=0.8, zorder=1.5)
        for level in chart.levels:
            axes.axhline(
                level.value, color=PALETTE[level.colour], linestyle=DASHES[level.dash], linewidth=1.1
            )
        shown = [_draw_line(axes, line, log=chart.log) for line in chart.lines]
        _limit(axes, chart, np.concatenate([np.empty(0), *shown]))
        _dress(axes, chart)
        buffer = io.BytesIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return _inline(buffer.getvalue().decode(), chart)


def _draw_line(axes: Axes, line: Line, *, log: bool) -> np.ndarray:
    """Draws one line and returns the values that must lie inside the chart."""
    series = line.series.finite()
    if log:
        series = Series(series.step[series.value > 0], series.value[series.value > 0])
    colour = PALETTE[line.colour]
    means, extremes = thin(series)
    width, above = (0.9, 2.5) if line.quiet or line.crowd else (1.5, 3)
    if line.smooth and len(means.value) >= 20:
        if not line.crowd:
            axes.plot(*extremes, color=colour, alpha=0.25, linewidth=0.7, zorder=2)
        window = max(3.0, len(means.value) / 40)
        if log:
            smooth = np.exp(moving_average(np.log(means.value), window))
        else:
            smooth = moving_average(tame(means.value), window)
        axes.plot(
            means.step, smooth, color=colour, linewidth=width, linestyle=DASHES[line.dash], zorder=above
        )
        # The trace of a wild step runs out of a linear chart, which shows the rest at its own scale.
        return np.concatenate([smooth, extremes.value if log else common_range(extremes.value)])
    few = len(series.value) <= 40
    marker = {"marker": "o", "markersize": 3.2} if (line.markers and few) or len(series.value) == 1 else {}
    axes.plot(*extremes, color=colour, linewidth=width, linestyle=DASHES[line.dash], zorder=above, **marker)
    return extremes.value


def _limit(axes: Axes, chart: Chart, shown: np.ndarray) -> None:
    values = np.concatenate([shown, [level.value for level in chart.levels]])
    if chart.log:
        values = values[values > 0]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if chart.log:
        axes.set_ylim(low / 1.3, high * 1.3)
        return
    low = min(low, 0.0) if chart.zero else low
    room = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_ylim(low - (0 if chart.zero and low == 0 else room), high + room)


def _dress(axes: Axes, chart: Chart) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALETTE["faint"])
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=PALETTE["ink"], pad=4)
    axes.margins(x=0.03 if chart.every else 0.01)
    axes.xaxis.set_major_locator(MaxNLocator(20 if chart.every else 6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if chart.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if chart.log:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1.0,) if high / low > 30 else (1.0, 2.0, 5.0), numticks=6)
        )
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))


def _inline(svg: str, chart: Chart) -> str:
    """The bare element: no prolog, no style that would reach the page, no ids but the ones it refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    opening = f'<svg {size[0]} role="img" aria-label="{escape(chart.title)}">'
    svg = re.sub(r"<svg[^>]*>", opening, svg, count=1)
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", " ", svg).strip()
