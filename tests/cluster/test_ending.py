"""Processes that are ended: killed workers told from other failures, pools, and what no signal reaches."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess

import pytest

from beit_pretrain.cluster import ending

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "DataLoader worker (pid 71) is killed by signal: Killed. ",
            "data worker 71 was killed by signal: Killed (out of memory?)",
        ),
        (
            "DataLoader worker (pid(s) 71, 72) exited unexpectedly",
            "data worker 71, 72 exited unexpectedly (out of memory?)",
        ),
        (
            "DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            "data worker 71 was killed by signal: Bus error (out of shared memory (/dev/shm)?)",
        ),
    ],
)
def test_the_death_of_a_worker_is_one_line(said: str, told: str) -> None:
    error = ending.killed_worker(RuntimeError(said))
    assert error is not None and error.code == 1
    assert str(error).startswith(told) and "data.workers" in str(error)


def test_no_other_error_is_taken_for_it() -> None:
    assert ending.killed_worker(RuntimeError("DataLoader timed out after 5 seconds")) is None
    assert (
        ending.killed_worker(ValueError("DataLoader worker (pid 71) is killed by signal: Killed. ")) is None
    )


class Unkillable(BaseProcess):
    """In the kernel, waiting for storage."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def join(self, timeout: float | None = None) -> None:
        assert timeout is not None
        time.sleep(timeout)

    def is_alive(self) -> bool:
        return True


def test_what_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "DYING", 0.2)
    children = multiprocessing.process._children  # what multiprocessing waits for at the end
    processes = [Unkillable() for _ in range(8)]
    children.update(processes)
    began = time.monotonic()
    ending.kill(processes)
    assert time.monotonic() - began < 1  # not for each of them
    assert all(process.killed for process in processes) and not children & set(processes)


def test_a_pool_ends_though_a_process_of_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "DYING", 0.3)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(2)
    jobs = [pool.submit(time.sleep, seconds) for seconds in (0, 100, 100, 100)]
    jobs[0].result()
    began = time.monotonic()
    ending.end_pool(pool)
    assert time.monotonic() - began < 10
    assert set(multiprocessing.active_children()) <= before
