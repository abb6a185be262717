"""Runs side by side: who is best, in what they differ, and that a page of many can still be read."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from beit_pretrain.report import make_comparison
from beit_pretrain.report.compare import ABSENT, Group, compare_runs, curves, other_epochs, table
from beit_pretrain.report.compare_page import best_words
from beit_pretrain.report.folder import read_run

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def group(make_run):
    """`group(stage, {name: final metrics}, configs={name: ...}, unfinished=[...])`: the runs of one stage, compared."""

    def make(
        stage: str,
        metrics: Mapping[str, Mapping[str, float]],
        *,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
        unfinished: tuple[str, ...] = (),
        **options: Any,
    ) -> Group:
        runs = []
        for name, final in metrics.items():
            results = {"metrics": dict(final), "command": f"beit-train stage={stage} name={name}"}
            run = make_run(name, stage=stage, results=results, sheets=0, **options)
            own = {"stage": {"name": stage}, "name": name, "runs": "runs", "run_dir": f"runs/{name}"}
            (run / "config.yaml").write_text(yaml.safe_dump({**own, **(configs or {}).get(name, {})}))
            if name in unfinished:
                (run / "results.json").unlink()
            runs.append(read_run(run))
        (made,) = compare_runs(runs)
        return made

    return make


def names(entries: Any) -> list[str]:
    return [entry.label for entry in entries]


@pytest.mark.parametrize(
    ("stage", "metrics", "order"),
    [
        ("pretrain", {"a": {"val/loss": 2.5}, "b": {"val/loss": 2.1}, "c": {"val/loss": 2.3}}, "bca"),
        ("classify", {"a": {"val/top1": 0.5}, "b": {"val/top1": 0.7}, "c": {"val/top1": 0.6}}, "bca"),
        ("segment", {"a": {"val/miou": 0.5}, "b": {"val/miou": 0.4}, "c": {"val/miou": 0.6}}, "cab"),
    ],
)
def test_the_best_of_the_stages_main_metric_comes_first(group, stage: str, metrics: Any, order: str) -> None:
    made = group(stage, metrics)
    assert "".join(names(made.entries)) == order and made.best.label == order[0]
    assert made.main == made.metrics[0] == next(iter(metrics["a"]))
    assert best_words(made).startswith(f"Best {made.main} of the finished runs: {order[0]}, ")


def test_test_images_decide_only_where_nothing_else_is_held_out(group, make_run) -> None:
    both = {"a": {"test/top1": 0.9, "val/top1": 0.5}, "b": {"test/top1": 0.8, "val/top1": 0.6}}
    assert group("classify", both).best.label == "b"
    runs = []
    for name, final in both.items():
        run = make_run(
            f"{name}-alone", stage="classify", results={"metrics": {"test/top1": final["test/top1"]}}
        )
        (run / "metrics.csv").unlink()
        runs.append(read_run(run))
    (made,) = compare_runs(runs)
    assert made.best is not None and (made.main, made.best.label) == ("test/top1", "a-alone")


def test_an_unfinished_run_is_shown_but_never_the_best(group) -> None:
    finals = {"a": {"val/loss": 9.0}, "b": {"val/loss": 8.0}, "c": {"val/loss": 1.0}}
    made = group("pretrain", finals, unfinished=("c",))
    assert names(made.entries) == ["b", "a", "c"] and made.winners("val/loss") == {"b"}
    assert made.entries[-1].run.metric("val/loss") < 3  # its last logged value
    nothing_done = group("pretrain", {"x": {}, "y": {}}, unfinished=("x", "y"))
    assert "runs so far, none of which is finished: " in best_words(nothing_done)


def test_only_metrics_that_all_finished_runs_share_are_columns(group) -> None:
    finals = {"a": {"val/loss": 2.0, "val/loss_se": 0.1, "val/own": 3.0, "val/images": 10}}
    finals["b"] = {"val/loss": 2.1, "val/loss_se": 0.1, "test/own": 3.0, "val/images": 10}
    made = group("pretrain", finals, unfinished=())
    assert made.metrics == ["val/loss", "val/accuracy"]  # the other one from the curves


def test_the_best_of_each_column_is_marked(group) -> None:
    rng = np.random.default_rng(0)
    kinds = {"val/loss": min, "val_ema/loss": min, "val/top1": max, "val_ema/top1": max, "test/top5": max}
    finals = {f"r{n}": {kind: float(rng.random()) for kind in kinds} | {"val/even": 1.0} for n in range(5)}
    for final in finals.values():
        final |= {"test/accuracy": 0.5, "knn/untrained": float(rng.random())}
    made = group("classify", finals)
    for kind, pick in kinds.items():
        assert made.winners(kind) == {pick(finals, key=lambda name, kind=kind: finals[name][kind])}
    for kind in ("test/accuracy", "val/even", "knn/untrained"):  # all alike, unknown, none of a run's merits
        assert kind in made.metrics and made.winners(kind) == set()
    finals["r0"]["val/top1"] = finals["r1"]["val/top1"] = 2.0
    assert group("classify", {f"s{name}": final for name, final in finals.items()}).winners("val/top1") == {
        "sr0",
        "sr1",
    }


def test_only_options_that_differ_are_left(group) -> None:
    """Against a comparison key by key of configurations that were flattened by hand."""
    same = {"seed": 0, "model": {"depth": 4, "_target_": "beit.Beit"}}
    a = {
        **same,
        "optim": {"lr": 0.1, "betas": [0.9, 0.999]},
        "masking": {"_target_": "beit_pretrain.masking.Block"},
    }
    a |= {"size": 224, "view": {"size": 224}, "only": None, "title": "a", "log": {"dir": "runs/a/log"}}
    b = {
        **same,
        "optim": {"lr": 0.2, "betas": [0.9, 0.98]},
        "masking": {"_target_": "beit_pretrain.masking.Random"},
    }
    b |= {"size": 96, "view": {"size": 96}, "title": "b", "log": {"dir": "runs/b/log"}, "experiment": "x"}
    made = group("pretrain", {"a": {"val/loss": 1}, "b": {"val/loss": 2}}, configs={"a": a, "b": b})
    assert {tuple(found.keys): found.values for found in made.differences} == {
        ("optim.lr",): ["0.1", "0.2"],
        ("optim.betas",): ["[0.9, 0.999]", "[0.9, 0.98]"],
        ("masking._target_",): ["…Block", "…Random"],
        ("size", "view.size"): ["224", "96"],  # what follows one option is one
        ("only",): ["null", ABSENT],
    }


def test_names_are_relative_to_what_the_runs_have_in_common(make_run) -> None:
    folders = ["x/one", "x/y/one", "x/one/inner"]
    (made,) = compare_runs([read_run(make_run("same", folder=folder)) for folder in folders])
    assert sorted(names(made.entries)) == ["one", "one/inner", "y/one"]


def test_stages_are_not_compared_with_each_other(make_run, tmp_path: Path, words) -> None:
    runs = [
        make_run(name, stage=stage) for name, stage in (("a", "pretrain"), ("b", "knn"), ("c", "pretrain"))
    ]
    (runs[2] / "results.json").unlink()  # its stage is in its configuration
    groups = compare_runs([read_run(run) for run in runs])
    assert [(made.stage, sorted(names(made.entries))) for made in groups] == [
        ("pretrain", ["a", "c"]),
        ("knn", ["b"]),
    ]
    said = words(make_comparison(groups, tmp_path / "page.html"))
    assert "3 runs of 2 stages, which are not compared with each other" in said
    assert said.count("What differs") == 1 and "kNN evaluation 1 run " in said


def test_curves_are_those_of_the_runs(group) -> None:
    made = group("classify", {name: {"val/top1": 0.5 + n / 10} for n, name in enumerate("abc")})
    charts = {chart.title: chart for chart in curves(made)}
    assert list(charts) == ["Training loss", "Held-out loss", "val/top1"]
    for title, column in (("Training loss", "train/loss"), ("val/top1", "val/top1")):
        for line, entry in zip(charts[title].lines, made.entries, strict=True):
            assert (line.label, line.colour, line.dash) == (entry.label, entry.colour, entry.dash)
            np.testing.assert_array_equal(line.series.value, entry.run.metrics[column].value)
            assert not line.crowd
    assert charts["val/top1"].percent and not charts["Held-out loss"].percent


def test_against_epochs_where_their_length_differs(group) -> None:
    made = group("pretrain", {"a": {"val/loss": 1}, "b": {"val/loss": 2}})
    assert not other_epochs(made)
    made.entries[1].run.metrics["epoch"].value[:] *= 2
    assert other_epochs(made)
    _, held_out = curves(made, "epoch")
    assert held_out.along == "epoch"
    for line, per_epoch in zip(held_out.lines, (25, 12.5), strict=True):
        np.testing.assert_allclose(line.series.step, np.arange(50, 1001, 50) / per_epoch)


def test_many_runs_are_thin_lines_with_a_folded_legend(group, tmp_path: Path, words) -> None:
    made = group("pretrain", {f"run-{n:02d}": {"val/loss": 2 + n / 100} for n in range(15)}, steps=200)
    looks = [(entry.colour, entry.dash) for entry in made.entries]
    assert len(set(looks)) == 12 and looks[12:] == looks[:3]
    for chart in curves(made):
        assert [line.crowd for line in chart.lines] == [False] + [True] * 14  # the best one stands out
    page = make_comparison([made], tmp_path / "page.html")
    assert words(page).count(" 3 more run-12 ") == 2
    assert page.stat().st_size < 500_000


@pytest.mark.parametrize(("count", "first"), [(6, "option"), (7, "run")])
def test_many_runs_have_a_row_each_among_the_options(
    group, tmp_path: Path, words, count: int, first: str
) -> None:
    configs = {f"r{n}": {"lr": n, "wd": 10 + n} for n in range(count)}
    finals = {name: {"val/loss": 1.0 + n} for n, name in enumerate(configs)}
    said = words(
        make_comparison([group("pretrain", finals, configs=configs, steps=100)], tmp_path / "page.html")
    )
    rows = {
        "option": "option r0 r1 r2 r3 r4 r5 lr 0 1 2 3 4 5 wd 10 11",
        "run": "run lr wd r0 0 10 r1 1 11 r2 2 12",
    }
    assert rows[first] in said


def test_the_page_says_results_links_reports_and_holds_everything(group, tmp_path: Path, words) -> None:
    made = group("pretrain", {"a b": {"val/loss": 2.0}, "b": {"val/loss": 3.0}})
    (tmp_path / "runs" / "a b" / "report.html").write_text("there")
    (tmp_path / "runs" / "b" / "events.csv").write_text(
        "time,step,event,job,restart,ranks,detail\n2026-01-31T12:00:00Z,0,start,,0,1,\n2026-01-31T13:00:00Z,5,start,,0,1,\n"
    )
    (made,) = compare_runs([read_run(entry.run.path) for entry in made.entries])
    (tmp_path / "out").mkdir()
    page = make_comparison([made], tmp_path / "out" / "page.html", left_out=["runs/c is damaged"])
    text, said = page.read_text(), words(page)
    assert re.findall(r'href="([^"]*)"', text.partition("<svg")[0]) == ["../runs/a%20b/report.html"]
    assert "beit-train stage=pretrain name=a b" in said and "Left out: runs/c is damaged" in said
    row = "finished 1,000 {} {} 2 min 12 s 1,4{} {}"
    assert re.search("a b " + row.format("2", "36.9%", r"\d\d", "0"), said)
    assert re.search(" b " + row.format("3", "36.9%", r"\d\d", "1"), said)
    assert "the runs are repetitions" in said
    assert not re.search(r"<(script|link|iframe)|src=|@import|https?://", text)


def test_text_from_files_is_never_markup(group, tmp_path: Path) -> None:
    configs = {"a": {EVIL: EVIL}, "b": {EVIL: 2}}
    finals = {name: {"val/loss": 2.0, f"val/{EVIL}": 1.0} for name in configs}
    made = group("pretrain", finals, configs=configs)
    text = make_comparison([made], tmp_path / "page.html", left_out=[EVIL]).read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") >= 4


def test_text_from_files_is_no_formula(group) -> None:
    configs = {"=a": {"-x": "@b", "optim": {"lr": -1e-3}}, "b": {"-x": "-1.5", "optim": {"lr": 2e-3}}}
    finals = {name: {"val/loss": 2.0, "=val/x": -1.0} for name in configs}
    rows = list(csv.DictReader(io.StringIO(table([group("pretrain", finals, configs=configs)]))))
    assert [(row["name"], row["'-x"], row["optim.lr"]) for row in rows] == [
        ("'=a", "'@b", "-0.001"),
        ("b", "-1.5", "0.002"),
    ]


def test_the_table_for_other_programs_has_every_digit(group) -> None:
    finals = {"a": {"val/loss": 1 / 3, "val/accuracy": 0.125}, "b": {"val/loss": 2 / 3, "val/accuracy": 0.25}}
    made = group(
        "pretrain", finals, configs={"a": {"optim": {"lr": 1e-3}}, "b": {"optim": {"lr": 2e-3}, "new": "x,y"}}
    )
    rows = list(csv.DictReader(io.StringIO(table([made]))))
    assert [row["name"] for row in rows] == ["a", "b"]
    for row, final, lr in zip(rows, finals.values(), ("0.001", "0.002"), strict=True):
        assert {name: float(row[name]) for name in final} == final
        assert (row["stage"], row["status"], row["optim.lr"], row["restarts"]) == (
            "pretrain",
            "finished",
            lr,
            "0",
        )
        assert (float(row["steps"]), float(row["seconds"])) == (1000, 132.4)
        speed = read_run(Path(row["folder"])).timing["images_per_second"].value
        assert float(row["images_per_second"]) == np.median(speed)
    assert [row["new"] for row in rows] == ["", "x,y"]


def test_a_run_that_has_barely_begun_is_a_row(make_run, tmp_path: Path, words) -> None:
    run, young = make_run("old"), tmp_path / "runs" / "young"
    young.mkdir()
    (young / "config.yaml").write_text(json.dumps({"name": "young", "stage": {"name": "pretrain"}}))
    said = words(make_comparison(compare_runs([read_run(young), read_run(run)]), tmp_path / "page.html"))
    assert re.search(r"old finished 1,000 2\.451 36\.9% 2 min 12 s 1,4\d\d ", said)
    assert f" young unfinished {ABSENT} {ABSENT} " in said
