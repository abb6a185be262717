"""A room in which a callback may use the model without training noticing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer


@contextmanager
def isolated(trainer: Trainer, stage: LightningModule) -> Iterator[None]:
    """Evaluation mode, no gradients, the run's precision; afterwards modes and random states are as before."""
    modes = [(module, module.training) for module in stage.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [stage.device] if stage.device.type == "cuda" else []
    stage.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def due(*, step: int, steps_per_epoch: int, total_steps: int, every_epochs: int) -> bool:
    """Whether the validation after `step` ends every `every_epochs`-th epoch, or the run."""
    done = step // steps_per_epoch
    return step >= total_steps or (done > 0 and done % every_epochs == 0)
