"""A run that ends early and tells what it was given, for `beit-tools drill`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from beit_pretrain.errors import ConfigError

LEAST = 4  # updates without which there is no middle to interrupt


class _Stage(Protocol):
    @property
    def total_steps(self) -> int: ...


class _Saver(Protocol):
    def save(self, trainer: Trainer) -> None: ...


class Rehearsal(Callback):
    """Writes down which samples and views each micro-batch holds, and ends the process after `steps` updates or all.

    `rehearsal.json` has `steps`, the number of those updates, and `device`, "cpu" or another. `order-<rank>.jsonl`
    has a line [step, micro-batch, samples, views] as each micro-batch begins; lines of repeated steps are appended.
    """

    def __init__(self, *, run_dir: str | Path, steps: int) -> None:
        self.run_dir = Path(run_dir)
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = cast(_Stage, pl_module).total_steps
        if total < LEAST:
            raise ConfigError(
                f"the whole run has {total} updates, too few to interrupt it: set stage.epochs so that it has {LEAST}"
            )
        self.steps = min(self.steps, total)
        if trainer.is_global_zero:
            facts = {"steps": self.steps, "device": pl_module.device.type}
            draft = self.run_dir / ".rehearsal.json.part"  # who waits for the file finds all of it
            draft.write_text(json.dumps(facts) + "\n")
            draft.replace(self.run_dir / "rehearsal.json")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        micro = batch_idx % trainer.accumulate_grad_batches
        line = json.dumps([trainer.global_step, micro, batch.sample.tolist(), batch.view.tolist()])
        with (self.run_dir / f"order-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(line + "\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.steps:
            cast(_Saver, trainer.checkpoint_callback).save(trainer)
            trainer.strategy.barrier()  # the newest checkpoint has its names too, which rank 0 gives it
            _leave(trainer)


def _leave(trainer: Trainer) -> NoReturn:
    """End here: what else belongs to a finished run (evaluation, results, report) is not to be had of a rehearsal."""
    if trainer.is_global_zero:
        time.sleep(1)  # the others may still be on their way out of the barrier, which this process serves
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
