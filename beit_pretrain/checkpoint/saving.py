"""When checkpoints are written and which are kept; the writing itself is atomic (`files.write`)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import ConfigError


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing, through `files`: never half a file, never an arbitrary pickle.

    `before_writing` raises if the run folder is another run's by now; asked again after the writing, which may take
    long, so that no other file is touched.
    """

    def __init__(self, before_writing: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.before_writing = before_writing

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.before_writing()
        files.write(Path(path), checkpoint)
        self.before_writing()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return files.read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class _Stage(Protocol):
    monitor: tuple[str, str]


class SaveCheckpoints(Checkpoint):
    """Writes `step-*.ckpt` at epoch ends and in between, and keeps the last ones and the best.

    `last.ckpt` points to the newest file, `best.ckpt` to the one with the best held-out score: the stage's own
    `monitor`, or the lowest value of the one given here. In the middle of an epoch a file is written every
    `every_steps` updates or `every_minutes`, whichever comes first; always right after an update, so that nothing
    is half-done.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        monitor: str | None = None,
        every_steps: int | None = None,
        every_minutes: float | None = 30.0,
        keep: int = 2,
    ) -> None:
        if keep < 1:
            raise ConfigError(
                f"checkpoint.keep={keep}: set 1 or more; a run goes on from the newest checkpoint"
            )
        self.folder = Path(folder)
        self.monitor = monitor
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.best_value: float | None = None
        self.best_step = -1
        self._written = time.monotonic()
        self._saved_step = -1

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint now, unless this step has one; right after an update, on all ranks."""
        if self._saved_step != trainer.global_step:
            self._save(trainer, best=False)

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        micro_batches = batch_idx + 1
        if micro_batches % trainer.accumulate_grad_batches or micro_batches == trainer.num_training_batches:
            return  # in the middle of an update; or the end of the epoch, which saves after its evaluation
        due = bool(self.every_steps) and trainer.global_step % (self.every_steps or 1) == 0
        if not due and self.every_minutes is not None:
            late = time.monotonic() - self._written >= 60 * self.every_minutes
            # Clocks differ between ranks, saving needs them all.
            due = (
                trainer.strategy.reduce_boolean_decision(late, all=False) if trainer.world_size > 1 else late
            )
        if due:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, wanted = self.monitor, "min"
        if name is None:
            name, wanted = cast(_Stage, pl_module).monitor
        value = trainer.callback_metrics.get(name)
        best = value is not None and _better(value.item(), self.best_value, wanted)
        if value is not None and best:
            self.best_value, self.best_step = value.item(), trainer.global_step
        self._save(trainer, best)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            self._saved_step = trainer.global_step
        # A run killed between writing its best checkpoint and naming it so.
        best = self.folder / f"step-{self.best_step:08d}.ckpt"
        if trainer.is_global_zero and best.exists():
            _link(self.folder / "best.ckpt", best)

    def _save(self, trainer: Trainer, best: bool) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            _point(self.folder / "last.ckpt", path)
            if best:
                _link(self.folder / "best.ckpt", path)
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()
        self._written, self._saved_step = time.monotonic(), trainer.global_step


def _better(value: float, best: float | None, wanted: str) -> bool:
    if best is None:
        return math.isfinite(value)
    return value > best if wanted == "max" else value < best


def _point(link: Path, target: Path) -> None:
    """A relative symbolic link, replaced in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def _link(link: Path, target: Path) -> None:
    """A second name for a file, which outlives the first one's removal and takes no space."""
    if link.exists() and link.samefile(target):
        return  # renaming one name of a file to another one of it would leave both
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    os.link(target, temporary)
    os.replace(temporary, link)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest `step-*.ckpt`: by name, so that a run killed before the link was moved loses nothing."""
    found = sorted(folder.glob("step-*.ckpt"))
    return found[-1] if found else None
