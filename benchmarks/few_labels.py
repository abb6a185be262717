"""Fine-tuning from pre-training against training from scratch, with few labels, on the embedded digits.

    python benchmarks/few_labels.py --init runs/quickstart/pretrain --jobs 2

Three arms with the same images, batches and updates: the pre-trained encoder, the same encoder from scratch, and
from scratch with three times the updates. Each arm has the better of two layer decays for it (0.75 pre-trained, 1.0
from scratch) and the same grid of learning rates; the rate is chosen by mean validation accuracy of two seeds. Then
five seeds, each with its own subset of labels, initial head, order and noise, are compared in pairs on the 397 test
digits. "1,400 labels" are all but the test digits: the rate is chosen with 1,120 to train on and 280 to validate,
the five seeds then train on all 1,400.

Writes summary.json, table.md and plot.png into --out; runs that are finished are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from paired import interval, measure  # pyright: ignore[reportMissingImports]

RATES = (1e-3, 2e-3, 4e-3)
SEEDS = 5
CHOOSING = 2  # seeds by which the rate is chosen
EPOCHS = {50: 50, 200: 20, 1400: 6}  # of batches of 25: 100, 160 and 264 updates (336 with all 1,400 images)
ARMS = {"pre-trained": 1, "scratch": 1, "scratch, 3x updates": 3}
ALL = 1400


class Task(NamedTuple):
    """One run."""

    arm: str
    labels: int
    rate: float
    seed: int
    final: bool  # with 1,400 labels: on training and validation digits

    @property
    def name(self) -> str:
        arm = self.arm.replace(", ", "-").replace(" ", "-")
        return f"{arm}_{self.labels}_{self.rate:g}_seed{self.seed}{'_final' if self.final else ''}"


def overrides(task: Task, init: str, out: str) -> list[str]:
    """The run's command line."""
    epochs = EPOCHS[task.labels] * ARMS[task.arm]
    start = [f"init_from={init}"] if task.arm == "pre-trained" else ["stage.optim.layer_decay=1.0"]
    images = ["data.train_on_val=true"] if task.final else []
    images += [] if task.labels == ALL else [f"data.train_limit={task.labels}"]
    return [
        "stage=classify",
        "experiment=digits_finetune",
        *start,
        *images,
        "batch_size=25",
        f"stage.epochs={epochs}",
        f"stage.optim.warmup_epochs={epochs / 10:g}",
        f"stage.optim.lr={task.rate}",
        f"trainer.evaluate_every={epochs}",
        "trainer.accelerator=cpu",
        "logger=csv",
        "~callbacks",
        f"seed={task.seed}",
        f"runs={out}/runs",
        f"name={task.name}",
    ]


def measured(tasks: Iterable[Task], init: str, out: str, jobs: int) -> dict[Task, dict[str, Any]]:
    """All tasks' metrics, several at a time."""
    return measure({task: overrides(task, init, out) for task in tasks}, jobs, "test/top1")


def choose_rates(init: str, out: str, jobs: int) -> dict[tuple[str, int], float]:
    """The learning rate of each arm and number of labels."""
    grid = [
        Task(arm, labels, rate, seed, False)
        for labels in EPOCHS
        for arm in ARMS
        for rate in RATES
        for seed in range(CHOOSING)
    ]
    found = measured(grid, init, out, jobs)
    chosen = {}
    for labels in EPOCHS:
        for arm in ARMS:
            means = {
                rate: np.mean([found[Task(arm, labels, rate, s, False)]["val/top1"] for s in range(CHOOSING)])
                for rate in RATES
            }
            chosen[arm, labels] = max(means, key=lambda rate: means[rate])
    return chosen


def summarise(init: str, out: str, jobs: int) -> dict[str, Any]:
    rates = choose_rates(init, out, jobs)
    tasks = [
        Task(arm, labels, rates[arm, labels], seed, labels == ALL)
        for labels in EPOCHS
        for arm in ARMS
        for seed in range(SEEDS)
    ]
    found = measured(tasks, init, out, jobs)
    rows = []
    for labels in EPOCHS:
        scores = {
            arm: np.array([found[t]["test/top1"] for t in tasks if (t.arm, t.labels) == (arm, labels)])
            for arm in ARMS
        }
        ours = scores["pre-trained"]
        rows.append(
            {
                "labels": labels,
                "rates": {arm: rates[arm, labels] for arm in ARMS},
                "test": {arm: list(values) for arm, values in scores.items()},
                "difference": {
                    arm: [float((ours - scores[arm]).mean()), *interval(ours - scores[arm])]
                    for arm in ARMS
                    if arm != "pre-trained"
                },
            }
        )
    return {"init": init, "rows": rows}


def table(summary: dict[str, Any]) -> str:
    lines = [
        "| labels | pre-trained | scratch | difference (95%) | scratch, 3x updates | difference (95%) |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        cells = [f"{row['labels']:,}"]
        for arm in ARMS:
            values = np.array(row["test"][arm])
            cells.append(f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1):.1f}")
            if arm in row["difference"]:
                mean, low, high = (100 * value for value in row["difference"][arm])
                cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    colours = dict(zip(ARMS, ("#1f6fb2", "#c2501a", "#e0a585"), strict=True))
    places = np.arange(len(summary["rows"]))
    for shift, arm in zip((-0.12, 0.0, 0.12), ARMS, strict=True):
        values = [100 * np.array(row["test"][arm]) for row in summary["rows"]]
        x = places + shift
        axes.plot(x, [v.mean() for v in values], color=colours[arm], linewidth=1.2)
        for at, v in zip(x, values, strict=True):
            axes.plot([at] * len(v), v, "o", color=colours[arm], markersize=4, alpha=0.6, markeredgewidth=0)
        axes.plot([], [], "o-", color=colours[arm], label=arm)
    axes.set_xticks(places, [f"{row['labels']:,}" for row in summary["rows"]])
    axes.set_xlabel("labelled digits")
    axes.set_ylabel("accuracy on 397 test digits, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7ec")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", default="runs/quickstart/pretrain", help="a pre-training run on the digits")
    parser.add_argument("--out", default="runs/few_labels", help="where runs and results go")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    summary = summarise(given.init, given.out, given.jobs)
    out = Path(given.out)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "table.md").write_text(table(summary))
    plot(summary, out / "plot.png")
    print(table(summary))


if __name__ == "__main__":
    main()
