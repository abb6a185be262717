"""An sbatch script for a run, to look at, change and hand in."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from beit_pretrain.cluster.submit import job_script
from beit_pretrain.compose import LAUNCHER, compose, explicit_keys, launcher_node
from beit_pretrain.devices import job_faults
from beit_pretrain.errors import BeitError, ConfigError

HEADER = """\
#!/bin/bash
# Made by: beit-tools sbatch {given}
# Hand it in from any folder with: sbatch {out}
# Before the job's time is over Slurm sends a signal (--signal): the run writes a checkpoint, and the job goes back into
# the queue under the same id (--requeue) until the run is finished. The same script handed in again goes on as well.
"""


def write_script(overrides: Sequence[str], out: Path) -> str:
    """Write the script of the job that trains with these overrides; returns what to do next.

    Raises ConfigError for overrides that do not compose or a batch that does not divide, BeitError if `out` is there.
    """
    own = [o for o in overrides if not o.lstrip("+~").startswith((f"{LAUNCHER}=", "hydra.launcher."))]
    if "trainer" not in explicit_keys(own):
        own.append("trainer=slurm")
    cfg = compose(own)
    if cfg.stage is None:
        raise ConfigError(
            "a script runs one stage: set stage=pretrain or another; a chain as jobs is "
            "beit-train chain=NAME chain.submit=slurm"
        )
    if out.exists():
        raise BeitError(f"{out} is there already: remove it, or give another file with --out")
    node = launcher_node(overrides)
    if faults := job_faults(cfg, node):
        raise ConfigError(faults)
    log = Path(cfg.runs) / f"{cfg.name}.log"
    command = shlex.join([sys.executable, "-m", "beit_pretrain", *own])
    script = job_script(node, command, name=cfg.name, log=str(log))
    log.parent.mkdir(parents=True, exist_ok=True)  # a job whose log cannot be written fails without a word
    out.parent.mkdir(parents=True, exist_ok=True)
    header = HEADER.format(given=shlex.join(overrides), out=shlex.quote(str(out.resolve())))
    out.write_text(script.replace("#!/bin/bash\n", header, 1))
    return (
        f"{out}: look at it, then hand it in: sbatch {shlex.quote(str(out))}\nlog: {log}   run: {cfg.run_dir}"
    )
