"""What a finished run says on the terminal: a table of results and where the report lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beit_pretrain.wording import printable

SHARES = ("accuracy", "top1", "top5", "codebook_use")  # metrics that are shares of one, shown in percent
NAMES = {"top1": "top-1", "top5": "top-5", "codebook_use": "codebook use"}
NAMES |= {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}
WORST = 3  # classes that are named
HIDDEN = ("_se", "/images", "/tokens", "/temperature")

Row = tuple[str, str]


def show(results: Mapping[str, Any], cfg: DictConfig) -> None:
    """Print one run's results; nothing for a dry run, which has printed for itself."""
    if not results:
        return
    table = _table(str(results.get("name") or cfg.name))
    for name, value in _rows(results):
        table.add_row(Text(printable(name)), Text(printable(value)))
    _print(table, _remarks(results), Path(cfg.run_dir) / "report.html")


def show_chain(results: Mapping[str, Mapping[str, Any]], report: Path) -> None:
    """Print the results of all links in one table."""
    table = _table("results")
    for link, link_results in results.items():
        for i, (name, value) in enumerate(_rows(link_results)):
            cells = (link if i == 0 else "", name, value)
            table.add_row(*(Text(printable(cell)) for cell in cells))
        table.add_section()
    remarks = [f"{link}: {remark}" for link, found in results.items() for remark in _remarks(found)]
    _print(table, remarks, report)


def _remarks(results: Mapping[str, Any]) -> list[str]:
    return results.get("remarks") or []


def _table(title: str) -> Table:
    return Table(title=Text(printable(title)), show_header=False, title_justify="left")


def _print(table: Table, remarks: Iterable[str], report: Path) -> None:
    console = Console()
    console.print(table)
    for remark in remarks:
        console.print(printable(remark), soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)


def _rows(results: Mapping[str, Any]) -> list[Row]:
    if "classification" in results:
        rows: Iterable[Row] = _classify(results)
    elif "segmentation" in results:
        rows = _segment(results)
    elif "probe" in results or "knn" in results:
        rows = [*_probe(results.get("probe") or {}), *_knn(results.get("knn") or {})]
    else:
        rows = _held_out(results)
    return [*rows, ("time", _minutes(results.get("seconds", 0.0)))]


def _classify(results: Mapping[str, Any]) -> Iterator[Row]:
    """Scores of each part and set of weights, then what they were learnt from."""
    metrics, section = results.get("metrics") or {}, results["classification"] or {}
    classes = section.get("classes") or []
    for part, name in (("test", "test"), ("val", "held-out")):
        images = metrics.get(f"{part}/images")
        for weights, label in (("", ""), ("_ema", ", EMA")):
            for key in ("top1", "top5", "loss"):
                if key == "top5" and 0 < len(classes) <= 5:
                    continue  # always 100%
                if (value := metrics.get(f"{part}{weights}/{key}")) is not None:
                    of = f" of {images:,.0f} images" if key == "top1" and images else ""
                    yield f"{name} {NAMES.get(key, key)}{label}", _number(key, value) + of
    if classes:
        yield "classes", f"{len(classes):,}, chance {_percent(section.get('chance'))}"
    yield from _learnt_from(results)


def _segment(results: Mapping[str, Any]) -> Iterator[Row]:
    """Scores of each part, how they were reached, the classes that are found worst, what was learnt from."""
    metrics, section = results.get("metrics") or {}, results["segmentation"] or {}
    for part, name in (("test", "test"), ("val", "held-out")):
        images = metrics.get(f"{part}/images")
        for key in ("miou", "macc", "aacc"):
            if (value := metrics.get(f"{part}/{key}")) is not None:
                of = f" of {images:,.0f} images" if key == "miou" and images else ""
                yield f"{name} {NAMES[key]}", _percent(value) + of
    if how := section.get("how"):
        yield "predicted by", how
    columns = (section.get(key) or [] for key in ("iou", "classes", "pixels"))
    known = [(iou, name) for iou, name, pixels in zip(*columns, strict=True) if pixels]
    if worst := sorted(known, key=lambda row: row[0])[:WORST]:
        yield "worst classes, IoU", ", ".join(f"{name} {_percent(iou)}" for iou, name in worst)
    yield from _learnt_from(results)


def _learnt_from(results: Mapping[str, Any]) -> Iterator[Row]:
    if (images := results.get("train_images")) is not None:
        yield "training images", f"{images:,}"
    if "init_from" in results:
        start = results["init_from"]
        yield "started", f"from {start.get('path')}" if start else "from scratch"


def _probe(probe: Mapping[str, Any]) -> Iterator[Row]:
    """The best linear classifier and where it sits, beside one on raw pixels."""
    best, pixels = probe.get("best") or {}, probe.get("pixels") or {}
    if probe.get("accuracy") is not None:
        where = f"block {best.get('block')}, {best.get('pooling')}, lr {best.get('lr')}"
        name = f"linear probe, pre-trained ({where})" if best else "linear probe"
        yield name, _percent(probe["accuracy"]) + _of(probe)
    if pixels:
        test = pixels.get("test")
        yield "linear probe, raw pixels", _percent(pixels.get("val") if test is None else test) + _of(probe)


def _knn(knn: Mapping[str, Any]) -> Iterator[Row]:
    if knn:
        of = _of(knn)
        yield f"kNN accuracy, pre-trained (block {knn.get('best_block')})", _percent(knn.get("accuracy")) + of
        yield "kNN accuracy, untrained", _percent(knn.get("untrained")) + of
        yield "kNN accuracy, raw pixels", _percent(knn.get("pixels")) + of


def _of(scored: Mapping[str, Any]) -> str:
    """How many images a score is of, where that was written down."""
    images = scored.get("images")
    return f" of {images:,} images" if images else ""


def _held_out(results: Mapping[str, Any]) -> Iterator[Row]:
    """Held-out metrics with their standard errors, beside what a model without pictures would reach."""
    metrics, base = results.get("metrics") or {}, results.get("baseline") or {}
    for name, value in metrics.items():
        if name.endswith(HIDDEN):
            continue
        short = name.removeprefix("val/")
        yield f"held-out {NAMES.get(short, short)}", _number(short, value, metrics.get(f"{name}_se"))
        if f"{short}_position" in base:
            z = base.get(f"{short}_z")
            gain = "" if z is None else f" ({z:.1f} standard errors)"
            yield "   without pictures", _number(short, base[f"{short}_position"]) + gain


def _number(key: str, value: float | None, error: float | None = None) -> str:
    """A metric as its kind is written: shares in percent, the rest with four decimals."""
    if value is None:
        return "-"
    if key in SHARES:
        return f"{100 * value:.1f} ± {100 * error:.1f}%" if error else _percent(value)
    return f"{value:.4f}" + (f" ± {error:.4f}" if error else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
