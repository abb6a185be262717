"""Numbers as a reader wants them: few digits, with a unit, never a raw float."""

from __future__ import annotations

from typing import Any


def compact(value: float) -> str:
    """At most four significant digits: 0.6931, 12.5, 3,200, 96.5M, 1.5e-05."""
    size = abs(value)
    if size >= 1e15:
        return f"{value:.3g}"
    for start, unit, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= start:
            return f"{value / unit:.4g}{name}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def whole(value: float) -> str:
    """A count with thousands separated."""
    return f"{value:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    """A share of one in percent."""
    return f"{100 * share:.{digits}f}%"


def interval(span: tuple[float, float], digits: int = 1) -> str:
    """Two shares of one as a range in percent."""
    return f"{100 * span[0]:.{digits}f} to {100 * span[1]:.{digits}f}%"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def plain(value: Any) -> str:
    """A config value as yaml would show it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
