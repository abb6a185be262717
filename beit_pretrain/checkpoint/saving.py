"""When checkpoints are written, which are kept, and which a run goes on from; `files.write` is the atomic writing."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.checkpoint.finite import counted, moments, not_finite, trained_names
from beit_pretrain.errors import CheckpointError, ConfigError, TrainingError

ASIDE = ".bad"  # after the name of a checkpoint that a run did not go on from


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
    bad_steps: Tensor  # refused updates: all, and those in a row up to now

    @property
    def total_steps(self) -> int: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def own_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class SaveCheckpoints(Checkpoint):
    """Writes `step-*.ckpt` at epoch ends and in between, and keeps the last ones and the best.

    `last.ckpt` points to the newest file, `best.ckpt` to the one with the best held-out score: the stage's own
    `monitor`, or the lowest value of the one given here. In the middle of an epoch a file is written every
    `every_steps` updates or `every_minutes`, whichever comes first; always right after an update, so that nothing
    is half-done.

    While updates are refused none is written, and the next accepted one is followed by what was left out; only the
    end of the training waits for nothing. Weights or moments that are not finite end the run (TrainingError).
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
        self._owed = False  # one was left out because updates were refused

    def save(self, trainer: Trainer) -> int:
        """Write a checkpoint now, unless this step has one or was refused; right after an update, on all ranks.

        Returns the step of the newest checkpoint, 0 without any.
        """
        if self._saved_step != trainer.global_step and self._sound(trainer):
            self._save(trainer, best=False)
        return max(self._saved_step, 0)

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
        due = self._owed or (bool(self.every_steps) and trainer.global_step % (self.every_steps or 1) == 0)
        if not due and self.every_minutes is not None:
            late = time.monotonic() - self._written >= 60 * self.every_minutes
            # Clocks differ between ranks, saving needs them all.
            due = (
                trainer.strategy.reduce_boolean_decision(late, all=False) if trainer.world_size > 1 else late
            )
        if due:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._sound(trainer):
            return
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

    def _sound(self, trainer: Trainer) -> bool:
        """Whether the state is worth keeping; the same on all ranks."""
        stage = cast(_Stage, trainer.lightning_module)
        self._owed = bool(stage.bad_steps[1]) and trainer.global_step < stage.total_steps
        if self._owed:
            return False
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        weights = stage.own_state(stage.state_dict())
        faults = not_finite(weights, trained_names(states)) + not_finite(moments(states))
        spoilt = bool(faults)
        if trainer.world_size > 1:
            spoilt = trainer.strategy.reduce_boolean_decision(spoilt, all=False)
        if spoilt:
            where = counted(faults) if faults else "NaN or infinity on another rank"
            good = last_good(self.folder, main=trainer.is_global_zero)
            raise TrainingError(
                f"step {trainer.global_step}: the weights or the optimiser's moments are spoilt ({where}) and not "
                f"saved. {good}; try a lower stage.optim.lr, stage.optim.clip, or trainer.precision=32."
            )
        return True

    def _save(self, trainer: Trainer, best: bool) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)  # not the run's own folder again, if somebody has removed it
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            _point(self.folder / "last.ckpt", path)
            if best:
                _link(self.folder / "best.ckpt", path)
            for old in _steps(self.folder)[: -self.keep]:
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


def _steps(folder: Path) -> list[Path]:
    """The `step-*.ckpt`, oldest first: by number, so that a run killed before the link was moved loses nothing."""
    found = [path for path in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+", path.stem)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """How many updates had been made when a `step-*.ckpt` was written."""
    return int(path.stem.removeprefix("step-"))


def newest_good(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole and finite, if any, and what is wrong with each newer one."""
    faults: dict[Path, str] = {}
    for path in reversed(_steps(folder)):
        if not (fault := _fault(path)):
            return path, faults
        faults[path] = fault
    return None, faults


def _fault(path: Path) -> str:
    """Why a run cannot go on from a checkpoint, or nothing."""
    try:
        saved = files.read(path)
    except CheckpointError as error:
        return str(error)
    if not {"state_dict", "optimizer_states"} <= saved.keys():
        return f"{path}: is not the checkpoint of a run"
    states = saved["optimizer_states"]
    spoilt = not_finite(saved["state_dict"], trained_names(states)) + not_finite(moments(states))
    return f"{path}: {counted(spoilt)}" if spoilt else ""


def last_good(folder: Path, *, main: bool) -> str:
    """A sentence for a run that ends because of its weights: where it can go on from.

    Only the `main` process reads the files to find out.
    """
    if not main:
        return f"Rank 0 names the last good checkpoint of {folder}"
    good, _ = newest_good(folder)
    return f"The last good checkpoint is {good}" if good else f"There is no good checkpoint in {folder}"


def go_on_from(folder: Path, *, main: bool) -> Path | None:
    """The checkpoint that a run goes on from; None if it has none yet. One process, the `main` one, tidies up.

    Newer ones that are damaged or not finite are passed over, which is told, and get another name.
    Raises CheckpointError if none is good.
    """
    good, faults = newest_good(folder)
    if not faults:
        return good
    if good is None:
        raise CheckpointError(
            f"a run can go on from none of the {len(faults)} checkpoints in {folder} ({next(iter(faults.values()))}): "
            "put a copy of one there, or start anew with overwrite=true or another name="
        )
    if main:
        for path, fault in faults.items():
            print(f"{fault}; kept as {path.name}{ASIDE}, the run goes on from {good.name}", flush=True)
        _set_aside(folder, faults, good)
    return good


def _set_aside(folder: Path, bad: Iterable[Path], good: Path) -> None:
    """Give checkpoints that were passed over another name, and `good` the names that they had beside their own."""
    best = folder / "best.ckpt"
    if best.exists() and any(best.samefile(path) for path in bad):
        best.unlink()  # the run writes this step again
    _point(folder / "last.ckpt", good)
    for path in bad:
        path.replace(path.with_name(path.name + ASIDE))
