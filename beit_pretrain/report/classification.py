"""What a run of stage=classify says: how much it gets right, of which classes, and what it takes for what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from beit_pretrain.errors import BeitError
from beit_pretrain.report.folder import Run, counts, number, rows, text
from beit_pretrain.report.intervals import wilson
from beit_pretrain.report.parts import Tile
from beit_pretrain.report.words import interval, percent, plain, whole

SPLITS = {"test": "test", "val": "held-out"}
FIRST = 50  # classes of the table that are not folded away
CONFUSIONS = 10  # of the most frequent ones


class Score(NamedTuple):
    """An accuracy and what it was measured on; `images` is None where the run did not write it."""

    share: float
    split: str  # a key of SPLITS
    images: float | None

    @property
    def span(self) -> tuple[float, float] | None:
        return None if not self.images else wilson(self.share, self.images)


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Right and wrong by class: `support` and `correct` (C,), `confusion` (C, C) with true classes as rows."""

    names: list[str]
    support: np.ndarray
    correct: np.ndarray
    confusion: np.ndarray | None
    mistakes: list[np.ndarray] = field(
        default_factory=list
    )  # (true, taken, images), where there is no whole table


def score(run: Run, weights: str = "", metric: str = "top1") -> Score | None:
    """Top-1 (or another metric) on test images if there are any, else on the held-out ones.

    Of the `weights` "raw" or "ema"; without, of those that the run wrote down as its result.
    """
    weights = weights or text(run.section("classification"), "weights")
    suffix = "_ema" if weights == "ema" else ""
    for split in SPLITS:
        share = run.metric(f"{split}{suffix}/{metric}")
        if share is not None:
            return Score(share, split, run.number("metrics", f"{split}/images"))
    return None


def tiles(run: Run) -> Iterator[Tile]:
    """Top-1 of the weights that count, then of the others, and top-5 where it can fail."""
    section = run.section("classification")
    ema = text(section, "weights") == "ema"
    for weights in ("ema", "raw") if ema else ("raw", "ema"):
        found, name = score(run, weights), ", EMA" if weights == "ema" else ""
        if found is not None:
            note = _trust(run, found) if ema == (weights == "ema") else ""
            yield Tile(f"{SPLITS[found.split]} top-1{name}", percent(found.share), note)
    top5 = score(run, metric="top5")
    if top5 is not None and len(rows(section, "classes", run.path / "results.json")) > 5:
        yield Tile(f"{SPLITS[top5.split]} top-5", percent(top5.share), "")


def _trust(run: Run, found: Score) -> str:
    """The interval of a score, what it is out of, and what could be had for nothing."""
    chance = run.number("classification", "chance")
    said = []
    if found.span is not None and found.images is not None:
        said += [f"95%: {interval(found.span)}", f"{whole(found.images)} images"]
    if chance is not None:
        said.append(f"chance {percent(chance)}")
    return "; ".join(said)


def read_classes(run: Run) -> Classes | None:
    """The counts of each class; None if the run wrote none."""
    section, source = run.section("classification"), run.path / "results.json"
    support = counts(rows(section, "support", source), "support", source)
    correct = counts(rows(section, "correct", source), "correct", source)
    if not len(support) or not len(correct):
        return None
    names = [plain(name) for name in rows(section, "classes", source)]
    names = names or [str(index) for index in range(len(support))]
    matrix = rows(section, "confusion", source)
    sizes = {"correct": len(correct), "classes": len(names)} | ({"confusion": len(matrix)} if matrix else {})
    for key, size in sizes.items():
        if size != len(support):
            raise BeitError(
                f"{source}: '{key}' has {size} entries and 'support' {len(support)}: mend or move the file away"
            )
    if (correct > support).any():
        raise BeitError(f"{source}: 'correct' is above 'support' in a class: mend or move the file away")
    confusion = None
    if matrix:
        lines = [line if isinstance(line, list) else [line] for line in matrix]
        if any(len(line) != len(support) for line in lines):
            raise BeitError(
                f"{source}: each row of 'confusion' should have {len(support)} counts: mend or move the file away"
            )
        confusion = np.stack([counts(line, "confusion", source) for line in lines])
    mistakes = []
    for line in rows(section, "mistakes", source):
        found = counts(line if isinstance(line, list) else [line], "mistakes", source)
        if len(found) != 3 or max(found[:2]) >= len(support):
            raise BeitError(
                f"{source}: each of 'mistakes' should be [true class, predicted class, images], got {line!r}: "
                "mend or move the file away"
            )
        mistakes.append(found)
    return Classes(names=names, support=support, correct=correct, confusion=confusion, mistakes=mistakes)


def summary(run: Run, classes: Classes) -> str:
    """What was right in all, and what always giving the same answer would get."""
    section = run.section("classification")
    images, correct = int(classes.support.sum()), int(classes.correct.sum())
    split = SPLITS.get(text(section, "split"), "")
    weights = ", with the averaged weights (EMA)" if text(section, "weights") == "ema" else ""
    said = f"{whole(correct)} of {whole(images)} {split} images are right{weights}".replace("  ", " ")
    if images:
        said += f": {percent(correct / images)} (95%: {interval(wilson(correct / images, images))})"
    chance = number(section, "chance", run.path / "results.json")
    if chance is None:
        return f"{said}."
    return f"{said}. Always answering the most frequent class would get {percent(chance)}."


def class_rows(classes: Classes) -> list[list[str]]:
    """(class, images, correct, accuracy, 95% interval), the worst first, classes without images last.

    Whole percents for fewer than a thousand images, which cannot tell finer ones apart.
    """
    share = classes.correct / np.maximum(classes.support, 1)
    order = sorted(range(len(share)), key=lambda i: (classes.support[i] == 0, share[i], -classes.support[i]))
    table = []
    for index in order:
        images = int(classes.support[index])
        digits = 0 if images < 1000 else 1
        said = ["", ""]
        if images:
            span = wilson(share[index], images)
            said = [percent(share[index], digits), interval(span, digits)]
        table.append([classes.names[index], whole(images), whole(classes.correct[index]), *said])
    return table


def confusions(classes: Classes) -> list[str]:
    """The most frequent mistakes in words, at most `CONFUSIONS`."""
    if classes.confusion is None:
        return [_mistake(classes, *(int(n) for n in line)) for line in classes.mistakes[:CONFUSIONS]]
    wrong = classes.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(place), len(wrong)) for place in order]
    return [
        _mistake(classes, true, taken, int(wrong[true, taken])) for true, taken in pairs if wrong[true, taken]
    ]


def _mistake(classes: Classes, true: int, taken: int, count: int) -> str:
    return f"{classes.names[true]} taken for {classes.names[taken]}: {_times(count)}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{whole(count)} times"


def start(run: Run) -> list[str] | None:
    """The path that a run's weights came from and what became of them; empty from scratch, None if unknown."""
    if "init_from" not in run.results:
        return None
    section, source = run.section("init_from"), run.path / "results.json"
    lines = [plain(line) for line in rows(section, "report", source)]
    return [text(section, "path"), *lines] if section else []
