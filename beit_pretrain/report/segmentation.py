"""What a run of stage=segment says: how much of each class it finds, where it fails, and what labels it learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.errors import BeitError
from beit_pretrain.report import pictures
from beit_pretrain.report.classification import CONFUSIONS, FIRST, SPLITS
from beit_pretrain.report.folder import Run, counts, number, records, rows, text
from beit_pretrain.report.parts import Tile
from beit_pretrain.report.words import percent, plain, whole

MEASURES = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}
NOTES = {"macc": "mean over classes of the pixels found", "aacc": "of all labelled pixels"}
SIDE, ENOUGH = (
    1600,
    300_000,
)  # pixels and bytes of an embedded picture: panels are wide and have small letters


class Score(NamedTuple):
    """A mean IoU and what it was measured on; `images` is None where the run did not write it."""

    miou: float
    split: str  # a key of SPLITS
    images: float | None
    how: str  # windows and scales of the prediction


class Section(NamedTuple):
    """What the page shows of the classes: `rows` as shown at first and those folded away."""

    summary: str
    rows: list[list[str]]
    folded: list[list[str]]
    mistakes: list[str]
    worst: list[pictures.Picture]
    look: list[str]


def score(run: Run) -> Score | None:
    """mIoU on test images if there are any, else on the held-out ones."""
    for split in SPLITS:
        miou = run.metric(f"{split}/miou")
        if miou is not None:
            images = run.number("metrics", f"{split}/images")
            return Score(miou, split, images, text(run.section("segmentation"), "how"))
    return None


def tiles(run: Run) -> Iterator[Tile]:
    """mIoU and the two accuracies."""
    found = score(run)
    if found is None:
        return
    notes = NOTES | {"miou": "" if found.images is None else f"{whole(found.images)} images"}
    for key, name in MEASURES.items():
        value = run.metric(f"{found.split}/{key}")
        if value is not None:
            yield Tile(f"{SPLITS[found.split]} {name}", percent(value), notes[key])


def section(run: Run) -> Section | None:
    """Single classes, mistakes, worst images and labels; None if the run wrote nothing of them."""
    about = run.section("segmentation")
    if not about:
        return None
    table = class_rows(run)
    return Section(summary(run), table[:FIRST], table[FIRST:], mistakes(run), worst(run), look(run))


def summary(run: Run) -> str:
    """What the score is a mean of, and how it was reached."""
    about, source = run.section("segmentation"), run.path / "results.json"
    scored = [share for share in _shares(run, "iou") if share is not None]
    split = text(about, "split")
    images = run.number("metrics", f"{split}/images")
    said = f"Mean over the {whole(len(scored))} classes that occur"
    if images is not None and split in SPLITS:
        said += f" in the {whole(images)} {SPLITS[split]} images or were predicted there"
    said += ". IoU: pixels that label and prediction both give to a class, of those that either does."
    ignored, how = number(about, "ignored", source), text(about, "how")
    said += f" {percent(ignored)} of the pixels are without a class and count nowhere." if ignored else ""
    return f"{said} Predicted by {how}." if how else said


def class_rows(run: Run) -> list[list[str]]:
    """(class, share of pixels, IoU, accuracy, share in training), worst IoU first, classes without pixels last."""
    names, pixels = _names(run), _pixels(run)
    iou, found, learnt = _shares(run, "iou"), _shares(run, "accuracy"), _learnt(run)
    if not len(pixels) or not iou or not found:
        return []
    order = sorted(
        range(len(names)), key=lambda i: (pixels[i] == 0, iou[i] is None, iou[i] or 0.0, -pixels[i])
    )
    total = max(int(pixels.sum()), 1)
    return [
        [
            names[i],
            _fine(pixels[i] / total),
            _cell(iou[i]),
            _cell(found[i]),
            "" if not learnt else _fine(learnt[i] or 0.0),
        ]
        for i in order
    ]


def mistakes(run: Run) -> list[str]:
    """The most frequent ones in words, at most `CONFUSIONS`."""
    names, pixels = _names(run), _pixels(run)
    said = []
    for line in rows(run.section("segmentation"), "mistakes", run.path / "results.json")[:CONFUSIONS]:
        true, taken, count = _mistake(run, line, len(names))
        share = f" ({percent(count / pixels[true])} of {names[true]})" if len(pixels) and pixels[true] else ""
        said.append(f"{names[true]} taken for {names[taken]}: {whole(count)} pixels{share}")
    return said


def worst(run: Run) -> list[pictures.Picture]:
    """The images of lowest mIoU, worst first, as far as their pictures are still there."""
    source, shown = run.path / "results.json", []
    for record in records(run.section("segmentation"), "worst", source):
        path = run.path / text(record, "picture")
        values = (
            ("mIoU", number(record, "miou", source)),
            ("pixels right", number(record, "accuracy", source)),
        )
        said = ", ".join(f"{name} {percent(value)}" for name, value in values if value is not None)
        if path.is_file():
            caption = ": ".join(part for part in (text(record, "name"), said) if part)
            shown.append(pictures.embed(path, caption, side=SIDE, enough=ENOUGH))
    return shown


def look(run: Run) -> list[str]:
    """What was seen of the training labels before the start, with the remarks on it."""
    about, source = run.section("segmentation", "look"), run.path / "results.json"
    maps, ignored = number(about, "label_maps", source), number(about, "ignored", source)
    if maps is None:
        return []
    seen = f"Before the start {whole(maps)} label maps of the training part were looked at"
    seen += "." if ignored is None else f": {percent(ignored)} of their pixels are without a class."
    return [seen, *(plain(remark) for remark in rows(about, "remarks", source))]


# --- reading ------------------------------------------------------------------------------------------------


def _names(run: Run) -> list[str]:
    return [plain(name) for name in rows(run.section("segmentation"), "classes", run.path / "results.json")]


def _pixels(run: Run) -> np.ndarray:
    """(C,) labelled pixels of each class; empty if the run wrote none."""
    source = run.path / "results.json"
    found = counts(rows(run.section("segmentation"), "pixels", source), "pixels", source)
    _of_each_class(run, "pixels", len(found))
    return found


def _shares(run: Run, key: str) -> list[float | None]:
    """A share of one for each class, None where it has none; empty if the run wrote none."""
    return _checked(run, key, rows(run.section("segmentation"), key, run.path / "results.json"))


def _learnt(run: Run) -> list[float | None]:
    """Each class's share of the training pixels that were looked at; empty if none were."""
    source = run.path / "results.json"
    return _checked(run, "share", rows(run.section("segmentation", "look"), "share", source))


def _checked(run: Run, key: str, values: list[Any]) -> list[float | None]:
    for value in values:
        fits = value is None or (type(value) in (int, float) and 0 <= value <= 1)
        if not fits:
            raise BeitError(
                f"{run.path / 'results.json'}: '{key}' should hold shares from 0 to 1 or null, got {value!r}: "
                "mend or move the file away"
            )
    _of_each_class(run, key, len(values))
    return values


def _of_each_class(run: Run, key: str, size: int) -> None:
    classes = len(_names(run))
    if size not in (0, classes):
        raise BeitError(
            f"{run.path / 'results.json'}: '{key}' has {size} entries and 'classes' {classes}: "
            "mend or move the file away"
        )


def _mistake(run: Run, line: Any, classes: int) -> tuple[int, int, int]:
    source = run.path / "results.json"
    found = counts(line if isinstance(line, list) else [line], "mistakes", source).tolist()
    if len(found) != 3 or max(found[:2]) >= classes:
        raise BeitError(
            f"{source}: each of 'mistakes' should be [true class, predicted class, pixels], got {line!r}: "
            "mend or move the file away"
        )
    return found[0], found[1], found[2]


def _cell(share: float | None) -> str:
    return "" if share is None else percent(share)


def _fine(share: float) -> str:
    """A share that may be small: none, two digits after the point, or less than they can say."""
    return "none" if share == 0 else percent(share, 2) if share >= 1e-4 else "<0.01%"
