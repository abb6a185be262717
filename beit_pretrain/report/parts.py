"""The pieces that pages are made of, as `parts.html.j2` draws them."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One number at the top of the page."""

    label: str
    value: str
    note: str


class Bar(NamedTuple):
    """One row of a comparison; `main` is one that the page is about, `span` the interval of its share."""

    label: str
    share: float
    main: bool
    note: str = ""
    span: tuple[float, float] | None = None
