"""The trials of a search, each a `beit-train` process: started, watched, stopped early, taken up again.

A process that was started outlives a worker that is killed. The next worker waits for its end, and the trial goes on
at its last checkpoint, or gives its results if it was finished.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from optuna.trial import TrialState

from beit_pretrain.errors import BeitError
from beit_pretrain.report.folder import read_series
from beit_pretrain.run_files import RESULTS, read_json
from beit_pretrain.tools.sweep_study import Claimed, Search, option, trial_name

POLL = 0.5  # seconds between looks at the processes
LIVES = 3  # times that a trial is started again after it was killed, then it counts as failed
FAILURES = 3  # trials in a row that fail before the worker gives up
TOLD_TO_STOP = {128 + n for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}  # exit codes of beit-train


@dataclass
class _Running:
    """One trial in this worker's hands; without a process while another one still writes in its folder."""

    claimed: Claimed
    slot: int
    process: subprocess.Popen[bytes] | None = None
    pruned: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.trial, self.claim, self.options, self.reported = self.claimed
        self.name = trial_name(self.trial.number)


class Trials:
    """A worker: runs trials, `at_once` of them, until all that the search asks for are finished or in others' hands.

    With `srun`, each is a step of this Slurm job. A signal to the worker is passed on and leaves its trials to the
    next start; one that Slurm sends to a step puts the job back into the queue.
    """

    def __init__(self, search: Search, *, overrides: Sequence[str], at_once: int, srun: bool) -> None:
        self.search = search
        self.folder = search.folder
        self.metric: str = search.settings["metric"]
        self.overrides = overrides
        self.at_once = at_once
        self.srun = srun
        self.running: list[_Running] = []
        self.signal: int | None = None  # what ends this worker: a signal to it, or to one of its trials
        self.mistake: str | None = None  # why no further trial makes sense
        self.failures = 0  # in a row

    def run(self) -> None:
        """Raises BeitError for a user's mistake that a trial reports, and SystemExit after a signal."""
        gpus = gpu_shares(self.at_once)
        told = False
        with self._listening():
            while True:
                stopping = self.signal is not None or self.mistake is not None
                if stopping and not told:
                    told = True
                    for one in self.running:
                        self._tell_to_stop(one)
                while not stopping and len(self.running) < self.at_once and (claimed := self.search.next()):
                    slot = min(set(range(self.at_once)) - {one.slot for one in self.running})
                    self.running.append(_Running(claimed, slot))
                for one in list(self.running):
                    if self._step(one, gpus[one.slot], stopping):
                        self.running.remove(one)
                        one.claim.__exit__()
                if not self.running and (stopping or not self.search.anything_left()):
                    break
                time.sleep(POLL)
        if self.mistake is not None:
            raise BeitError(self.mistake)
        if self.signal is not None:
            print("the search was told to stop; the same command goes on", file=sys.stderr)
            raise SystemExit(128 + self.signal)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        # Under `nohup`, and in a shell's background, a closed terminal or Ctrl-C is no reason to stop. The other
        # signals ask this very process to, also where whatever started it ignores them.
        terminal = (signal.SIGINT, signal.SIGHUP)
        heard = [n for n in numbers if n not in terminal or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.signal = self.signal or number

    def _step(self, one: _Running, gpus: str | None, stopping: bool) -> bool:
        """Look after a trial; whether it is out of this worker's hands."""
        code = one.process.poll() if one.process is not None else None
        self._report(one)
        if one.process is None:
            if stopping:
                return True
            with (one.claim.path / "process").open("w") as mark:
                if _locked(mark) and self.search.is_free(self.folder / one.name):
                    self._start(one, gpus, mark)
            return False
        if code is None:
            if not stopping and not one.pruned and one.trial.should_prune():
                one.pruned = True
                self._tell_to_stop(one)
            return False
        one.process = None
        return self._ended(one, code, stopping)

    def _start(self, one: _Running, gpus: str | None, mark: IO[str]) -> None:
        """Start a trial's process, which keeps `mark` locked for as long as it lives, with or without this worker."""
        values = [option(key, value) for key, value in one.options.items()]
        print(f"{one.name}: {' '.join(values)}", flush=True)
        command = [sys.executable, "-m", "beit_pretrain", *self.overrides, *values]
        command += [f"name={self.search.settings['name']}/{one.name}", "trainer.requeue=false"]
        if self.srun:
            # srun does not take over the cpus per task that the job asked for.
            cpus = os.environ.get("SLURM_CPUS_PER_TASK")
            step = ["srun", "--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])]
            command = [*step, *command]
        with (self.folder / f"{one.name}.log").open("ab") as log:
            one.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}),
                start_new_session=True,  # Ctrl-C is for the worker, which asks for a checkpoint
                pass_fds=[mark.fileno()],
            )

    def _tell_to_stop(self, one: _Running) -> None:
        """Ask for a checkpoint and an end. `srun` takes TERM for itself and hands USR1 on to the tasks."""
        if one.process is not None:
            one.process.send_signal(signal.SIGUSR1 if self.srun else signal.SIGTERM)

    def _report(self, one: _Running) -> None:
        """Tell Optuna of evaluations that are new in metrics.csv, by epochs, which compare over batch sizes."""
        table = read_series(self.folder / one.name / "metrics.csv")
        found, epochs = table.get(self.metric), table.get("epoch")
        if found is None or epochs is None:
            return
        epoch_of = dict(zip(epochs.step.tolist(), epochs.value.tolist(), strict=True))
        for step, value in zip(found.step.tolist(), found.value.tolist(), strict=True):
            if (epoch := round(epoch_of[step])) not in one.reported:
                one.reported.add(epoch)
                one.trial.report(value, epoch)

    def _ended(self, one: _Running, code: int, stopping: bool) -> bool:
        """What the end of a process means for its trial; whether the trial is out of this worker's hands."""
        if code == 0:
            self._finish(one)
        elif one.pruned:
            self._tell(one, TrialState.PRUNED, f"stopped early, after epoch {max(one.reported)}")
        elif stopping:
            print(f"{one.name} left for the next start", flush=True)
        elif code in TOLD_TO_STOP:
            self._interrupted(one, code - 128)
        elif code == 2:
            self.mistake = f"{one.name}: {self._last_line(one)}"
            self._tell(one, TrialState.FAIL, "refused")
        elif code < 0 or code > 128:
            deaths = one.trial.user_attrs.get("deaths", 0) + 1
            one.trial.set_user_attr("deaths", deaths)
            if deaths <= LIVES:
                print(f"{one.name} was killed (exit code {code}) and goes on", flush=True)
                return False
            self._fail(one, f"killed {deaths} times, the last time with exit code {code}")
        else:
            self._fail(one, f"exit code {code}")
        return True

    def _finish(self, one: _Running) -> None:
        """Give a finished trial the number of its last evaluation, or of the test that followed."""
        metric, run = self.metric, self.folder / one.name
        metrics = read_json(run / RESULTS)["metrics"]
        series = read_series(run / "metrics.csv")
        if metric not in metrics and metric not in series:
            known = ", ".join(name for name in metrics if not name.endswith("_se"))
            self.mistake = f"sweep.metric={metric} is not among the results of {one.name}: set one of {known}"
            self._tell(one, TrialState.FAIL, "without the number")
            return
        value = metrics[metric] if metric in metrics else series[metric].last
        if value is None or not math.isfinite(value):
            self._fail(one, f"{metric} is not finite")
            return
        self.failures = 0
        self._tell(one, TrialState.COMPLETE, f"{metric} {value:.4g}", value)

    def _fail(self, one: _Running, why: str) -> None:
        self._tell(one, TrialState.FAIL, f"failed: {why}; {self.folder / one.name}.log says more")
        self.failures += 1
        if self.failures >= FAILURES:
            self.mistake = (
                f"{FAILURES} trials in a row failed, the last {one.name} ({why}): look at "
                f"{self.folder / one.name}.log; the same command goes on with the next trial"
            )

    def _tell(self, one: _Running, state: TrialState, words: str, value: float | None = None) -> None:
        self.search.study.tell(one.trial, value, state, skip_if_finished=True)
        print(f"{one.name}: {words}", flush=True)

    def _interrupted(self, one: _Running, number: int) -> None:
        """A trial was told to stop and not by this worker: Slurm warns its steps, the worker itself hears nothing."""
        self.signal = number
        if not self.srun:
            return
        from beit_pretrain.cluster.requeue import requeue

        why = requeue()
        words = "the job goes back into the queue" if why is None else f"the job is not put back, {why}"
        print(f"{one.name} was stopped by Slurm; {words}", flush=True)

    def _last_line(self, one: _Running) -> str:
        """What a trial said of a user's mistake."""
        lines = (self.folder / f"{one.name}.log").read_text(errors="replace").splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return said[-1] if said else f"refused; {self.folder / one.name}.log says why"


def _locked(mark: IO[str]) -> bool:
    """Whether the lock on an open file could be had; also where the file system has no locks."""
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # the run folder's own lock has to do, which a process takes some seconds after its start
    return True


def gpu_shares(workers: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of several trials on this machine; None: as it is.

    The GPUs are dealt out; if there are fewer than workers, some share one.
    """
    import torch

    if workers == 1 or (count := torch.cuda.device_count()) == 0:
        return [None] * workers
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:count]
    names = names if len(names) == count and names[0] else [str(number) for number in range(count)]
    each = max(count // workers, 1)
    return [",".join(names[(w * each) % count :][:each]) for w in range(workers)]
