"""Segmentation from pre-training against from scratch, on the drawn scenes, in three pairs.

    python benchmarks/shapes.py --init runs/quickstart_segmentation/pretrain --jobs 2

Both arms see the same 200 labelled scenes, batches and updates and have the same grid of learning rates; each arm's
rate is the best of one run with a seed of its own. Layer decay is what suits the arm (0.75, and 1.0 from scratch).
Then three seeds, each with its own subset of scenes, head, order and noise, are compared in pairs by the mean IoU of
the 200 validation scenes, by which the rate was chosen too. Prints the table; runs that are finished are not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from paired import interval, measure  # pyright: ignore[reportMissingImports]

RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEEDS = (0, 1, 2)
CHOOSING = 100  # the seed by which the rate is chosen
ARMS = ("pre-trained", "scratch")
METRIC = "val/miou"


class Task(NamedTuple):
    """One run."""

    arm: str
    rate: float
    seed: int


def overrides(task: Task, init: str, data: str | None, out: str) -> list[str]:
    """The run's command line."""
    start = [f"init_from={init}"] if task.arm == "pre-trained" else ["stage.optim.layer_decay=1.0"]
    return [
        "stage=segment",
        "experiment=shapes_segment",
        "data.train_limit=200",
        *start,
        *([] if data is None else [f"data.root={data}"]),
        f"stage.optim.lr={task.rate}",
        "data.workers=0",
        "trainer.accelerator=cpu",
        "logger=csv",
        "~callbacks",
        f"seed={task.seed}",
        f"runs={out}",
        f"name={task.arm}_{task.rate:g}_seed{task.seed}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", default="runs/quickstart_segmentation/pretrain", help="a pre-training run")
    parser.add_argument("--data", help="folder of the scenes, if not the default")
    parser.add_argument("--out", default="runs/shapes", help="where runs go")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()

    def run(tasks: list[Task]) -> dict[Task, float]:
        commands = {task: overrides(task, given.init, given.data, given.out) for task in tasks}
        return {task: found[METRIC] for task, found in measure(commands, given.jobs, METRIC).items()}

    tried = run([Task(arm, rate, CHOOSING) for arm in ARMS for rate in RATES])
    best = {arm: max(RATES, key=lambda rate: tried[Task(arm, rate, CHOOSING)]) for arm in ARMS}
    found = run([Task(arm, best[arm], seed) for seed in SEEDS for arm in ARMS])
    ours, scratch = (np.array([100 * found[Task(arm, best[arm], seed)] for seed in SEEDS]) for arm in ARMS)
    lines = ["| seed | pre-trained | scratch | difference |", "|---|---|---|---|"]
    for seed, a, b in zip(SEEDS, ours, scratch, strict=True):
        lines.append(f"| {seed} | {a:.1f} | {b:.1f} | {a - b:+.1f} |")
    low, high = interval(ours - scratch)
    mean = f"{np.mean(ours - scratch):+.1f} ({low:+.1f} to {high:+.1f})"
    lines.append(f"| mean (95%) | {ours.mean():.1f} | {scratch.mean():.1f} | {mean} |")
    grids = "; ".join(
        f"{arm} {', '.join(f'{100 * tried[Task(arm, rate, CHOOSING)]:.1f} at {rate:g}' for rate in RATES)}"
        for arm in ARMS
    )
    table = "\n".join([*lines, "", f"Rates tried: {grids}."])
    Path(given.out, "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
