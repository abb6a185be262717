"""How several processes train one model: each with all of it (DDP), or each with its share of every weight (FSDP).

Either way the gradients are means over the ranks, and checkpoints are those of a single process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from beit_pretrain.cluster.environment import TIMEOUT


class _Stage(Protocol):
    frozen: tuple[str, ...]

    @property
    def units(self) -> Sequence[nn.Module]: ...


def strategy(name: str, processes: int) -> Strategy | str:
    """What Lightning's Trainer takes for `trainer.strategy`, auto, ddp or fsdp; alone there is nothing to spread."""
    if processes == 1:
        return "auto"
    return Sharded(timeout=TIMEOUT) if name == "fsdp" else Replicated(timeout=TIMEOUT)


class Replicated(DDPStrategy):
    """The whole model on every rank (DDP); on CPUs the mean of the gradients repeats to the last bit.

    After its first step DDP sorts the gradients into other packets. Sums over more than two ranks are then rounded
    elsewhere, and a run that goes on begins with the first order again.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        ddp = cast(DistributedDataParallel, self.model)
        # Buffers are statistics that every rank counts for itself and merges when they are read.
        ddp.broadcast_buffers = False
        if self.root_device.type == "cpu":
            ddp.register_comm_hook(None, _mean_in_rank_order)


def _mean_in_rank_order(state, bucket):  # DDP takes no annotations that are text, as all are in this file
    """The mean of a packet of gradients over the ranks, added up in their order, whatever lies where in it."""
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    work = dist.all_gather(parts, mine, async_op=True)
    assert work is not None
    return work.get_future().then(lambda _: torch.stack(parts).sum(0) / len(parts))


class Sharded(Replicated):
    """Weights, gradients and optimiser states in shares, one per rank (FSDP2, `torch.distributed.fsdp.fully_shard`).

    A step gathers the stage's `units` (the blocks) one at a time and forgets them again; all other weights are
    together for as long as it takes, and what is `frozen` is whole on each rank. An evaluation gathers everything
    once and keeps it to its end: ranks may then make different numbers of passes, and callbacks may make their own.
    A stage without units is trained as with DDP.

    Shares are cut after a checkpoint's weights are read, and whole tensors are written, so that files are the same
    as without shares.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._parts: list[FSDPModule] = []  # the units, then the stage; empty as long as all is whole

    def setup(self, trainer: Trainer) -> None:
        if not self._parts:
            super().setup(trainer)
            return
        # A test after the training: every share is in its place, where DDP would send weights from rank to rank.
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        if not self._parts:
            super().teardown()
            return
        # Shares stay on their devices: a test may follow.
        assert self.accelerator is not None and self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def configure_ddp(self) -> None:
        stage: Any = self.lightning_module
        units = list(cast(_Stage, stage).units)
        if not units:
            super().configure_ddp()
            return
        whole = {p for name in cast(_Stage, stage).frozen for p in getattr(stage, name).parameters()}
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for part in [*units, stage]:
            self._parts.append(fully_shard(part, mesh=mesh, ignored_params=whole))
        # The steps are the stage's forward passes.
        for step in ("training_step", "validation_step", "test_step"):
            register_fsdp_forward_method(stage, step)

    # --- evaluation ------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self._gather()

    def on_validation_end(self) -> None:
        self._scatter()

    def on_test_start(self) -> None:
        self._gather()

    def on_test_end(self) -> None:
        self._scatter()

    def _gather(self) -> None:
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def _scatter(self) -> None:
        for part in self._parts:
            # The stage's own weights are needed at once by the backward pass.
            part.set_reshard_after_forward(part is not self._parts[-1], recurse=False)
            part.reshard()

    # --- checkpoints -----------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The whole weights, on every rank."""
        return {name: _whole(value) for name, value in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state, on rank 0; the others only help to gather it."""
        state: Any = super().optimizer_state(optimizer)
        entries: dict[int, dict[str, Any]] = {}
        for number, entry in state["state"].items():
            whole = {key: _whole(value) for key, value in entry.items()}
            if self.is_global_zero:
                entries[number] = whole
        return {**state, "state": entries}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        shares = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            entries = {
                number: {key: _share(value, parameters[number]) for key, value in entry.items()}
                for number, entry in state["state"].items()
            }
            shares.append({**state, "state": entries})
        super().load_optimizer_state_dict({"optimizer_states": shares})


def _whole(value: Any) -> Any:
    """A tensor that lies in shares in one piece, in main memory; anything else as it is."""
    # A copy, because what was gathered may be a view of something larger that would be written with it.
    return value.full_tensor().to("cpu", copy=True) if isinstance(value, DTensor) else value


def _share(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's share of a value that belongs to a weight in shares; counts of steps are not shared."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    here = value.to(parameter.device)
    # Every rank has read the file: nothing is sent.
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)
