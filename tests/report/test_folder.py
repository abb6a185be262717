"""What the report reads, and what it says of files it cannot read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from beit_pretrain.errors import BeitError
from beit_pretrain.report import make_chain_report, make_report
from beit_pretrain.report.folder import read_run, read_series
from beit_pretrain.report.words import compact, duration, percent, plain, whole

FILES = ["config.yaml", "metrics.csv", "timing.csv", "results.json", "pictures/masks.png", "pictures"]


def test_each_column_keeps_the_steps_at_which_it_has_a_value(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,train/loss,val/loss\n0.5,10,3.5,\n1,20,,2.25\n1,20,1e-3,\n2,30,nan,\n")
    found = read_series(file)
    assert found.keys() == {"epoch", "train/loss", "val/loss"}
    np.testing.assert_array_equal(found["train/loss"].step, [10, 20, 30])
    np.testing.assert_array_equal(found["train/loss"].value, [3.5, 1e-3, np.nan])
    np.testing.assert_array_equal(found["train/loss"].finite().step, [10, 20])
    assert (found["val/loss"].step.tolist(), found["val/loss"].last) == ([20.0], 2.25)


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/loss\n10,3.5\n20,1.2")  # 1.2 may be the beginning of 1.25
    assert read_series(file)["train/loss"].value.tolist() == [3.5]
    file.write_text("step,train")
    assert read_series(file) == {}


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_never_breaks_the_report(make_run, file: str) -> None:
    run = make_run()
    gone = run / file
    if gone.is_dir():
        for picture in gone.iterdir():
            picture.unlink()
        gone.rmdir()
    else:
        gone.unlink()
    page = make_report(run).read_text()
    assert "pretrain-digits-micro" in page
    assert (">unfinished<" in page) == (file == "results.json")
    assert ("Resolved configuration" in page) == (file != "config.yaml")
    assert ("<h2>Masks</h2>" in page) == (not file.startswith("pictures"))
    assert ("Gradient norm" in page) == (file != "metrics.csv")
    assert ("Images per second" in page) == (file != "timing.csv")


def test_an_empty_folder_still_has_a_report(tmp_path: Path) -> None:
    page = make_report(tmp_path).read_text()
    assert f"<h1>{tmp_path.name}</h1>" in page and "<section" not in page


@pytest.mark.parametrize("stage", ["pretrain", "knn", "classify", "probe"])
def test_any_key_of_the_results_may_be_missing(make_run, stage: str) -> None:
    run = make_run(stage=stage)
    results = json.loads((run / "results.json").read_text())
    shorter = [{**results, key: None} for key in results]
    shorter += [{other: results[other] for other in results if other != key} for key in results]
    for outer in ("knn", "baseline", "metrics", "classification", "init_from", "probe"):
        for key in results.get(outer, {}):
            inner = {other: value for other, value in results[outer].items() if other != key}
            shorter.append({**results, outer: inner})
    (run / "metrics.csv").unlink(missing_ok=True)  # the drawing is tested elsewhere; this is about the words
    (run / "timing.csv").unlink()
    for picture in (run / "pictures").iterdir():
        picture.unlink()
    for content in shorter:
        (run / "results.json").write_text(json.dumps(content))
        make_report(run)
        make_chain_report(run.parent, [("first", run), ("second", run)])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", '{"name": ', r"results\.json is not valid JSON .*mend or move the file away"),
        ("results.json", "[1, 2]", r"results\.json should hold a mapping, got list"),
        ("results.json", '{"knn": [1]}', r"results\.json: 'knn' should be a mapping, got \[1\]"),
        ("results.json", '{"knn": {"blocks": 3}}', r"'blocks' should be a list, got 3"),
        ("results.json", '{"knn": {"blocks": [3]}}', r"each of 'blocks' should be a mapping, got 3"),
        ("results.json", '{"probe": {"rows": [3]}}', r"each of 'rows' should be a mapping, got 3"),
        ("results.json", '{"probe": {"best": 3}}', r"'best' should be a mapping, got 3"),
        ("results.json", '{"probe": {"rows": [{"lr": "x"}]}}', r"'lr' should be a number, got 'x'"),
        ("results.json", '{"init_from": "path"}', r"'init_from' should be a mapping, got 'path'"),
        ("results.json", '{"init_from": {"report": "x"}}', r"'report' should be a list, got 'x'"),
        ("results.json", '{"steps": "many"}', r"'steps' should be a number, got 'many'"),
        ("results.json", '{"steps": true}', r"'steps' should be a number, got True"),
        ("results.json", '{"recipe_diff": ["model"]}', r"\[key, recipe, this run\], got 'model'"),
        ("config.yaml", "a: [1, 2", r"config\.yaml is not valid YAML"),
        ("config.yaml", "just words", r"config\.yaml should hold a mapping, got str"),
        (
            "metrics.csv",
            "train/loss\n1\n",
            r"metrics\.csv is damaged \(its first line has no column 'step'\)",
        ),
        ("metrics.csv", "step,train/loss\n1,2\n1\n", r"line 3 has 1 cells and the first line 2"),
        ("metrics.csv", "step,train/loss\n1,lots\n", r"could not convert string to float: 'lots'"),
        ("timing.csv", "step,seconds\n,3\n", r"timing\.csv is damaged"),
        ("pictures/step-00000000.png", "no picture", r"step-00000000\.png is not a readable picture"),
        ("pictures/masks.png", "", r"masks\.png is not a readable picture"),
    ],
)
def test_a_damaged_file_is_one_clear_error(make_run, file: str, content: str, message: str) -> None:
    run = make_run()
    (run / file).write_text(content)
    with pytest.raises(BeitError, match=message):
        make_report(run)


def test_a_picture_cut_short_is_said(make_run) -> None:
    run = make_run()
    sheet = run / "pictures" / "step-00001000.png"
    sheet.write_bytes(sheet.read_bytes()[:2000])
    with pytest.raises(BeitError, match=r"step-00001000\.png is not a readable picture"):
        make_report(run)


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(BeitError, match=r"There is no run folder .*nowhere: give the folder"):
        make_report(tmp_path / "nowhere")


def test_sheets_are_in_the_order_of_their_steps_and_other_pictures_are_not_among_them(make_run) -> None:
    run = make_run(sheets=2, steps=1000)
    late = run / "pictures" / "step-123456789.png"  # one digit more than the name is padded to
    os.link(run / "pictures" / "masks.png", late)
    os.link(run / "pictures" / "masks.png", run / "pictures" / "step-last.png")
    names = [sheet.name for sheet in read_run(run).sheets]
    assert names == ["step-00000000.png", "step-00001000.png", "step-123456789.png"]


def test_the_written_result_counts_before_the_last_logged_value(make_run) -> None:
    run = read_run(make_run(results={"metrics": {"val/loss": 1.75}}))
    assert run.metric("val/loss") == 1.75
    assert run.metric("val/accuracy") == run.metrics["val/accuracy"].last
    assert run.metric("val/other") is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (0.69314, "0.6931"), (12.5, "12.5"), (1234.4, "1,234"), (10_000, "10k"), (1e20, "1e+20"),
        (96_512_000, "96.51M"), (3.2e9, "3.2G"), (1.5e-5, "1.5e-05"), (-2500.0, "-2,500"),
        (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, said: str) -> None:
    assert compact(value) == said


def test_times_shares_counts_and_config_values_read_as_one_writes_them() -> None:
    seconds = (3.21, 59.99, 60, 132.4, 3599.6, 7260, 47 * 3600, 49 * 3600)
    said = [
        "3.2 s",
        "60.0 s",
        "1 min 00 s",
        "2 min 12 s",
        "1 h 00 min",
        "2 h 01 min",
        "47 h 00 min",
        "2 d 01 h",
    ]
    assert [duration(value) for value in seconds] == said
    assert (percent(0.9125), percent(1), whole(91_965_776)) == ("91.2%", "100.0%", "91,965,776")
    assert [plain(value) for value in (None, True, 0.1, "a", [1])] == ["null", "true", "0.1", "a", "[1]"]
