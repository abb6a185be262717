"""Values as a user types them, and the good ones near a bad one, for messages about a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf


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
