"""Progress: what a terminal and what a log file get to see."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from callbacks.toy import KNOWN_WARNINGS, Data, Toy, fit
from rich.console import Console

from beit_pretrain.callbacks import progress
from beit_pretrain.callbacks.progress import Progress, View, clock, plain_line, render

pytestmark = pytest.mark.filterwarnings(*KNOWN_WARNINGS)

VIEW = View(
    title="pretrain-digits-micro",
    step=1234,
    total_steps=8000,
    epoch=3,
    epochs=20,
    elapsed=753.0,
    left=3721.0,
    speed=5123.4,
    metrics={"train/loss": 4.21314, "train/accuracy": 0.1234, "train/lr": 1.5e-3, "train/other": 1.0},
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 50.0

    def monotonic(self) -> float:
        return self.now


class Run:
    """A trainer and a stage that do nothing but count."""

    is_global_zero, sanity_checking = True, False

    def __init__(self, step: int, callback: Progress) -> None:
        self.global_step, self.callback = step, callback
        self.steps_per_epoch, self.total_steps, self.batch_size = 100, 1000, 64
        self.latest: dict[str, float] = {"train/loss": 2.5}
        self.callback_metrics: dict[str, float] = {"val/loss": 1.5}
        self.num_val_batches = [7]
        self.state = type("State", (), {"fn": "fit"})

    def hook(self, name: str, *args: Any) -> None:
        getattr(self.callback, name)(self, self, *args)


@pytest.fixture
def wound(monkeypatch: pytest.MonkeyPatch) -> Clock:
    watch = Clock()
    monkeypatch.setattr(progress, "time", watch)
    return watch


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal as stderr; called by the test itself, since pytest takes stderr again after the fixtures."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return screen


def test_a_line_says_everything_in_plain_characters() -> None:
    assert plain_line(VIEW) == (
        "pretrain-digits-micro  epoch 3/20  step 1234/8000 (15%)  images/s 5,123  loss 4.2131  "
        "accuracy 0.1234  lr 1.50e-03  elapsed 12:33  left 1:02:01"
    )


def test_a_line_before_anything_is_known() -> None:
    view = View("toy", step=0, total_steps=10, epoch=1, epochs=2, elapsed=0.0)
    assert plain_line(view) == "toy  epoch 1/2  step 0/10 (0%)  elapsed 0:00  left -:--"


@pytest.mark.parametrize("width", [40, 80, 132])
def test_the_bar_is_two_lines_at_any_width(width: int) -> None:
    screen = io.StringIO()
    Console(file=screen, width=width, force_terminal=True, color_system=None).print(render(VIEW))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 2 and all(len(line) <= width for line in lines)
    assert "step 1234/8000" in lines[1]
    if width >= 80:
        assert "epoch 3/20" in lines[0] and "12:33 < 1:02:01" in lines[0] and "loss 4.2131" in lines[1]


def test_clocks() -> None:
    assert [clock(s) for s in (None, 0.4, 59.6, 3599, 3600, 90061)] == [
        *("-:--", "0:00", "1:00", "59:59", "1:00:00", "25:01:01")
    ]


def test_a_log_file_gets_a_line_now_and_then(wound: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(0, Progress(title="toy", line_every=30.0))
    run.hook("on_train_start")
    for _ in range(400):
        wound.now += 0.25
        run.global_step += 1
        run.hook("on_train_batch_end", None, None, 0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["0", "120", "240", "360"]
    assert "images/s 256" in lines[1] and "left 3:40" in lines[1] and "loss 2.5000" in lines[1]


def test_a_resumed_run_begins_at_its_step(wound: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(730, Progress(title="toy", line_every=1.0))
    run.hook("on_train_start")
    wound.now += 10.0
    run.global_step += 10
    run.hook("on_train_batch_end", None, None, 0)
    first, second = capsys.readouterr().err.splitlines()
    assert "epoch 8/10  step 730/1000 (73%)" in first and "images/s" not in first
    assert "images/s 64 " in second and "left 4:20" in second  # 260 steps to go, one a second


def test_validation_time_does_not_slow_the_shown_speed(
    wound: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(0, Progress(title="toy", line_every=5.0))
    run.hook("on_train_start")
    run.hook("on_validation_start")
    wound.now += 100.0
    run.hook("on_validation_end")
    wound.now += 20.0  # pictures, neighbours, a checkpoint
    run.hook("on_train_batch_start", None, 0)
    wound.now += 10.0
    run.global_step += 10
    run.hook("on_train_batch_end", None, None, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "toy step 0 held-out: val/loss 1.5"
    # 990 steps of 1 s, and 120 s of pauses for every 10 of them.
    assert "images/s 64 " in lines[2] and "elapsed 2:10" in lines[2] and "left 3:34:30" in lines[2]


def test_short_epochs_do_not_each_write_a_line_and_series_are_left_out(
    wound: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(0, Progress(title="toy", line_every=30.0))
    run.callback_metrics |= {f"val/block_{i}": 0.1 for i in range(12)} | {"train/loss": 2.0, "val/top1": 0.5}
    for _ in range(10):
        wound.now += 10.0
        run.global_step += 100
        run.hook("on_validation_start")
        run.hook("on_validation_end")
    lines = [line for line in capsys.readouterr().err.splitlines() if "held-out" in line]
    steps = (100, 400, 700, 1000)
    assert lines == [f"toy step {step} held-out: val/loss 1.5 val/top1 0.5" for step in steps]


def test_a_terminal_is_drawn_on_at_most_four_times_a_second(
    wound: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch)
    run = Run(0, Progress(title="toy"))
    run.hook("on_train_start")
    for _ in range(1000):
        wound.now += 0.002
        run.global_step += 1
        run.hook("on_train_batch_end", None, None, 0)
    run.hook("on_train_end")
    assert 8 <= len(re.findall(r"step \d+/1000", terminal.getvalue())) <= 2 + 2 * 4 + 1
    assert "step 1000/1000" in terminal.getvalue()
    assert sys.stderr is terminal  # nothing stays redirected


def test_a_terminal_shows_validation_briefly(wound: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    run = Run(0, Progress(title="toy"))
    run.hook("on_train_start")
    run.hook("on_validation_start")
    for batch in range(7):
        wound.now += 0.3
        run.hook("on_validation_batch_end", None, None, batch)
    run.hook("on_validation_end")
    run.hook("on_exception", KeyboardInterrupt())
    assert "held-out" in terminal.getvalue() and "batch 7/7" in terminal.getvalue()
    assert sys.stderr is terminal


def test_other_ranks_are_silent(wound: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(0, Progress(title="toy", line_every=0.0))
    run.is_global_zero = False
    run.hook("setup", "fit")
    run.hook("on_train_start")
    run.hook("on_train_batch_end", None, None, 0)
    run.hook("on_validation_start")
    run.hook("on_validation_end")
    run.hook("on_train_end")
    assert capsys.readouterr() == ("", "")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, wound: Clock) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    run = Run(0, Progress(title="toy"))
    run.hook("on_train_start")
    assert (
        terminal.getvalue().startswith("toy  epoch 1/10  step 0/1000") and "\x1b" not in terminal.getvalue()
    )


def test_a_real_run_in_a_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(Toy(epochs=2), Data(), tmp_path, [Progress(title="toy", line_every=0.0)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("toy")]
    assert trainer.progress_bar_callback is not None
    assert len([line for line in lines if "held-out: val/loss" in line]) == 2
    assert any("step 12/12 (100%)" in line for line in lines)
    assert all(line.isprintable() and line.isascii() for line in lines)


def test_a_real_run_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    stage, bar = Toy(epochs=2), Progress(title="toy")
    trainer = fit(stage, Data(), tmp_path, [bar])
    assert "step 12/12" in terminal.getvalue() and "accuracy" in terminal.getvalue()
    trainer.validate(stage, datamodule=Data(), verbose=False)
    assert sys.stderr is terminal
