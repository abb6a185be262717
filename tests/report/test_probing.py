"""The page of linear probes."""

from __future__ import annotations

import json

import numpy as np

from beit_pretrain.report import make_report
from beit_pretrain.report.charts import probe_while_training, run_charts
from beit_pretrain.report.folder import read_run
from beit_pretrain.report.probing import best_words, by_block, pixels, probe_rows, score


def test_the_tile_names_the_best_classifier_and_the_knn_of_the_same_encoder_follows(make_run, words) -> None:
    said = words(make_report(make_run(stage="probe")))
    assert (
        "linear probe 92.0% 95%: 88.9 to 94.3%; block 2, both, lr 0.003, chosen on validation "
        "kNN accuracy 91.0% block 2, chosen on validation"
    ) in said
    assert "Untrained encoder 62.0% Raw pixels 97.0% Pre-trained encoder 91.0%" in said
    assert "training loss" not in said.partition("Linear probe on")[0]


def test_a_line_for_each_pooling_runs_along_the_blocks(make_run) -> None:
    folder = make_run(stage="probe")
    rows = json.loads((folder / "results.json").read_text())["probe"]["rows"]
    chart = by_block(read_run(folder))
    assert chart is not None and chart.note == "test; numbers: block 2"
    for line, pooling in zip(chart.lines[:3], ("cls", "mean", "both"), strict=True):
        assert line.label == pooling
        np.testing.assert_array_equal(line.series.step, range(4))
        expected = [row["test"] for row in rows if row["pooling"] == pooling]
        np.testing.assert_allclose(line.series.value, expected)
    assert [entry[:2] for entry in chart.legend()] == [
        ("cls", "88.0%"), ("mean", "91.0%"), ("both", "92.0%"), ("attentive", "91.5%"),
        ("raw pixels", "89.0%"), ("kNN", "91.0%"),
    ]  # fmt: skip


def test_without_a_test_part_validation_counts(make_run) -> None:
    rows = [{"block": b, "pooling": "mean", "lr": 0.01, "val": 0.5 + 0.1 * b, "test": None} for b in (1, 0)]
    attentive = [{"block": 4, "lr": 0.02, "val": 0.7, "test": None}]
    section = {"rows": rows, "best": rows[0], "accuracy": 0.6, "attentive": attentive}
    section |= {"pixels": {"lr": 0.1, "val": 0.55, "test": None}}
    run = read_run(make_run(stage="probe", results={"probe": section, "knn": None}))
    chart, found = by_block(run), score(run)
    assert chart is not None and found is not None and (found.split, found.span) == ("val", None)
    assert chart.lines[0].series.step.tolist() == [0, 1] and chart.note == "validation; numbers: block 1"
    # a line that has no point at the best block says where its number is from
    assert [entry[:2] for entry in chart.legend()] == [
        ("mean", "60.0%"), ("attentive, block 4", "70.0%"), ("raw pixels", "55.0%"),
    ]  # fmt: skip
    assert pixels(run) == 0.55 and best_words(run) == "block 1, mean, lr 0.01"


def test_the_table_marks_the_best_and_ends_with_raw_pixels(make_run) -> None:
    table = probe_rows(read_run(make_run(stage="probe")))
    assert [row for row in table if row[5]] == [["2", "both", "0.003", "93.0%", "92.0%", "best"]]
    assert table[-1] == ["", "raw pixels", "0.01", "90.0%", "89.0%", ""]
    assert [row[0] for row in table[:-1]] == [str(b) for b, n in enumerate((3, 3, 4, 4)) for _ in range(n)]


def test_the_best_so_far_is_drawn_over_that_of_each_block(make_run, words) -> None:
    folder = make_run(stage="probe")
    chart = probe_while_training(read_run(folder))
    assert chart is not None and [label for label, *_ in chart.legend()] == ["best of all"]
    assert [line.label for line in chart.lines if line.quiet] == [f"block {b}" for b in range(4)]
    assert "Linear probe while training" in [drawn.title for drawn in run_charts(read_run(folder))]
    (folder / "results.json").unlink()
    (folder / "config.yaml").write_text("stage:\n  name: probe\n")
    assert "linear probe 89.6% best so far, on validation" in words(make_report(folder))
