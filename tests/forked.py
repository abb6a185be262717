"""Whole `beit-train` processes without the seconds that each would need for its imports.

A server has imported everything. For each run it forks a process, which takes a session of its own, runs the command
line, and ends as any interpreter does: with its threads, its exit handlers and its destructors.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ENDED = 0.02  # seconds between two looks at whether a process has ended


def left(session: int, seconds: float = 5.0) -> list[str]:
    """The processes of a session that still run some seconds later: number and command of each."""
    deadline = time.monotonic() + seconds
    while (found := _members(session)) and time.monotonic() < deadline:
        time.sleep(ENDED)
    return found


def _members(session: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = path.joinpath("stat").read_text().rpartition(")")
        except OSError:
            continue  # it has just ended
        state, _, _, its = rest.split()[:4]
        if int(its) == session and state not in "ZX":
            found.append(f"{path.name} {name.partition('(')[2]} ({state})")
    return found


class Forked:
    """A run in a process of its own session; its `pid` is also that of the session."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self.server = server
        self.pid = pid
        self.log = log
        self.code: int | None = None

    @property
    def output(self) -> str:
        """What it has printed so far, on both streams."""
        return self.log.read_text()

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None as long as it runs."""
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})
        return self.code

    def wait(self, seconds: float) -> int:
        """Its exit code. AssertionError, with what it has printed, if it runs for longer."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running after {seconds:g} s:\n{self.output}"
            time.sleep(ENDED)
        return code

    def left(self) -> list[str]:
        """Its processes that still run some seconds later."""
        return left(self.pid)

    def kill(self) -> None:
        """End whatever is left of the session."""
        for process in left(self.pid, 0.0):
            try:
                os.kill(int(process.split()[0]), signal.SIGKILL)
            except ProcessLookupError:
                continue


class ForkServer:
    """Starts runs (a context manager); at its end it kills what is left of them."""

    def __enter__(self) -> ForkServer:
        self.runs: list[Forked] = []
        paths = [str(TESTS), str(TESTS / "integration"), *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread: a process is forked whole only while there is no other one.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.runs:
            run.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def start(
        self, arguments: Sequence[str], cwd: Path, *, log: str = "log", tools: bool = False, **variables: str
    ) -> Forked:
        """`beit-train`, or `beit-tools`, in the folder `cwd`; what it prints goes to the file `log` there."""
        told = {"arguments": list(arguments), "cwd": str(cwd), "log": log, "tools": tools, "env": variables}
        run = Forked(self, self.ask(told), cwd / log)
        self.runs.append(run)
        return run

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


# --- the server's own process -------------------------------------------------------------------------------


def serve() -> dict[str, Any] | None:
    """Fork a process for each request, in which this returns the request; None in the server, at its end."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return request
        print(json.dumps(answer), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Let this process be as if it had been started anew."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    tempfile.tempdir = None  # it may be another one now
    with open(os.devnull) as nothing, open(request["log"], "w") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["beit-tools" if request["tools"] else "beit-train", *request["arguments"]]


def main() -> None:
    # What a run needs, as far as it is not imported by these.
    import beit_pretrain.chain
    import beit_pretrain.run
    import beit_pretrain.summary  # noqa: F401
    from beit_pretrain import cli

    if (request := serve()) is not None:
        become(request)
        cli.tools_main() if request["tools"] else cli.main()


if __name__ == "__main__":
    main()
