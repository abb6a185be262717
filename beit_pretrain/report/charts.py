"""Which charts a run has: one function for each, None where the run logged nothing of the kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from beit_pretrain.report.curves import Chart, Level, Line
from beit_pretrain.report.folder import Run, Series, number, records

LOSSES = {
    "pretrain": "masked cross-entropy, nats",
    "classify": "cross-entropy, nats; training images are augmented",
    "probe": "training, summed over all classifiers; nats",
    "segment": "cross-entropy of labelled pixels, nats; auxiliary head weighted in",
}


def run_charts(run: Run) -> list[Chart]:
    """The charts of training, in the order of the page; one with a single point of each line says nothing."""
    made = (loss(run), accuracy(run), reconstruction(run), divergence(run), temperature(run), perplexity(run))
    made += (codebook(run), knn_while_training(run), probe_while_training(run), learning_rate(run))
    return drawable(run, made)


def drawable(run: Run, made: Iterable[Chart | None]) -> list[Chart]:
    """The charts in which there is a line to see, each with the restarts of the run marked."""
    return [chart for chart in marked(run, made) if max(len(line.series.value) for line in chart.lines) > 1]


def marked(run: Run, made: Iterable[Chart | None]) -> list[Chart]:
    """Charts over the steps of a run with its restarts."""
    return [replace(chart, marks=run.restarts) for chart in made if chart is not None]


def loss(run: Run) -> Chart | None:
    """Training and held-out loss beside what a model without pictures reaches."""
    lines = _both(run, "loss")
    if run.stage == "probe":  # what is held out is the loss of one classifier, far below the sum of all
        lines = _line(run, "train/loss", "training", smooth=True)
    if not lines:
        return None
    more, levels = _baselines(run, "loss")
    more += _line(run, "val_ema/loss", "held-out, EMA", colour="third", markers=True)
    more += _line(run, "train/decode", "its main head alone", colour="third", smooth=True)
    more += _line(run, "train/auxiliary", "its auxiliary head alone", colour="fourth", smooth=True)
    note = LOSSES.get(run.stage, "")
    return Chart(title="Loss", lines=lines + more, levels=levels, note=note)


def accuracy(run: Run) -> Chart | None:
    """Training and held-out accuracy, of masked tokens beside the share of the most frequent ids."""
    if run.stage == "classify":
        return classification(run)
    if run.stage == "segment":
        return segmentation(run)
    lines = _both(run, "accuracy")
    if not lines:
        return None
    more, levels = _baselines(run, "accuracy")
    note = "masked tokens whose id is predicted" if run.stage == "pretrain" else ""
    return Chart(title="Accuracy", lines=lines + more, levels=levels, percent=True, note=note)


def classification(run: Run) -> Chart | None:
    """Top-1 on held-out images and, where labels are not mixed, accuracy on training images."""
    lines = _line(run, "val/top1", "held-out top-1", colour="heldout", markers=True)
    lines += _line(run, "val_ema/top1", "held-out top-1, EMA", colour="third", markers=True)
    lines = _line(run, "train/accuracy", "training", smooth=True) + lines
    if not lines:
        return None
    quiet = [replace(line, quiet=True) for line in _line(run, "val/top5", "held-out top-5", colour="faint")]
    note = "grey: held-out top-5" if quiet else ""
    return Chart(title="Accuracy", lines=quiet + lines, percent=True, note=note)


def segmentation(run: Run) -> Chart | None:
    """mIoU and both accuracies on held-out images, and the share of pixels that were right in training."""
    looks = (("miou", "mIoU", "heldout"), ("macc", "mAcc", "third"), ("aacc", "aAcc", "fourth"))
    held_out = [
        line
        for key, name, colour in looks
        for line in _line(run, f"val/{key}", f"held-out {name}", colour=colour, markers=True)
    ]
    lines = _line(run, "train/accuracy", "training, pixels right", smooth=True) + held_out
    return (
        Chart(title="Segmentation", lines=lines, percent=True, note="training crops are augmented")
        if lines
        else None
    )


def reconstruction(run: Run) -> Chart | None:
    lines = _both(run, "recon")
    return Chart(title="Reconstruction loss", lines=lines) if lines else None


def divergence(run: Run) -> Chart | None:
    lines = _both(run, "kl")
    return Chart(title="KL to uniform", lines=lines, note="nats") if lines else None


def temperature(run: Run) -> Chart | None:
    lines = _line(run, "train/temperature", "Gumbel-softmax temperature")
    return Chart(title="Temperature", lines=lines) if lines else None


def perplexity(run: Run) -> Chart | None:
    lines = _both(run, "perplexity")
    return Chart(title="Perplexity of the ids", lines=lines, zero=True) if lines else None


def codebook(run: Run) -> Chart | None:
    lines = _both(run, "codebook_use")
    return (
        Chart(title="Codebook use", lines=lines, percent=True, zero=True, note="share of the codes")
        if lines
        else None
    )


def knn_while_training(run: Run) -> Chart | None:
    """kNN accuracy of every block over the steps; the block that ends best stands out."""
    found = _of_blocks(run, "knn")
    if not found or max(len(series.value) for series in found.values()) < 2:
        return None
    best = max(found, key=lambda block: found[block].last)
    lines = [_quiet(block, series) for block, series in sorted(found.items()) if block != best]
    lines.append(Line(label=f"block {best}", series=found[best], markers=True))
    return Chart(
        title="kNN while training", lines=lines, percent=True, note="held-out; grey: the other blocks"
    )


def probe_while_training(run: Run) -> Chart | None:
    """Accuracy of the best linear classifier, and of the best at each block, over the steps."""
    best = _line(run, "val/best", "best of all", markers=True)
    if not best:
        return None
    blocks = [_quiet(block, series) for block, series in sorted(_of_blocks(run, "val").items())]
    note = "validation; grey: the best of each block" if blocks else "validation"
    return Chart(title="Linear probe while training", lines=blocks + best, percent=True, note=note)


def learning_rate(run: Run) -> Chart | None:
    """The largest lr of any parameter group and, with layer decay, the smallest."""
    top, low = (_line(run, name, "") for name in ("train/lr", "train/lr_min"))
    if not top:
        return None
    if not low or np.array_equal(low[0].series.value, top[0].series.value):
        return Chart(title="Learning rate", lines=[_named(top[0], "all groups, peak")], zero=True)
    lines = [_named(top[0], "largest of the groups, peak"), _named(low[0], "smallest, peak", "third")]
    peaks = [line.number or 0.0 for line in lines]
    wide = peaks[0] > 20 * peaks[1] > 0  # on a linear axis the smallest would lie on the floor
    return Chart(title="Learning rate", lines=lines, log=wide, zero=not wide)


def knn_by_block(run: Run) -> Chart | None:
    """Final kNN accuracy along the depth, with the untrained encoder and raw pixels to compare with."""
    source = run.path / "results.json"
    knn = run.section("knn")
    best = number(knn, "best_block", source)
    blocks = records(knn, "blocks", source)
    lines = []
    for key, label, colour in (("val", "validation", "heldout"), ("test", "test", "training")):
        points = [(number(block, "block", source), number(block, key, source)) for block in blocks]
        known = {at: value for at, value in points if at is not None and value is not None}
        if known:
            series = Series(np.array(list(known)), np.array(list(known.values())))
            chosen = None if best is None else known.get(best)
            lines.append(Line(label=label, series=series, colour=colour, markers=True, number=chosen))
    if not lines:
        return None
    levels = []
    for key, label, dash in (
        ("untrained", "untrained encoder", "dashed"),
        ("pixels", "raw pixels", "dotted"),
    ):
        value = number(knn, key, source)
        if value is not None:
            levels.append(Level(label=label, value=value, dash=dash))
    note = "" if best is None else f"numbers: block {best:.0f}"
    title = "kNN accuracy by block"
    return Chart(title=title, lines=lines, levels=levels, along="block", percent=True, every=True, note=note)


def _named(line: Line, label: str, colour: str = "training") -> Line:
    """The same curve under another name, its peak in the legend."""
    return replace(line, label=label, colour=colour, number=float(line.series.finite().value.max()))


def _of_blocks(run: Run, prefix: str) -> dict[int, Series]:
    """The columns `prefix`/block_0, `prefix`/block_1, ... by block."""
    found = {name: re.fullmatch(rf"{prefix}/block_(\d+)", name) for name in run.metrics}
    return {int(match[1]): run.metrics[name] for name, match in found.items() if match}


def _quiet(block: int, series: Series) -> Line:
    return Line(label=f"block {block}", series=series, colour="faint", quiet=True)


def _both(run: Run, name: str) -> list[Line]:
    return [
        *_line(run, f"train/{name}", "training", smooth=True),
        *_line(run, f"val/{name}", "held-out", colour="heldout", markers=True),
    ]


def _baselines(run: Run, name: str) -> tuple[list[Line], list[Level]]:
    """The per-position baseline as it was logged (else its final value) and the global one."""
    lines = _line(run, f"train/baseline_{name}", "per-position baseline", colour="baseline", dash="dashed")
    pairs = [("global", "global baseline", "dotted")]
    if not lines or len(lines[0].series.value) == 1:  # a single point is no line to compare with
        lines = []
        pairs.insert(0, ("position", "per-position baseline", "dashed"))
    known = [(run.number("baseline", f"{name}_{key}"), label, dash) for key, label, dash in pairs]
    return lines, [
        Level(label=label, value=value, dash=dash) for value, label, dash in known if value is not None
    ]


def _line(
    run: Run,
    name: str,
    label: str,
    *,
    colour: str = "training",
    dash: str = "solid",
    smooth: bool = False,
    markers: bool = False,
) -> list[Line]:
    series = run.metrics.get(name)
    if series is None or not len(series.finite().value):
        return []
    return [Line(label=label, series=series, colour=colour, dash=dash, smooth=smooth, markers=markers)]
