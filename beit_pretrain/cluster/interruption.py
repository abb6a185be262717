"""Ends a run at a signal, between two updates and with a checkpoint."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from beit_pretrain.cluster import events
from beit_pretrain.cluster.ending import lost
from beit_pretrain.cluster.signals import Interrupted, Signals
from beit_pretrain.errors import LockLost


class _Saver(Protocol):
    def save(self, trainer: Trainer) -> int: ...


class Interruption(Callback):
    """After each update all ranks agree on whether one of them has had a signal; then all save and end.

    A signal during an evaluation waits for its end, where a checkpoint is written anyway. Also keeps `events.csv`.
    Raises Interrupted out of `Trainer.fit`.
    """

    def __init__(self, signals: Signals, *, run_dir: str | Path) -> None:
        self.signals = signals
        self.run_dir = Path(run_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.install()  # Lightning has just put a handler of its own over SIGTERM, one that waits for ranks
        # With trainer.requeue=false another process, as a sweep's worker, asks for it and says so.
        if self.signals.requeue and trainer.is_global_zero and events.requeue_unsaid(self.run_dir):
            self._record(trainer, "requeue", "seen at the next start")
        self._record(trainer, "start")
        self._end_if_asked(trainer, save=False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        micro_batches = batch_idx + 1
        if micro_batches % trainer.accumulate_grad_batches or micro_batches == trainer.num_training_batches:
            return  # within an update; or before the evaluation of an epoch, which belongs to it
        self._end_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Interrupted | LockLost):
            said = "another rank failed" if lost(exception) else " ".join(str(exception).split())[:200]
            with suppress(OSError):  # a folder that is gone or full, which the exception itself may be about
                self._record(trainer, "stop", f"{type(exception).__name__}: {said}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, "finish")

    def _end_if_asked(self, trainer: Trainer, save: bool = True) -> None:
        asked = self.signals.received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked:
            return
        # None is written while updates are refused: the run then goes on from an earlier step.
        saved = cast(_Saver, trainer.checkpoint_callback).save(trainer) if save else trainer.global_step
        interrupted = Interrupted(
            # A rank that has had none ends for another one's; which it was matters on rank 0, for the exit code.
            self.signals.received or signal.SIGTERM,
            requeue=self.signals.requeue,
            run_dir=self.run_dir,
            step=saved,
            ranks=trainer.world_size,
        )
        self._record(trainer, "signal", interrupted.name)
        raise interrupted

    def _record(self, trainer: Trainer, event: str, detail: str = "") -> None:
        if trainer.is_global_zero:
            events.record(
                self.run_dir, event, step=trainer.global_step, ranks=trainer.world_size, detail=detail
            )
