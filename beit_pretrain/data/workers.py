"""The processes that load data: they leave signals to the training process, and end with it."""

from __future__ import annotations

import atexit
import multiprocessing
import signal


def leave_signals(worker: int) -> None:
    """Slurm signals a whole process group: a worker that died of it would take the run along before it has saved."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers_with_this_process() -> None:
    """See to it that nothing waits for workers at the end, whatever still holds their loader (a traceback, say).

    multiprocessing ends them by the very signal that they leave alone, and would wait for them for ever.
    """
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # anew, so that it comes before multiprocessing's own


def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes their death for an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
