"""What a run of stage=probe says: linear (and attentive) classifiers on the features of each block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.report.classification import Score
from beit_pretrain.report.curves import Chart, Level, Line
from beit_pretrain.report.folder import Run, Series, number, records, text
from beit_pretrain.report.parts import Tile
from beit_pretrain.report.words import compact, interval, percent

POOLINGS = {"cls": "training", "mean": "heldout", "both": "third"}  # and the colour of each
ATTENTIVE = "attentive"


class Row(NamedTuple):
    """A classifier: the best learning rate of its block and pooling."""

    block: float | None
    pooling: str
    lr: float | None
    val: float | None
    test: float | None

    @property
    def place(self) -> tuple[float | None, str]:
        return self.block, self.pooling


def score(run: Run) -> Score | None:
    """The accuracy of the best classifier."""
    share = run.number("probe", "accuracy")
    if share is None:
        return None
    return Score(share, "val" if _best(run).test is None else "test", run.number("probe", "images"))


def pixels(run: Run) -> float | None:
    """What the same protocol reaches on raw pixels, on the images of `score`."""
    row = _row(run.section("probe", "pixels"), run)
    return row.val if row.test is None else row.test


def best_words(run: Run) -> str:
    """Where the best classifier sits: block 3, both, lr 0.001."""
    best = _best(run)
    said = "" if best.block is None else f"block {best.block:.0f}"
    lr = "" if best.lr is None else f"lr {compact(best.lr)}"
    return ", ".join(word for word in (said, best.pooling, lr) if word)


def tiles(run: Run) -> Iterator[Tile]:
    """The best classifier; of a run that was stopped, the best so far."""
    found = score(run)
    if found is not None:
        trust = [] if found.span is None else [f"95%: {interval(found.span)}"]
        where = best_words(run)
        said = [*trust, *([f"{where}, chosen on validation"] if where else [])]
        yield Tile("linear probe", percent(found.share), "; ".join(said))
    elif run.stage == "probe" and "val/best" in run.metrics:
        yield Tile("linear probe", percent(run.metrics["val/best"].last), "best so far, on validation")


def probe_rows(run: Run) -> list[list[str]]:
    """(block, pooling, lr, validation, test, mark) of each classifier, raw pixels last."""
    best, table = _best(run), []
    for row in _rows(run):
        mark = "best" if row.place == best.place else ""
        table.append([*_cells(row), mark])
    last = _row(run.section("probe", "pixels"), run)
    if last.val is not None or last.test is not None:
        table.append([*_cells(last._replace(block=None, pooling="raw pixels")), ""])
    return table


def by_block(run: Run) -> Chart | None:
    """Accuracy along the depth, a line for each pooling, beside raw pixels and kNN of the same encoder."""
    every = _rows(run)
    split = "test" if any(row.test is not None for row in every) else "val"
    best = _best(run).block
    lines = []
    for pooling, colour in {**POOLINGS, ATTENTIVE: "fourth"}.items():
        points = {
            row.block: value
            for row in every
            if row.pooling == pooling
            and row.block is not None
            and (value := row.test if split == "test" else row.val) is not None
        }
        if points:
            at = sorted(block for block in points)
            label = pooling if best in points else f"{pooling}, block {at[-1]:.0f}"
            series = Series(np.array(at), np.array([points[block] for block in at]))
            shown = points.get(at[-1] if best is None else best)
            lines.append(Line(label=label, series=series, colour=colour, markers=True, number=shown))
    if not lines:
        return None
    known = (("raw pixels", pixels(run), "dotted"), ("kNN", run.number("knn", "accuracy"), "dashed"))
    note = "test" if split == "test" else "validation"
    return Chart(
        title="Linear probe by block",
        lines=lines,
        levels=[
            Level(label=name, value=value, dash=dash) for name, value, dash in known if value is not None
        ],
        along="block",
        percent=True,
        every=True,
        note=note if best is None else f"{note}; numbers: block {best:.0f}",
    )


def _best(run: Run) -> Row:
    return _row(run.section("probe", "best"), run)


def _rows(run: Run) -> list[Row]:
    """Linear and attentive classifiers, by block."""
    probe, source = run.section("probe"), run.path / "results.json"
    linear = [_row(row, run) for row in records(probe, "rows", source)]
    attentive = [_row(row, run)._replace(pooling=ATTENTIVE) for row in records(probe, ATTENTIVE, source)]
    return sorted([*linear, *attentive], key=lambda row: -1 if row.block is None else row.block)


def _row(values: Mapping[str, Any], run: Run) -> Row:
    block, lr, val, test = (
        number(values, key, run.path / "results.json") for key in ("block", "lr", "val", "test")
    )
    return Row(block, text(values, "pooling"), lr, val, test)


def _cells(row: Row) -> list[str]:
    return [
        "" if row.block is None else f"{row.block:.0f}",
        row.pooling,
        "" if row.lr is None else compact(row.lr),
        "" if row.val is None else percent(row.val),
        "" if row.test is None else percent(row.test),
    ]
