"""What is said of machines: the worst of all ranks, and nothing where nothing is known."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from callbacks.toy import KNOWN_WARNINGS, Data, Toy, fit
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from machine_ranks import work

from beit_pretrain.callbacks import machine
from beit_pretrain.callbacks.throughput import Throughput, loss_scale

CUDA = torch.device("cuda", 1)


class Gpu:
    """In place of torch.cuda: a device whose peak is 3 GB, then 1 GB."""

    def __init__(self, busy: int | Exception) -> None:
        self.busy, self.peaks, self.asked = busy, [3_000_000_000, 1_000_000_000], []

    def max_memory_allocated(self, device: torch.device) -> int:
        self.asked.append(device)
        return self.peaks[0]

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.asked.append(device)
        self.peaks.pop(0)

    def utilization(self, device: torch.device) -> int:
        if isinstance(self.busy, Exception):
            raise self.busy
        return self.busy


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(busy: int | Exception) -> Gpu:
        made = Gpu(busy)
        for name in ("max_memory_allocated", "reset_peak_memory_stats", "utilization"):
            monkeypatch.setattr(torch.cuda, name, getattr(made, name))
        return made

    return put


def test_the_peak_is_that_since_the_last_call_of_the_device_asked_for(gpu: Any) -> None:
    made = gpu(50)
    assert [machine.peak_gpu_memory(CUDA) for _ in range(2)] == [3.0, 1.0]
    assert set(made.asked) == {CUDA}
    assert machine.gpu_idle(CUDA) == 0.5


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("nvidia-ml-py"), RuntimeError("no driver"), Exception("MIG")]
)
def test_a_driver_that_says_nothing_ends_no_run(gpu: Any, error: Exception) -> None:
    gpu(error)
    assert machine.gpu_idle(CUDA) == machine.UNKNOWN


def test_a_cpu_has_no_gpu_and_main_memory_in_gigabytes() -> None:
    cpu = torch.device("cpu")
    assert (machine.gpu_idle(cpu), machine.peak_gpu_memory(cpu)) == (machine.UNKNOWN, machine.UNKNOWN)
    assert machine.peak_memory() > 0.1  # torch alone takes as much
    if sys.platform == "linux":
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        kibibytes = int(status["VmHWM"].split()[0])
        assert (
            0.98 < machine.peak_memory() / (kibibytes * 1024 / 1e9) < 10
        )  # perhaps of its parent, never other units


def test_every_rank_gets_the_largest_and_what_any_of_them_knows(tmp_path: Path) -> None:
    mp.start_processes(work, args=(tmp_path,), nprocs=2, start_method="spawn")
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [0.75, 1.0, -math.inf, 0.5]


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
def test_a_run_logs_what_its_device_has(tmp_path: Path) -> None:
    stage = Toy(epochs=1)
    fit(stage, Data(), tmp_path, [Throughput(tmp_path, every_steps=2)])
    always = {"time/images_per_second", "time/data_wait_share", "time/seconds", "time/memory_gb"}
    assert [set(row) for _, row in stage.logged] == [always] * 3


def test_the_loss_scale_is_the_scalers_and_unknown_without_one() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with_one, without = MixedPrecision("16-mixed", "cpu", scaler), MixedPrecision("bf16-mixed", "cpu")
    known: Any = [SimpleNamespace(precision_plugin=plugin) for plugin in (with_one, without, Precision())]
    assert [loss_scale(trainer) for trainer in known] == [1024.0, machine.UNKNOWN, machine.UNKNOWN]
