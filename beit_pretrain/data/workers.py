"""The processes that load data: they leave signals to the training process, end with it, and can reach it."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir

from beit_pretrain.cluster.ending import die_with_parent, end_workers
from beit_pretrain.errors import BeitError

# Tensors come through sockets, whose paths are short: sun_path in <sys/un.h>, with its NUL.
_PATH = (108 if sys.platform == "linux" else 104) - 1
_NAME = len("/listener-12345678")  # of a socket, below multiprocessing's folder
_FOLDER = len("/pymp-12345678")  # of that folder, below the one for temporary files
_SHORT = ("/tmp", "/var/tmp")


def before_workers() -> None:
    """What has to be in place before a loader starts its workers. BeitError if nothing could come from them."""
    _shorten_sockets()
    # See to it that nothing waits for workers at the end, whatever still holds their loader (a traceback, say).
    atexit.unregister(end_workers)
    atexit.register(end_workers)  # anew, so that it comes before multiprocessing's own


def begin_worker(worker: int) -> None:
    """Slurm signals a whole process group: a worker that died of it would take the run along before it has saved.

    A worker that outlived its process would keep what it has inherited: memory, locks, connections to other ranks,
    which then do not learn that this one is gone.
    """
    die_with_parent()
    signal.set_wakeup_fd(-1)  # the training process's
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Watch:
    """A thread that kills workers when a wait for them lasts longer than `seconds` (a context manager); 0: never.

    torch looks for a sign of life with a limit, but waits without one for what a worker then hands over itself: one
    that is stopped (SIGSTOP) hands over nothing. Its death ends that wait.
    """

    def __init__(self, workers: Sequence[BaseProcess], seconds: float) -> None:
        self.workers = workers
        self.seconds = seconds
        self.ended = False  # whether it came to that
        self._since: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        if self.seconds:
            threading.Thread(target=self._look, daemon=True, name="watch over data workers").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around one wait."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _look(self) -> None:
        while not self._over.wait(self.seconds / 10):
            since = self._since
            if since is not None and time.monotonic() - since > self.seconds:
                self.ended = True
                for worker in self.workers:
                    worker.kill()
                return


def _shorten_sockets() -> None:
    """Let multiprocessing have a short folder of its own where TMPDIR is too long for a socket's path.

    Workers would die of such a path one thread at a time, without a word to this process. Nothing else moves: other
    temporary files stay where the user wants them.
    """
    given = tempfile.gettempdir()
    if _length(given) + _FOLDER + _NAME <= _PATH:
        return
    before = tempfile.tempdir
    short = (folder for folder in _SHORT if os.access(folder, os.W_OK | os.X_OK))
    try:
        tempfile.tempdir = next(short, given)
        folder = get_temp_dir()  # made at the first call; workers inherit it
    finally:
        tempfile.tempdir = before
    if _length(folder) + _NAME > _PATH:
        raise BeitError(
            f"the path of temporary files, {given}, has {_length(given)} bytes, and the data workers need one of at "
            f"most {_PATH - _NAME - _FOLDER}: set TMPDIR to a shorter one, or data.workers=0"
        )


def _length(path: str) -> int:
    return len(os.fsencode(path))
