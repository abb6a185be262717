"""Throughput, on a clock that the test winds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger

from beit_pretrain.callbacks import throughput
from beit_pretrain.callbacks.csv_log import CsvLog
from beit_pretrain.callbacks.throughput import Throughput


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Run:
    """A trainer and a stage that do nothing but count."""

    device = torch.device("cpu")
    precision_plugin = None

    def __init__(self, callback: Throughput, clock: Clock, loggers: list[Logger]) -> None:
        self.callback, self.clock, self.loggers = callback, clock, loggers
        self.global_step, self.batch_size, self.total_steps = 0, 64, 1000
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.logged.append((self.global_step, metrics))
        for logger in self.loggers:
            logger.log_metrics(metrics, self.global_step)

    def hook(self, name: str, *args: Any) -> None:
        getattr(self.callback, name)(self, self, *args)

    def batch(self, wait: float, work: float, step: bool = True) -> None:
        self.clock.now += wait
        self.hook("on_train_batch_start", None, 0)
        self.clock.now += work
        self.global_step += step
        self.hook("on_train_batch_end", None, None, 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def test_speed_and_waiting_are_averaged_over_the_steps_between(tmp_path: Path, clock: Clock) -> None:
    run = Run(Throughput(tmp_path, every_steps=2), clock, [])
    run.hook("on_train_start")
    for wait in (1.0, 0.5, 0.0, 0.5):
        run.batch(wait, work=1.5, step=False)  # two micro-batches make a step
        run.batch(0.0, work=0.5)
    (first, a), (second, b) = run.logged
    assert (first, second) == (2, 4)
    assert a["time/images_per_second"] == pytest.approx(128 / 5.5)
    assert a["time/data_wait_share"] == pytest.approx(1.5 / 5.5)
    assert b["time/images_per_second"] == pytest.approx(128 / 4.5)
    assert (a["time/seconds"], b["time/seconds"]) == (5.5, 10.0)


def test_the_rank_that_waits_longest_and_the_gpu_that_idles_most_are_told(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank sends as many values, known or not, and logs what came back."""
    sent = []

    def others(values: list[float], device: torch.device) -> list[float]:
        sent.append(values)
        return [0.75, 8.0, 40.0, 0.125]

    monkeypatch.setattr(throughput.machine, "largest", others)
    run = Run(Throughput(tmp_path, every_steps=1), clock, [])
    run.hook("on_train_start")
    run.batch(1.0, work=3.0)
    ((_, row),) = run.logged
    assert len(sent) == 1 and len(sent[0]) == 4 and sent[0][0] == 0.25
    assert (row["time/data_wait_share"], row["time/gpu_utilisation"]) == (0.75, 0.875)
    assert (row["time/memory_gb"], row["time/gpu_memory_gb"]) == (8.0, 40.0)


def test_validation_and_checkpoints_are_not_waiting_for_data(tmp_path: Path, clock: Clock) -> None:
    run = Run(Throughput(tmp_path, every_steps=3), clock, [])
    run.hook("on_train_start")
    run.batch(0.0, work=1.0)
    run.hook("on_save_checkpoint", {})
    run.batch(50.0, work=1.0)
    run.hook("on_validation_start")
    clock.now += 500.0
    run.hook("on_train_epoch_start")
    run.batch(0.25, work=1.0)
    assert run.logged[0][1]["time/images_per_second"] == pytest.approx(3 * 64 / 3.25)
    assert run.logged[0][1]["time/data_wait_share"] == pytest.approx(0.25 / 3.25)
    assert run.logged[0][1]["time/seconds"] == pytest.approx(553.25)


def test_validation_in_the_middle_of_an_epoch_is_not_waiting_for_data(tmp_path: Path, clock: Clock) -> None:
    run = Run(Throughput(tmp_path, every_steps=2), clock, [])
    run.hook("on_train_start")
    run.batch(0.0, work=1.0)
    run.hook("on_validation_start")
    run.batch(500.0, work=1.0)
    assert run.logged[0][1]["time/images_per_second"] == pytest.approx(64.0)


def test_the_last_steps_of_a_run_are_logged_too(tmp_path: Path, clock: Clock) -> None:
    run = Run(Throughput(tmp_path, every_steps=50), clock, [])
    run.total_steps = 3
    run.hook("on_train_start")
    for _ in range(3):
        run.batch(0.0, work=1.0)
    assert [step for step, _ in run.logged] == [3]


def test_seconds_go_on_over_restarts(tmp_path: Path, clock: Clock) -> None:
    for start, seconds in ((0, 20.0), (20, 40.0)):
        run = Run(Throughput(tmp_path, every_steps=10), clock, [CsvLog(tmp_path, start)])
        run.global_step = start
        run.hook("on_train_start")
        for _ in range(20):
            run.batch(0.0, work=1.0)
        assert run.logged[-1][1]["time/seconds"] == pytest.approx(seconds)
        clock.now = 7.0  # another process, another clock
