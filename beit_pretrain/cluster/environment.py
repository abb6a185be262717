"""The cluster as Lightning sees it, and the process group of processes that were started from outside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from beit_pretrain.cluster.launch import Launch, launched, restarts

TIMEOUT = timedelta(minutes=10)  # of one collective, after which a hanging run ends
Value = TypeVar("Value")


class FailedElsewhere(SystemExit):
    """Rank 0 has failed and says why."""


class SlurmStep(ClusterEnvironment):
    """A task of `srun`, by the variables of its step.

    Lightning's own class goes by the job's variables and name: it refuses `srun -n1` within a larger job, lets each
    task of a job called `bash` or `interactive` train alone, gives two steps of a job one port, and requeues from
    within a signal handler.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launch = launched()

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        given = os.environ.get("MASTER_ADDR")
        return given or SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])

    @property
    def main_port(self) -> int:
        if given := os.environ.get("MASTER_PORT"):
            return int(given)
        # Below the ports that are lent to outgoing connections; another one for each job, step and start.
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        return 15000 + (31 * job + 7 * step + restarts()) % 17000

    @staticmethod
    def detect() -> bool:
        return launched().kind == "slurm"

    def world_size(self) -> int:
        return self.launch.processes

    def set_world_size(self, size: int) -> None:
        """It is what srun started."""

    def global_rank(self) -> int:
        return self.launch.rank

    def set_global_rank(self, rank: int) -> None:
        """It is what srun gave."""

    def local_rank(self) -> int:
        return self.launch.local_rank

    def node_rank(self) -> int:
        return self.launch.node_rank


def environment(launch: Launch) -> ClusterEnvironment:
    """For Lightning's Trainer, which would otherwise guess."""
    if launch.kind == "slurm":
        return SlurmStep()
    return TorchElasticEnvironment() if launch.kind == "torchrun" else LightningEnvironment()


@contextmanager
def process_group(launch: Launch, device: str) -> Iterator[None]:
    """Connect processes that srun or torchrun started, before one of them looks at the run's folder.

    Lightning finds the group and uses it. Nothing to do for a single process, or where Lightning starts the others.
    """
    if launch.kind == "alone" or launch.processes == 1:
        yield
        return
    at = environment(launch)
    more: dict[str, Any] = {}
    if device == "cuda":
        torch.cuda.set_device(launch.local_rank)
        more["device_id"] = torch.device("cuda", launch.local_rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{at.main_address}:{at.main_port}" if launch.kind == "slurm" else "env://",
        rank=launch.rank,
        world_size=launch.processes,
        timeout=TIMEOUT,
        **more,
    )
    yield
    # Not after an exception: others may wait for this rank in a collective, and would be waited for here.
    if dist.is_initialized():
        dist.destroy_process_group()


def from_rank_zero(make: Callable[[], Value]) -> Value:
    """What rank 0 makes, on every rank of the group; where it fails, the others end without a word.

    File systems of clusters show the nodes different things for seconds: what is in a run's folder, one process says.
    """
    if not dist.is_initialized():
        return make()
    said: list[Any] = [None, False]
    if dist.get_rank() == 0:
        try:
            said = [make(), True]
        finally:
            dist.broadcast_object_list(said)
    else:
        dist.broadcast_object_list(said)
        if not said[1]:
            raise FailedElsewhere(0)  # rank 0 has the exit code too: srun may end all for the first one
    return said[0]
