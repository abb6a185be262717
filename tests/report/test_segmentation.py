"""The page of a segmentation: single classes as they were counted, the worst images, links side by side."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from beit_pretrain.errors import BeitError
from beit_pretrain.report import make_chain_report, make_report
from beit_pretrain.report.charts import accuracy, loss, run_charts
from beit_pretrain.report.comparison import compare, compare_segmentation
from beit_pretrain.report.folder import read_run
from beit_pretrain.report.segmentation import class_rows, look, mistakes, score, section, summary, worst


def _run(make_run, change: dict[str, Any] | None = None, **options: Any):
    """A run whose section on segmentation is changed in some keys."""
    folder = make_run(stage="segment", **options)
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["segmentation"] |= change or {}
    path.write_text(json.dumps(results))
    return read_run(folder)


def _tuned(make_run, name: str, miou: float, **results: Any) -> Path:
    metrics = {"val/miou": miou, "val/images": 200}
    return make_run(name, stage="segment", results={"metrics": metrics, **results})


def _compare(*folders: Path):
    return compare_segmentation([(folder.name, read_run(folder)) for folder in folders])


def test_the_page_says_the_scores_and_what_they_are_means_of(make_run, words) -> None:
    said = words(make_report(make_run(stage="segment")))
    assert (
        "held-out mIoU 46.1% 200 images held-out mAcc 67.2% mean over classes of the pixels found "
        "held-out aAcc 94.0% of all labelled pixels"
    ) in said
    assert (
        "Mean over the 5 classes that occur in the 200 held-out images or were predicted there. IoU: pixels that "
        "label and prediction both give to a class, of those that either does. 4.8% of the pixels are without a "
        "class and count nowhere. Predicted by sliding windows of 64 x 64, stride 42 x 42; one scale."
    ) in said
    assert (
        "Before the start 160 label maps of the training part were looked at: 5.1% of their pixels are without a "
        "class. 1 class never occurs: ring"
    ) in said
    assert "Start Weights from runs/shapes/pretrain" in said and "training images 1,600" in said


def test_classes_are_listed_worst_first_and_those_without_pixels_last(make_run) -> None:
    assert class_rows(_run(make_run)) == [
        ["pole", "0.05%", "11.4%", "20.0%", "<0.01%"],
        ["disc", "9.95%", "40.2%", "61.0%", "9.00%"],
        ["ground", "30.00%", "88.0%", "93.0%", "30.00%"],
        ["sky", "60.00%", "91.0%", "95.0%", "60.00%"],
        ["ring", "none", "0.0%", "", "none"],
        ["net", "none", "", "", "1.00%"],
    ]
    unseen = _run(make_run, {"look": {}}, folder="unseen")
    assert [row[4] for row in class_rows(unseen)] == [""] * 6 and look(unseen) == []


def test_the_table_and_the_mistakes_are_those_of_the_labels(make_run) -> None:
    rng = np.random.default_rng(3)
    true = rng.integers(0, 9, 20_000)
    taken = np.where(rng.random(20_000) < 0.5 + true / 20, true, rng.integers(0, 9, 20_000))
    matrix = confusion_matrix(true, taken)
    iou, found = jaccard_score(true, taken, average=None), recall_score(true, taken, average=None)
    off = [[i, j, int(matrix[i, j])] for i in range(9) for j in range(9) if i != j]
    told = sorted(off, key=lambda row: -row[2])[:20]
    names = [f"kind {index}" for index in range(9)]
    change = {"classes": names, "iou": iou.tolist(), "accuracy": found.tolist(), "mistakes": told}
    run = _run(make_run, {**change, "pixels": matrix.sum(1).tolist(), "look": {}})
    rows = class_rows(run)
    assert [row[0] for row in rows] == [names[i] for i in np.argsort(iou)]
    for name, share, cell, right, _ in rows:
        i = names.index(name)
        assert (cell, right) == (f"{100 * iou[i]:.1f}%", f"{100 * found[i]:.1f}%")
        assert share == f"{100 * (true == i).mean():.2f}%"
    a, b, count = told[0]
    part = f"{100 * count / (true == a).sum():.1f}% of kind {a}"
    assert mistakes(run)[0] == f"kind {a} taken for kind {b}: {count:,} pixels ({part})"
    assert len(mistakes(run)) == 10


def test_the_worst_images_are_on_the_page_worst_first(make_run) -> None:
    folder = make_run(stage="segment")
    page = make_report(folder).read_text()
    shown = re.findall(r'<img src="data:image/png;base64,([^"]*)"[^>]*alt="([^"]*)"', page)
    assert [alt for _, alt in shown] == [
        f"val/{n}.png: mIoU {10 + 10 * n}.0%, pixels right 40.0%" for n in range(3)
    ]
    for number, (content, _) in enumerate(shown):
        assert base64.b64decode(content) == (folder / "pictures" / "worst" / f"{number}.png").read_bytes()
    (folder / "pictures" / "worst" / "1.png").unlink()
    assert [picture.caption[:9] for picture in worst(read_run(folder))] == ["val/0.png", "val/2.png"]


def test_many_classes_are_folded_away(make_run) -> None:
    count = 130
    change = {"classes": [f"class {i}" for i in range(count)], "iou": [i / count for i in range(count)]}
    change |= {"accuracy": [0.5] * count, "pixels": [7] * count, "mistakes": [], "worst": [], "look": {}}
    page = make_report(_run(make_run, change).path).read_text()
    shown, _, folded = page.partition("<summary>80 more</summary>")
    assert len(re.findall(r"<td>class \d+</td>", shown)) == 50
    assert len(re.findall(r"<td>class \d+</td>", folded)) == 80
    assert "Most frequent mistakes" not in page and "Worst images" not in page


def test_test_images_count_where_there_are_any(make_run, words) -> None:
    metrics = {"val/miou": 0.5, "val/images": 90, "test/miou": 0.4, "test/macc": 0.45, "test/images": 70}
    run = _run(make_run, {"split": "test"}, results={"metrics": metrics})
    found = score(run)
    assert found is not None and (found.miou, found.split, found.images) == (0.4, "test", 70)
    said = words(make_report(run.path))
    assert (
        "test mIoU 40.0% 70 images test mAcc 45.0%" in said
        and "held-out mIoU 5" not in said.split("Training")[0]
    )
    assert "in the 70 test images" in summary(run)


def test_a_run_that_was_stopped_shows_what_it_logged(make_run, words) -> None:
    folder = make_run(stage="segment")
    (folder / "results.json").unlink()
    said = words(make_report(folder))
    assert "held-out mIoU 50.9%" in said and "Classes" not in said and "unfinished" in said
    assert section(read_run(folder)) is None


def test_the_charts_show_both_heads_and_all_three_scores(make_run) -> None:
    run = read_run(make_run(stage="segment"))
    losses, scores = loss(run), accuracy(run)
    assert losses is not None and scores is not None
    assert losses.note == "cross-entropy of labelled pixels, nats; auxiliary head weighted in"
    assert [label for label, *_ in losses.legend()] == [
        "training", "its main head alone", "its auxiliary head alone",
    ]  # fmt: skip
    assert [label for label, *_ in scores.legend()] == [
        "training, pixels right", "held-out mIoU", "held-out mAcc", "held-out aAcc",
    ]  # fmt: skip
    assert {chart.title for chart in run_charts(run)} >= {"Loss", "Segmentation", "Learning rate"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": [1, -1, 1, 1, 1, 1]}, r"'pixels' should hold counts, got -1: mend or move"),
        ({"pixels": [1, 2]}, r"'pixels' has 2 entries and 'classes' 6: mend or move"),
        ({"iou": [0.5] * 7}, r"'iou' has 7 entries and 'classes' 6"),
        ({"iou": [0.5, 1.5, None, None, 0, 0]}, r"'iou' should hold shares from 0 to 1 or null, got 1\.5"),
        ({"accuracy": ["x"] * 6}, r"'accuracy' should hold shares from 0 to 1 or null, got 'x'"),
        ({"accuracy": 3}, r"'accuracy' should be a list, got 3"),
        (
            {"mistakes": [[0, 6, 5]]},
            r"each of 'mistakes' should be \[true class, predicted class, pixels\], got",
        ),
        ({"mistakes": [[0, 1]]}, r"each of 'mistakes' should be"),
        ({"mistakes": [7]}, r"each of 'mistakes' should be"),
        ({"mistakes": [[0, 1, "x"]]}, r"'mistakes' should hold counts, got 'x'"),
        ({"ignored": "some"}, r"'ignored' should be a number, got 'some'"),
        ({"worst": [3]}, r"each of 'worst' should be a mapping, got 3"),
        ({"look": {"label_maps": 1, "share": [0.5]}}, r"'share' has 1 entries and 'classes' 6"),
        ({"look": [1]}, r"'look' should be a mapping, got \[1\]"),
    ],
)
def test_damaged_results_are_one_clear_error(make_run, change: dict[str, Any], message: str) -> None:
    run = _run(make_run, change)
    with pytest.raises(BeitError, match=message):
        make_report(run.path)


def test_text_of_a_segmentation_is_never_markup(make_run) -> None:
    evil = "<script>alert('x')</script>\"&<b>"
    told = [{"name": evil, "miou": 0.1, "accuracy": 0.2, "picture": "pictures/worst/0.png"}]
    change: dict[str, Any] = {"classes": [evil] * 6, "how": evil, "worst": told}
    change["look"] = {"label_maps": 3, "remarks": [evil]}
    page = make_report(_run(make_run, change).path).read_text()
    assert "<script" not in page and "<b>al" not in page and page.count("&lt;script&gt;") >= 10


# --- links side by side -------------------------------------------------------------------------------------


def test_pre_training_is_compared_with_training_from_scratch(make_run, tmp_path: Path, words) -> None:
    links = [("pretrain", make_run("pretrain", steps=200)), ("segment", _tuned(make_run, "segment", 0.621))]
    links.append(("scratch", _tuned(make_run, "scratch", 0.41, init_from=None)))
    path = make_chain_report(tmp_path / "runs", links)
    said = words(path)
    assert (
        "Result: what pre-training is worth in segmentation Fine-tuned from pre-training: 62.1% mIoU, from scratch "
        "with the same 1,600 images and steps: 41.0%: +21.1 points (one seed)."
    ) in said
    assert "segment pre-trained, 1,600 training images, 1,000 steps 62.1% scratch from scratch" in said
    assert (
        "mIoU on the 200 held-out images, sliding windows of 64 x 64, stride 42 x 42; one scale. It is no share of "
        "images, so there is no interval, and a single seed is no proof."
    ) in said
    assert said.count("Held-out mIoU while training") == 1 and '<i style="left' not in path.read_text()
    assert "segment segmentation finished held-out mIoU 62.1%" in said
    assert compare([(name, read_run(folder)) for name, folder in links]) is None


def test_classification_and_segmentation_are_compared_apart(make_run, tmp_path: Path, words) -> None:
    links = [(name, make_run(name, stage="classify", steps=200)) for name in ("a", "b")]
    links += [(name, make_run(name, stage="segment", steps=200)) for name in ("c", "d")]
    said = words(make_chain_report(tmp_path / "runs", links))
    first, _, second = said.partition("Result: what pre-training is worth in segmentation")
    assert "Result: what pre-training is worth a " in first and "top-1 while training" in first
    assert "mIoU" not in first and "mIoU while training" in second


def test_other_images_ways_or_efforts_are_said(make_run) -> None:
    ours = _tuned(make_run, "ours", 0.5)
    shorter = _tuned(make_run, "shorter", 0.55, init_from=None, train_images=100, steps=50)
    found = _compare(ours, shorter)
    assert found is not None and found.sentences == [
        "Fine-tuned from pre-training, 1,600 images and 1,000 steps: 50.0% mIoU, from scratch, 100 images and 50 "
        "steps: 55.0%: -5.0 points (one seed)."
    ]
    way = _run(make_run, {"how": "whole images"}, folder="way", results={"init_from": None}).path
    found = _compare(ours, way)
    assert found is not None and not found.sentences
    assert found.bars[1].note.endswith("; whole images") and "windows" not in found.measured
    metrics = {"test/miou": 0.7, "test/images": 9}
    other = make_run("other", stage="segment", results={"metrics": metrics, "init_from": None})
    found = _compare(ours, other)
    assert found is not None and not found.sentences and found.bars[1].note.endswith("; test images")


def test_a_single_segmentation_is_compared_with_nothing(make_run) -> None:
    assert _compare(make_run(stage="segment"), make_run(folder="k", stage="knn")) is None
