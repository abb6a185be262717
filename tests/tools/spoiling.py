"""A callback with a fault that shows only when a run is taken up again."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class ForgetsItsDraws(Callback):
    """Adds noise to a weight once, from a generator that nobody seeds, if the run goes on from a step."""

    def __init__(self, resume_step: int | None) -> None:
        self.pending = resume_step is not None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.pending:
            self.pending = False
            generator = torch.Generator()
            generator.seed()
            weight = next(p for p in pl_module.parameters() if p.requires_grad)
            weight.data += 1e-3 * torch.randn(weight.shape, generator=generator)
