"""Costs of several ways to do the same, side by side in one run, and how they are shown."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    """Seconds: of cores in this process and in those that it has started, and of the clock."""

    cpu: float
    wall: float


Costs = Mapping[str, Sequence[Cost]]  # of each way, one per round


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Cost]]:
    """All ways take turns, round by round, so that what disturbs the machine disturbs them alike."""
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            cpu, wall = _cpu(), time.perf_counter()
            run()
            costs[name].append(Cost(_cpu() - cpu, time.perf_counter() - wall))
    return costs


def _cpu() -> float:
    alive = sum(_cpu_of(child.pid) for child in multiprocessing.active_children())
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + alive + ended.ru_utime + ended.ru_stime


def _cpu_of(pid: int | None) -> float:
    """All threads of a process, by Linux's count in ticks of 10 ms (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def median(costs: Costs, name: str, kind: str = "cpu") -> float:
    """Of the rounds, in seconds."""
    return statistics.median(getattr(cost, kind) for cost in costs[name])


def faster(costs: Costs, name: str, base: str, kind: str = "cpu") -> float:
    """How many times less a way costs than another: the median of the rounds' own ratios."""
    pairs = zip(costs[base], costs[name], strict=True)
    return statistics.median(getattr(slow, kind) / getattr(fast, kind) for slow, fast in pairs)


def spread(costs: Costs, name: str, kind: str = "cpu") -> float:
    """(largest - smallest) / median of the rounds."""
    values = [getattr(cost, kind) for cost in costs[name]]
    return (max(values) - min(values)) / statistics.median(values)


def machine(*packages: str) -> str:
    """The date, what was measured on, and with which versions, in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{datetime.date.today()}, {_core()}, {os.cpu_count()} cores (load {load}), Python "
        f"{platform.python_version()}, {versions}"
    )


def _core() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In markdown; the first column is left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
