"""What a process asks Slurm for: its job back in the queue, or the end of its step."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress

from beit_pretrain.cluster.launch import job_id, restarts


def requeue() -> str | None:
    """Put this process's job back into the queue: None if that is done, else why not.

    Slurm then ends the job, this process too, and starts it again under the same number.
    """
    job = job_id()
    if job is None:
        return "this is no Slurm job"
    try:
        shown = _job(job)
        if int(shown.get("Restarts", 0)) > restarts():
            return None  # Slurm has just done so, at the end of a preemption's grace
        # Asked to, Slurm would bring even a job back that its user has cancelled.
        if shown.get("JobState") != "RUNNING" and shown.get("Reason") != "TimeLimit":
            return f"job {job} was cancelled"
        _scontrol("requeue", job)
    except FileNotFoundError:
        return "there is no command scontrol here"
    except subprocess.CalledProcessError as error:
        return " ".join((error.stderr or error.stdout or f"exit code {error.returncode}").split())
    except subprocess.TimeoutExpired:
        return "Slurm does not answer"
    return None


def end_step() -> None:
    """Kill all tasks of this process's step, if it can be done.

    Not those of the job's next life, which have the same number: a process can outlive its own when its node fails.
    """
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    with suppress(FileNotFoundError, subprocess.SubprocessError):
        if int(_job(str(job_id())).get("Restarts", 0)) == restarts():
            subprocess.run(["scancel", "--signal=KILL", step], capture_output=True, timeout=30)


def _job(job: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", _scontrol("show", "job", "-o", job)))


def _scontrol(*arguments: str) -> str:
    return subprocess.run(
        ["scontrol", *arguments], check=True, capture_output=True, text=True, timeout=30
    ).stdout
