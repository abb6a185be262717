"""What can end a run in an evaluation, as callbacks; and images to evaluate on."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image


class InEvaluation(Callback):
    """Does something at the second held-out batch, on one rank, when workers read ahead."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 1 and trainer.global_rank == self.rank:
            self.do(trainer)

    def do(self, trainer: Trainer) -> None:
        raise NotImplementedError


class KillWorkers(InEvaluation):
    """As the kernel does when memory runs out."""

    def do(self, trainer: Trainer) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)


class RemoveFolder(InEvaluation):
    """The run's folder, under the run's feet."""

    def do(self, trainer: Trainer) -> None:
        shutil.rmtree(trainer.default_root_dir)


class Signal(InEvaluation):
    """To this process alone, not to its group."""

    def __init__(self, number: int, rank: int = 0) -> None:
        super().__init__(rank)
        self.number = number

    def do(self, trainer: Trainer) -> None:
        os.kill(os.getpid(), self.number)


class BlockFile(Callback):
    """Puts a file whose reading never ends in the place of one that the run already knows."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.unlink()
            os.mkfifo(self.path)


def paint(root: Path, train: int = 12, held_out: int = 20) -> Path:
    """Two classes of noise, 24 x 20 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", held_out)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.png")
    return root


def spoil(root: Path) -> None:
    """Cut one in four held-out images short."""
    for path in sorted((root / "val").rglob("*.png"))[::4]:
        path.write_bytes(path.read_bytes()[:60])


def on(root: Path, workers: int) -> list[str]:
    """Arguments of a short fine-tuning from scratch on these images."""
    return [
        "stage=classify",
        "model=micro",
        "data=class_folders",
        f"data.root={root}",
        f"data.workers={workers}",
        "image_size=32",
        "batch_size=4",
        "stage.epochs=1",
        "stage.optim.warmup_epochs=0",
        "trainer.evaluate_every=1",
        "trainer.accelerator=cpu",
        "logger=csv",
        "~callbacks.knn",
        "~callbacks.pictures",
        "~callbacks.throughput",
        "name=run",
    ]
