"""The last moments of a process: after a signal, and after a failure that other ranks feel."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from beit_pretrain.cluster import events
from beit_pretrain.cluster.launch import Launch, job_id, launched
from beit_pretrain.cluster.requeue import end_step, requeue
from beit_pretrain.cluster.signals import Interrupted, Signals

FIRST_WORD = 5.0  # seconds in which the rank that failed first can say why, before another one speaks or acts
KILL_WAIT = 60.0  # seconds after a requeue in which Slurm ends this process

# What torch, gloo and NCCL say of a connection whose other end is gone.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|remote process exited|broken pipe|socket|"
    r"timed out waiting|NCCL|TCPStore|recvValue failed|Rank \d+ successfully reached monitoredBarrier",
    re.IGNORECASE,
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


def fail(error: BaseException, mistake: str | None) -> NoReturn:
    """End one of several ranks after an exception: each cause is told once, by the rank it happened on, and no rank is
    left waiting.

    `mistake` is a user's mistake in words, for exit code 2; without one the traceback is shown.
    """
    launch, echo = launched(), lost(error)
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
    _exit(2 if mistake and not echo else 1)


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
