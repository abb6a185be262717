"""Values as a user types them, the good ones near a bad one, and text from outside as a terminal may have it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

# What a terminal obeys in place of showing it, what turns the order of letters or breaks a line, and what is no
# Unicode: C0, DEL, C1, marks and overrides of direction, separators of lines, lone surrogates.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

# What a formula begins with, in some spreadsheets also in full width.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def sides_of(value: Any) -> list[int] | None:
    """[height, width] of a size in pixels, or None if it is none."""
    sides = list(value) if OmegaConf.is_list(value) or isinstance(value, list | tuple) else [value, value]
    return sides if len(sides) == 2 and all(is_whole(side, 1) for side in sides) else None


def nearest(value: int, unit: int) -> list[int]:
    """The multiples of `unit` on either side, without 0."""
    down = value // unit * unit
    return [n for n in (down, down + unit) if n > 0]


def around(value: int, options: Sequence[int]) -> list[int]:
    """The options on either side of a value."""
    below, above = [n for n in options if n <= value], [n for n in options if n > value]
    return [*below[-1:], *above[:1]]


def either(values: Sequence[object]) -> str:
    words = [str(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def times(grid: Sequence[int]) -> str:
    return " x ".join(str(n) for n in grid)


def bracket(values: Sequence[object]) -> str:
    return f"[{','.join(str(v) for v in values)}]"


def size(value: Any) -> str:
    """A size as one would type it: 224 or [192,160]."""
    sides = sides_of(value)
    if sides is None:
        return show(value)
    return str(sides[0]) if sides[0] == sides[1] else bracket(sides)


def show(value: Any) -> str:
    """A value as one would type it."""
    if OmegaConf.is_list(value) or isinstance(value, list | tuple):
        return bracket([show(v) for v in value])
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def pair(size: Any) -> list[int]:
    """`224` or `[192, 160]` as [height, width]."""
    return [int(size)] * 2 if isinstance(size, int | float | str) else [int(side) for side in size]


def printable(text: object) -> str:
    """Text from outside, such as the name of a file, in one line that every terminal and format takes as text."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def cell(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula: such a text begins with an apostrophe.

    Numbers stay as they are, also those that are written out.
    """
    return f"'{value}" if _is_formula(str(value)) else value


def from_cell(text: str) -> str:
    """What `cell` was given."""
    return text[1:] if text.startswith("'") and _is_formula(text[1:]) else text


def _is_formula(text: str) -> bool:
    if not text.lstrip("'").startswith(_FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False
