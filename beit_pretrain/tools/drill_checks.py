"""Whether an interrupted run is the one that was left alone: what their folders say, for `beit-tools drill`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.cluster import events

NEAR = 1e-4  # between the losses of a step: some sums on a GPU have no fixed order
RESULT = ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "callbacks")

Place = tuple[int, int, int]  # step, micro-batch, rank


class Finding(NamedTuple):
    """One row of the drill's table."""

    check: str
    found: str
    good: bool


def compare(
    alone: Path, broken: Path, *, signal: str, job: str | None, wandb_before: str | None
) -> list[Finding]:
    """Every check of two rehearsals that have ended; `job` is the Slurm job that was interrupted.

    `wandb_before` is the run's W&B id at the signal, if it has one.
    """
    facts = rehearsed(broken)
    steps = facts["steps"]
    result = [_checkpoints(alone, broken, steps), _metrics(alone, broken)]
    return [
        _same_run(broken, signal, job, wandb_before),
        _same_order(alone, broken, steps),
        *(result if facts["device"] == "cpu" else [_losses(alone, broken, steps)]),
    ]


def rehearsed(run: Path) -> dict[str, Any]:
    """What the callback says of a rehearsal: `steps` and `device`."""
    return json.loads((run / "rehearsal.json").read_text())


def wandb_id(run: Path) -> str | None:
    file = run / "wandb_id"
    return file.read_text().strip() if file.exists() else None


# --- one run in two parts -----------------------------------------------------------------------------------


def _same_run(run: Path, signal: str, job: str | None, wandb_before: str | None) -> Finding:
    rows = events.read(run)
    story = [row["event"] for row in rows]
    steps = [int(row["step"]) for row in rows]
    good = story == ["start", "signal", *(["requeue"] if job else []), "start"]
    good = good and steps[0] == 0 and len(set(steps[1:])) == 1
    # Rank 0 writes TERM where it ends for another rank, which the signal has reached first.
    good = good and rows[1]["detail"] in (signal, "TERM")
    named = [f"signal {row['detail']}" if row["event"] == "signal" else row["event"] for row in rows]
    found = [", ".join(f"{event} {step}" for event, step in zip(named, steps, strict=True))]
    if job is not None:
        jobs = list(dict.fromkeys(row["job"] for row in rows))
        good = good and jobs == [job]
        found.append(f"job {', '.join(jobs)}")
    if wandb_before is not None:
        now = wandb_id(run)
        good = good and now == wandb_before
        found.append(f"W&B run {wandb_before}" + ("" if now == wandb_before else f", then {now}"))
    return Finding("same run", "; ".join(found), good)


# --- order --------------------------------------------------------------------------------------------------


def _same_order(alone: Path, broken: Path, steps: int) -> Finding:
    """The same samples and views in every micro-batch of every rank, also where a step was done twice."""
    left, right = _Order(alone), _Order(broken)
    ranks = int(events.read(alone)[0]["ranks"])
    micros = sorted({micro for _, micro, _ in left.held})
    for place in product(range(steps), micros, range(ranks)):
        for order in (left, right):
            if place not in order.held:
                return Finding("same order", f"{order.run.name}: {_words(place)} is missing", False)
            if place in order.changed:
                return Finding(
                    "same order", f"{order.run.name}: {_words(place)} held others the second time", False
                )
        if left.held[place] != right.held[place]:
            return Finding("same order", f"other samples or views in {_words(place)}", False)
    if more := sorted(right.held.keys() - left.held.keys()):
        return Finding("same order", f"{broken.name}: {_words(more[0])} is one too many", False)
    images = sum(len(samples) for samples, _ in left.held.values())
    counts = ((steps, "steps"), (len(micros), "micro-batches"), (ranks, "ranks"))
    each = " x ".join(f"{count} {word}" for count, word in counts if count > 1)
    return Finding("same order", f"{each}: the same {images:,} samples and views", True)


class _Order:
    """What each micro-batch held, and those that held something else the second time."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.held: dict[Place, list[list[int]]] = {}
        self.changed: set[Place] = set()
        for path in run.glob("order-*.jsonl"):
            rank = int(path.stem.removeprefix("order-"))
            for line in path.read_text().splitlines():
                step, micro, *content = json.loads(line)
                if self.held.setdefault((step, micro, rank), content) != content:
                    self.changed.add((step, micro, rank))


def _words(place: Place) -> str:
    return f"step {place[0]}, micro-batch {place[1]}, rank {place[2]}"


# --- result -------------------------------------------------------------------------------------------------


def checkpoint(run: Path, steps: int) -> Path:
    """The file with which a rehearsal ends."""
    return run / "checkpoints" / f"step-{steps:08d}.ckpt"


def _checkpoints(alone: Path, broken: Path, steps: int) -> Finding:
    """Equal bits in weights, optimiser and callbacks."""
    left, right = (files.read(checkpoint(run, steps)) for run in (alone, broken))
    differ = [where for key in RESULT for where in _differences(left[key], right[key], key)]
    if differ:
        return Finding("same weights", f"{len(differ)} entries differ, first {differ[0]}", False)
    parts = f"weights, optimiser and callbacks after step {steps}: equal to the last bit"
    return Finding("same weights", parts, True)


def _differences(left: Any, right: Any, where: str) -> Iterator[str]:
    """The places at which two nests of containers, tensors and plain values are not the same."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in [*left, *(k for k in right if k not in left)]:
            if key in left and key in right:
                yield from _differences(left[key], right[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif isinstance(left, Sequence) and isinstance(right, Sequence) and not isinstance(left, str):
        if len(left) != len(right):
            yield where
        for i, (one, other) in enumerate(zip(left, right, strict=False)):
            yield from _differences(one, other, f"{where}.{i}")
    elif isinstance(left, Tensor) and isinstance(right, Tensor):
        if (
            left.dtype != right.dtype
            or left.shape != right.shape
            or not torch.equal(_bits(left), _bits(right))
        ):
            yield where
    elif type(left) is not type(right) or left != right:
        yield where


def _bits(tensor: Tensor) -> Tensor:
    """As bytes, in which a NaN is equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _metrics(alone: Path, broken: Path) -> Finding:
    """metrics.csv byte for byte."""
    left, right = ((run / "metrics.csv").read_bytes() for run in (alone, broken))
    if left == right:
        return Finding("same metrics", f"metrics.csv: {len(_rows(alone))} rows, every digit", True)
    for one, other in zip(_rows(alone), _rows(broken), strict=False):
        if names := [name for name in one if one[name] != other.get(name)]:
            name = names[0]
            found = f"step {one['step']}: {name} {one[name]} alone, {other.get(name)} interrupted"
            return Finding("same metrics", found, False)
    return Finding("same metrics", "metrics.csv has other rows or columns", False)


def _losses(alone: Path, broken: Path, steps: int) -> Finding:
    """train/loss of every step, nearly."""
    left, right = (
        {int(row["step"]): float(row["train/loss"]) for row in _rows(run) if row.get("train/loss")}
        for run in (alone, broken)
    )
    for step in range(1, steps + 1):
        if step not in left or step not in right:
            return Finding("same losses", f"metrics.csv has no train/loss of step {step}", False)
        if not abs(left[step] - right[step]) <= NEAR:
            found = f"step {step}: {left[step]:.6f} alone, {right[step]:.6f} interrupted"
            return Finding("same losses", found, False)
    largest = max(abs(left[step] - right[step]) for step in range(1, steps + 1))
    return Finding(
        "same losses",
        f"train/loss of {steps} steps: at most {largest:.1e} apart (allowed on a GPU: {NEAR:g})",
        True,
    )


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
