"""`sbatch` and `squeue` as files on the PATH that write down what they are asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SBATCH = """\
#!/bin/sh
[ ! -e "$FAKE_SLURM/says" ] || { cat "$FAKE_SLURM/says" >&2; exit 1; }
id=$(($(cat "$FAKE_SLURM/last") + 1))
echo $id >"$FAKE_SLURM/last"
cat >"$FAKE_SLURM/$id.sh"
echo "$@" >"$FAKE_SLURM/$id.options"
env >"$FAKE_SLURM/$id.env"
echo "$id$FAKE_SLURM_CLUSTER"
"""
SQUEUE = '#!/bin/sh\necho "$@" >"$FAKE_SLURM/asked"\ncat "$FAKE_SLURM/active"\n'


class FakeSlurm:
    """Job ids count from 101; `active` are those that squeue knows."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "last").write_text("100\n")
        self.now_active()
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setenv("FAKE_SLURM", str(folder))

    def now_active(self, *jobs: str) -> None:
        (self.folder / "active").write_text("".join(f"{job}\n" for job in jobs))

    def refuse(self, said: str | None) -> None:
        """Let sbatch fail, or not any more."""
        (self.folder / "says").unlink(missing_ok=True)
        if said is not None:
            (self.folder / "says").write_text(said)

    @property
    def submitted(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.sh"))

    def script(self, job: str) -> str:
        return (self.folder / f"{job}.sh").read_text()

    def options(self, job: str) -> list[str]:
        return (self.folder / f"{job}.options").read_text().split()

    def after(self, job: str) -> list[str]:
        """The jobs that a job waits for."""
        found = [o.removeprefix("--dependency=afterok:") for o in self.options(job) if "depend" in o]
        return found[0].split(":") if found else []

    def name(self, job: str) -> str:
        return next(line.split("=")[1] for line in self.script(job).splitlines() if "--job-name=" in line)

    def environment(self, job: str) -> dict[str, str]:
        lines = (self.folder / f"{job}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)
