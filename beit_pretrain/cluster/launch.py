"""What started this process: the user, `srun` or `torchrun`; they say so in the environment, and nowhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


class Launch(NamedTuple):
    """The processes that were started together, and which of them this one is.

    `kind` is "slurm" (a task of `srun`), "torchrun", or "alone": then Lightning starts more processes where several
    devices are asked for, and `rank` tells those apart. `per_node` is 0 where nodes have different numbers of them.
    """

    kind: str
    nodes: int = 1
    per_node: int = 1
    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """How this process was started, from the variables that srun and torchrun set for each of theirs."""
    env = os.environ if environment is None else environment
    if "TORCHELASTIC_RUN_ID" in env:
        return Launch(
            "torchrun",
            nodes=int(env["GROUP_WORLD_SIZE"]),
            per_node=int(env["LOCAL_WORLD_SIZE"]),
            rank=int(env["RANK"]),
            local_rank=int(env["LOCAL_RANK"]),
            node_rank=int(env["GROUP_RANK"]),
        )
    if "SLURM_STEP_ID" in env and "SLURM_STEP_TASKS_PER_NODE" in env:
        # Of the step, not of the job: `srun -n1` within a larger job is one process.
        counts = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        return Launch(
            "slurm",
            nodes=len(counts),
            per_node=counts[0] if len(set(counts)) == 1 else 0,
            rank=int(env["SLURM_PROCID"]),
            local_rank=int(env["SLURM_LOCALID"]),
            node_rank=int(env["SLURM_NODEID"]),
        )
    # Lightning's own launcher tells the processes it starts their number.
    local = int(env.get("LOCAL_RANK", 0))
    return Launch("alone", rank=local, local_rank=local, node_rank=int(env.get("NODE_RANK", 0)))


def idle_tasks(environment: Mapping[str, str] | None = None) -> int:
    """Tasks of a Slurm allocation around a process that `srun` did not start; 0 or 1: there is nothing to miss."""
    env = os.environ if environment is None else environment
    if launched(env).kind != "alone" or "SLURM_JOB_ID" not in env:
        return 0
    return max(int(env.get("SLURM_NTASKS", 1)), int(env.get("SLURM_NNODES", 1)))


def job_id(environment: Mapping[str, str] | None = None) -> str | None:
    """The Slurm job, as `scontrol` takes it (`123`, or `123_4` in an array); None outside of one."""
    env = os.environ if environment is None else environment
    if array := env.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restarts(environment: Mapping[str, str] | None = None) -> int:
    """How often Slurm has put this job back into the queue."""
    env = os.environ if environment is None else environment
    return int(env.get("SLURM_RESTART_COUNT", 0))


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` to [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts
