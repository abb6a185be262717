"""How fast a run is, how much of its time it waits for data, and what it uses of its machines."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from beit_pretrain.callbacks import machine
from beit_pretrain.callbacks.csv_log import read_rows


class _Stage(Protocol):
    batch_size: int

    @property
    def device(self) -> torch.device: ...

    @property
    def total_steps(self) -> int: ...

    def log_metrics(self, metrics: dict[str, float]) -> None: ...


class Throughput(Callback):
    """Logs, averaged over the last `every_steps` optimiser steps, under `time/`:

    `images_per_second` of all ranks together; `data_wait_share`, the share of the time between the end of one
    batch and the start of the next, as the process sees it (work queued on an accelerator may still run), of the
    rank that waits longest, since it holds up all; `seconds` of wall time in training over all starts of the run,
    as far as `timing.csv` knows of earlier ones. Validation, pictures and checkpoints don't count in the first
    two: a gap between batches in which one of them fell is left out.

    Beside them, the largest over all ranks of `memory_gb`, the peak of main memory so far, and `gpu_memory_gb`, the
    peak of allocated GPU memory since the last row; `gpu_utilisation`, of the GPU that is least busy as the row is
    written (if nvidia-ml-py is installed); with 16-mixed, `loss_scale`.
    """

    def __init__(self, run_dir: str | Path, every_steps: int) -> None:
        self.run_dir = Path(run_dir)
        self.every_steps = every_steps
        self._earlier = 0.0
        self._began = 0.0
        self._logged_step = 0
        self._waited = 0.0
        self._worked = 0.0
        self._gap_began: float | None = None  # None: the gap holds something else than waiting
        self._batch_began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not kept in checkpoints: those are to be equal whenever the training is.
        known = [row["seconds"] for row in read_rows(self.run_dir / "timing.csv") if "seconds" in row]
        self._earlier = float(known[-1]) if known else 0.0
        self._began = self._gap_began = time.monotonic()
        self._logged_step = trainer.global_step
        self._waited = self._worked = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Validation and checkpoints of the last epoch are over; from here on only data is awaited.
        self._gap_began = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_began = time.monotonic()
        if self._gap_began is not None:
            self._waited += self._batch_began - self._gap_began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self._worked += now - self._batch_began
        stage = cast(_Stage, pl_module)
        steps = trainer.global_step - self._logged_step
        if steps >= self.every_steps or (steps and trainer.global_step >= stage.total_steps):
            self._log(trainer, stage, now)
        self._gap_began = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gap_began = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._gap_began = None

    def _log(self, trainer: Trainer, stage: _Stage, now: float) -> None:
        total, device = self._waited + self._worked, stage.device
        images = (trainer.global_step - self._logged_step) * stage.batch_size
        # The same values in the same order on each rank, known or not: no rank may wait for another in vain.
        wait, memory, gpu_memory, gpu_idle = machine.largest(
            [
                self._waited / total,
                machine.peak_memory(),
                machine.peak_gpu_memory(device),
                machine.gpu_idle(device),
            ],
            device,
        )
        known = {
            "images_per_second": images / total,
            "data_wait_share": wait,
            "seconds": self._earlier + now - self._began,
            "memory_gb": memory,
            "gpu_memory_gb": gpu_memory,
            "gpu_utilisation": 1 - gpu_idle,
            "loss_scale": loss_scale(trainer),
        }
        stage.log_metrics({f"time/{name}": value for name, value in known.items() if math.isfinite(value)})
        self._logged_step = trainer.global_step
        self._waited = self._worked = 0.0


def loss_scale(trainer: Trainer) -> float:
    """What trainer.precision=16-mixed multiplies the loss with now; unknown elsewhere."""
    plugin = trainer.precision_plugin
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return machine.UNKNOWN if scaler is None else float(scaler.get_scale())
