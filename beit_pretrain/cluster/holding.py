"""Ends a run that has lost its folder to another one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from beit_pretrain.cluster.lock import Lock


class Holding(Callback):
    """Raises LockLost out of the Trainer: before other callbacks write, and soon after the heartbeat has noticed."""

    def __init__(self, lock: Lock) -> None:
        self.lock = lock

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lock.check()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lock.check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lock.check()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._noticed()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        self._noticed()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self._noticed()

    def _noticed(self) -> None:
        if self.lock.lost:
            self.lock.check()
