"""Storage that does not answer ends a run with the name of what was being read, and leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from data.shades import Shades, make_module
from torch import Tensor

from beit_pretrain.cluster.ending import deaths_are_meant, killed_worker
from beit_pretrain.data import workers
from beit_pretrain.data.sampler import epoch_order
from beit_pretrain.errors import BeitError, ConfigError, DataError, WorkerError

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)


TESTS = Path(__file__).parents[1]


class Hanging(Shades):
    """To read one of the images never ends."""

    def __init__(self, count: int, pipe: Path, bad: int) -> None:
        super().__init__(count)
        self.pipe, self.bad = pipe, bad

    def read(self, index: int) -> Tensor:
        if index == self.bad:
            os.close(os.open(self.pipe, os.O_RDONLY))  # nobody ever writes
        return super().read(index)

    def where(self, index: int) -> str:
        return f"shard {index // 10}, sample {index % 10}"


def test_a_read_that_never_ends_is_named_and_its_worker_is_gone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    others = make_module(Shades(64), workers=1, val_share=0.0).train_dataloader()
    batches = iter(others)
    next(batches)
    before = set(multiprocessing.active_children())
    bad = int(epoch_order(32, 1, 0)[19])
    module = make_module(Hanging(32, tmp_path / "pipe", bad), workers=2, timeout=1.0, val_share=0.0)
    seen, began = 0, time.monotonic()
    with pytest.raises(DataError) as caught:
        for _ in module.train_dataloader():
            seen += 1
    # Batch 2 is worker 0's; worker 1 has done all of its own.
    assert seen == 2 and time.monotonic() - began < 30
    assert str(caught.value) == (
        f"the data workers gave nothing for 1 s (data.timeout): worker 0 is reading shard {bad // 10}, sample "
        f"{bad % 10}; look at the storage that it lies on, or raise data.timeout"
    )
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(batches)) == 7  # another loader's worker goes on


def test_a_slow_source_is_no_stalled_one_and_zero_is_no_limit() -> None:
    class Slow(Shades):
        def read(self, index: int) -> Tensor:
            time.sleep(0.02)
            return super().read(index)

    for timeout in (5.0, 0.0):
        assert (
            len(list(make_module(Slow(16), workers=1, timeout=timeout, val_share=0.0).train_dataloader()))
            == 2
        )


def test_what_is_fetched_ends_by_itself() -> None:
    source = Shades(16)
    source.fetched = True
    assert make_module(source, workers=1, timeout=5.0).train_dataloader().timeout == 0


def test_what_is_no_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.timeout=-1"):
        make_module(Shades(16), timeout=-1)


def test_a_process_that_fails_while_it_loads_ends(tmp_path: Path) -> None:
    script = """
from data.shades import Shades, make_module
batches = iter(make_module(Shades(64), workers=2, val_share=0.0).train_dataloader())
next(batches)
raise RuntimeError("of the training")
"""
    paths = os.pathsep.join(map(str, [TESTS, TESTS.parent]))
    command = [sys.executable, "-W", "ignore", "-c", script]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=100
    )
    assert ended.returncode == 1 and ended.stderr.decode().endswith("RuntimeError: of the training\n")


def test_a_worker_that_is_stopped_ends_the_wait_for_what_it_has_announced() -> None:
    loader = make_module(Shades(64), workers=1, timeout=1.0, val_share=0.0).train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = loader._workers
    time.sleep(1.0)  # it has announced two more
    os.kill(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"nothing for 2 s \(data\.timeout\).* is a process stopped"):
        list(batches)
    assert time.monotonic() - began < 20 and not worker.is_alive()


def test_a_worker_that_dies_before_it_has_handed_over_what_it_announced_is_a_dead_worker() -> None:
    loader = make_module(Shades(64), workers=1, timeout=20.0, val_share=0.0).train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = loader._workers
    time.sleep(1.0)  # it has announced two more
    with deaths_are_meant():
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.2)
    with pytest.raises(RuntimeError) as caught:
        list(batches)
    assert isinstance(killed_worker(caught.value), WorkerError)


def test_a_worker_that_reads_is_ended_before_its_loader_is_let_go_of(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    bad = int(epoch_order(32, 1, 0)[9])  # of batch 1, which is worker 1's
    module = make_module(Hanging(32, tmp_path / "pipe", bad), workers=2, val_share=0.0)
    loader = module.train_dataloader()
    batches = iter(loader)
    next(batches)
    idle, stuck = loader._workers
    deadline = time.monotonic() + 20
    while loader.dataset.reading.tolist() != [-1, bad]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    module.on_exception(RuntimeError())
    assert idle.is_alive() and not stuck.is_alive()


def test_a_long_path_of_temporary_files_is_only_too_long_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 110)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    module = make_module(Shades(64), workers=2, timeout=20.0, val_share=0.0)
    assert len(list(module.train_dataloader())) == 8
    assert tempfile.gettempdir() == str(long)


def test_without_a_short_place_for_sockets_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 110)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(workers, "_SHORT", ())
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    with pytest.raises(
        BeitError, match=rf"temporary files, {long}, has \d+ bytes.* set TMPDIR to a shorter one"
    ):
        make_module(Shades(64), workers=1).train_dataloader()
    make_module(Shades(64), workers=0).train_dataloader()
