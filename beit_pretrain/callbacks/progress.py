"""Where a run stands: a bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

REFRESH = 0.25  # seconds between two drawings at least
WINDOW = 30.0  # seconds over which the speed is averaged


class _Stage(Protocol):
    steps_per_epoch: int
    batch_size: int
    latest: dict[str, float]

    @property
    def total_steps(self) -> int: ...


@dataclass
class View:
    """All that is shown, whichever way it is shown."""

    title: str
    step: int
    total_steps: int
    epoch: int
    epochs: int
    elapsed: float
    left: float | None = None  # seconds; None: not known yet
    speed: float | None = None  # images per second
    metrics: Mapping[str, float] | None = None
    validation: tuple[int, int] | None = None  # batches done, of how many


class Progress(ProgressBar):
    """Stage, epoch, step, images/s, loss, masked-token accuracy, learning rate and time, on stderr of rank 0.

    On a terminal a bar over the whole run, drawn at most four times a second and never from a thread of its
    own (data workers are forked). Elsewhere one line every `line_every` seconds, and one of a validation as often
    and of the last, without control characters; series (`val/block_0`, `val/block_1`, ...) are left out. A resumed
    run begins at its step; speed and time left are this process's own.
    """

    def __init__(self, title: str, line_every: float = 30.0) -> None:
        super().__init__()
        self.title = title
        self.line_every = line_every
        self._enabled = True
        self._live: Live | None = None
        self._drawn = -math.inf
        self._scored = -math.inf  # when the last line of a validation was written
        self._began = 0.0
        self._first_step = 0
        self._paused = 0.0  # seconds between training, for validation and what hangs on it
        self._pause_began: float | None = None
        self._marks: deque[tuple[float, int]] = deque()  # (seconds of training, step), within WINDOW

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        print(*args, **{"file": sys.stderr, **kwargs})

    # --- training -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        self._paused, self._pause_began = 0.0, None
        self._first_step = trainer.global_step
        self._marks = deque([(0.0, trainer.global_step)])
        self._open()
        self._show(self._view(trainer, pl_module), force=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._end_pause()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due():
            self._mark(trainer.global_step)
            self._show(self._view(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pause()
        self._mark(trainer.global_step)
        self._show(self._view(trainer, pl_module), force=True)
        self._close()

    # --- evaluation ---------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause_began = time.monotonic()
        if trainer.state.fn != "fit":
            self._began = self._pause_began
            self._open()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._live is not None and not trainer.sanity_checking and self._due():
            total = int(sum(trainer.num_val_batches))
            self._show(self._view(trainer, pl_module, validation=(batch_idx + 1, total)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._enabled:
            return
        scores = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val") and not re.search(r"_\d+$", name)
        }
        last = trainer.global_step >= cast(_Stage, pl_module).total_steps
        if self._live is None and (last or time.monotonic() - self._scored >= self.line_every):
            self._scored = time.monotonic()
            text = " ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self._line(f"{self.title} step {trainer.global_step} held-out: {text}")
        elif self._live is not None and trainer.state.fn != "fit":
            self._close()

    # --- ends ---------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    # --- drawing ------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._drawn = -math.inf
        if not self._enabled or self._live is not None:
            return
        console = Console(stderr=True)
        if sys.stderr.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _due(self) -> bool:
        pause = REFRESH if self._live is not None else self.line_every
        return self._enabled and time.monotonic() - self._drawn >= pause

    def _show(self, view: View, force: bool = False) -> None:
        if not self._enabled or not (force or self._due()):
            return
        self._drawn = time.monotonic()
        if self._live is not None:
            self._live.update(render(view), refresh=True)
        else:
            self._line(plain_line(view))

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _mark(self, step: int) -> None:
        now = time.monotonic() - self._began - self._paused
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[0][0] > max(WINDOW, 2 * self.line_every):
            self._marks.popleft()

    def _end_pause(self) -> None:
        if self._pause_began is not None:
            self._paused += time.monotonic() - self._pause_began
            self._pause_began = None

    def _view(
        self, trainer: Trainer, pl_module: LightningModule, validation: tuple[int, int] | None = None
    ) -> View:
        stage, step = cast(_Stage, pl_module), trainer.global_step
        view = View(
            title=self.title,
            step=step,
            total_steps=stage.total_steps,
            epoch=min(step, stage.total_steps - 1) // stage.steps_per_epoch + 1,
            epochs=math.ceil(stage.total_steps / stage.steps_per_epoch),
            elapsed=time.monotonic() - self._began,
            metrics=stage.latest,
            validation=validation,
        )
        if len(self._marks) > 1 and self._marks[-1][1] > self._marks[0][1]:
            (then, first), (now, last) = self._marks[0], self._marks[-1]
            per_step = (now - then) / (last - first)
            view.speed = stage.batch_size / per_step if per_step > 0 else None
            pauses = self._paused / (step - self._first_step)
            view.left = (per_step + pauses) * (stage.total_steps - step)
        return view


def clock(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or `-:--` when unknown."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def numbers(view: View) -> list[tuple[str, str]]:
    """What is known of speed and training metrics, as (name, text)."""
    metrics = view.metrics or {}
    shown = [("images/s", f"{view.speed:,.0f}")] if view.speed is not None else []
    for key, name, form in (
        ("train/loss", "loss", ".4f"),
        ("train/accuracy", "accuracy", ".4f"),
        ("train/lr", "lr", ".2e"),
    ):
        if key in metrics:
            shown.append((name, format(metrics[key], form)))
    return shown


def plain_line(view: View) -> str:
    """One line for a log file."""
    share = 100 * view.step // max(view.total_steps, 1)
    parts = [
        view.title,
        f"epoch {view.epoch}/{view.epochs}",
        f"step {view.step}/{view.total_steps} ({share}%)",
        *(f"{name} {text}" for name, text in numbers(view)),
        f"elapsed {clock(view.elapsed)}",
        f"left {clock(view.left)}",
    ]
    return "  ".join(parts)


def render(view: View) -> Group:
    """Two lines for a terminal: the bar and the clock, then the numbers."""
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    if view.validation is None:
        done, total, what = view.step, view.total_steps, f"epoch {view.epoch}/{view.epochs}"
    else:
        (done, total), what = view.validation, "held-out"
    bar.add_row(
        Text.assemble((view.title, "bold"), "  ", what),
        Bar(total=total, completed=done, complete_style="cyan", finished_style="green"),
        Text(f"{clock(view.elapsed)} < {clock(view.left)}", style="dim"),
    )
    line = Text("  ", no_wrap=True, overflow="ellipsis")
    line.append(f"{'batch' if view.validation else 'step'} {done}/{total}")
    for name, text in numbers(view):
        line.append("   ").append(name, style="dim").append(f" {text}")
    return Group(bar, line)
