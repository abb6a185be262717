"""What a finished run says on the terminal: a table of results and where the report lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table


def show(results: Mapping[str, Any], cfg: DictConfig) -> None:
    """Print one run's results; nothing for a dry run, which has printed for itself."""
    if not results:
        return
    table = _table(str(results["name"]))
    for name, value in _rows(results):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(f"report: {Path(cfg.run_dir) / 'report.html'}", soft_wrap=True, highlight=False)


def show_chain(results: Mapping[str, Mapping[str, Any]], report: Path) -> None:
    """Print the results of all links in one table."""
    table = _table("results")
    for link, link_results in results.items():
        for i, (name, value) in enumerate(_rows(link_results)):
            table.add_row(link if i == 0 else "", name, value)
        table.add_section()
    console = Console()
    console.print(table)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    return table


def _rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    time = ("time", _minutes(results.get("seconds", 0.0)))
    if knn := results.get("knn"):
        return [
            (f"kNN accuracy, pre-trained (block {knn['best_block']})", _number(knn["accuracy"])),
            ("kNN accuracy, untrained", _number(knn["untrained"])),
            ("kNN accuracy, raw pixels", _number(knn["pixels"])),
            time,
        ]
    metrics, base, rows = results.get("metrics", {}), results.get("baseline", {}), []
    for name, value in metrics.items():
        if name.endswith(("_se", "/images", "/tokens", "/temperature")):
            continue
        short = name.removeprefix("val/")
        error = metrics.get(f"{name}_se")
        rows.append((f"held-out {short}", _number(value) + (f" ± {_number(error)}" if error else "")))
        if f"{short}_position" in base:
            gain = f" ({base[f'{short}_z']:.1f} standard errors)" if f"{short}_z" in base else ""
            rows.append(("   without pictures", _number(base[f"{short}_position"]) + gain))
    return [*rows, time]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
