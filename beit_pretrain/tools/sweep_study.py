"""What the workers of a search share: Optuna's study in a journal, and a claim on each trial that runs.

A trial belongs to the worker that holds its claim (the same kind of lock as a run folder's), so one whose worker is
gone can be taken up by another, which goes on at its checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.folder import RunFolder
from beit_pretrain.run_files import LOCK
from beit_pretrain.wording import show

GRACE = 30  # seconds after which the journal's lock of a worker that was killed is taken over


class Claimed(NamedTuple):
    """A trial in one worker's hands, its options, and the epochs whose evaluation Optuna knows already."""

    trial: optuna.Trial
    claim: RunFolder
    options: dict[str, Any]
    reported: set[int]


class Search:
    """A search that lies in a folder; any number of workers open it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder = folder
        self.settings = settings
        self._watched: dict[Path, RunFolder] = {}  # each remembers what it has seen of another machine's lock
        journal = folder / "study.journal"
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if (how := settings["pruner"]) is not None:
            pruner = optuna.pruners.PercentilePruner(
                100 * how["keep"],
                n_startup_trials=how["startup"],
                n_warmup_steps=round(how["warmup"] * settings["epochs"]),
            )
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal), lock_obj=_Lock(journal))),
            study_name=settings["name"],
            direction="maximize" if settings["direction"] == "max" else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> bool:
        return sum(trial.state.is_finished() for trial in self.trials()) >= self.settings["trials"]

    def anything_left(self) -> bool:
        """Whether there is a trial that no worker has: one that was left, or a new one."""
        trials = self.trials()
        return len(trials) < self.settings["trials"] or any(
            trial.state == TrialState.RUNNING and self.is_free(self._claim(trial.number).path)
            for trial in trials
        )

    def next(self) -> Claimed | None:
        """A trial that its worker left, or a new one; one worker at a time draws."""
        with self._if_free(self.folder / ".claims" / "draw") as drawing:
            if not drawing:
                return None
            trials = self.trials()
            for trial in trials:
                if trial.state == TrialState.RUNNING and (left := self._take(trial.number)) is not None:
                    return left
            return self._take(self.study.ask().number) if len(trials) < self.settings["trials"] else None

    def _claim(self, number: int) -> RunFolder:
        return self._watch(self.folder / ".claims" / trial_name(number))

    def _watch(self, path: Path) -> RunFolder:
        return self._watched.setdefault(path, RunFolder(path))

    def is_free(self, path: Path) -> bool:
        """Whether nobody holds a folder that is locked as run folders are; it need not exist."""
        if not (path / LOCK).exists():
            return True
        with self._if_free(path) as free:
            return free

    @contextmanager
    def _if_free(self, path: Path) -> Iterator[bool]:
        """Whether the folder could be had, which is then held for the block."""
        folder = self._watch(path)
        if not _enter(folder):
            yield False
            return
        try:
            yield True
        finally:
            folder.__exit__()

    def _take(self, number: int) -> Claimed | None:
        """Claim a trial, unless another worker has it or has just finished it."""
        claim = self._claim(number)
        if not _enter(claim):
            return None
        now = self.trials()[number]
        if now.state != TrialState.RUNNING:
            claim.__exit__()
            return None
        # With the trial's number in the seed, workers draw differently, and one that was ended draws the same again.
        self.study.sampler = self._sampler(number)
        trial = optuna.Trial(self.study, now._trial_id)
        space = self.settings["parameters"]
        for key, value in now.params.items():
            if key in space and not within(value, space[key]):
                claim.__exit__()
                raise ConfigError(
                    f"{self.folder / 'study.journal'} has {key}={value} for {trial_name(number)}, which "
                    f"sweep.parameters.{key} does not allow: give this search another name="
                )
        drawn = {key: _suggest(trial, key, how) for key, how in space.items()}  # what was drawn before stays
        if "run" not in now.user_attrs:  # for Optuna's dashboard
            trial.set_user_attr("run", str(self.folder / trial_name(number)))
        return Claimed(trial, claim, drawn, set(now.intermediate_values))

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        how = self.settings["sampler"]
        if how["name"] == "random":
            return optuna.samplers.RandomSampler(seed=how["seed"] + number)
        return optuna.samplers.TPESampler(n_startup_trials=how["startup"], seed=how["seed"] + number)


def trial_name(number: int) -> str:
    return f"trial-{number:04d}"


def option(key: str, value: Any) -> str:
    """A drawn value as an override; six digits of a float say enough, and the run gets no more."""
    return f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"


def _enter(folder: RunFolder) -> bool:
    try:
        folder.enter(wait=False)
    except ConfigError:  # it cannot be written
        raise
    except BeitError:
        return False
    return True


def within(value: Any, how: dict[str, Any]) -> bool:
    """Whether a value is one that the search may draw: those of a journal become options of a command."""
    if "choices" in how:
        return value in [show(choice) for choice in how["choices"]]
    return isinstance(value, int | float) and how["low"] <= value <= how["high"]


def _suggest(trial: optuna.Trial, key: str, how: dict[str, Any]) -> Any:
    if "choices" in how:
        return trial.suggest_categorical(key, [show(choice) for choice in how["choices"]])
    low, high, step, log = how["low"], how["high"], how.get("step"), how.get("log", False)
    if isinstance(low, int) and isinstance(high, int) and isinstance(step or 1, int):
        return trial.suggest_int(key, low, high, step=step or 1, log=log)
    return trial.suggest_float(key, low, high, step=step, log=log)


class _Lock(JournalFileOpenLock):
    """The journal's lock, by creating a file, which also holds on NFS.

    On taking it, cuts off the unfinished line of a writer that was killed: Optuna could not read beyond it.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal), grace_period=GRACE)
        self._journal = journal

    def acquire(self) -> bool:
        super().acquire()
        if self._journal.stat().st_size:
            with self._journal.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return True
