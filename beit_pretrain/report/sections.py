"""What a report says in words and numbers: stat tiles, the held-out verdict, kNN rows, facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from beit_pretrain.errors import BeitError
from beit_pretrain.report import classification, probing, segmentation
from beit_pretrain.report.folder import Run, number, records, rows, text
from beit_pretrain.report.parts import Bar, Tile
from beit_pretrain.report.words import compact, duration, percent, plain, whole

CLEAR = 3.0  # standard errors from which a difference is called clear

STAGES = {
    "tokenizer": "tokenizer training",
    "pretrain": "masked image modelling",
    "knn": "kNN evaluation",
    "classify": "classification",
    "probe": "linear probe",
    "segment": "segmentation",
}


class HeldOut(NamedTuple):
    """Held-out numbers beside the baselines: table rows and one sentence for each quantity."""

    rows: list[list[str]]
    sentences: list[str]


def stage_words(run: Run) -> str:
    return STAGES.get(run.stage, run.stage)


def tiles(run: Run) -> list[Tile]:
    """The main numbers of a run first, then its size."""
    return [*_result_tiles(run), *_size_tiles(run)]


def main_result(run: Run) -> str:
    """The first results of a run in a few words, for a row of a table."""
    return ", ".join(f"{tile.label} {tile.value}" for tile in list(_result_tiles(run))[:2])


def _result_tiles(run: Run) -> Iterator[Tile]:
    yield from classification.tiles(run)
    yield from segmentation.tiles(run)
    yield from probing.tiles(run)
    knn = run.number("knn", "accuracy")
    if knn is not None:
        best = run.number("knn", "best_block")
        yield Tile(
            "kNN accuracy", percent(knn), "" if best is None else f"block {best:.0f}, chosen on validation"
        )
    recon, training = run.metric("val/recon"), run.metric("train/loss")
    if recon is not None:
        yield Tile("held-out loss", compact(recon), "of the reconstruction")
    elif run.metric("val/loss") is not None:
        yield from _held_out_tiles(run)
    elif training is not None and run.stage != "probe":  # there a sum over classifiers of all qualities
        yield Tile("training loss", compact(training), "last logged step")
    for split, images in (("val", "held-out"), ("train", "training")):
        use = run.metric(f"{split}/codebook_use")
        if use is not None:
            yield Tile("codebook use", percent(use), f"of the codes, on {images} images")
            break


def _held_out_tiles(run: Run) -> Iterator[Tile]:
    for key, say in (("loss", compact), ("accuracy", percent)):
        value, against = run.metric(f"val/{key}"), run.number("baseline", f"{key}_position")
        if value is not None:
            yield Tile(f"held-out {key}", say(value), "" if against is None else f"baseline {say(against)}")


def _size_tiles(run: Run) -> Iterator[Tile]:
    steps, epochs = run.number("steps"), run.number("epochs")
    if steps is not None:
        yield Tile("steps", whole(steps), "" if epochs is None else f"{compact(epochs)} epochs")
    images = run.number("train_images")
    if images is not None:
        yield Tile("training images", whole(images), "")
    seconds = run.number("seconds")
    if seconds is not None:
        yield Tile("time", duration(seconds), "")
    speed = run.timing.get("images_per_second")
    if speed is not None and len(speed.finite().value):
        wait = run.timing.get("data_wait_share")
        share = None if wait is None else float(np.median(wait.finite().value))
        note = "median" if share is None else f"median; {percent(share)} waiting for data"
        yield Tile("images/s", compact(float(np.median(speed.finite().value))), note)
    parameters = run.number("parameters")
    if parameters is not None:
        yield Tile("parameters", compact(parameters), whole(parameters))


def held_out(run: Run) -> HeldOut | None:
    """The model beside what one without pictures reaches; z in standard errors of the model's own value."""
    model = {key: run.metric(f"val/{key}") for key in ("loss", "accuracy")}
    base = {key: run.number("baseline", f"{key}_position") for key in model}
    z = {key: _better_by(key, model[key], base[key], run.number("baseline", f"{key}_z")) for key in model}
    position = [
        "Ids counted at each position",
        _cell(base["loss"], compact),
        _cell(base["accuracy"], percent),
    ]
    others = [run.number("baseline", f"{key}_global") for key in model]
    overall = ["Ids counted over all positions", _cell(others[0], compact), _cell(others[1], percent), "", ""]
    table = [[*position, _cell(z["loss"], _signed), _cell(z["accuracy"], _signed)], overall]
    table = [row for row in table if any(row[1:3])]
    if not table or all(value is None for value in model.values()):
        return None
    errors = {key: run.metric(f"val/{key}_se") for key in model}
    ours = ["This model, held-out images", _with_error(model["loss"], errors["loss"], compact)]
    ours.append(_with_error(model["accuracy"], errors["accuracy"], percent, scale=100, unit="%"))
    sentences = [_verdict(key, model[key], base[key], z[key]) for key in model]
    return HeldOut([[*ours, "", ""], *table], [sentence for sentence in sentences if sentence])


def _better_by(key: str, model: float | None, baseline: float | None, z: float | None) -> float | None:
    """Standard errors by which the model is better, whichever way round the file counts them."""
    if model is None or baseline is None or z is None:
        return None
    better = model < baseline if key == "loss" else model > baseline
    return abs(z) if better else -abs(z)


def _verdict(key: str, model: float | None, baseline: float | None, z: float | None) -> str:
    if model is None or baseline is None:
        return ""
    gain = baseline - model if key == "loss" else model - baseline
    say = f"{abs(gain):.3f} nats" if key == "loss" else f"{100 * abs(gain):.1f} points"
    side = "below" if (gain > 0) == (key == "loss") else "above"
    what = "Masked loss" if key == "loss" else "Masked-token accuracy"
    start = f"{what} on held-out images is {say} {side} what a model without pictures reaches"
    if z is None:
        return f"{start}."
    far = f"{abs(z):.1f} standard errors"
    if z >= CLEAR:
        return f"{start}: {far}, a clear gain from looking at the picture."
    if z > 0:
        return f"{start}: only {far}, too little to call a gain (it takes {CLEAR:.0f})."
    return f"{start} ({far} on the wrong side): the model does not use the picture yet."


def knn_bars(run: Run) -> list[Bar]:
    """Untrained encoder, raw pixels and this encoder, as far as they were measured."""
    named = (
        ("untrained", "Untrained encoder"),
        ("pixels", "Raw pixels"),
        ("accuracy", "Pre-trained encoder"),
    )
    found = [(key, label, run.number("knn", key)) for key, label in named]
    return [Bar(label, share, key == "accuracy") for key, label, share in found if share is not None]


def knn_rows(run: Run) -> list[list[str]]:
    """(block, validation, test, mark) for each block."""
    source = run.path / "results.json"
    knn = run.section("knn")
    best = number(knn, "best_block", source)
    table = []
    for block in records(knn, "blocks", source):
        at = number(block, "block", source)
        if at is not None:
            cells = [_cell(number(block, key, source), percent) for key in ("val", "test")]
            table.append([f"{at:.0f}", *cells, "best" if at == best else ""])
    return table


def knn_remark(run: Run) -> str:
    return text(run.section("knn"), "remark")


def recipe_diff(run: Run) -> list[list[str]] | None:
    """(key, recipe, this run); None if the run has no recipe to compare with."""
    if run.results.get("recipe_diff") is None:
        return None
    source = run.path / "results.json"
    table = []
    for row in rows(run.results, "recipe_diff", source):
        if not isinstance(row, list) or len(row) != 3:
            raise BeitError(f"{source}: each of 'recipe_diff' should be [key, recipe, this run], got {row!r}")
        table.append([plain(cell) for cell in row])
    return table


def environment(run: Run) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), plain(value)) for key, value in run.section("environment").items()]


def _signed(value: float) -> str:
    return f"{value:+.1f}"


def _cell(value: float | None, say: Callable[[float], str]) -> str:
    return "" if value is None else say(value)


def _with_error(
    value: float | None, error: float | None, say: Callable[[float], str], *, scale: float = 1, unit: str = ""
) -> str:
    """Value and standard error, both to the error's second digit; the value alone if there is no error."""
    if value is None or not error:
        return _cell(value, say)
    digits = max(0, 1 - math.floor(math.log10(scale * error)))
    return f"{scale * value:.{digits}f} ± {scale * error:.{digits}f}{unit}"
