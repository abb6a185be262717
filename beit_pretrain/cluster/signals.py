"""Signals that ask a run to end: the warning before a time limit, a preemption, `kill`.

Outside of training a signal ends the process where it stands. While training it is only noted: nothing that waits for
another rank happens in a handler (ranks are rarely at the same point when it arrives).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

NAMES = ("USR1", "USR2", "TERM")
JOIN = 5.0  # seconds at most in which the thread ends; it needs none


class Interrupted(BaseException):
    """A signal ended the run, after `step` updates if it was training in `run_dir`."""

    def __init__(
        self, number: int, *, requeue: bool, run_dir: Path | None = None, step: int = 0, ranks: int = 1
    ) -> None:
        super().__init__(number)
        self.number = number
        self.requeue = requeue
        self.run_dir = run_dir
        self.step = step
        self.ranks = ranks

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name.removeprefix("SIG")


class Signals:
    """This process's handlers, from its first moment on (a context manager).

    A thread watches over them: a main thread that waits for another rank in a library never gets to a handler. If the
    process still runs `grace` seconds after a signal, `late` is called in that thread.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.grace = 60.0
        self.requeue = True  # whether a Slurm job is to come back
        self.late: Callable[[int], None] = _end_at_once
        self._numbers = {getattr(signal, f"SIG{name}") for name in NAMES}
        self._held = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in self._numbers}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._clock: threading.Timer | None = None
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._watcher.start()
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor)
        if os.getpid() == self._pid:
            # Forked processes have copies of this end: to close one of them ends nothing. A forked process that comes
            # here itself has no such thread, and the connection is its parent's.
            self._writer.shutdown(socket.SHUT_RDWR)
            self._watcher.join(JOIN)
        self._writer.close()
        self._reader.close()
        if self._clock is not None:
            self._clock.cancel()

    def listen_to(self, names: Sequence[str]) -> None:
        """Only these of `NAMES` from now on; the others do what they did before."""
        wanted = {getattr(signal, f"SIG{name}") for name in names}
        for number in self._numbers - wanted:
            signal.signal(number, self._before[number])
        self._numbers &= wanted
        self.install()

    def install(self) -> None:
        """Put the handlers in place; again where a library has put its own over them."""
        for number in self._numbers:
            signal.signal(number, self._handle)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals are noted in `received` until the block ends."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid or self.received is not None:
            return  # a forked process ends when its parent says so; and one signal is enough
        self.received = number
        if not self._held:
            raise Interrupted(number, requeue=self.requeue)

    def _watch(self) -> None:
        numbers = set(self._numbers)
        while data := self._reader.recv(1):
            if data[0] in numbers & self._numbers:
                self._clock = threading.Timer(self.grace, self.late, [data[0]])
                self._clock.daemon = True
                self._clock.start()
                break


def _end_at_once(number: int) -> None:
    print("the run did not end in time after a signal; it is ended", file=sys.stderr, flush=True)
    os._exit(128 + number)
