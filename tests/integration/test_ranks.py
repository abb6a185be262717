"""Several processes that nobody watches over: one that dies takes the others along, and says why once.

And a job that comes back again and again without getting further.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from running import SMALL_TOKENIZER, assert_same_run, record, start, train, train_here

from beit_pretrain.cluster import events

LONG = [
    *SMALL_TOKENIZER,
    "stage.epochs=60",
    "checkpoint.every_steps=4",
    "trainer.devices=2",
    "data.workers=0",
]


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _start(arguments: Sequence[str], cwd: Path, starter: str) -> subprocess.Popen[str]:
    """Two ranks: `torchrun` starts both, or Lightning the second one."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_port()}"]
    return start(arguments, cwd, torchrun if starter == "torchrun" else [])


def _until(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(int(p.stem[5:]) >= step for p in (run / "checkpoints").glob("step-*.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)


def _ranks(folder: Path) -> list[int]:
    """The processes that train in a folder, in the order of their ranks."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            here = path.joinpath("cwd").resolve() == folder.resolve()
            arguments = path.joinpath("cmdline").read_text().split("\0")
            variables = path.joinpath("environ").read_text().split("\0") if here else []
        except OSError:
            continue  # it has just ended, or is not ours
        if here and "stage=tokenizer" in arguments and "torch.distributed.run" not in arguments:
            rank = next((int(v[11:]) for v in variables if v.startswith("LOCAL_RANK=")), 0)
            found[rank] = int(path.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("starter", ["torchrun", pytest.param("lightning", marks=pytest.mark.slow)])
def test_an_exception_on_one_rank_is_shown_once_and_ends_both(starter: str, tmp_path: Path) -> None:
    fail = ["+callbacks.fail._target_=running.Fail", "+callbacks.fail.rank=1", "name=failed"]
    process = _start([*LONG, *fail], tmp_path, starter)
    _until(tmp_path / "runs" / "failed", 4, process)
    began = time.monotonic()
    output, _ = process.communicate(timeout=90)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert output.count("RuntimeError: rank 1 has had enough") == 1, output
    assert "Connection closed by peer" not in output, output
    assert [row["event"] for row in events.read(tmp_path / "runs" / "failed")] in (
        ["start"],
        ["start", "stop"],
    )


@pytest.mark.parametrize("starter", [pytest.param("torchrun", marks=pytest.mark.slow), "lightning"])
def test_a_killed_rank_ends_the_other_one(starter: str, tmp_path: Path) -> None:
    process = _start([*LONG, "name=killed"], tmp_path, starter)
    _until(tmp_path / "runs" / "killed", 4, process)
    os.kill(_ranks(tmp_path)[1], signal.SIGKILL)
    began = time.monotonic()
    output, _ = process.communicate(timeout=90)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert "loss.backward" not in output, output


def test_a_signal_to_one_of_two_ranks_stops_both_with_one_checkpoint(tmp_path: Path) -> None:
    whole, broken = (tmp_path / "runs" / name for name in ("whole", "broken"))
    short = [*LONG, "stage.epochs=4"]
    train([*short, *record(whole), "name=whole"], tmp_path)
    process = _start([*short, *record(broken), "name=broken"], tmp_path, "torchrun")
    _until(broken, 8, process)
    os.kill(_ranks(tmp_path)[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=90)
    assert "stopped by SIG" in output, output
    # Lightning starts the second process now; neither the place nor the starter matters.
    train([*short, *record(broken), "name=broken"], tmp_path)
    assert [row["event"] for row in events.read(broken)] == ["start", "signal", "start", "finish"]
    assert_same_run(whole, broken)


def test_a_job_that_gets_no_further_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "stuck"
    run.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    for _ in range(3):
        events.record(run, "start", step=0, ranks=1)
    command = [*SMALL_TOKENIZER, "stage.epochs=1", "name=stuck", "trainer.requeue=false"]
    output = train_here([*command, "trainer.max_requeues=2"], tmp_path, code=2)
    assert "error: runs/stuck: this Slurm job was started 3 times after step 0" in output
    assert output.count("\n") == 1 and "hydra.launcher.timeout_min" in output
    assert events.read(run)[-1]["event"] == "stop"
    train_here([*command, "trainer.max_requeues=3"], tmp_path)
    assert (run / "results.json").exists()
