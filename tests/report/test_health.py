"""What the report says of a run's health: restarts in every chart, how each part ended, what was short."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from beit_pretrain.cluster.events import record
from beit_pretrain.errors import BeitError
from beit_pretrain.report import make_chain_report, make_report
from beit_pretrain.report.charts import knn_by_block, loss, marked, run_charts
from beit_pretrain.report.curves import draw
from beit_pretrain.report.events import Event, Start, read_events, starts
from beit_pretrain.report.folder import read_run
from beit_pretrain.report.health import health

HEADER = "time,step,event,job,restart,ranks,detail\n"
STORY = """\
2026-01-31T12:00:00Z,0,start,4711,0,8,
2026-01-31T13:00:00Z,200,signal,4711,0,8,USR1
2026-01-31T13:00:01Z,200,requeue,4711,0,8,
2026-01-31T13:05:00Z,200,start,4711,1,8,
2026-01-31T14:00:00Z,200,start,4711,2,8,
2026-01-31T15:00:00Z,410,signal,4711,2,8,TERM
2026-01-31T16:00:00Z,410,start,4712_3,0,16,
2026-01-31T17:00:00Z,640,stop,4712_3,0,16,"no time left, said the user"
2026-02-01T00:00:00Z,640,start,,0,1000,
2026-02-01T01:00:00Z,1000,finish,,0,1000,
"""
TOLD = [
    Start("2026-01-31 12:00:00", "0", "4711", "8", ""),
    Start(
        "2026-01-31 13:05:00",
        "200",
        "4711, restart 1",
        "8",
        "signal USR1 after step 200, put back into the queue",
    ),
    Start("2026-01-31 14:00:00", "200", "4711, restart 2", "8", "killed, or its node failed"),
    Start("2026-01-31 16:00:00", "410", "4712_3", "16", "signal TERM after step 410"),
    Start("2026-02-01 00:00:00", "640", "", "1,000", "stopped: no time left, said the user"),
]
FULL = "step,images_per_second,data_wait_share,memory_gb,gpu_memory_gb,gpu_utilisation,loss_scale\n"


def tell(run: Path, story: str = STORY) -> Path:
    (run / "events.csv").write_text(HEADER + story)
    return run


def test_the_table_says_how_each_part_ended(make_run) -> None:
    run = read_run(tell(make_run()))
    assert starts(run.events) == TOLD
    assert run.restarts == [200, 200, 410, 640]
    assert run.events[1] == Event("2026-01-31T13:00:00Z", 200, "signal", "4711", 0, 8, "USR1")


def test_a_run_that_was_finished_and_made_longer(tmp_path: Path) -> None:
    tell(tmp_path, STORY + "2026-02-02T00:00:00Z,1000,start,,0,1,\n")
    assert starts(read_events(tmp_path / "events.csv"))[-1].before == "finished"


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.csv") == []
    (tmp_path / "events.csv").write_text("")
    assert read_events(tmp_path / "events.csv") == []
    tell(tmp_path, STORY + "2026-02-02T00:00:00Z,10")
    assert len(read_events(tmp_path / "events.csv")) == 10
    torn = "2026-02-02T00:00:00Z,10" + STORY.splitlines()[0] + "\n" + STORY.splitlines()[1] + "\n"
    tell(tmp_path, torn)  # killed while it wrote, and appended to by the next start
    assert [event.event for event in read_events(tmp_path / "events.csv")] == ["signal"]


def test_what_a_run_writes_is_what_is_read(tmp_path: Path) -> None:
    record(tmp_path, "start", step=0, ranks=2)
    record(tmp_path, "stop", step=7, ranks=2, detail='of "what", and why')
    first, last = read_events(tmp_path / "events.csv")
    assert (first.step, first.event, first.ranks, first.detail) == (0, "start", 2, "")
    assert (last.step, last.event, last.ranks, last.detail) == (7, "stop", 2, 'of "what", and why')


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("when,what\n", "its first line should be time,step,event"),
        (HEADER + "2026-01-31T12:00:00Z,soon,start,,0,1,\n", "invalid literal"),
    ],
)
def test_a_damaged_file_is_named(make_run, content: str, said: str) -> None:
    run = make_run()
    (run / "events.csv").write_text(content)
    with pytest.raises(BeitError, match=rf"events\.csv is damaged \(.*{said}.*\): mend or move"):
        make_report(run)


def test_restarts_stand_at_their_steps_in_every_chart_over_steps(make_run) -> None:
    run = read_run(tell(make_run()))
    found = health(run)
    assert found is not None
    charts = run_charts(run) + found.charts
    assert len(charts) == 8
    for chart in charts:
        assert chart.legend()[-1] == ("restarts", "4", "mark", "mark")
        tree = ElementTree.fromstring(draw(chart).replace("xlink:href", "href"))
        paths = [(path.get("style", ""), path.get("d", "")) for path in tree.iter("path")]
        corners = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", d) for style, d in paths if "var(--mark)" in style]
        marks = np.array(corners, dtype=float)  # (marks, ends, x and y)
        assert marks.shape == (3, 2, 2)  # two starts at the same step are one line
        np.testing.assert_array_equal(marks[:, 0, 0], marks[:, 1, 0])
        below = [text for text in tree.iter("text") if "text-anchor: middle" in text.get("style", "")]
        ticks = {text.text: float(text.get("x", "")) for text in below}
        at = (marks[:, 0, 0] - ticks["200"]) / (ticks["800"] - ticks["200"]) * 600 + 200
        np.testing.assert_allclose(at, [200, 410, 640], atol=0.5)


def test_a_run_without_restarts_has_neither_marks_nor_a_table(make_run, words) -> None:
    quiet = tell(make_run(), STORY.splitlines(keepends=True)[0])
    for run in (quiet, make_run(name="older")):
        page = make_report(run)
        assert "var(--mark)" not in page.read_text().partition("<body>")[2]
        assert "Health Images per second" in words(page) and "Starts" not in words(page)


def test_charts_that_are_not_over_steps_have_no_marks(make_run) -> None:
    run = read_run(tell(make_run(stage="knn")))
    chart = knn_by_block(run)
    assert chart is not None and chart.marks == []


def test_the_page_of_the_run_and_of_its_chain_tell_of_restarts(make_run, words) -> None:
    run = tell(make_run())
    said = words(make_report(run))
    assert (
        "restarts 4" in said
        and "how it ended before 2026-01-31 12:00:00 0 4711 8 2026-01-31 13:05:00" in said
    )
    assert "640 1,000 stopped: no time left, said the user" in said
    assert "restarts 4" in words(make_chain_report(run.parent, [("one", run)]))
    (chart,) = marked(read_run(run), [loss(read_run(run)), None])
    assert chart.marks == [200, 200, 410, 640]


def test_a_long_table_shows_the_latest_and_folds_the_earlier(make_run, words) -> None:
    lines = [f"2026-01-31T12:{n:02d}:00Z,{n},start,{n},0,8,\n" for n in range(47)]
    run = tell(make_run(), "".join(lines))
    found = health(read_run(run))
    assert found is not None and [row.job for row in found.starts] == [str(n) for n in range(17, 47)]
    assert [row.job for row in found.earlier] == [str(n) for n in range(17)]
    assert "17 earlier" in words(make_report(run)) and "restarts 46" in words(run / "report.html")


def test_charts_are_of_what_was_logged(make_run) -> None:
    run = make_run()
    rows = [
        f"{s},1000,0.1,{2 + s / 1000},{30 + s / 1000},0.9,{65536 if s < 500 else 32768}"
        for s in (5, 500, 900)
    ]
    (run / "timing.csv").write_text(FULL + "\n".join(rows) + "\n")
    found = health(read_run(run))
    assert found is not None
    legends = {chart.title: [(label, value) for label, value, *_ in chart.legend()] for chart in found.charts}
    assert legends.pop("Gradient norm")
    assert legends == {
        "Images per second": [("median", "1,000")],
        "Waiting for data": [("median", "10.0%")],
        "Memory": [("GPU", "30.9"), ("main memory, so far", "2.9")],
        "GPU utilisation": [("median", "90.0%")],
        "Loss scale": [("last", "32.77k")],
    }


@pytest.mark.parametrize(("refused", "shown"), [([0, 0, 0], False), ([0, 2, 3], True)])
def test_refused_steps_are_shown_once_there_are_any(make_run, refused: list[int], shown: bool) -> None:
    run = make_run()
    rows = "".join(f"{step},{count}\n" for step, count in zip((5, 10, 15), refused, strict=True))
    (run / "metrics.csv").write_text("step,train/bad_steps\n" + rows)
    found = health(read_run(run))
    assert found is not None
    charts = {chart.title: chart.legend()[0][1] for chart in found.charts}
    assert charts.get("Refused steps") == ("3" if shown else None)


def test_a_folder_without_any_of_it_has_no_such_section(tmp_path: Path) -> None:
    assert health(read_run(tmp_path)) is None
