"""The drawing: nothing is lost by thinning, and every colour can be told from its background."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import beit_pretrain.report
from beit_pretrain.report.charts import knn_by_block, learning_rate, loss, run_charts
from beit_pretrain.report.curves import DASHES, PALETTE, Chart, Level, Line, draw, moving_average, thin
from beit_pretrain.report.folder import Series, read_run
from beit_pretrain.report.health import gradient_norm

STYLE = (Path(beit_pretrain.report.__file__).parent / "style.css").read_text()


def _series(values: list[float] | np.ndarray) -> Series:
    return Series(np.arange(1.0, len(values) + 1), np.asarray(values, dtype=float))


@pytest.mark.parametrize("count", [801, 1000, 1601, 12_347])
def test_thinning_keeps_the_mean_and_every_spike(count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.normal(size=count)
    spikes = rng.choice(count, 5, replace=False)
    values[spikes] = 50 + np.arange(5)
    means, extremes = thin(_series(values))
    assert len(means.value) == 800 and len(extremes.value) <= 1600
    lengths = np.diff(np.linspace(0, count, 801).astype(int))
    np.testing.assert_allclose(np.average(means.value, weights=lengths), values.mean(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.average(means.step, weights=lengths), (count + 1) / 2)
    assert extremes.value.min() == values.min() and extremes.value.max() == values.max()
    assert (np.diff(extremes.step) > 0).all()
    np.testing.assert_array_equal(values[extremes.step.astype(int) - 1], extremes.value)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    assert {part.max() for part in parts} | {part.min() for part in parts} == set(extremes.value)


def test_a_short_series_is_not_thinned() -> None:
    series = _series(np.arange(800.0))
    assert thin(series) == (series, series)


def test_the_moving_average_is_the_weighted_mean_it_says() -> None:
    values, window = np.random.default_rng(0).normal(size=37), 5.0
    keep = 1 - 2 / (window + 1)
    at = np.arange(37)
    expected = []
    for index in at:
        before = np.where(at <= index, keep ** np.abs(index - at), 0)
        after = np.where(at >= index, keep ** np.abs(index - at), 0)
        expected.append((np.average(values, weights=before) + np.average(values, weights=after)) / 2)
    np.testing.assert_allclose(moving_average(values, window), expected)


def test_the_moving_average_does_not_lag_behind_a_slope() -> None:
    slope = np.linspace(5, 1, 400)
    np.testing.assert_allclose(moving_average(slope, 10)[100:-100], slope[100:-100], atol=1e-6)


def _points(svg: str, colour: str) -> np.ndarray:
    """The corners of the (one) line of a colour, in the picture's own units."""
    tree = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    lines = [
        path
        for path in tree.iter("path")
        if re.search(rf"fill: none;.* stroke: var\(--{colour}\)", path.get("style", ""))
    ]
    corners = re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", lines[-1].get("d", ""))
    return np.array(corners, dtype=float)


@pytest.mark.parametrize("log", [False, True])
def test_values_stand_where_the_axis_says(log: bool) -> None:
    values = np.array([1.0, 10.0, 100.0, 40.0])
    chart = Chart(
        title="t",
        lines=[Line(label="a", series=_series(values))],
        levels=[Level(label="b", value=10)],
        log=log,
    )
    svg = draw(chart)
    corners = _points(svg, "training")
    assert len(corners) == 4
    heights = np.log(values) if log else values
    scale = (corners[2, 1] - corners[0, 1]) / (heights[2] - heights[0])
    assert scale < 0  # upwards
    np.testing.assert_allclose(corners[:, 1], corners[0, 1] + scale * (heights - heights[0]), atol=1e-3)
    np.testing.assert_allclose(np.diff(corners[:, 0], 2), 0, atol=1e-3)
    level = _points(svg, "baseline")
    np.testing.assert_allclose(level[:, 1], corners[1, 1], atol=1e-3)


@pytest.mark.parametrize("count", [20, 99, 500, 5000])
def test_one_wild_step_does_not_squash_the_curve(count: int) -> None:
    values = 3 + np.sin(np.arange(count) * 9 / count) + np.random.default_rng(0).normal(0, 0.1, count)
    calm = draw(Chart(title="t", lines=[Line(label="a", series=_series(values), smooth=True)]))
    values[count // 2] = 1e4
    wild = draw(Chart(title="t", lines=[Line(label="a", series=_series(values), smooth=True)]))
    heights = [_points(svg, "training")[: count // 3, 1] for svg in (calm, wild)]  # before the wild step
    assert np.ptp(heights[0]) > 40
    assert np.ptp(heights[1]) > 0.5 * np.ptp(heights[0])


@pytest.mark.parametrize(
    "values", [[2.0], [2.0, 2.0], [0.0] * 30, [1.0, float("nan"), 3.0], [float("inf"), 1.0]]
)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_odd_series_are_drawn_without_a_warning(values: list[float], smooth: bool, log: bool) -> None:
    chart = Chart(title="t", lines=[Line(label="a", series=_series(values), smooth=smooth)], log=log)
    ElementTree.fromstring(draw(chart).replace("xlink:href", "href"))


def test_a_drawing_is_one_element_whose_colours_are_the_pages(make_run) -> None:
    charts = run_charts(read_run(make_run()))
    assert len(charts) == 5
    for chart in charts:
        svg = draw(chart)
        assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>") and svg == draw(chart)
        assert not re.search(r"#[0-9a-f]{6}\b(?!\w)(?=[;\"])", svg.replace('href="#', 'href="')), chart.title
        assert "<style" not in svg and "font-family" not in svg and "://" not in svg
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(PALETTE)
        inner = re.findall(r'id="([^"]*)"', svg)
        assert len(inner) == len(set(inner))
        assert {*re.findall(r'href="#([^"]*)"', svg), *re.findall(r"url\(#([^)]*)\)", svg)} == set(inner)


def test_ids_inside_different_charts_do_not_meet(make_run) -> None:
    drawn = [set(re.findall(r'id="([^"]*)"', draw(chart))) for chart in run_charts(read_run(make_run()))]
    assert len(set.union(*drawn)) == sum(len(ids) for ids in drawn)


def _luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    shares = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_is_defined_and_readable_in_light_dark_and_print() -> None:
    roots = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
    ]
    assert len(roots) == 3
    for colours in roots:
        assert {*PALETTE, "page", "text", "good", "warn"} <= set(colours)
        for name in ("text", "ink", "training", "baseline"):
            assert _contrast(colours[name], colours["paper"]) >= 4.5, name
            assert _contrast(colours["ink"], colours["page"]) >= 4.5
        for name in ("heldout", "third"):
            assert _contrast(colours[name], colours["paper"]) >= 3, name
        for name in ("good", "warn"):
            assert _contrast(colours[name], colours[f"{name}-paper"]) >= 4.5, name
    assert {name: colour for name, colour in roots[0].items() if name in PALETTE and name != "paper"} == {
        name: colour for name, colour in PALETTE.items() if name != "paper"
    }
    assert len(set(PALETTE.values())) == len(PALETTE)
    assert all(f".legend i.{dash}" in STYLE for dash in DASHES if dash != "solid")


def test_the_loss_stands_beside_both_baselines(make_run) -> None:
    run = read_run(make_run())
    chart = loss(run)
    assert chart is not None
    labels = [label for label, *_ in chart.legend()]
    assert labels == ["training", "held-out", "per-position baseline", "global baseline"]
    assert [value for _, value, *_ in chart.legend()][1:] == ["2.451", "4.02", "4.78"]
    # without a logged baseline, or with one logged once, its final value is a level
    short = {name: series for name, series in run.metrics.items() if "baseline" not in name}
    logged = run.metrics["train/baseline_loss"]
    once = {**short, "train/baseline_loss": Series(logged.step[:1], logged.value[:1])}
    for metrics in (short, once):
        chart = loss(replace(run, metrics=metrics))
        assert chart is not None
        levels = [(level.label, level.value) for level in chart.levels]
        assert levels == [("per-position baseline", 4.02), ("global baseline", 4.78)]


def test_a_chart_of_single_points_is_left_out(make_run) -> None:
    run = read_run(make_run())
    once = {name: Series(series.step[:1], series.value[:1]) for name, series in run.metrics.items()}
    assert run_charts(replace(run, metrics=once, timing={})) == []
    once["train/loss"] = run.metrics["train/loss"]
    assert [chart.title for chart in run_charts(replace(run, metrics=once, timing={}))] == ["Loss"]


@pytest.mark.parametrize(("low", "labels", "log"), [(1.0, 1, False), (0.5, 2, False), (0.001, 2, True)])
def test_the_lr_of_several_groups_is_shown_on_an_axis_that_fits(
    make_run, low: float, labels: int, log: bool
) -> None:
    run = read_run(make_run())
    top = run.metrics["train/lr"]
    metrics = {"train/lr": top, "train/lr_min": Series(top.step, low * top.value)}
    chart = learning_rate(replace(run, metrics=metrics))
    assert chart is not None and (len(chart.legend()), chart.log) == (labels, log)
    assert chart.legend()[0][1] == "0.002"
    draw(chart)


def test_a_gradient_norm_with_spikes_has_a_logarithmic_axis(make_run) -> None:
    run = read_run(make_run())
    calm = gradient_norm(run)
    run.metrics["train/grad_norm"].value[3] = 1e4
    spiky = gradient_norm(run)
    assert calm is not None and spiky is not None and (calm.log, spiky.log) == (False, True)
    assert len(re.findall(r"<text", draw(spiky))) < 20


def test_knn_by_block_names_the_chosen_blocks_numbers(make_run) -> None:
    chart = knn_by_block(read_run(make_run(stage="knn")))
    assert chart is not None
    shown = [(label, value) for label, value, *_ in chart.legend()]
    assert shown == [
        ("validation", "92.0%"),
        ("test", "91.0%"),
        ("untrained encoder", "62.0%"),
        ("raw pixels", "97.0%"),
    ]
    assert _points(draw(chart), "training").shape == (4, 2)
