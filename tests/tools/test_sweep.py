"""`beit-tools sweep`: bad trials are stopped, none is lost or done twice, and the best one's command is right.

Trials are a script that leaves what `beit-train` leaves; one search, marked slow, is real.
"""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from running import SMALL_TOKENIZER

from beit_pretrain.cli import tools_main
from beit_pretrain.compose import compose
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.tools import sweep_study, trials
from beit_pretrain.tools.app import app
from beit_pretrain.tools.sweep_study import Search
from beit_pretrain.tools.sweep_table import show_sweep

STUB = Path(__file__).with_name("stub_train.py")
EPOCHS = 6
SPACE = "+sweep.parameters.stage.optim.lr={low:1e-5,high:1e-1,log:true}"
BASE = ["sweep=default", "stage=tokenizer", "experiment=digits_tokenizer", "data=digits"]
BASE += [f"stage.epochs={EPOCHS}", "name=s"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which `beit-train` is the stub, for this process and those it starts."""
    stub = executable(tmp_path / "bin" / "stub", f'shift 2\nexec {sys.executable} {STUB} "$@"')
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "POLL", 0.02)
        patch.setattr(sweep_study, "GRACE", 3)
        patch.setattr(sys, "executable", str(stub))
        patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        yield tmp_path


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def sweep(*more: str, space: str = SPACE) -> None:
    app(["sweep", *BASE, f"runs={Path.cwd()}/runs", space, *more], standalone_mode=False)


class Worker:
    """`beit-tools sweep` in a process of its own, a fork of this one, which has imported everything."""

    def __init__(self, work: Path, *more: str, **environment: str) -> None:
        self.output = work / f"worker-{time.monotonic_ns()}"
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                sys.stdout = sys.stderr = self.output.open("w", buffering=1)
                os.environ.update(environment)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as some job runners do
                signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
                sys.argv = ["beit-tools", "sweep", *BASE, f"runs={work}/runs", SPACE, *more]
                tools_main()
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> str:
        """What it printed, when it has ended."""
        deadline = time.monotonic() + 60
        while not self.ended():
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.01)
        return self.output.read_text()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


def study(work: Path) -> list[Any]:
    settings = {"name": "s", "pruner": None, "direction": "min"}
    return Search(work / "runs" / "s", settings).trials()


def starts(work: Path) -> dict[str, list[int]]:
    """The epoch at which each start of each trial began."""
    files = sorted((work / "runs" / "s").glob("trial-*/starts"))
    return {f.parent.name: [int(line.split()[0]) for line in f.read_text().splitlines()] for f in files}


def states(work: Path) -> list[str]:
    return [trial.state.name for trial in study(work)]


# --- a search -----------------------------------------------------------------------------------------------


def test_a_search_finds_the_best_of_its_trials_and_prints_a_command_for_it(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(
        "sweep.trials=5",
        "sweep.pruner=null",
        "+sweep.parameters.stage.optim.betas={choices:[[0.9,0.9],[0.8,0.9]]}",
    )
    printed = capsys.readouterr().out
    assert states(work) == ["COMPLETE"] * 5 and starts(work) == {f"trial-000{i}": [0] for i in range(5)}
    values = {
        t.number: abs(math.log10(float(f"{t.params['stage.optim.lr']:.6g}")) + 3) + 1 / EPOCHS
        for t in study(work)
    }
    assert {t.number: t.value for t in study(work)} == pytest.approx(values)
    folders = [Path(trial.user_attrs["run"]) for trial in study(work)]
    assert folders == [work / "runs" / "s" / f"trial-000{i}" for i in range(5)]
    best = study(work)[min(values, key=lambda number: values[number])]
    command = shlex.split(printed.splitlines()[-1].removeprefix("best: "))
    cfg = compose(command[1:])
    assert command[0] == "beit-train" and cfg.name == f"s/trial-000{best.number}"
    assert cfg.stage.optim.lr == pytest.approx(best.params["stage.optim.lr"], rel=1e-5)
    assert f"[{','.join(map(str, cfg.stage.optim.betas))}]" == best.params["stage.optim.betas"]
    # A finished search only prints its table again.
    sweep(
        "sweep.trials=5",
        "sweep.pruner=null",
        "+sweep.parameters.stage.optim.betas={choices:[[0.9,0.9],[0.8,0.9]]}",
    )
    again = capsys.readouterr().out
    assert printed.endswith(again) and "5 of 5 trials" in again


def test_trials_that_fall_behind_are_stopped_at_a_checkpoint(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_SECONDS", "0.1")
    more = ["sweep.pruner.startup=1", "sweep.pruner.warmup=0", "sweep.pruner.keep=0.01"]
    more += ["sweep.sampler.name=random", "sweep.trials=6"]
    sweep(*more)
    done = study(work)
    at_first = [trial.intermediate_values[1] for trial in done]
    for number, trial in enumerate(done[1:], 1):
        best = min(v for earlier, v in enumerate(at_first[:number]))
        assert (trial.state.name == "PRUNED") == (at_first[number] > best)
        reached = int((work / "runs" / "s" / f"trial-000{number}" / "checkpoint").read_text())
        assert reached == EPOCHS if trial.state.name == "COMPLETE" else reached < EPOCHS
    assert {"PRUNED", "COMPLETE"} == set(states(work))


def test_the_same_search_is_drawn_again(work: Path) -> None:
    drawn = []
    for name in ("a", "b"):
        sweep("sweep.trials=4", "sweep.sampler.startup=2", "sweep.pruner=null", f"name={name}")
        settings = {"name": name, "pruner": None, "direction": "min"}
        drawn.append([t.params for t in Search(work / "runs" / name, settings).trials()])
    assert drawn[0] == drawn[1] and len({str(p) for p in drawn[0]}) == 4


# --- workers that end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_workers_killed_at_any_moment_lose_no_trial(work: Path, kills: int) -> None:
    rng = random.Random(kills)
    trials_of_all = 2 * kills + 1
    more = [f"sweep.trials={trials_of_all}", "sweep.pruner=null", "--workers", "2"]
    for _ in range(kills):
        one = Worker(work, *more, STUB_SECONDS="0.1")
        begun = len(starts(work))
        while len(starts(work)) <= begun and not one.ended():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        one.send(signal.SIGKILL)
        one.wait()
        assert one.code == -signal.SIGKILL, one.output.read_text()
        for pid in stubs(work)[: rng.randrange(3)]:  # some trials die with their worker, some live on
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    one = Worker(work, *more)
    printed = one.wait()
    assert one.code == 0, printed
    assert (
        states(work) == ["COMPLETE"] * trials_of_all and f"{trials_of_all} of {trials_of_all} " in printed
    ), printed
    assert any(len(began) > 1 and began[-1] > 0 for began in starts(work).values())
    for trial in study(work):
        assert sorted(trial.intermediate_values) == list(range(1, EPOCHS + 1))


def test_a_process_that_outlives_its_worker_is_waited_for(work: Path) -> None:
    first = Worker(work, "sweep.trials=1", STUB_AWAITS=str(work / "go"))
    while not (work / "runs/s/trial-0000").is_dir():  # the process of the trial is there, not only its log
        time.sleep(0.01)
    first.send(signal.SIGKILL)
    first.wait()
    second = Worker(work, "sweep.trials=1")
    while holder(work / "runs/s/.claims/trial-0000/.lock") != second.pid:
        time.sleep(0.01)
    time.sleep(0.5)
    (work / "go").touch()
    printed = second.wait()
    assert second.code == 0, printed
    assert states(work) == ["COMPLETE"] and starts(work) == {"trial-0000": [0, EPOCHS]}


def stubs(work: Path) -> list[int]:
    """The processes of trials that live."""
    pids = map(holder, (work / "runs" / "s").glob("trial-*/.lock"))
    return [pid for pid in pids if pid is not None and Path(f"/proc/{pid}").exists()]


def holder(lock: Path) -> int | None:
    """The process that a lock names; none while it changes hands."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(lock.read_text())["pid"]


def test_two_workers_at_once_do_no_trial_twice(work: Path) -> None:
    more = ["sweep.trials=10", "sweep.pruner=null"]
    both = [Worker(work, *more) for _ in range(2)]
    printed = [one.wait() for one in both]
    assert [one.code for one in both] == [0, 0], printed
    assert states(work) == ["COMPLETE"] * 10 and starts(work) == {f"trial-{i:04d}": [0] for i in range(10)}
    own = [
        sum(line.startswith("trial-") and "val/loss" in line for line in text.splitlines())
        for text in printed
    ]
    assert sum(own) == 10 and min(own) > 0
    assert len({str(trial.params) for trial in study(work)}) == 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_worker_told_to_stop_hands_it_on_and_the_next_goes_on(work: Path, number: int, code: int) -> None:
    one = Worker(work, "sweep.trials=1", STUB_SECONDS="1")
    while not list(work.glob("runs/s/trial-0000/checkpoint")):
        time.sleep(0.01)
    one.send(signal.SIGHUP)  # no reason to stop under nohup
    time.sleep(0.2)
    assert not one.ended()
    one.send(number)
    printed = one.wait()
    assert one.code == code and "the same command goes on" in printed
    assert states(work) == ["RUNNING"] and not stubs(work)
    sweep("sweep.trials=1")
    assert states(work) == ["COMPLETE"]
    (began,) = starts(work).values()
    assert began[0] == 0 and 0 < began[1] < EPOCHS


def test_a_killed_trial_goes_on_and_one_that_always_dies_fails(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_KILL", "1")
    sweep("sweep.trials=2")
    assert states(work) == ["COMPLETE"] * 2 and list(starts(work).values()) == [[0, 1]] * 2
    executable(work / "bin" / "stub", "kill -9 $$")
    sweep("sweep.trials=3")
    assert states(work) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert study(work)[2].user_attrs["deaths"] == trials.LIVES + 1


def test_a_journal_with_half_a_line_is_mended(work: Path) -> None:
    sweep("sweep.trials=1")
    journal = work / "runs" / "s" / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_id":"x')
    sweep("sweep.trials=2")
    assert states(work) == ["COMPLETE"] * 2 and journal.read_bytes().startswith(whole)
    for line in journal.read_text().splitlines():
        json.loads(line)


# --- mistakes -----------------------------------------------------------------------------------------------


def test_the_table_gives_no_command_with_options_of_a_strangers_journal(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"sampler": {"name": "random", "seed": 0}, "pruner": None, "direction": "min", "name": "s"}
    settings |= {
        "trials": 1,
        "epochs": 1,
        "metric": "val/loss",
        "parameters": {"a": {"low": 0.0, "high": 1.0}},
    }
    (work / "s").mkdir()
    search = Search(work / "s", settings)
    kinds: dict[str, Any] = {
        "a": optuna.distributions.FloatDistribution(0.0, 1.0),
        "hydra.searchpath": optuna.distributions.CategoricalDistribution(("[file:///x]",)),
    }
    values = {"a": 0.5, "hydra.searchpath": "[file:///x]"}
    state = optuna.trial.TrialState.COMPLETE
    search.study.add_trial(
        optuna.trial.create_trial(state=state, params=values, distributions=kinds, value=1.0)
    )
    show_sweep(search, ["stage=classify"])
    printed = capsys.readouterr().out
    assert "no command is given" in printed and "searchpath" not in printed


def test_a_journal_sets_no_options_but_those_of_the_search(work: Path) -> None:
    """A trial that was left is taken up with what the journal holds, which becomes options of a command."""
    settings = {"sampler": {"name": "random", "seed": 0}, "pruner": None, "direction": "min", "name": "s"}
    settings |= {
        "trials": 1,
        "epochs": 1,
        "parameters": {"a": {"low": 0.0, "high": 1.0}, "b": {"choices": [1, 2]}},
    }
    range_, other = (
        optuna.distributions.FloatDistribution(0.0, 1.0),
        optuna.distributions.FloatDistribution(0, 1e9),
    )
    choice = optuna.distributions.CategoricalDistribution
    for number, (params, says) in enumerate(
        [
            ({"a": (0.5, range_), "b": ("2", choice(("1", "2"))), "+callbacks.x": (1.0, other)}, ""),
            ({"a": (1e8, other)}, "a=100000000.0 for trial-0000, which sweep.parameters.a does not allow"),
            ({"a": ("{_target_:x.Y}", choice(("{_target_:x.Y}",)))}, "parameters.a does not allow"),
        ]
    ):
        (work / str(number)).mkdir()
        search = Search(work / str(number), settings)
        values = {key: value for key, (value, _) in params.items()}
        kinds: dict[str, Any] = {key: kind for key, (_, kind) in params.items()}
        state = optuna.trial.TrialState.RUNNING
        search.study.add_trial(optuna.trial.create_trial(state=state, params=values, distributions=kinds))
        if says:
            with pytest.raises(ConfigError, match=says):
                search.next()
        else:
            claimed = search.next()
            assert claimed is not None and claimed.options == {"a": 0.5, "b": "2"}


def test_a_mistake_that_a_trial_reports_stops_the_search(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_EXIT", "2")
    with pytest.raises(BeitError, match=r"^trial-0000: data.root=/nowhere: there is no such folder$"):
        sweep()
    assert states(work) == ["FAIL"]


def test_three_failures_in_a_row_end_the_search(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_EXIT", "1")
    with pytest.raises(
        BeitError, match=r"3 trials in a row failed, the last trial-0002 \(exit code 1\): look at"
    ):
        sweep()
    assert states(work) == ["FAIL"] * 3


def test_a_number_that_is_not_there_is_named(work: Path) -> None:
    with pytest.raises(
        BeitError, match=r"sweep.metric=val/miou is not among the results .*: set one of val/loss"
    ):
        sweep("sweep.metric=val/miou", "sweep.direction=max")


def test_another_search_in_the_same_folder_is_refused(work: Path) -> None:
    sweep("sweep.trials=1")
    for changed, key in (
        ("sweep.sampler.seed=1", "sweep.sampler.seed: 0 -> 1"),
        ("+sweep.parameters.seed={choices:[1,2]}", "sweep.parameters.seed: None -> "),
        ("stage.epochs=7", "stage.epochs: 6 -> 7"),
        ("batch_size=7", "batch_size: "),
    ):
        with pytest.raises(ConfigError, match=f"holds another search .*{key}.*give this one another name="):
            sweep("sweep.trials=1", changed)
    with pytest.raises(
        ConfigError, match=r"stage.optim.lr: \{low:1e-05,high:0.1,log:true\} -> \{low:1e-05,high:0.2"
    ):
        sweep("sweep.trials=1", space=SPACE.replace("1e-1", "2e-1"))
    sweep("sweep.trials=2", "data.workers=1")  # neither changes what a trial finds
    assert states(work) == ["COMPLETE"] * 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            [SPACE.replace("optim.lr", "optim.rl")],
            r"stage.optim.rl: there is no such option; did you mean stage.optim",
        ),
        (
            [SPACE.replace("1e-5", "0")],
            r"sweep.parameters.stage.optim.lr=\{.*\}: a logarithmic range begins above 0",
        ),
        ([SPACE.replace("1e-5", "1")], r"low below high"),
        ([SPACE.replace("log", "lag")], r"lag is not known \(low, high, log, step, choices\)"),
        (
            [SPACE, "stage.optim.lr=1"],
            r"stage.optim.lr is both given and searched: .*'~sweep.parameters.stage.optim.lr'",
        ),
        ([SPACE, "sweep.direction=max"], r"sweep.direction=max: val/loss is best at its minimum"),
        ([SPACE, "sweep.metric=val/kl"], r"sweep.metric=val/kl needs sweep.direction=min or max"),
        ([SPACE, "sweep.sampler.name=grid"], r"sweep.sampler.name=grid: set tpe or random"),
        ([SPACE, "sweep.pruner.keep=1"], r"sweep.pruner.keep=1: set a share between 0 and 1"),
        ([SPACE, "sweep.pruner.warmup=5"], r"sweep.pruner.warmup=5: set a share between 0 and 1"),
        ([SPACE, "overwrite=true"], r"overwrite=true: a trial goes on in its folder"),
        ([SPACE, "--show"], r"runs/s holds no search yet"),
        ([], r"sweep.parameters is empty"),
    ],
)
def test_mistakes_are_told_before_anything_starts(work: Path, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        app(["sweep", *BASE, f"runs={work}/runs", *more], standalone_mode=False)
    assert "\n" not in str(caught.value) and not (work / "runs").exists()


def test_a_search_without_settings_names_the_group() -> None:
    with pytest.raises(ConfigError, match="a search needs its settings: set sweep=finetune"):
        app(["sweep", "stage=knn"], standalone_mode=False)


def test_without_optuna_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from beit_pretrain.tools import sweep as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'beit-pretrain\[sweep\]'"):
        sweep()


# --- Slurm, weights & biases --------------------------------------------------------------------------------


def test_wandb_shows_the_trials_as_a_group(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("sweep.trials=1", "logger=wandb")
    assert "logger.wandb.group=s " in capsys.readouterr().out.splitlines()[-1]


def test_gpus_are_dealt_out_to_the_workers(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert trials.gpu_shares(1) == [None]
    assert trials.gpu_shares(2) == ["0,1", "2,3"]
    assert trials.gpu_shares(3) == ["0", "1", "2"]
    assert trials.gpu_shares(6) == ["0", "1", "2", "3", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert trials.gpu_shares(2) == ["4,5", "6,7"]
    monkeypatch.setenv("STUB_SECONDS", "0.1")
    sweep("sweep.trials=2", "--workers", "2")
    seen = [file.read_text().split() for file in work.glob("runs/s/trial-*/starts")]
    assert sorted(seen) == [["0", "4,5"], ["0", "6,7"]]


def test_in_a_job_a_trial_is_a_step_and_an_interrupted_one_brings_the_job_back(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executable(work / "bin" / "srun", f'echo "$@" >> {work}/srun\nshift\nexec "$@"')
    executable(work / "bin" / "scontrol", f'echo "$@" >> {work}/scontrol\necho JobState=RUNNING')
    for key, value in {"SLURM_JOB_ID": "12", "SLURM_JOBID": "12", "STUB_SLURM": "12"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as ended:
        sweep("sweep.trials=1", "--in-job")
    assert ended.value.code == 140 and states(work) == ["RUNNING"]
    assert (work / "scontrol").read_text().splitlines()[-1] == "requeue 12"
    assert "trial-0000 was stopped by Slurm; the job goes back into the queue" in capsys.readouterr().out
    sweep("sweep.trials=1", "--in-job")
    assert states(work) == ["COMPLETE"] and starts(work) == {"trial-0000": [0, 1]}
    step = (work / "srun").read_text().splitlines()[0].split()
    assert step[0] == "--kill-on-bad-exit=1" and {"trainer=slurm", "trainer.requeue=false"} < set(step)


def test_with_slurm_the_workers_are_an_array_of_jobs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executable(work / "bin" / "sbatch", f"cat - $(ls $@ 2>/dev/null) > {work}/script\necho 77")
    sweep("--slurm", "--workers", "3", "hydra.launcher.timeout_min=90")
    script = (work / "script").read_text()
    assert "job 77: 3 workers" in capsys.readouterr().out
    assert "#SBATCH --array=0-2" in script and f"{work}/runs/s/worker-%A_%a.log" in script
    (line,) = (line for line in script.splitlines() if "tools_main" in line)
    words = shlex.split(line)
    assert words[words.index("sweep") + 1 :] == [*BASE, f"runs={work}/runs", SPACE, "--in-job"]
    assert "srun" not in words


# --- a real one ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    base = [
        *SMALL_TOKENIZER,
        "data.workers=0",
        "sweep=default",
        "sweep.trials=3",
        "sweep.pruner.startup=1",
        "name=s",
    ]
    app(["sweep", *base, SPACE], standalone_mode=False)
    done = study(tmp_path)
    assert done[0].state.name == "COMPLETE" and {t.state.name for t in done} <= {"COMPLETE", "PRUNED"}
    for trial in done:
        run = tmp_path / "runs" / "s" / f"trial-{trial.number:04d}"
        assert (run / "checkpoints" / "last.ckpt").exists()
        if trial.state.name == "COMPLETE":
            assert trial.value == json.loads((run / "results.json").read_text())["metrics"]["val/loss"]
            assert trial.intermediate_values[2] == trial.value
    assert "best: beit-train stage=tokenizer" in capsys.readouterr().out
