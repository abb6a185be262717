"""`beit-tools drill --slurm`: the signal comes from Slurm, and the job comes back by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import SMALL_TOKENIZER, environment

from beit_pretrain.cluster import events
from beit_pretrain.tools.app import app

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_a_job_of_two_tasks_passes_the_drill(
    slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    job = ["hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1"]
    slow = ["+callbacks.slow._target_=running.Slow", "name=fire"]
    assert app(["drill", *SMALL_TOKENIZER, *slow, *job, "--slurm"], standalone_mode=False) == 0
    printed = capsys.readouterr().out
    assert "NOT" not in printed and printed.count(" ok ") == 5
    first, second = slurm.jobs("fire-drill-alone")[-1], slurm.jobs("fire-drill-interrupted")[-1]
    assert [slurm.job(id)["Restarts"] for id in (first, second)] == ["0", "1"]
    rows = events.read(tmp_path / "runs" / "fire-drill" / "interrupted")
    assert [row["event"] for row in rows] == ["start", "signal", "requeue", "start"]
    assert {(row["job"], row["ranks"]) for row in rows} == {(second, "2")}
