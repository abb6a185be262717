"""The lock of a folder: one writer on this machine, one among several machines, whatever their clocks say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from beit_pretrain.cluster import lock as module
from beit_pretrain.cluster.lock import Lock, started
from beit_pretrain.errors import BeitError, LockLost

SILENT = "import time; time.sleep(60)"
GONE = 2**22 + 1  # beyond the largest number of a process


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with shorter times."""
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    monkeypatch.setattr(module, "WATCH", 0.5)
    monkeypatch.setattr(module, "LOOK", 0.02)


def hold(file: Path, **holder: Any) -> Path:
    file.write_text(json.dumps(holder))
    return file


@contextmanager
def touching(file: Path, ahead: float) -> Iterator[None]:
    """A writer on another machine, whose clock (or whose server's) differs by so many seconds."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            now = time.time() + ahead
            os.utime(file, (now, now))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_second_writer_is_refused_and_the_lock_is_free_afterwards(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    one, other = Lock(file), Lock(file)
    one.acquire()
    with pytest.raises(
        BeitError, match=rf"is being written by process {os.getpid()} on .* name= .*remove .*\.lock"
    ):
        other.acquire()
    one.check()
    one.release()
    assert not file.exists()
    other.acquire()
    other.release()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SILENT])
    file = hold(tmp_path / ".lock", host=socket.gethostname(), pid=process.pid, started=started(process.pid))
    lock = Lock(file)
    with pytest.raises(BeitError, match=f"process {process.pid}"):
        lock.acquire()
    process.kill()
    process.wait()
    lock.acquire()
    assert json.loads(file.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_later_process_of_the_same_number_holds_nothing(tmp_path: Path) -> None:
    lock = Lock(hold(tmp_path / ".lock", host=socket.gethostname(), pid=os.getpid(), started="1"))
    lock.acquire()
    lock.release()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ahead", [0.0, -180.0, 3600.0])
def test_another_machines_lock_counts_while_it_is_touched_whatever_its_clock_says(
    tmp_path: Path, ahead: float, capsys: pytest.CaptureFixture[str]
) -> None:
    file = hold(tmp_path / ".lock", host="node7", pid=5, started="1")
    os.utime(file, (time.time() + ahead, time.time() + ahead))
    began = time.monotonic()
    with touching(file, ahead), pytest.raises(BeitError, match="process 5 on node7"):
        Lock(file).acquire()
    assert time.monotonic() - began < module.WATCH  # known at the first touch
    assert json.loads(file.read_text())["host"] == "node7"
    assert "watching for up to 0.5 s whether process 5 on node7 is still alive" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ahead", [0.0, -180.0, 3600.0])
def test_another_machines_lock_that_is_not_touched_is_taken_over_whatever_its_clock_says(
    tmp_path: Path, ahead: float
) -> None:
    file = hold(tmp_path / ".lock", host="node7", pid=5, started="1")
    os.utime(file, (time.time() + ahead, time.time() + ahead))
    lock = Lock(file)
    lock.acquire()
    assert json.loads(file.read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "text", ['{"host"', "", "5", "{}", "[]", '{"host": 5, "pid": "x", "started": null}', "\0\xff"]
)
def test_a_lock_that_names_nobody_is_watched_too(tmp_path: Path, text: str) -> None:
    file = tmp_path / ".lock"
    file.write_text(text)
    with touching(file, 0.0), pytest.raises(BeitError, match="an unknown process"):
        Lock(file).acquire()
    lock = Lock(file)
    lock.acquire()
    lock.release()


@pytest.mark.usefixtures("quick")
def test_whoever_does_not_wait_goes_on_watching_at_the_next_attempt(tmp_path: Path) -> None:
    lock = Lock(hold(tmp_path / ".lock", host="node7", pid=5, started="1"))
    for _ in range(2):
        with pytest.raises(BeitError, match="process 5 on node7"):
            lock.acquire(wait=False)
    time.sleep(module.WATCH)
    lock.acquire(wait=False)
    lock.release()


@pytest.mark.usefixtures("quick")
def test_a_writer_that_stood_still_notices_that_its_lock_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".lock"
    stalled, fresh = Lock(file), Lock(file)
    stalled.acquire()
    monkeypatch.setattr(socket, "gethostname", lambda: "node8")
    with pytest.raises(BeitError, match="is being written by"):
        fresh.acquire()  # it lives
    stalled._stop.set()  # its heart stands still
    fresh.acquire()
    for _ in range(2):
        with pytest.raises(LockLost, match=rf"process {os.getpid()} on node8 has taken the folder over"):
            stalled.check()
    stalled.release()
    fresh.check()
    fresh.release()
    fresh.check()  # nothing is held, nothing was lost


@pytest.mark.usefixtures("quick")
def test_the_heartbeat_notices_too_and_does_not_touch_what_is_another_ones(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    lock.acquire()
    hold(lock.file, host="node8", pid=5, started="1")
    os.utime(lock.file, (5, 5))
    time.sleep(0.3)
    assert lock.lost and lock.file.stat().st_mtime == 5
    lock.release()
    assert lock.file.exists()


@pytest.mark.usefixtures("quick")
def test_a_lock_that_was_removed_is_lost(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run" / ".lock")
    lock.file.parent.mkdir()
    lock.acquire()
    lock.file.unlink()
    with pytest.raises(LockLost, match="was removed"):
        lock.check()
    lock.file.parent.rmdir()
    with pytest.raises(LockLost, match="was removed"):
        lock.check()
    lock.release()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    writers, rounds = 8, 10
    start, end = Barrier(writers), Barrier(writers)

    def write(file: Path) -> bool:
        start.wait()
        lock = Lock(file)
        try:
            lock.acquire()
        except BeitError:
            end.wait()
            return False
        end.wait()
        lock.release()
        return True

    with ThreadPoolExecutor(writers) as pool:
        for number in range(rounds):
            file = hold(tmp_path / str(number), host=socket.gethostname(), pid=GONE, started="1")
            assert sum(pool.map(write, [file] * writers)) == 1


def test_a_slow_finder_of_a_stale_lock_leaves_the_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hold(tmp_path / ".lock", host=socket.gethostname(), pid=GONE, started="1")
    fast, slow = Lock(file), Lock(file)
    remove = slow._remove

    def overtaken(dead: Any) -> None:
        fast.acquire()
        remove(dead)
        fast.check()
        with pytest.raises(BeitError, match="is being written by"):
            Lock(file).acquire()
        fast.release()

    monkeypatch.setattr(slow, "_remove", overtaken)
    slow.acquire()
    slow.check()
    slow.release()


def test_a_link_to_nothing_in_the_place_of_a_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to("nowhere")
    with pytest.raises(BeitError, match=r"\.lock is a link to nothing: remove it"):
        Lock(tmp_path / ".lock").acquire()


@pytest.mark.usefixtures("quick")
def test_a_lock_that_cannot_be_read_is_given_back_without_a_traceback(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    lock.acquire()
    lock.file.unlink()
    lock.file.mkdir()
    with pytest.raises(LockLost, match="cannot be read"):
        lock.check()
    lock.release()
