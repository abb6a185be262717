"""Handlers that only take note while a run trains, and a watch for a main thread that hangs."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time

import pytest

from beit_pretrain.cluster.signals import Interrupted, Signals


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # until the interpreter has run the handler


def test_outside_of_training_a_signal_ends_the_process_where_it_stands() -> None:
    with Signals() as signals:
        signals.requeue = False
        with pytest.raises(Interrupted) as caught:
            _send(signal.SIGUSR1)
    assert (caught.value.number, caught.value.name, caught.value.requeue) == (signal.SIGUSR1, "USR1", False)


def test_while_training_a_signal_is_noted_and_only_the_first() -> None:
    with Signals() as signals:
        with signals.held():
            _send(signal.SIGUSR2)
            _send(signal.SIGTERM)
        assert signals.received == signal.SIGUSR2


def test_afterwards_the_handlers_are_those_of_before() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)]
    with Signals() as signals:
        signals.listen_to(["USR1"])
        assert signal.getsignal(signal.SIGUSR1) not in before
        assert [signal.getsignal(n) for n in (signal.SIGUSR2, signal.SIGTERM)] == before[1:]
    assert [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)] == before


def test_a_handler_that_a_library_has_replaced_is_put_back() -> None:
    with Signals() as signals, signals.held():
        signal.signal(signal.SIGTERM, lambda *_: None)
        signals.install()
        _send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_end_waits_for_no_forked_process() -> None:
    """Data workers have copies of the socket that tells the watch of the end."""
    with Signals():
        if (worker := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_end_the_watch_of_its_parent() -> None:
    heard: queue.Queue[int] = queue.Queue()
    before = signal.getsignal(signal.SIGUSR1)
    with Signals() as signals, signals.held():
        signals.grace, signals.late = 0.05, heard.put
        if (forked := os.fork()) == 0:
            signals.__exit__()
            os._exit(0 if signal.getsignal(signal.SIGUSR1) == before else 1)
        assert os.waitpid(forked, 0)[1] == 0
        _send(signal.SIGUSR1)
        assert heard.get(timeout=10) == signal.SIGUSR1


HANGS = """
import ctypes, os, signal, sys
from beit_pretrain.cluster.signals import Signals
with Signals() as signals, signals.held():
    signals.grace = 0.3
    if sys.argv[1] == "own":
        signals.late = lambda number: (print("late", number, flush=True), os._exit(3))
    print("ready", flush=True)
    condition = (ctypes.c_byte * 64)(), (ctypes.c_byte * 64)()
    ctypes.CDLL(None).pthread_cond_wait(*condition)  # in a library: no handler of Python's runs until it returns
"""


@pytest.mark.parametrize(
    ("late", "code", "says"), [("own", 3, "late 10"), ("default", 138, "did not end in time")]
)
def test_a_main_thread_that_hangs_in_a_library_is_ended_after_the_grace(
    late: str, code: int, says: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, late], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    assert says in output
