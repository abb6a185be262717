"""The diary of a run's starts and ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer

from beit_pretrain.cluster import events
from beit_pretrain.cluster.interruption import Interruption
from beit_pretrain.cluster.signals import Signals
from beit_pretrain.errors import BeitError


def test_lines_are_appended_and_a_part_of_one_is_left_out(tmp_path: Path) -> None:
    assert events.read(tmp_path) == []
    events.record(tmp_path, "start", step=0, ranks=4)
    events.record(tmp_path, "signal", step=12, ranks=4, detail="USR1, early")
    with (tmp_path / "events.csv").open("a") as file:
        file.write("2026-01-31T12:0")
    rows = events.read(tmp_path)
    assert [(r["step"], r["event"], r["ranks"], r["detail"]) for r in rows] == [
        ("0", "start", "4", ""),
        ("12", "signal", "4", "USR1, early"),
    ]


def test_starts_in_vain_are_those_of_this_job_at_this_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)

    def start(step: int) -> None:
        events.record(tmp_path, "start", step=step, ranks=1)

    start(0)
    start(0)
    assert events.starts_in_vain(tmp_path, 0) == 2
    assert events.starts_in_vain(tmp_path, 5) == 0
    start(5)
    events.record(tmp_path, "requeue", step=5, ranks=1)
    start(5)
    assert events.starts_in_vain(tmp_path, 5) == 2
    assert events.starts_in_vain(tmp_path, 0) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert events.starts_in_vain(tmp_path, 5) == 0, "a new job begins anew"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert events.starts_in_vain(tmp_path, 5) == 0


def test_a_requeue_that_a_killed_process_could_not_say_is_seen_by_the_next_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert not events.requeue_unsaid(tmp_path)
    events.record(tmp_path, "start", step=0, ranks=4)
    events.record(tmp_path, "signal", step=9, ranks=4, detail="USR1")
    assert not events.requeue_unsaid(tmp_path), "it has not been started again"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert events.requeue_unsaid(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not events.requeue_unsaid(tmp_path), "another job, started by hand"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    events.record(tmp_path, "requeue", step=9, ranks=4)
    assert not events.requeue_unsaid(tmp_path), "it was said"


@pytest.mark.parametrize(
    "asks_itself, told", [(True, ["signal", "requeue", "start"]), (False, ["signal", "start"])]
)
def test_the_next_life_speaks_only_of_a_requeue_that_the_run_asked_for_itself(
    asks_itself: bool, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    events.record(tmp_path, "signal", step=9, ranks=1, detail="USR1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Signals() as signals:
        signals.requeue = asks_itself  # false in a trial: the sweep's worker asks
        Interruption(signals, run_dir=tmp_path).on_train_start(trainer, LightningModule())
    assert [row["event"] for row in events.read(tmp_path)] == told


def test_torn_lines_are_left_out_and_another_file_is_refused(tmp_path: Path) -> None:
    events.record(tmp_path, "start", step=0, ranks=1)
    with (tmp_path / "events.csv").open("a") as file:
        file.write("2026-01-31T12:00:00Z,1x,sta,,,\n")
    events.record(tmp_path, "start", step=7, ranks=1)
    assert [row["step"] for row in events.read(tmp_path)] == ["0", "7"]
    (tmp_path / "events.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BeitError, match=r"events\.csv is damaged \(it has no column"):
        events.read(tmp_path)
