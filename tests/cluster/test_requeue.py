"""Whether a job goes back into the queue, with a scontrol that answers as the real one was seen to."""

from __future__ import annotations

from pathlib import Path

import pytest

from beit_pretrain.cluster.requeue import requeue

SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then
  echo "JobId=7 JobName=x JobState=$STATE Reason=$REASON Dependency=(null) Requeue=1 Restarts=$RESTARTS"
  exit 0
fi
[ -z "$REFUSE" ] || { echo "$REFUSE" >&2; exit 1; }
echo "$@" >> "$ASKED"
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(SCONTROL)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    for name, value in {"STATE": "RUNNING", "REASON": "None", "RESTARTS": "0", "REFUSE": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return tmp_path / "asked"


def test_a_running_job_goes_back(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue() is None
    assert asked.read_text() == "requeue 5_2\n"


def test_a_job_at_its_time_limit_goes_back(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "COMPLETING")
    monkeypatch.setenv("REASON", "TimeLimit")
    assert requeue() is None
    assert asked.exists()


def test_a_cancelled_job_stays_away(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "COMPLETING")
    assert requeue() == "job 7 was cancelled"
    assert not asked.exists()


def test_what_slurm_has_done_is_not_done_again(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "COMPLETING")
    monkeypatch.setenv("RESTARTS", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert requeue() is None
    assert not asked.exists()


def test_slurms_refusal_is_told(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSE", "Requested operation is presently disabled")
    assert requeue() == "Requested operation is presently disabled"


def test_without_slurm_there_is_no_queue(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert requeue() == "there is no command scontrol here"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue() == "this is no Slurm job"
