"""The confusion matrix as a picture whose colours are the page's; `classes.html.j2` draws it."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from beit_pretrain.report.classification import Classes

LARGEST = 100  # classes; with more, a cell would be too small to see
NAMED = 20  # classes up to which names and counts are written
CELL, SIDE = 40.0, 540.0  # largest sides of a cell and of all cells, in pixels
LETTER = 7.2  # mean width of one at 12 pixels; that of a Chinese one is near twice as much
LONGEST = 18  # letters of a name that are shown


class Cell(NamedTuple):
    """A pair of classes that occurred; `opacity` from 0 to 1."""

    row: int
    column: int
    count: int
    opacity: float
    title: str


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Squares of `cell` pixels, `size` of them each way, with `margin` pixels at the left and `head` above."""

    size: int
    cell: float
    margin: float
    head: float
    upright: bool  # the names of the columns stand upright
    names: list[str]  # empty if there are too many
    cells: list[Cell]

    @property
    def side(self) -> float:
        return self.size * self.cell


def heat_map(classes: Classes) -> HeatMap | None:
    """The picture of a run's confusion matrix; None where it wrote none or there are more than `LARGEST` classes.

    The opacity is the square root of the share of the row, so that rare mistakes can be seen; half of it where
    the count is written on top.
    """
    matrix = classes.confusion
    if matrix is None or len(matrix) > LARGEST:
        return None
    named = len(matrix) <= NAMED
    share = np.sqrt(matrix / np.maximum(matrix.sum(1, keepdims=True), 1)) * (0.5 if named else 1.0)
    names = [_short(name) for name in classes.names] if named else []
    longest = max((_width(name) for name in names), default=0.0)
    cell = min(CELL, SIDE / len(matrix))
    upright = longest > cell - 4
    return HeatMap(
        size=len(matrix),
        cell=cell,
        margin=32 + longest,
        head=28 + (longest if upright else 8 if named else 0),
        upright=upright,
        names=names,
        cells=[
            Cell(
                row, column, int(matrix[row, column]), float(share[row, column]), _title(classes, row, column)
            )
            for row, column in np.argwhere(matrix).tolist()
        ],
    )


def _title(classes: Classes, row: int, column: int) -> str:
    assert classes.confusion is not None
    count, images = classes.confusion[row, column], classes.confusion[row].sum()
    what = "right" if row == column else f"taken for {classes.names[column]}"
    return f"{classes.names[row]} {what}: {count} of {images}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _width(name: str) -> float:
    return LETTER * sum(1.8 if unicodedata.east_asian_width(letter) in "WF" else 1.0 for letter in name)
