"""`beit-tools drill`: a sound run passes, every fault of an interrupted one has its row, and no process is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_slurm import FakeSlurm
from running import SMALL_PRETRAIN, SMALL_TOKENIZER, environment, hearing_ctrl_c, train

from beit_pretrain.cluster import events
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.tools import drill as drill_tool
from beit_pretrain.tools import drill_runs
from beit_pretrain.tools.app import app
from beit_pretrain.tools.drill_checks import compare
from beit_pretrain.tools.drill_runs import Job, Process

STEPS, RANKS, MICROS = 8, 2, 2


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in; processes use one thread and can import what lies beside this file."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), environment()["PYTHONPATH"]])
    )
    return tmp_path


def drill(*arguments: str) -> int:
    return app(["drill", *arguments], standalone_mode=False)


def rows(printed: str) -> dict[str, str]:
    """The table's verdicts, by check."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    return {row[0]: row[2] for row in cells if row and row[0]}


# --- real drills --------------------------------------------------------------------------------------------


def test_a_sound_run_passes_and_a_second_drill_starts_anew(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = work / "here" / "interrupted"
    earlier.mkdir(parents=True)
    (work / "here" / "drill.json").touch()
    (earlier / "events.csv").write_text("of an earlier drill\n")
    assert drill(*SMALL_TOKENIZER, "--out", "here", "--signal", "USR2", "--seed", "3") == 0
    checks = ["same run", "same order", "same weights", "same metrics", "in time"]
    assert rows(capsys.readouterr().out) == dict.fromkeys(checks, "ok")
    story = [(row["event"], row["detail"]) for row in events.read(earlier)]
    assert story == [("start", ""), ("signal", "USR2"), ("start", "")]
    # The whole run has 34 updates, fewer than were asked for.
    assert (work / "here" / "alone" / "checkpoints" / "step-00000034.ckpt").exists()
    assert len((earlier / "order-0.jsonl").read_text().splitlines()) == 34
    step = int(events.read(earlier)[1]["step"])
    assert 8 < step < 34
    assert not (work / "runs").exists()


@pytest.mark.slow
def test_two_processes_with_workers_and_micro_batches(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train([*SMALL_TOKENIZER, "name=tok"], work)
    more = [
        "tokenizer.checkpoint=runs/tok",
        "trainer.devices=2",
        "data.workers=1",
        "micro_batch_size=16",
        "name=two",
    ]
    assert drill(*SMALL_PRETRAIN, *more, "--steps", "24") == 0
    printed = capsys.readouterr().out
    assert set(rows(printed).values()) == {"ok"}
    assert "24 steps x 2 micro-batches x 2 ranks" in " ".join(printed.replace("│", " ").split())
    folder = work / "runs" / "two-drill" / "interrupted"
    assert {row["ranks"] for row in events.read(folder)} == {"2"}
    assert len(list(folder.glob("order-*.jsonl"))) == 2


@pytest.mark.slow
def test_a_run_that_draws_anew_after_a_restart_does_not_pass(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = ["+callbacks.spoilt._target_=spoiling.ForgetsItsDraws"]
    spoilt += ["+callbacks.spoilt.resume_step=${resume_step}", "name=spoilt"]
    assert drill(*SMALL_TOKENIZER, *spoilt) == 1
    verdicts = {"same run": "ok", "same order": "ok", "same weights": "NOT", "same metrics": "NOT"}
    assert rows(capsys.readouterr().out) == {**verdicts, "in time": "ok"}


def test_what_beit_train_refuses_is_said_in_its_words(work: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^batch_size=5000 is more than the \d+ training images"
    ) as refused:
        drill(*SMALL_TOKENIZER, "batch_size=5000", "name=large")
    assert "\n" not in str(refused.value)
    assert not (work / "runs" / "large-drill" / "interrupted").exists()


@pytest.mark.slow
def test_too_few_updates_are_refused(work: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^the whole run has 2 updates, too few to interrupt it: set stage.epochs"
    ):
        drill(*SMALL_TOKENIZER, "batch_size=512", "stage.epochs=1", "stage.optim.warmup_epochs=0")


def test_ctrl_c_ends_what_was_started(work: Path) -> None:
    door = "from beit_pretrain.cli import tools_main; tools_main()"
    with hearing_ctrl_c():
        process = subprocess.Popen(
            [sys.executable, "-c", door, "drill", *SMALL_TOKENIZER, "name=stopped"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.stdout is not None
    assert "left alone" in process.stdout.readline()
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "the drill was stopped, and with it what it had started\n")
    assert len(children) == 1 and not Path(f"/proc/{children[0]}").exists()


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debug=true"], "debug=true: a drill has two runs of its own: leave it out"),
        (["overwrite=true"], "overwrite=true: a drill"),
        (
            ["--signal", "HUP"],
            r"--signal=HUP, but trainer.signals=\[USR1,USR2,TERM\] is what the run listens to",
        ),
        (["trainer.signals=[]"], r"^trainer.signals=\[\] is what"),
        (["logger=tensorboard"], "a drill compares metrics.csv: set logger=csv"),
        (["--slurm", "trainer.requeue=false"], "trainer.requeue=false: the job would not come back"),
        (["--slurm", "hydra.launcher.nodes=0"], "hydra.launcher.nodes=0 must be a whole number above 0"),
        (["stage.nonsense=1"], "stage.nonsense: there is no such option"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_before_anything_is_written(
    work: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        drill(*SMALL_TOKENIZER, *arguments)
    assert list(work.iterdir()) == []


def test_a_stage_that_does_not_train_is_refused(work: Path) -> None:
    with pytest.raises(ConfigError, match="a drill interrupts a training: set stage=pretrain"):
        drill("data=digits")


def test_a_folder_of_something_else_is_left_alone(work: Path) -> None:
    precious = work / "precious" / "alone"
    precious.mkdir(parents=True)
    with pytest.raises(BeitError, match="precious is there and no drill has made it"):
        drill(*SMALL_TOKENIZER, "--out", "precious")
    assert precious.exists()


# --- runs that do not do what they should -------------------------------------------------------------------


def test_a_job_that_does_not_come_back_is_not_waited_for_for_ever(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSlurm(work / "slurm", monkeypatch)
    monkeypatch.setattr(drill_runs, "QUEUE_POLL", 0.1)
    job = Job("#!/bin/bash\n", folder=work / "run", log=work / "run.log")
    job.start()
    assert job.job == "101"
    fake.now_active("101")
    with pytest.raises(BeitError, match=r"^too late$"):
        job.until(lambda: False, minutes=0.01, late=lambda: "too late")
    # Between two lives squeue may not show it for a moment.
    fake.now_active()
    monkeypatch.setattr(drill_runs, "GONE", 1.0)
    began = time.monotonic()
    (work / "run.log").write_text("stopped by SIGUSR1 after step 7 (not put back into the queue: no)\n\n")
    with pytest.raises(
        BeitError, match=r"^job 101 \(.*run\) has ended before its time: stopped by SIGUSR1 .*: no\)"
    ):
        job.until(lambda: False)
    assert time.monotonic() - began >= 0.5


def test_a_process_that_dies_is_quoted(work: Path) -> None:
    code = "import sys; print('first', file=sys.stderr); sys.exit('it broke')"
    process = Process([sys.executable, "-c", code], folder=work / "run", log=work / "run.log")
    process.start()
    with pytest.raises(
        BeitError, match=r"has ended before its time: it broke; all it printed is in .*run.log"
    ):
        process.until(lambda: False)


# --- every fault has its row --------------------------------------------------------------------------------


def order_lines(step: int, rank: int) -> list[str]:
    return [json.dumps([step, micro, [step * 8 + micro, rank], [0, 1]]) for micro in range(MICROS)]


def make_run(run: Path, *, starts: list[int], device: str = "cpu") -> None:
    """What a rehearsal leaves: `starts` are the steps after which it began."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "rehearsal.json").write_text(json.dumps({"steps": STEPS, "device": device}))
    (run / "wandb_id").write_text("abc\n")
    for number, step in enumerate(starts):
        if number:
            events.record(run, "signal", step=step, ranks=RANKS, detail="USR1")
        events.record(run, "start", step=step, ranks=RANKS)
    for rank in range(RANKS):
        lines = [line for step in range(STEPS) for line in order_lines(step, rank)]
        (run / f"order-{rank}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    losses = "".join(f"{step + 1},{5 - step / 8}\n" for step in range(STEPS))
    (run / "metrics.csv").write_text(f"step,train/loss\n{losses}")
    write_checkpoint(run)


def write_checkpoint(run: Path, **changed: object) -> None:
    content: dict[str, object] = {
        "global_step": STEPS,
        "epoch": 1,
        "state_dict": {"w": torch.tensor([1.0, float("nan")]), "n": torch.tensor(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(0)}}, "lr": 0.1}],
        "lr_schedulers": [],
        "callbacks": {"Save": {"best_value": None}},
    }
    torch.save({**content, **changed}, run / "checkpoints" / f"step-{STEPS:08d}.ckpt")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    alone, broken = tmp_path / "alone", tmp_path / "interrupted"
    make_run(alone, starts=[0])
    make_run(broken, starts=[0, 5])
    return alone, broken


def bad_rows(
    pair: tuple[Path, Path], *, job: str | None = None, wandb_before: str | None = "abc"
) -> dict[str, str]:
    findings = compare(*pair, signal="USR1", job=job, wandb_before=wandb_before)
    return {check: found for check, found, good in findings if not good}


def test_equal_runs_have_no_bad_row(pair: tuple[Path, Path]) -> None:
    assert bad_rows(pair) == {}
    # A step that was done twice, and held the same.
    with (pair[1] / "order-1.jsonl").open("a") as file:
        file.write(order_lines(5, rank=1)[0] + "\n")
    assert bad_rows(pair) == {}


def test_another_story_is_seen(pair: tuple[Path, Path]) -> None:
    broken = pair[1]
    assert bad_rows(pair, wandb_before="abd") == {
        "same run": "start 0, signal USR1 5, start 5; W&B run abd, then abc"
    }
    assert "same run" in bad_rows(pair, job="12"), "it was no job"
    events.record(broken, "start", step=5, ranks=RANKS)
    assert bad_rows(pair)["same run"].startswith("start 0, signal USR1 5, start 5, start 5;")
    (broken / "events.csv").unlink()
    events.record(broken, "start", step=0, ranks=RANKS)
    events.record(broken, "signal", step=5, ranks=RANKS, detail="USR1")
    events.record(broken, "start", step=0, ranks=RANKS)
    assert "same run" in bad_rows(pair), "from the beginning"


def test_a_job_must_be_the_same_one(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = pair[1]
    (broken / "events.csv").unlink()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    events.record(broken, "start", step=0, ranks=RANKS)
    for event in ("signal", "requeue"):
        events.record(broken, event, step=5, ranks=RANKS, detail="USR1")
    events.record(broken, "start", step=5, ranks=RANKS)
    assert bad_rows(pair, job="12") == {}
    assert "job 12" in bad_rows(pair, job="13")["same run"]


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (
            "[5, 1, [41, 1], [0, 1]]",
            "[5, 1, [41, 0], [0, 1]]",
            "other samples or views in step 5, micro-batch 1",
        ),
        (
            "[5, 1, [41, 1], [0, 1]]",
            "[5, 1, [41, 1], [0, 2]]",
            "other samples or views in step 5, micro-batch 1",
        ),
        ("[7, 0, [56, 1], [0, 1]]\n", "", "interrupted: step 7, micro-batch 0, rank 1 is missing"),
        ("[7, 1, [57, 1], [0, 1]]\n", "", "interrupted: step 7, micro-batch 1, rank 1 is missing"),
        (
            "[7, 1,",
            "[7, 1, [57, 1], [0, 1]]\n[8, 1,",
            "interrupted: step 8, micro-batch 1, rank 1 is one too many",
        ),
        (
            "[6, 0,",
            "[5, 1, [40, 1], [0, 1]]\n[6, 0,",
            "interrupted: step 5, micro-batch 1, rank 1 held others the second time",
        ),
    ],
)
def test_another_order_is_seen(pair: tuple[Path, Path], before: str, after: str, found: str) -> None:
    path = pair[1] / "order-1.jsonl"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    wrong = bad_rows(pair)
    assert list(wrong) == ["same order"] and wrong["same order"].startswith(found)


def test_a_rank_without_a_record_is_seen_even_on_both_sides(pair: tuple[Path, Path]) -> None:
    for run in pair:
        (run / "order-1.jsonl").unlink()
    assert bad_rows(pair) == {"same order": "alone: step 0, micro-batch 0, rank 1 is missing"}


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"state_dict": {"w": torch.tensor([1.0, float("nan")]), "n": torch.tensor(4)}}, "state_dict.n"),
        (
            {"state_dict": {"w": torch.tensor([1.0 + 1e-7, float("nan")]), "n": torch.tensor(3)}},
            "state_dict.w",
        ),
        ({"state_dict": {"w": torch.tensor([1.0, float("nan")])}}, "state_dict.n"),
        ({"optimizer_states": [{"state": {}, "lr": 0.1}]}, "optimizer_states.0.state.0"),
        ({"lr_schedulers": [{}]}, "lr_schedulers"),
        ({"callbacks": {"Save": {"best_value": 0.5}}}, "callbacks.Save.best_value"),
        ({"global_step": STEPS - 1}, "global_step"),
    ],
)
def test_another_checkpoint_is_seen(pair: tuple[Path, Path], changed: dict[str, object], place: str) -> None:
    write_checkpoint(pair[1], **changed)
    assert bad_rows(pair) == {"same weights": f"1 entries differ, first {place}"}


def test_other_metrics_are_seen(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole.replace("7,4.25\n", "7,4.250000000000001\n"))
    found = "step 7: train/loss 4.25 alone, 4.250000000000001 interrupted"
    assert bad_rows(pair) == {"same metrics": found}
    path.write_text(whole.rpartition("8,")[0])
    assert bad_rows(pair) == {"same metrics": "metrics.csv has other rows or columns"}


def test_on_a_gpu_losses_may_be_a_little_apart(tmp_path: Path) -> None:
    pair = tmp_path / "alone", tmp_path / "interrupted"
    for run, starts in zip(pair, ([0], [0, 5]), strict=True):
        make_run(run, starts=starts, device="cuda")
    write_checkpoint(pair[1], state_dict={})
    path = pair[1] / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole.replace("8,4.125\n", "8,4.12509\n"))
    assert bad_rows(pair) == {}
    for wrong in ("4.12511", "nan"):
        path.write_text(whole.replace("8,4.125\n", f"8,{wrong}\n"))
        assert bad_rows(pair)["same losses"].startswith("step 8: 4.125000 alone, ")
    path.write_text(whole.replace("8,4.125\n", ""))
    assert bad_rows(pair) == {"same losses": "metrics.csv has no train/loss of step 8"}


def test_an_end_that_is_nearly_too_late_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = drill_tool.Settings(steps=40, signal="USR1", grace=10.0, seed=0, timeout=30.0)
    for ended, good, warned in ((4.9, True, False), (5.1, True, True), (10.1, False, True)):
        times = drill_tool.Times(step=17, saved=1.5, ended=ended, wandb_id=None)
        finding = drill_tool._in_time(times, settings)
        assert (
            finding.good == good
            and f"checkpoint after 1.5 s, end after {ended} s of the 10 s" in finding.found
        )
        drill_tool._show([finding], times, settings, tmp_path)
        assert (
            "warning: the end took more than half of trainer.signal_grace=10" in capsys.readouterr().out
        ) == warned
