"""A `beit-train` command as a process here or as a Slurm job, for `beit-tools drill`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from beit_pretrain.cluster.submit import active, sbatch
from beit_pretrain.errors import BeitError, ConfigError

POLL = 0.02  # seconds between looks at a run's files
QUEUE_POLL = 5.0  # seconds between questions to Slurm
GONE = 60.0  # seconds outside of the queue after which a job is; between two lives squeue may not show it


class Run(ABC):
    """One run, in its first life or a later one. `job` is its Slurm job, `log` has what it prints."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.log = log
        self.job: str | None = None

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def alive(self) -> bool:
        """Whether it runs, or is to."""

    @abstractmethod
    def send(self, name: str) -> None:
        """A signal, as the cluster sends it."""

    @abstractmethod
    def wait(self) -> None:
        """Until it has ended by itself. Raises what `fault` says if that was not as it should be."""

    @abstractmethod
    def end(self) -> None:
        """Now, whatever it does."""

    def until(
        self, done: Callable[[], object], *, minutes: float | None = None, late: Callable[[], str] = str
    ) -> None:
        """Wait for something that this run does. BeitError if it ends without, or with `late()` after so long."""
        began = time.monotonic()
        while not done():
            if not self.alive() and not done():
                raise self.fault()
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                raise BeitError(late())
            time.sleep(POLL)

    def fault(self) -> BeitError:
        """Why it has ended: its own words if it was a user's mistake, else its last ones."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        if mistakes := [line for line in lines if line.startswith("error: ")]:
            return ConfigError([line.removeprefix("error: ") for line in dict.fromkeys(mistakes)])
        said = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        return BeitError(f"{self.title()} has ended before its time: {said}; all it printed is in {self.log}")

    def title(self) -> str:
        return f"the run {self.folder}" if self.job is None else f"job {self.job} ({self.folder})"


class Process(Run):
    """On this machine."""

    def __init__(self, command: Sequence[str], *, folder: Path, log: Path) -> None:
        super().__init__(folder, log)
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the drill, which ends all
            )

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, name: str) -> None:
        assert self.process is not None
        self.process.send_signal(getattr(signal, f"SIG{name}"))

    def wait(self, code: int = 0) -> None:
        assert self.process is not None
        if self.process.wait() != code:
            raise self.fault()

    def end(self) -> None:
        if self.process is not None and self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)  # with the ranks and workers that it has started
            self.process.wait()


class Job(Run):
    """On a Slurm cluster."""

    def __init__(self, script: str, *, folder: Path, log: Path) -> None:
        super().__init__(folder, log)
        self.script = script
        self._asked = self._seen = 0.0

    def start(self) -> None:
        self.job = sbatch(self.script)
        self._asked = self._seen = time.monotonic()

    def alive(self) -> bool:
        if time.monotonic() - self._asked >= QUEUE_POLL:
            self._asked = time.monotonic()
            if self._active():
                self._seen = self._asked
        return time.monotonic() - self._seen < GONE

    def send(self, name: str) -> None:
        self._scancel(f"--signal={name}")

    def wait(self) -> None:
        deadline = time.monotonic() + GONE
        while self._active() and time.monotonic() < deadline:
            time.sleep(1)

    def end(self) -> None:
        if self.job is not None and self._active():
            self._scancel()

    def _active(self) -> bool:
        assert self.job is not None
        return bool(active([self.job]))

    def _scancel(self, *options: str) -> None:
        assert self.job is not None
        done = subprocess.run(["scancel", *options, self.job], capture_output=True, text=True)
        if done.returncode:
            raise BeitError(f"scancel of job {self.job} failed: {' '.join(done.stderr.split())}")
