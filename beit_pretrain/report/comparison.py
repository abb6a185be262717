"""The links of a chain side by side: probes, kNN, fine-tuning and segmentation, on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, product
from typing import NamedTuple, TypeVar

from beit_pretrain.report import classification, probing, segmentation
from beit_pretrain.report.classification import SPLITS, Score
from beit_pretrain.report.curves import DASHES, Chart, Line
from beit_pretrain.report.folder import Run, records
from beit_pretrain.report.intervals import difference
from beit_pretrain.report.parts import Bar
from beit_pretrain.report.words import percent, whole

COLOURS = ("training", "heldout", "third", "fourth")
S = TypeVar("S")


class Entry(NamedTuple):
    """One way to use an encoder and how far it got."""

    label: str
    note: str
    score: Score
    kind: str  # "pre-trained", "scratch", or "reference": neither


class Comparison(NamedTuple):
    """What a chain's page sets side by side."""

    bars: list[Bar]
    measured: str  # on which images, and what the intervals mean
    sentences: list[str]
    chart: Chart | None


def compare(runs: Sequence[tuple[str, Run]]) -> Comparison | None:
    """All accuracies of the links `runs` (name, run); None if there are no two that bear on each other."""
    entries = [entry for name, run in runs for entry in _entries(name, run)]
    tuned = [(name, run, found) for name, run in runs if (found := _tuned(run)) is not None]
    if sum(entry.kind != "reference" for entry in entries) < 2:
        return None
    splits = {entry.score.split for entry in entries}
    bars = []
    for label, note, score, kind in entries:
        where = f"{SPLITS[score.split]} images"
        note = note if len(splits) == 1 else ", ".join(part for part in (note, where) if part)
        bars.append(Bar(label, score.share, kind == "pre-trained", note, score.span))
    return Comparison(bars, _measured(entries), _sentences(tuned), while_training(runs, "top1", "top-1"))


def while_training(runs: Sequence[tuple[str, Run]], metric: str, label: str) -> Chart | None:
    """A held-out score over the steps, a line for each link that has it."""
    known = [(name, run.metrics[f"val/{metric}"]) for name, run in runs if f"val/{metric}" in run.metrics]
    known = [(name, series) for name, series in known if len(series.finite().value) > 1]
    looks = cycle((colour, dash) for dash, colour in product(DASHES, COLOURS))
    lines = [
        Line(label=name, series=series, colour=colour, dash=dash, markers=True)
        for (name, series), (colour, dash) in zip(known, looks, strict=False)
    ]
    if len(lines) < 2:
        return None
    return Chart(title=f"Held-out {label} while training", lines=lines, percent=True)


def _entries(name: str, run: Run) -> Iterator[Entry]:
    probe, tuned = probing.score(run), _tuned(run)
    if probe is not None:
        yield Entry(
            "Linear probe", f"{name}: frozen encoder, {probing.best_words(run)}", probe, "pre-trained"
        )
        pixels = probing.pixels(run)
        if pixels is not None:
            yield Entry(
                "Linear, raw pixels", f"{name}: no encoder", probe._replace(share=pixels), "reference"
            )
    yield from _knn(name, run)
    if tuned is not None:
        yield Entry(name, _training(run), tuned, "pre-trained" if _started(run) else "scratch")


def _knn(name: str, run: Run) -> Iterator[Entry]:
    """kNN on the encoder's features, on those of an untrained one, and on raw pixels."""
    blocks = records(run.section("knn"), "blocks", run.path / "results.json")
    split = "test" if any("test" in block for block in blocks) else "val"
    at = run.number("knn", "best_block")
    frozen = "frozen encoder" if at is None else f"frozen encoder, block {at:.0f}"
    for key, label, note, kind in (
        ("accuracy", "kNN", frozen, "pre-trained"),
        ("untrained", "kNN, untrained encoder", "random weights", "reference"),
        ("pixels", "kNN, raw pixels", "no encoder", "reference"),
    ):
        share = run.number("knn", key)
        if share is not None:
            score = Score(share, split, run.number("knn", "images"))
            yield Entry(label, f"{name}: {note}", score, kind)


def _tuned(run: Run) -> Score | None:
    return classification.score(run) if run.stage == "classify" else None


def _started(run: Run) -> bool:
    """Whether a fine-tuning run began with another's weights."""
    return bool(run.section("init_from"))


def _training(run: Run) -> str:
    """What a fine-tuning run had to learn from."""
    said = [] if "init_from" not in run.results else ["pre-trained" if _started(run) else "from scratch"]
    images, steps = run.number("train_images"), run.number("steps")
    said += [] if images is None else [f"{whole(images)} training images"]
    said += [] if steps is None else [f"{whole(steps)} steps"]
    if classification.text(run.section("classification"), "weights") == "ema":
        said.append("averaged weights")
    return ", ".join(said)


def _measured(entries: Sequence[Entry]) -> str:
    """On which images, and what the intervals leave out."""
    splits = {entry.score.split for entry in entries}
    images = {entry.score.images for entry in entries}
    said = ""
    if len(splits) == 1:
        count = images.pop() if len(images) == 1 else None
        said = f"Accuracy on {'' if count is None else f'the {whole(count)} '}{SPLITS[splits.pop()]} images. "
    if any(entry.score.span for entry in entries):
        said += (
            "Lines: 95% interval of the images' chance alone (Wilson); another seed of training adds to it. "
        )
    return f"{said}Blue: with pre-trained weights."


def _sentences(tuned: Sequence[tuple[str, Run, Score]]) -> list[str]:
    """Each fine-tuned link against each that was trained from scratch, on the same images."""
    pairs = [(a, b) for a, b in _pairs(tuned) if a[2].split == b[2].split]
    return [_sentence(a, b, named=len(pairs) > 1) for a, b in pairs]


def _pairs(tuned: Sequence[tuple[str, Run, S]]) -> list[tuple[tuple[str, Run, S], tuple[str, Run, S]]]:
    """Every link that began with another's weights with every one that is known to have begun from scratch."""
    ours = [entry for entry in tuned if _started(entry[1])]
    scratch = [entry for entry in tuned if "init_from" in entry[1].results and not _started(entry[1])]
    return list(product(ours, scratch))


def _sentence(one: tuple[str, Run, Score], other: tuple[str, Run, Score], *, named: bool) -> str:
    (_, _, score), (_, _, other_score) = one, other
    said = _both(
        one[:2], other[:2], (percent(score.share), percent(other_score.share)), "labels", named=named
    )
    if not score.images or not other_score.images:
        return f"{said}."
    gap = score.share - other_score.share
    low, high = difference(score.share, other_score.share, (score.images, other_score.images))
    said += (
        f" ({whole(score.images)} {SPLITS[score.split]} images). The difference is {100 * gap:+.1f} points"
    )
    said += f" (95%: {100 * low:+.1f} to {100 * high:+.1f})"
    return f"{said}." if low > 0 or high < 0 else f"{said}, too little to tell with so few images."


def _both(
    one: tuple[str, Run], other: tuple[str, Run], shares: tuple[str, str], unit: str, *, named: bool
) -> str:
    """Two links and their scores, with what they learnt from: said once where it is the same."""
    (name, run), (other_name, other_run) = one, other
    labels, steps = run.number("train_images"), run.number("steps")
    same = labels is not None and steps is not None
    same = same and (labels, steps) == (other_run.number("train_images"), other_run.number("steps"))
    said = f"Fine-tuned from pre-training{f' ({name})' if named else ''}"
    if not same and (effort := _effort(run, unit)):
        said += f", {effort}"
    said += f": {shares[0]}, from scratch{f' ({other_name})' if named else ''}"
    if same:
        said += f" with the same {whole(labels or 0)} {unit} and steps"
    elif effort := _effort(other_run, unit):
        said += f", {effort}"
    return f"{said}: {shares[1]}"


def _effort(run: Run, unit: str) -> str:
    labels, steps = run.number("train_images"), run.number("steps")
    said = [] if labels is None else [f"{whole(labels)} {unit}"]
    return " and ".join([*said, *([] if steps is None else [f"{whole(steps)} steps"])])


# --- segmentation -------------------------------------------------------------------------------------------


def compare_segmentation(runs: Sequence[tuple[str, Run]]) -> Comparison | None:
    """mIoU of the links that segment; None if there are no two of them."""
    found = [(name, run, score) for name, run in runs if (score := segmentation.score(run)) is not None]
    if len(found) < 2:
        return None
    splits, ways = {score.split for *_, score in found}, {score.how for *_, score in found}
    bars = []
    for name, run, score in found:
        where = "" if len(splits) == 1 else f"{SPLITS[score.split]} images"
        how = "" if len(ways) == 1 else score.how
        note = "; ".join(part for part in (_training(run), where, how) if part)
        bars.append(Bar(name, score.miou, _started(run), note))
    pairs = [(a, b) for a, b in _pairs(found) if (a[2].split, a[2].how) == (b[2].split, b[2].how)]
    sentences = [_segmented(a, b, named=len(pairs) > 1) for a, b in pairs]
    return Comparison(
        bars,
        _measured_segments([score for *_, score in found]),
        sentences,
        while_training(runs, "miou", "mIoU"),
    )


def _measured_segments(scores: Sequence[segmentation.Score]) -> str:
    """On which images and how, and why there is no interval."""
    splits, ways = {score.split for score in scores}, {score.how for score in scores}
    images = {score.images for score in scores}
    said = "mIoU"
    if len(splits) == 1:
        count = images.pop() if len(images) == 1 else None
        said += f" on {'' if count is None else f'the {whole(count)} '}{SPLITS[splits.pop()]} images"
    said += "".join(f", {how}" for how in ways if how and len(ways) == 1)
    return (
        f"{said}. It is no share of images, so there is no interval, and a single seed is no proof. "
        "Blue: with pre-trained weights."
    )


def _segmented(
    one: tuple[str, Run, segmentation.Score], other: tuple[str, Run, segmentation.Score], *, named: bool
) -> str:
    shares = (f"{percent(one[2].miou)} mIoU", percent(other[2].miou))
    gap = 100 * (one[2].miou - other[2].miou)
    return f"{_both(one[:2], other[:2], shares, 'images', named=named)}: {gap:+.1f} points (one seed)."
