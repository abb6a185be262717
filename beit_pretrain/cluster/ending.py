"""The last moments of a process: after a signal, and after a failure that other ranks feel."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import NoReturn

from beit_pretrain.cluster import events
from beit_pretrain.cluster.launch import Launch, job_id, launched
from beit_pretrain.cluster.requeue import end_step, requeue
from beit_pretrain.cluster.signals import Interrupted, Signals
from beit_pretrain.errors import BeitError, WorkerError

FIRST_WORD = 5.0  # seconds in which the rank that failed first can say why, before another one speaks or acts
KILL_WAIT = 60.0  # seconds after a requeue in which Slurm ends this process
DYING = 5.0  # seconds in which a killed process is gone, unless it waits for storage that hangs

# What torch, gloo and NCCL say of a connection whose other end is gone.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|remote process exited|broken pipe|socket|"
    r"timed out waiting|NCCL|TCPStore|recvValue failed|Rank \d+ successfully reached monitoredBarrier",
    re.IGNORECASE,
)
# What torch says of a data worker that is gone.
_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ((?:is killed by signal: |exited )[\w ]+)"
)


def end(interrupted: Interrupted) -> NoReturn:
    """Put the job back into the queue, say so, and end: with 128 + the signal's number where it does not come back."""
    rank = launched().rank
    if rank:
        # Not with an error: srun may kill all others for it, before rank 0 has reached the queue.
        _exit(0)
    name = f"SIG{interrupted.name}"
    where = f" after step {interrupted.step}" if interrupted.run_dir else ""
    again = f"stopped by {name}{where}; the same command goes on from there"
    if job_id() is None or not interrupted.requeue:
        _say(again)
    elif reason := requeue():
        _say(f"{again} (not put back into the queue: {reason})")
    else:
        if interrupted.run_dir:
            events.record(
                interrupted.run_dir, "requeue", step=interrupted.step, ranks=interrupted.ranks, detail=name
            )
        _say(f"stopped by {name}{where}; job {job_id()} is back in the queue and goes on from there")
        time.sleep(KILL_WAIT)
    _exit(128 + interrupted.number)


def end_late(signals: Signals, number: int) -> None:
    """For `Signals.late`: no checkpoint was possible in time, as another rank hangs or an evaluation takes long."""
    if launched().rank:
        time.sleep(KILL_WAIT)  # rank 0 first
        _exit(0)
    reason = requeue() if signals.requeue and job_id() else ""
    _say(
        f"no checkpoint within trainer.signal_grace={signals.grace:g} seconds of a signal (an evaluation that takes "
        "longer, or a rank that hangs): the run goes on from its last one"
        + (f" (not put back into the queue: {reason})" if reason else "")
    )
    if reason is None:
        time.sleep(KILL_WAIT)
    _exit(128 + number)


def among_others() -> bool:
    """Whether other ranks feel the end of this one."""
    launch, group = launched(), sys.modules.get("torch.distributed")
    together = group is not None and group.is_available() and group.is_initialized()
    return launch.processes > 1 or launch.rank > 0 or together


def die_with_parent() -> None:
    """End this process with the one that has started it: Lightning watches over its children, not they over it."""
    with suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_workers() -> None:
    """Kill this process's data workers, whatever still holds their loaders.

    They leave alone the signal by which multiprocessing would end them, and it would wait for them for ever.
    """
    kill(child for child in multiprocessing.active_children() if child.daemon)


def kill(workers: Iterable[BaseProcess]) -> None:
    """End processes of multiprocessing at once, and forget those that cannot be ended."""
    with deaths_are_meant():
        dying = list(workers)
        for worker in dying:
            worker.kill()
        deadline = time.monotonic() + DYING
        for worker in dying:
            worker.join(max(0.0, deadline - time.monotonic()))
    for worker in dying:
        if worker.is_alive():
            # In the kernel, where no signal reaches it. At its end this process would wait for it for ever.
            multiprocessing.process._children.discard(worker)  # pyright: ignore[reportAttributeAccessIssue]


def gone(workers: Iterable[BaseProcess]) -> str:
    """The numbers of those that have died; death takes a moment to show."""
    dead = []
    for worker in workers:
        worker.join(0.2)
        dead += [] if worker.is_alive() else [str(worker.pid)]
    return ", ".join(dead)


def end_pool(pool: ProcessPoolExecutor) -> None:
    """Shut a pool down. Its processes have some seconds to give up what they do; storage may hang for longer."""
    processes = list(pool._processes.values())  # and no others: this process may have data workers too
    pool.shutdown(wait=False, cancel_futures=True)
    deadline = time.monotonic() + DYING
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    kill(process for process in processes if process.is_alive())


@contextmanager
def deaths_are_meant() -> Iterator[None]:
    """torch takes the death of a worker for an error, which it raises in the main thread wherever that is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def killed_worker(error: BaseException) -> WorkerError | None:
    """What an exception of torch's means that tells of the death of a data worker; None for any other.

    torch raises it wherever the main thread is.
    """
    if type(error) is not RuntimeError or not (found := _WORKER.match(str(error))):
        return None
    number, how = found.groups()
    memory = "shared memory (/dev/shm)" if "Bus error" in how else "memory"
    return WorkerError(
        f"data worker {number} {how.replace('is killed', 'was killed')} (out of {memory}?): give the job more of it, "
        "or set data.workers lower"
    )


def fail(error: BaseException, mistake: BeitError | None) -> NoReturn:
    """End one of several ranks after an exception: each cause is told once, by the rank it happened on, and no rank is
    left waiting.

    `mistake` is what a user can mend, with its exit code; without one the traceback is shown.
    """
    launch, echo = launched(), lost(error)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise again where several workers have died
    if launch.rank or echo:
        # Rank 0 may have the same to say, or another one the reason; then srun or torchrun ends this process.
        time.sleep(FIRST_WORD)
    prefix = f"rank {launch.rank}: " if launch.rank else ""
    if echo and launch.rank == 0:
        _say("error: another rank has failed (its own words are above), or was killed (out of memory?)")
    elif not echo and mistake is None:
        _say(prefix + "".join(traceback.format_exception(error)))
    elif not echo:
        for line in str(mistake).splitlines():
            _say(f"error: {prefix}{line}")
    _end_others(launch)
    _exit(mistake.code if mistake and not echo else 1)


def lost(error: BaseException) -> bool:
    """Whether an exception is the echo of another rank's end."""
    from_torch = type(error).__module__.startswith("torch") or type(error) is RuntimeError
    return from_torch and bool(_LOST.search(str(error)))


def _end_others(launch: Launch) -> None:
    """Where srun runs without --kill-on-bad-exit, ranks in a collective would wait for this one for minutes."""
    if launch.kind == "slurm" and launch.processes > 1:
        time.sleep(FIRST_WORD)
        end_step()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    """Without destructors: those of a process group wait for ranks that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
