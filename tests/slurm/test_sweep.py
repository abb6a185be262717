"""A search on Slurm: workers in an array, trials that the cluster interrupts."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import pytest
from running import SMALL_TOKENIZER, assert_same_end, environment, train

from beit_pretrain.cluster import events
from beit_pretrain.tools.app import app

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_workers_in_an_array_lose_no_trial(
    slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    search = [
        "sweep",
        "sweep=default",
        "sweep.trials=3",
        "sweep.pruner=null",
        "name=search",
        *SMALL_TOKENIZER,
    ]
    search += ["+sweep.parameters.stage.optim.lr={low:1e-3,high:3e-3,log:true}", "checkpoint.every_steps=4"]
    search += ["+callbacks.slow._target_=running.Slow", "trainer=slurm"]
    app([*search, "--slurm", "--workers=2", "hydra.launcher.cpus_per_task=1"], standalone_mode=False)
    jobs = slurm.jobs("search")[-2:]
    folder = tmp_path / "runs" / "search"
    deadline = time.monotonic() + 120
    while not list(folder.glob("trial-0000/checkpoints/step-*.ckpt")):
        assert time.monotonic() < deadline, slurm.run("squeue")
        time.sleep(0.1)
    first = events.read(folder / "trial-0000")[0]["job"]
    slurm.run("scancel", "--signal=USR2", first)  # as before a time limit: to the steps, not to the worker
    slurm.finished(*jobs, seconds=300)
    assert sorted(slurm.job(job)["Restarts"] for job in jobs) == ["0", "1"]

    trial = folder / "trial-0000"
    assert [row["event"] for row in events.read(trial)] == ["start", "signal", "start", "finish"]
    runs = sorted(path for path in folder.glob("trial-*") if path.is_dir())
    assert [json.loads((run / "results.json").read_text())["status"] for run in runs] == ["finished"] * 3
    capsys.readouterr()
    app([*search, "--show"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed.count("finished") == 3 and "beit-train " in printed, printed

    command = shlex.split(json.loads((trial / "results.json").read_text())["command"])[1:]
    alone = [o for o in command if not o.startswith(("name=", "trainer=", "trainer.requeue="))]
    train([*alone, "name=whole"], tmp_path)
    assert_same_end(trial, tmp_path / "runs" / "whole")
