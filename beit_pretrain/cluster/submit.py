"""Slurm jobs: the text of their scripts, from the launcher node of the configuration, and handing them in."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from beit_pretrain.errors import BeitError, ConfigError

# Key of the node to option of sbatch; a key whose value is null leaves its option out.
OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "nodes": "nodes",
    "tasks_per_node": "ntasks-per-node",
    "gpus_per_node": "gpus-per-node",
    "cpus_per_task": "cpus-per-task",
    "mem_gb": "mem",
    "timeout_min": "time",
}
NUMBERS = (
    "nodes",
    "tasks_per_node",
    "gpus_per_node",
    "cpus_per_task",
    "mem_gb",
    "timeout_min",
    "signal_delay_s",
)
# What squeue calls a job that is still to come or under way.
ACTIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED,REQUEUED,REQUEUE_HOLD,RESIZING,STOPPED"


def job_script(
    node: Mapping[str, Any],
    command: str,
    *,
    name: str,
    log: str,
    array: str | None = None,
    tasks: bool = True,
) -> str:
    """The whole text of an sbatch script that runs a shell command in this folder; `log` is appended to.

    With `tasks` the command is started by srun, once per task; without, it runs once, in the batch shell. `array`
    is as `sbatch --array` takes it. Raises ConfigError for values of the launcher node that no job can have.
    """
    _check(node)
    options = list(_options(node, name=name, log=log, array=array))
    lines = ["#!/bin/bash", *(f"#SBATCH --{option}" for option in options), "", *(node.get("setup") or [])]
    if tasks:
        # The first rank that dies ends the others, which would wait for it; srun does not take over --cpus-per-task.
        cpus = node.get("cpus_per_task")
        srun = ["srun", "--kill-on-bad-exit=1", *([] if cpus is None else [f"--cpus-per-task={cpus}"])]
        command = f"{shlex.join(srun)} {command}"
    return "\n".join([*lines, command, ""])


def _check(node: Mapping[str, Any]) -> None:
    faults = [
        f"hydra.launcher.{key}={value} must be a whole number above 0, or null"
        for key in NUMBERS
        if (value := node.get(key)) is not None and (type(value) is not int or value < 1)
    ]
    lead, minutes = node.get("signal_delay_s"), node.get("timeout_min")
    # Slurm looks every 30 seconds, and may send the signal a minute early.
    if not faults and lead and minutes and lead + 60 >= 60 * minutes:
        faults.append(
            f"hydra.launcher.signal_delay_s={lead} leaves nothing of timeout_min={minutes}: set "
            f"hydra.launcher.timeout_min={lead // 60 + 2} or more"
        )
    if faults:
        raise ConfigError(faults)


def _options(node: Mapping[str, Any], *, name: str, log: str, array: str | None) -> Iterator[str]:
    """The options of sbatch, each once: `additional_parameters` win over the others."""
    found: dict[str, Any] = {"job-name": name, "output": log, "open-mode": "append", "chdir": os.getcwd()}
    found["array"] = array
    for key, option in OPTIONS.items():
        found[option] = node.get(key)
    if found["mem"] is not None:
        found["mem"] = f"{found['mem']}G"
    if (lead := node.get("signal_delay_s")) is not None:
        found["signal"] = f"USR2@{lead}"
    for key, value in (node.get("additional_parameters") or {}).items():
        found[str(key).replace("_", "-")] = value
    for option, value in found.items():
        if value is True:
            yield option
        elif value is not None and value is not False:
            yield f"{option}={shlex.quote(str(value))}"


def sbatch(script: str, *, after: Sequence[str] = ()) -> str:
    """Hand a script in and return the job's id; it starts once the jobs `after` have ended with exit code 0.

    Raises BeitError with what Slurm says.
    """
    options = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return _slurm(["sbatch", "--parsable", *options], script).strip().partition(";")[0]


def active(jobs: Iterable[str]) -> set[str]:
    """Those of these jobs that are waiting or running."""
    wanted = set(jobs)
    if not wanted:
        return set()
    return wanted & set(_slurm(["squeue", "--me", "--noheader", f"--states={ACTIVE}", "--format=%A"]).split())


def _slurm(command: Sequence[str], script: str | None = None) -> str:
    """What a command of Slurm prints, run without what a job around this process has set for its own steps."""
    keep = ("SLURM_CONF", "SLURM_CLUSTERS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in keep}
    try:
        done = subprocess.run(command, input=script, env=environment, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise BeitError(
            f"{command[0]}: there is no such command here; jobs are handed in on a login node of a Slurm cluster"
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise BeitError(f"{command[0]} failed: {said}; what a job asks for is hydra.launcher.*")
    return done.stdout
