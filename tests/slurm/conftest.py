"""A real Slurm of two nodes on this machine: `cluster.sh` starts it, as root; it ends with the tests."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

CLUSTER = Path(__file__).with_name("cluster.sh")
HOME = Path(os.environ.get("BEIT_SLURM", "/tmp/beit-slurm"))
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Slurm:
    """What a test asks of the cluster. Jobs are named as sbatch prints them: `12`, or `12_3` in an array."""

    def submit(self, script: str, *options: str, cwd: Path) -> str:
        """The id of a job that runs `script`; its output goes to `<cwd>/<id>.log`, unless the options differ."""
        command = ["sbatch", "--parsable", f"--output={cwd}/%A.log", "--open-mode=append", *options]
        return self.run(*command, cwd=cwd, input=f"#!/bin/bash\n{script}\n").strip()

    def run(self, *command: str, cwd: Path | None = None, input: str | None = None, code: int = 0) -> str:
        """What a command prints; it must end with `code`."""
        done = subprocess.run(command, cwd=cwd, input=input, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, Restarts, NodeList, ExitCode."""
        shown = self.run("scontrol", "show", "job", "-o", job)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def jobs(self, name: str) -> list[str]:
        """The ids of all jobs of a name, those that have ended too, in the order of their submission."""
        shown = self.run("squeue", "--noheader", "--array", "--states=all", f"--name={name}", "--format=%i")
        return sorted(shown.split(), key=lambda job: [int(part) for part in job.split("_")])

    def wait(self, job: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """The job's fields once it is in one of the states; without any, once it has ended."""
        deadline = time.monotonic() + seconds
        while (fields := self.job(job))["JobState"] not in (states or ENDED):
            assert time.monotonic() < deadline, f"{self.tail(fields)}\njob {job} is {fields['JobState']}"
            assert states or fields["Reason"] != "DependencyNeverSatisfied", f"job {job}: {fields['Reason']}"
            time.sleep(0.2)
        return fields

    def finished(self, *jobs: str, seconds: float = 120) -> None:
        """Wait until all have ended, with exit code 0."""
        for job in jobs:
            fields = self.wait(job, seconds=seconds)
            assert fields["JobState"] == "COMPLETED", f"{self.tail(fields)}\njob {job}: {fields['JobState']}"

    def tail(self, fields: dict[str, str], lines: int = 40) -> str:
        """The end of a job's log."""
        path = Path(fields.get("StdOut", ""))
        return "\n".join(path.read_text().splitlines()[-lines:]) if path.is_file() else f"no log {path}"

    def cancel_all(self) -> None:
        """End every job, and wait until the nodes are free."""
        user = f"--user={os.getuid()}"
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", user)
        self.run("scancel", user)
        deadline = time.monotonic() + 60
        while self.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, self.run("squeue")
            time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster, alone for these tests; the variables of a job around them are taken away."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            patch.delenv(name)
        patch.setenv("SLURM_CONF", str(HOME / "slurm.conf"))
        patch.setenv("PATH", f"{HOME / 'bin'}:{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        runs = _answers()
        if not runs and os.getuid() != 0:
            pytest.skip(f"needs a running Slurm: start it as root with {CLUSTER} start")
        # Two sessions at once would end each other's jobs.
        HOME.mkdir(exist_ok=True)
        with FileLock(HOME / "tests.lock", mode=0o666):
            if not runs:
                subprocess.run([CLUSTER, "start"], check=True, timeout=300)
            yield Slurm()
            if not runs:
                subprocess.run([CLUSTER, "stop"], check=True, timeout=60)


@pytest.fixture(autouse=True)
def _no_job_is_left(slurm: Slurm) -> Iterator[None]:
    yield
    slurm.cancel_all()


def _answers() -> bool:
    """Whether the cluster runs."""
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return False
    return done.returncode == 0 and "UP" in done.stdout
