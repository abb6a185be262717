"""`report.html`: one page per run (or chain) that holds everything it shows."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from beit_pretrain.errors import BeitError
from beit_pretrain.report import charts, classification, comparison, pictures, probing, sections, segmentation
from beit_pretrain.report.curves import Chart, draw
from beit_pretrain.report.events import Start
from beit_pretrain.report.folder import Run, read_run, sheet_step
from beit_pretrain.report.health import health
from beit_pretrain.report.heat_map import HeatMap, heat_map
from beit_pretrain.report.words import duration, interval, whole

HERE = Path(__file__).parent
STRIP = 12  # pictures between the first and the last one


class View(NamedTuple):
    """A chart and its drawing."""

    chart: Chart
    svg: Markup


class ClassesView(NamedTuple):
    """The section on single classes: `rows` as shown at first and those folded away."""

    summary: str
    rows: list[list[str]]
    folded: list[list[str]]
    map: HeatMap | None
    confusions: list[str]


class HealthView(NamedTuple):
    """The section on health: drawn charts, and the starts of a run that was interrupted."""

    charts: list[View]
    starts: list[Start]
    earlier: list[Start]


class Link(NamedTuple):
    """One row of a chain and what the page shows of it."""

    name: str
    stage: str
    status: str
    result: str
    time: str
    href: str
    sentences: list[str]
    charts: list[View]
    picture: pictures.Picture | None


def make_report(run: Path) -> Path:
    """Writes `report.html` of the run folder `run` from its files alone and returns its path.

    The folder may be that of a run that was stopped or has barely begun: parts without data are left out.
    Raises `BeitError` if there is no such folder or a file in it is damaged.
    """
    found = read_run(run)
    knn_chart, probe_chart = charts.knn_by_block(found), probing.by_block(found)
    page = render(
        "run.html.j2",
        title=found.name,
        stage=sections.stage_words(found),
        status=found.status,
        tiles=sections.tiles(found),
        charts=[view(chart) for chart in charts.run_charts(found)],
        health=_health(found),
        sheets=_outer_sheets(found),
        strip=_strip(found),
        masks=None if found.masks is None else pictures.embed(found.masks, "Hidden patches (mask sheet)"),
        knn_bars=sections.knn_bars(found),
        knn_rows=sections.knn_rows(found),
        knn_remark=sections.knn_remark(found),
        knn_chart=None if knn_chart is None else view(knn_chart),
        probe_chart=None if probe_chart is None else view(probe_chart),
        probe_rows=probing.probe_rows(found),
        classes=_classes(found),
        segmentation=segmentation.section(found),
        start=classification.start(found),
        held_out=sections.held_out(found),
        diff=sections.recipe_diff(found),
        command=sections.text(found.results, "command"),
        environment=sections.environment(found),
        config=found.config_text,
    )
    return write(run / "report.html", page)


def make_chain_report(folder: Path, links: Sequence[tuple[str, Path]]) -> Path:
    """Writes `report.html` of a chain into `folder` and returns its path.

    `links` are (name, run folder) in order. A link whose folder is not there yet is shown as not started.
    Raises `BeitError` if `folder` is missing or a file of a link is damaged.
    """
    if not folder.is_dir():
        raise BeitError(f"There is no folder {folder} to write the report of the chain to")
    runs = [(name, path, read_run(path) if path.is_dir() else None) for name, path in links]
    views = [_link(name, path, run, folder) for name, path, run in runs]
    present = [(name, run) for name, _, run in runs if run is not None]
    compared, segmented = comparison.compare(present), comparison.compare_segmentation(present)
    measured = [run for _, run in present if sections.knn_bars(run)]
    page = render(
        "chain.html.j2",
        title=folder.resolve().name,
        status="finished" if all(view.status == "finished" for view in views) else "unfinished",
        total=duration(sum(run.number("seconds") or 0.0 for _, run in present)),
        links=views,
        compared=[
            (title, found, None if found.chart is None else view(found.chart))
            for title, found in (("", compared), (" in segmentation", segmented))
            if found is not None
        ],
        knn_bars=sections.knn_bars(measured[-1]) if measured and compared is None else [],
        knn_remark=sections.knn_remark(measured[-1]) if measured else "",
    )
    return write(folder / "report.html", page)


def _link(name: str, path: Path, run: Run | None, folder: Path) -> Link:
    if run is None:
        return Link(name, "", "not started", "", "", "", [], [], None)
    there = path / "report.html"
    href = quote(Path(os.path.relpath(there, folder)).as_posix()) if there.is_file() else ""
    key = (
        [] if run.stage == "probe" else [charts.loss(run), charts.accuracy(run) or charts.reconstruction(run)]
    )
    key = charts.marked(run, key)
    key += [chart for chart in (probing.by_block(run), charts.knn_by_block(run)) if chart is not None]
    held_out = sections.held_out(run)
    seconds = run.number("seconds")
    return Link(
        name=name,
        stage=sections.stage_words(run),
        status=run.status,
        result=sections.main_result(run),
        time="" if seconds is None else duration(seconds),
        href=href,
        sentences=[] if held_out is None else held_out.sentences,
        charts=[view(chart) for chart in key],
        picture=_sheet(run.sheets[-1]) if run.sheets else None,
    )


def _classes(run: Run) -> ClassesView | None:
    found = classification.read_classes(run)
    if found is None:
        return None
    rows, first = classification.class_rows(found), classification.FIRST
    said = classification.summary(run, found)
    mistakes = classification.confusions(found)
    return ClassesView(said, rows[:first], rows[first:], heat_map(found), mistakes)


def _health(run: Run) -> HealthView | None:
    found = health(run)
    return None if found is None else HealthView([view(chart) for chart in found.charts], *found[1:])


def view(chart: Chart) -> View:
    """The chart, drawn."""
    return View(chart, Markup(draw(chart)))


def _outer_sheets(run: Run) -> list[pictures.Picture]:
    """The last sheet and, to compare with, the first."""
    if len(run.sheets) < 2:
        return [_sheet(sheet) for sheet in run.sheets]
    return [_sheet(run.sheets[-1], ", the last one"), _sheet(run.sheets[0], ", the first one")]


def _strip(run: Run) -> list[pictures.Picture]:
    between = pictures.spread(run.sheets[1:-1], STRIP)
    return [pictures.embed(sheet, _step(sheet), side=480, enough=40_000) for sheet in between]


def _sheet(sheet: Path, when: str = "") -> pictures.Picture:
    return pictures.embed(sheet, f"{_step(sheet)}{when}")


def _step(sheet: Path) -> str:
    return f"Step {whole(sheet_step(sheet))}"


def render(template: str, **values: Any) -> str:
    """A page from its template."""
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return _templates().get_template(template).render(style=style, **values)


@cache
def _templates() -> Environment:
    loader = FileSystemLoader(HERE)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    made.filters["interval"] = interval
    return made


def write(path: Path, page: str) -> Path:
    """A whole page or the one before it, never half of one."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise BeitError(
            f"{path} could not be written ({error}): free some space or make the folder writable"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
            _remove_drafts(path)
    return path


def _remove_drafts(path: Path) -> None:
    """What killed writers of a page left beside it; those of other machines may still be at work."""
    for draft in path.parent.glob(f".{path.name}.*"):
        host, _, number = draft.name.removeprefix(f".{path.name}.").rpartition("-")
        here = host in (
            "",
            socket.gethostname(),
        )  # drafts of earlier versions have the process's number alone
        if here and number.isdecimal() and not Path(f"/proc/{number}").exists():
            draft.unlink(missing_ok=True)
