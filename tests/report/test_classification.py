"""Single classes: what the counts say, no more exactly than they can, and the picture of them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix

import beit_pretrain.report
from beit_pretrain.errors import BeitError
from beit_pretrain.report import make_report
from beit_pretrain.report.charts import accuracy, loss
from beit_pretrain.report.classification import Classes, class_rows, confusions, read_classes, score
from beit_pretrain.report.folder import read_run
from beit_pretrain.report.heat_map import CELL, SIDE, heat_map
from beit_pretrain.report.intervals import difference, wilson

STYLE = (Path(beit_pretrain.report.__file__).parent / "style.css").read_text()


def _classes(matrix: list[list[int]] | np.ndarray, names: list[str] | None = None) -> Classes:
    counts = np.asarray(matrix)
    names = names or [f"c{index}" for index in range(len(counts))]
    return Classes(names=names, support=counts.sum(1), correct=counts.diagonal(), confusion=counts)


@pytest.mark.parametrize(("right", "images"), [(0, 1), (1, 1), (7, 8), (351, 397), (0, 40), (39_000, 50_000)])
def test_the_interval_is_scipys(right: int, images: int) -> None:
    expected = binomtest(right, images).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(right / images, images), expected, rtol=1e-9, atol=1e-12)


def test_the_interval_of_a_difference_is_newcombes_example() -> None:
    # Newcombe (1998), Table II, method 10: 56/70 - 48/80 and 9/10 - 3/10
    np.testing.assert_allclose(difference(56 / 70, 48 / 80, (70, 80)), (0.0524, 0.3339), atol=5e-5)
    np.testing.assert_allclose(difference(0.9, 0.3, (10, 10)), (0.1705, 0.8090), atol=5e-5)


def test_classes_are_listed_worst_first_and_not_more_exactly_than_they_were_measured() -> None:
    matrix = np.diag([7, 0, 1000, 0, 12])
    matrix[0, 1], matrix[1, 0], matrix[2, 0], matrix[4, 0] = 1, 3, 500, 12
    rows = class_rows(_classes(matrix))
    assert [row[:4] for row in rows] == [
        ["c1", "3", "0", "0%"],
        ["c4", "24", "12", "50%"],
        ["c2", "1,500", "1,000", "66.7%"],
        ["c0", "8", "7", "88%"],
        ["c3", "0", "0", ""],
    ]
    assert [row[4] for row in rows] == ["0 to 56%", "31 to 69%", "64.2 to 69.0%", "53 to 98%", ""]


def test_the_most_frequent_mistakes_are_said_in_words() -> None:
    found = confusions(_classes([[5, 0, 1], [12, 2, 0], [0, 1200, 9]], ["cat", "dog", "4"]))
    assert found == ["4 taken for dog: 1,200 times", "dog taken for cat: 12 times", "cat taken for 4: once"]
    assert confusions(_classes([[3, 0], [0, 2]])) == []
    assert len(confusions(_classes(np.ones((9, 9), dtype=int)))) == 10


def test_the_page_says_what_a_confusion_matrix_of_the_labels_would(make_run, words) -> None:
    rng = np.random.default_rng(1)
    true = rng.integers(0, 7, 230)
    taken = np.where(rng.random(230) < 0.7, true, rng.integers(0, 7, 230))
    matrix = confusion_matrix(true, taken)
    support = np.bincount(true)
    section = {"split": "val", "weights": "ema", "classes": [f"kind {i}" for i in range(7)]}
    section |= {"support": support.tolist(), "correct": matrix.diagonal().tolist()}
    section |= {"confusion": matrix.tolist(), "chance": support.max() / 230}
    run = make_run(stage="classify", results={"classification": section})
    said, right = words(make_report(run)), accuracy_score(true, taken, normalize=False)
    interval = " to ".join(
        f"{100 * end:.1f}" for end in binomtest(int(right), 230).proportion_ci(method="wilson")
    )
    assert f"{right:.0f} of 230 held-out images are right, with the averaged weights (EMA): " in said
    assert f"{100 * right / 230:.1f}% (95%: {interval}%). Always answering the most frequent class" in said
    assert f"would get {100 * support.max() / 230:.1f}%." in said
    off = matrix - np.diag(matrix.diagonal())
    row, column = divmod(int(off.argmax()), 7)
    assert f"Most frequent mistakes kind {row} taken for kind {column}: {off.max()} times" in said


def test_the_picture_shows_every_pair_where_it_belongs(make_run) -> None:
    run = make_run(stage="classify")
    matrix = np.array(json.loads((run / "results.json").read_text())["classification"]["confusion"])
    page = make_report(run).read_text()
    svg = ElementTree.fromstring(re.findall(r'<svg class="heat".*?</svg>', page, re.S)[0])
    names = [text.text for text in svg.findall("text[@class='row']")]
    assert names == [text.text for text in svg.findall("text[@class='column']")] == list("0123456789")
    empty = svg.find("rect[@class='empty']")
    assert empty is not None
    left, top, side = (float(empty.get(key) or "nan") for key in ("x", "y", "width"))
    seen = np.zeros_like(matrix)
    for group in svg.findall("g"):
        rect, count, title = group.find("rect"), group.find("text"), group.find("title")
        assert rect is not None and count is not None and title is not None
        column = round((float(rect.get("x") or "nan") - left) / (side / 10))
        row = round((float(rect.get("y") or "nan") - top) / (side / 10))
        seen[row, column] = int(count.text or "")
        right = row == column
        assert rect.get("class") == ("right" if right else "wrong")
        opacity = 0.5 * np.sqrt(seen[row, column] / matrix[row].sum())
        assert float(rect.get("fill-opacity") or "nan") == pytest.approx(opacity, abs=1e-3)
        what = "right" if right else f"taken for {column}"
        assert title.text == f"{row} {what}: {seen[row, column]} of {matrix[row].sum()}"
    np.testing.assert_array_equal(seen, matrix)


def test_names_and_counts_are_left_out_when_there_is_no_room_for_them() -> None:
    few, many, most = (heat_map(_classes(np.ones((n, n), dtype=int))) for n in (20, 21, 100))
    assert few is not None and many is not None and most is not None
    assert len(few.names) == 20 and not many.names and not most.names
    assert few.side <= SIDE and most.side == pytest.approx(SIDE) and few.cell <= CELL
    assert heat_map(_classes(np.ones((101, 101), dtype=int))) is None
    assert heat_map(_classes(np.ones((2, 2), dtype=int)))


def test_long_names_are_cut_stand_upright_and_get_room() -> None:
    short = heat_map(_classes([[1, 0], [0, 1]], ["a", "b"]))
    long = heat_map(_classes([[1, 0], [0, 1]], ["a", "golden retriever puppies"]))
    wide = heat_map(_classes([[1, 0], [0, 1]], ["a", "\N{CJK UNIFIED IDEOGRAPH-56FE}" * 10]))
    assert short is not None and long is not None and wide is not None
    assert (short.upright, long.upright) == (False, True)
    assert long.names[1] == "golden retriever …" and long.head > short.head
    assert wide.margin > short.margin + 10 * 12


def _mix(over: str, under: str, opacity: float) -> str:
    pairs = [(int(over[i : i + 2], 16), int(under[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * a + (1 - opacity) * b):02x}" for a, b in pairs)


def _contrast(one: str, other: str) -> float:
    """WCAG 2.1."""
    lights = []
    for colour in (one, other):
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_counts_can_be_read_on_the_darkest_cell_in_light_dark_and_print() -> None:
    for block in re.findall(r":root \{(.*?)\}", STYLE, re.S):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for name in ("training", "heldout"):
            assert _contrast(colours["text"], _mix(colours[name], colours["code"], 0.5)) >= 4.5, name


def test_the_tiles_take_test_images_first_and_say_how_sure_they_are(make_run, words) -> None:
    said = words(make_report(make_run(stage="classify")))
    assert (
        "test top-1 88.4% 95%: 84.9 to 91.2%; 397 images; chance 10.3% "
        "test top-1, EMA 88.0% test top-5 98.2% held-out loss 0.41"
    ) in said
    metrics = {"val/loss": 0.5, "val/top1": 0.75, "val/top5": 0.9, "val_ema/top1": 0.8, "val_ema/top5": 0.95}
    for weights, order in (("raw", "top-1 75.0% {} held-out top-1, EMA 80.0% held-out top-5 90.0%"),
                           ("ema", "top-1, EMA 80.0% {} held-out top-1 75.0% held-out top-5 95.0%")):  # fmt: skip
        section = {"weights": weights, "classes": list("abcdef"), "chance": 0.25}
        results = {"metrics": {**metrics, "val/images": 40}, "classification": section}
        run = make_run(folder=weights, stage="classify", results=results)
        share = 0.75 if weights == "raw" else 0.8
        span = " to ".join(f"{100 * end:.1f}" for end in wilson(share, 40))
        assert "held-out " + order.format(f"95%: {span}%; 40 images; chance 25.0%") in words(make_report(run))
        found = score(read_run(run))
        assert found is not None and (found.share, found.split, found.images) == (share, "val", 40)


def test_top_five_of_five_classes_is_not_shown(make_run, words) -> None:
    section = {"classes": list("abcde")}
    said = words(make_report(make_run(stage="classify", results={"classification": section})))
    assert "top-1" in said and "test top-5" not in said


def test_a_run_that_was_stopped_shows_what_it_logged(make_run, words) -> None:
    run = make_run(stage="classify")
    (run / "results.json").unlink()
    (run / "config.yaml").write_text("stage:\n  name: classify\n")
    said = words(make_report(run))
    assert "held-out top-1 89.5%" in said and "Classes" not in said and "Start" not in said
    assert "unfinished" in said


def test_many_classes_are_folded_away(make_run) -> None:
    section = {"support": [10] * 120, "correct": [index % 11 for index in range(120)], "confusion": None}
    section |= {"classes": [f"class {index}" for index in range(120)]}
    page = make_report(make_run(stage="classify", results={"classification": section})).read_text()
    shown, _, folded = page.partition("<summary>70 more</summary>")
    assert len(re.findall(r"<td>class \d+</td>", shown)) == 50
    assert len(re.findall(r"<td>class \d+</td>", folded)) == 70
    assert "What was taken for what" not in page and "Most frequent mistakes" not in page


def test_the_start_of_a_run_is_told(make_run, words) -> None:
    said = words(make_report(make_run(stage="classify")))
    assert "Start Weights from runs/quickstart/pretrain loaded: 48 keys copied into each block" in said
    scratch = make_run(folder="scratch", stage="classify", results={"init_from": None})
    assert "Start From scratch: all weights as initialised." in words(make_report(scratch))
    assert "Start" not in words(make_report(make_run(folder="other", stage="knn")))


def test_loss_and_accuracy_show_both_sets_of_weights_and_top_five_without_a_name(make_run) -> None:
    run = read_run(make_run(stage="classify"))
    drawn = loss(run), accuracy(run)
    assert [[label for label, *_ in chart.legend()] for chart in drawn if chart is not None] == [
        ["training", "held-out", "held-out, EMA"],
        ["training", "held-out top-1", "held-out top-1, EMA"],
    ]
    assert drawn[1] is not None and [line.label for line in drawn[1].lines if line.quiet] == [
        "held-out top-5"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support": [1, -1]}, r"'support' should hold counts, got -1: mend or move"),
        ({"support": [1, 2.5]}, r"'support' should hold counts, got 2\.5"),
        ({"correct": [1, True]}, r"'correct' should hold counts, got True"),
        ({"correct": [1]}, r"'correct' has 1 entries and 'support' 2"),
        ({"correct": [1, 9]}, r"'correct' is above 'support' in a class"),
        ({"classes": ["a", "b", "c"]}, r"'classes' has 3 entries and 'support' 2"),
        ({"confusion": [[1, 1]]}, r"'confusion' has 1 entries and 'support' 2"),
        ({"confusion": [[1, 1], [1]]}, r"each row of 'confusion' should have 2 counts"),
        ({"confusion": [1, 2]}, r"each row of 'confusion' should have 2 counts"),
        ({"confusion": [[1, "x"], [1, 1]]}, r"'confusion' should hold counts, got 'x'"),
        ({"confusion": "none"}, r"'confusion' should be a list, got 'none'"),
        ({"chance": "low"}, r"'chance' should be a number, got 'low'"),
    ],
)
def test_damaged_counts_are_one_clear_error(make_run, change: dict[str, object], message: str) -> None:
    section = {"classes": ["a", "b"], "support": [2, 3], "correct": [1, 2], "confusion": [[1, 1], [1, 2]]}
    run = make_run(stage="classify", results={"classification": {**section, **change}})
    with pytest.raises(BeitError, match=message):
        make_report(run)


def test_classes_without_names_are_numbered(make_run) -> None:
    run = make_run(stage="classify", results={"classification": {"support": [2, 3], "correct": [1, 2]}})
    found = read_classes(read_run(run))
    assert found is not None and found.names == ["0", "1"] and found.confusion is None


def test_of_many_classes_the_mistakes_are_those_that_the_run_wrote() -> None:
    counts = np.array([[5, 2, 0], [0, 4, 1], [0, 0, 3]])
    whole = Classes(names=["a", "b", "c"], support=counts.sum(1), correct=counts.diagonal(), confusion=counts)
    kept = [np.array([0, 1, 2]), np.array([1, 2, 1])]
    listed = replace(whole, confusion=None, mistakes=kept)
    assert confusions(listed) == confusions(whole) == ["a taken for b: 2 times", "b taken for c: once"]
