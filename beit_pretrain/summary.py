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
    if knn := results.get("knn"):
        return [
            (f"kNN accuracy, pre-trained encoder (block {knn['best_block']})", f"{knn['accuracy']:.4f}"),
            ("kNN accuracy, the same encoder untrained", f"{knn['untrained']:.4f}"),
            ("kNN accuracy, raw pixels", f"{knn['pixels']:.4f}"),
            ("time", _minutes(results["seconds"])),
        ]
    metrics = results.get("metrics", {})
    rows = [
        (name.replace("val/", "held-out "), f"{value:.4f}")
        for name, value in metrics.items()
        if not name.endswith(("_se", "/images", "/tokens"))
    ]
    if base := results.get("baseline"):
        gains = [f"{base[f'{n}_z']:.1f} ({n})" for n in ("loss", "accuracy") if f"{n}_z" in base]
        rows += [
            ("loss without pictures, per position", f"{base['loss_position']:.4f}"),
            ("accuracy without pictures, per position", f"{base['accuracy_position']:.4f}"),
        ]
        if gains:
            rows.append(("better than without pictures by", f"{' and '.join(gains)} standard errors"))
    rows.append(("time", _minutes(results.get("seconds", 0.0))))
    return rows


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
