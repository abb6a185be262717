"""Runs that Slurm interrupts end with the bits of one that it left alone."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import HERE, SMALL_PRETRAIN, SMALL_TOKENIZER, assert_same_run, record, train

from beit_pretrain.cluster import events

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

OFTEN = ["checkpoint.every_steps=4", "stage.log_every=5", "trainer=slurm"]


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train([*SMALL_TOKENIZER, "name=tok"], folder)
    return folder / "runs" / "tok"


def _script(run: Path, arguments: list[str]) -> str:
    command = [sys.executable, "-m", "beit_pretrain", *arguments, *record(run), f"name={run.name}"]
    return f"export PYTHONPATH={HERE}\nsrun --kill-on-bad-exit=1 {shlex.join(command)}"


def _until(run: Path, step: int, seconds: float = 120) -> None:
    """Wait until a checkpoint of `step` or a later one is there."""
    deadline = time.monotonic() + seconds
    while not any(int(p.stem[5:]) >= step for p in (run / "checkpoints").glob("step-*.ckpt")):
        assert time.monotonic() < deadline, f"no checkpoint after step {step} in {run}"
        time.sleep(0.05)


def _story(run: Path) -> list[str]:
    return [row["event"] for row in events.read(run)]


def _runs(folder: Path) -> tuple[Path, Path]:
    return folder / "runs" / "whole", folder / "runs" / "broken"


def test_two_nodes_of_two_tasks_go_on_after_a_signal_at_any_rank(
    slurm, tokenizer_run: Path, tmp_path: Path
) -> None:
    whole, broken = _runs(tmp_path)
    base = [*SMALL_PRETRAIN, *OFTEN, f"tokenizer.checkpoint={tokenizer_run}", "masking.exact=false"]
    base += ["data.workers=1", "micro_batch_size=8", "stage.epochs=3"]
    options = ["--nodes=2", "--ntasks-per-node=2", "--requeue"]
    slurm.finished(slurm.submit(_script(whole, base), *options, cwd=tmp_path))
    job = slurm.submit(_script(broken, base), *options, cwd=tmp_path)
    _until(broken, 8)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.finished(job)
    assert slurm.job(job)["Restarts"] == "1"
    assert _story(broken) == ["start", "signal", "requeue", "start", "finish"]
    assert {row["ranks"] for row in events.read(broken)} == {"4"}
    assert_same_run(whole, broken)


def test_a_run_outlives_its_time_limit(slurm, tmp_path: Path) -> None:
    whole, broken = _runs(tmp_path)
    base = [*SMALL_TOKENIZER, *OFTEN, "stage.epochs=6"]
    slurm.finished(slurm.submit(_script(whole, base), cwd=tmp_path))
    # Slow enough for one life to end before the run does; a minute is the shortest limit, and Slurm looks twice in it.
    base += ["+callbacks.slow._target_=running.Slow"]
    job = slurm.submit(_script(broken, base), "--time=1", "--signal=USR2@10", "--requeue", cwd=tmp_path)
    slurm.finished(job, seconds=420)
    assert int(slurm.job(job)["Restarts"]) >= 1
    assert _story(broken)[:4] == ["start", "signal", "requeue", "start"]
    assert_same_run(whole, broken)


def test_one_member_of_an_array_goes_back_and_the_others_do_not(slurm, tmp_path: Path) -> None:
    whole = tmp_path / "runs" / "whole"
    base = [*SMALL_TOKENIZER, *OFTEN, "stage.epochs=6"]
    slurm.finished(slurm.submit(_script(whole, base), cwd=tmp_path))
    command = _script(tmp_path / "runs" / "member-M", base).replace("member-M", "member-$SLURM_ARRAY_TASK_ID")
    array = slurm.submit(command.replace("'", '"'), "--array=0-1", "--requeue", cwd=tmp_path)
    members = [tmp_path / "runs" / f"member-{n}" for n in (0, 1)]
    _until(members[1], 8)
    slurm.run("scancel", "--signal=TERM", f"{array}_1")
    slurm.finished(f"{array}_0", f"{array}_1")
    assert [slurm.job(f"{array}_{n}")["Restarts"] for n in (0, 1)] == ["0", "1"]
    assert [row["job"] for row in events.read(members[1])] == [f"{array}_1"] * 5
    for member in members:
        assert_same_run(whole, member)


def test_a_node_that_is_lost_costs_what_came_after_the_last_checkpoint(slurm, tmp_path: Path) -> None:
    whole, broken = _runs(tmp_path)
    base = [*SMALL_TOKENIZER, *OFTEN, "stage.epochs=6"]
    options = ["--nodes=2", "--ntasks-per-node=1", "--requeue"]
    slurm.finished(slurm.submit(_script(whole, base), *options, cwd=tmp_path))
    job = slurm.submit(_script(broken, base), *options, cwd=tmp_path)
    _until(broken, 8)
    # What holds the step on a node dies without a word, and the node with it.
    slurm.run("pkill", "-KILL", "-f", rf"slurmstepd: \[{job}\.0\]")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.wait(job, "PENDING", "CONFIGURING", seconds=60)
    # A node whose daemon still lives may have come back by itself.
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], capture_output=True)
    slurm.finished(job)
    # No signal came; a rank that outlived its node may have noticed.
    assert [event for event in _story(broken) if event != "stop"] == ["start", "start", "finish"]
    assert_same_run(whole, broken)


def test_a_cancelled_job_saves_and_stays_away(slurm, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "cancelled"
    base = [*SMALL_TOKENIZER, *OFTEN, "stage.epochs=40"]
    job = slurm.submit(_script(run, base), "--requeue", cwd=tmp_path)
    _until(run, 8)
    slurm.run("scancel", job)
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    assert _story(run) == ["start", "signal"]
    last = events.read(run)[-1]
    assert (run / "checkpoints" / f"step-{int(last['step']):08d}.ckpt").exists()


def test_a_preempted_job_comes_back(slurm, tmp_path: Path) -> None:
    whole, broken = _runs(tmp_path)
    base = [*SMALL_TOKENIZER, *OFTEN, "stage.epochs=6"]
    options = ["--partition=preemptible", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--requeue"]
    slurm.finished(slurm.submit(_script(whole, base), *options, cwd=tmp_path))
    job = slurm.submit(_script(broken, base), *options, cwd=tmp_path)
    _until(broken, 8)
    slurm.finished(slurm.submit("true", "--partition=urgent", "--nodes=2", "--exclusive", cwd=tmp_path))
    slurm.finished(job)
    assert _story(broken) == ["start", "signal", "requeue", "start", "finish"]
    assert_same_run(whole, broken)


def test_a_rank_that_dies_ends_the_job_with_its_own_words(slurm, tmp_path: Path) -> None:
    base = [*SMALL_TOKENIZER, *OFTEN, "stage.epochs=40", "+callbacks.fail._target_=running.Fail"]
    options = ["--nodes=2", "--ntasks-per-node=1", "--requeue"]
    script = _script(tmp_path / "runs" / "failed", [*base, "+callbacks.fail.rank=1"])
    # As a user may write it: without srun's own way to end the others.
    job = slurm.submit(script.replace(" --kill-on-bad-exit=1", ""), *options, cwd=tmp_path)
    _until(tmp_path / "runs" / "failed", 4)
    began = time.monotonic()
    fields = slurm.wait(job)
    assert time.monotonic() - began < 60
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0")
    log = (tmp_path / f"{job}.log").read_text()
    assert log.count("RuntimeError: rank 1 has had enough") == 1, log
    assert log.count("Traceback") == 1, log


def test_tasks_and_devices_that_disagree_are_one_line(slurm, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "wrong"
    base = [*SMALL_TOKENIZER, "trainer=slurm", "trainer.devices=3"]
    job = slurm.submit(_script(run, base), "--nodes=2", "--ntasks-per-node=2", cwd=tmp_path)
    assert slurm.wait(job)["JobState"] == "FAILED"
    log = (tmp_path / f"{job}.log").read_text()
    assert log.count("error: trainer.devices=3, but srun has started 2 processes on each node") == 1, log
    assert "Traceback" not in log and not run.exists()
    alone = slurm.submit(
        shlex.join([sys.executable, "-m", "beit_pretrain", *SMALL_TOKENIZER, "name=alone"]),
        "--ntasks=4",
        cwd=tmp_path,
    )
    slurm.wait(alone)
    assert "this Slurm allocation is for 4 tasks" in (tmp_path / f"{alone}.log").read_text()


def test_an_interactive_shell_trains_on_its_own_and_is_not_requeued(slurm, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "shell"
    command = [sys.executable, "-m", "beit_pretrain", *SMALL_TOKENIZER, "stage.epochs=40", "name=shell"]
    process = subprocess.Popen(
        ["srun", "--ntasks=1", "--job-name=bash", *command, "checkpoint.every_steps=4"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _until(run, 4)
    slurm.run("scancel", "--signal=USR1", slurm.jobs("bash")[-1])
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 138, output
    assert "stopped by SIGUSR1 after step" in output and "not put back into the queue" in output
