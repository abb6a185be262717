"""What all stages share: seeding, exact averaging, refusing NaN, schedules, logging and self-describing checkpoints.

Randomness follows the step, not the process: before each micro-batch the generator is seeded from
(seed, global step, micro-batch, rank), so neither restarts nor callbacks can change a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from beit_pretrain import optim
from beit_pretrain.checkpoint import files, record, saving
from beit_pretrain.errors import CheckpointError, TrainingError
from beit_pretrain.stages.bad_steps import keep_bad_step
from beit_pretrain.stages.gradients import scale_and_clip
from beit_pretrain.stages.loop_state import fit_loop_state

BAD_STEPS_KEPT = 3  # each file holds the weights, so a run that never recovers must not fill the disk


@dataclass
class StepResult:
    """Sums over the `count` items (hidden patches, images) of one micro-batch; `loss` carries the gradient."""

    loss: Tensor
    count: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def step_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The generator's seed for one micro-batch."""
    return int(np.random.SeedSequence([seed, step, micro_batch, rank]).generate_state(1, np.uint64)[0])


class Stage(LightningModule, ABC):
    """A model, what it eats (`views`), and its optimisation; run.py puts it into a Trainer.

    `record` is what a checkpoint says about itself (plain containers); `frozen` names the submodules that a
    checkpoint leaves out and only remembers by their weight hash.
    """

    monitor: tuple[str, str] = ("val/loss", "min")  # which held-out number makes a checkpoint the best one
    self_supervised = True  # whether kNN while training says more than the held-out score
    frozen: tuple[str, ...] = ()
    came_from = "tokenizer.checkpoint"  # where frozen weights are from
    statistics: tuple[str, ...] = ()  # submodules that count instead of learning

    def __init__(
        self,
        *,
        optim: optim.Recipe,
        epochs: int,
        views: Any,
        eval_views: Any,
        normalize: Mapping[str, Sequence[float]],
        seed: int,
        log_every: int,
        max_bad_steps: int,
        run_dir: str | Path,
    ) -> None:
        super().__init__()
        self.recipe = optim
        self.epochs = epochs
        self.views = views
        self.eval_views = eval_views
        self.seed = seed
        self.log_every = log_every
        self.max_bad_steps = max_bad_steps
        self.run_dir = Path(run_dir)
        # Raises if the run folder is another run's by now.
        self.before_writing: Callable[[], None] = lambda: None
        self.record: dict[str, Any] = {}
        self.latest: dict[str, float] = {}
        self.held_out: dict[str, float] = {}  # the last held-out score
        self.tested: dict[str, float] = {}  # the score on the test part, where data have one
        self.steps_per_epoch = 0
        self.batch_size = 0
        shape = (1, 3, 1, 1)
        self.mean: Tensor
        self.std: Tensor
        self.bad_steps: Tensor
        self.register_buffer("mean", torch.tensor(list(normalize["mean"])).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(list(normalize["std"])).view(shape), persistent=False)
        # Of this run, carried through checkpoints: all refused steps, and those in a row up to now.
        self.register_buffer("bad_steps", torch.zeros(2, dtype=torch.int64))
        self._results: list[StepResult] = []
        self._batches: list[Any] = []
        self._hashes: dict[str, str] = {}

    # --- what a stage says of itself -------------------------------------------------------------------------

    @abstractmethod
    def compute(self, batch: Any, step: int) -> StepResult:
        """Loss and metrics of one micro-batch of optimiser step `step`, as sums."""

    @abstractmethod
    def evaluate(self, batch: Any) -> None:
        """Take one held-out batch into the running score."""

    @abstractmethod
    def evaluation(self) -> dict[str, float]:
        """The score over all held-out batches and ranks since the last call, under `val/`, and start anew."""

    @abstractmethod
    def expected_count(self, batch: Any) -> int:
        """How many items a micro-batch of this size holds when every image has its full share."""

    counts_vary = False  # whether `StepResult.count` can differ from `expected_count`

    def after_step(self, step: int) -> None:
        """Apply what `compute` only noted; called after an update, on all ranks."""

    def drop_pending(self) -> None:
        """Forget what `compute` noted; called instead of `after_step` when the update is refused."""

    def merge_ranks(self) -> None:
        """Bring statistics that each rank keeps for itself together; called on all ranks before they are read."""

    def step_metrics(self) -> dict[str, float]:
        """More numbers for the training log, beyond the sums of `compute`."""
        return {}

    # --- places in the run -----------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def depth(self) -> int:
        """Number of blocks, for the layer-wise learning-rate decay."""
        return 0

    @property
    def units(self) -> Sequence[nn.Module]:
        """What trainer.strategy=fsdp gathers one at a time: the blocks that are trained. Without any it is ddp."""
        return ()

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.batch_size = data.batch_size
        if stage == "fit":
            self.steps_per_epoch = data.steps_per_epoch

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to the encoder's input."""
        return (image.to(self.mean.dtype) / 255 - self.mean) / self.std

    # --- one step --------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        micro = batch_idx % self.trainer.accumulate_grad_batches
        if micro == 0:
            self._results, self._batches = [], []
        step = self.trainer.global_step
        torch.manual_seed(step_seed(self.seed, step, micro, self.global_rank))
        result = self.compute(batch, step)
        self._batches.append(batch)
        self._results.append(
            StepResult(
                result.loss.detach(),
                result.count.detach(),
                {name: value.detach() for name, value in result.sums.items()},
            )
        )
        return result.loss / self.expected_count(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        optim.set_schedule(
            optimizer,
            self.recipe,
            self.trainer.global_step,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Weight the mean exactly, clip, and refuse the update if anything on any rank is not finite."""
        totals, factor = self._step_totals(), None
        if self.counts_vary:
            # Lightning and DDP averaged over micro-batches and ranks as if each held as many items; the true
            # mean is the sum over the global batch divided by the count of the global batch.
            even = sum(self.expected_count(batch) for batch in self._batches) * self.trainer.world_size
            factor = even / totals["count"].clamp(min=1)
        norm = scale_and_clip(optimizer, factor, self.recipe.clip)
        good = torch.isfinite(norm) & torch.isfinite(totals["loss"])
        if dist.is_initialized():
            agreed = good.to(torch.int32)
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
            good = agreed.bool()
        self._good = bool(good)
        self._norm, self._totals = norm, totals
        if not self._good:
            optimizer.zero_grad(set_to_none=True)  # AdamW passes over parameters without a gradient

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        if self._good:
            self.bad_steps[1] = 0
            self.after_step(step)
        else:
            self._refuse(step)
        if (step + 1) % self.log_every == 0 or step + 1 == self.total_steps or not self._good:
            self._log_step(step + 1)
        self._batches = []

    def _step_totals(self) -> dict[str, Tensor]:
        """Sums of the step's metrics over micro-batches and ranks, float64 where the device has it."""
        names = list(self._results[0].sums)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        rows = [
            torch.stack([r.loss.to(wide), r.count.to(wide), *(r.sums[n].to(wide) for n in names)])
            for r in self._results
        ]
        total = torch.stack(rows).sum(0)
        if dist.is_initialized():
            dist.all_reduce(total)
        return dict(zip(["loss", "count", *names], total.unbind(), strict=True))

    def _refuse(self, step: int) -> None:
        self.drop_pending()
        self.bad_steps += 1
        total, in_a_row = (int(n) for n in self.bad_steps)
        # A loss scaler finds its scale by overflowing, which is no fault of the batch.
        scaling = self.trainer.precision == "16-mixed" and bool(torch.isfinite(self._totals["loss"]))
        if not scaling and total <= BAD_STEPS_KEPT:
            self.before_writing()
            path = keep_bad_step(
                self.run_dir,
                step=step,
                rank=self.global_rank,
                batches=self._batches,
                state=self.own_state(self.trainer.strategy.lightning_module_state_dict()),
                record=self.record,
                precision=str(self.trainer.precision),
            )
            rank_zero_warn(
                f"step {step}: loss or gradient is not finite; the update is skipped, the batch is kept. "
                f"`beit-tools replay {path}` reproduces it."
            )
        if in_a_row >= self.max_bad_steps:
            good = saving.last_good(self.run_dir / "checkpoints", main=self.global_rank == 0)
            raise TrainingError(
                f"{in_a_row} steps in a row without a finite loss and gradient (stage.max_bad_steps="
                f"{self.max_bad_steps}), the last at step {step}. {good}; try a lower stage.optim.lr, "
                "stage.optim.clip, or trainer.precision=32."
            )

    def _log_step(self, step: int) -> None:
        self.merge_ranks()
        count = self._totals["count"].clamp(min=1)
        metrics = {f"train/{name}": float(v / count) for name, v in self._totals.items() if name != "count"}
        metrics |= {f"train/{name}": value for name, value in self.step_metrics().items()}
        rates = [group["lr"] for group in self.optimizers().param_groups]  # pyright: ignore
        decays = [group["weight_decay"] for group in self.optimizers().param_groups]  # pyright: ignore
        metrics["train/lr"], metrics["train/lr_min"] = max(rates), min(rates)
        metrics["train/weight_decay"] = max(decays)
        metrics["train/grad_norm"] = float(self._norm)
        metrics["train/bad_steps"] = float(self.bad_steps[0])
        self.latest = metrics
        self.log_metrics(metrics, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write already reduced numbers to every logger, at `step` (by default the optimiser steps done)."""
        step = self.trainer.global_step if step is None else step
        row = {"epoch": step / max(self.steps_per_epoch, 1), **metrics}
        self.before_writing()
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step)

    # --- held-out score --------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        self.merge_ranks()
        self.before_writing()  # of a segmentation's worst images
        metrics = self.held_out = self.evaluation()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log_metrics(metrics)
        # Lightning's own callbacks (early stopping and the like) read it from here.
        self.log_dict(metrics, logger=False, rank_zero_only=False, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self.before_writing()
        self.tested = {f"test{name.removeprefix('val')}": value for name, value in self.evaluation().items()}

    # --- optimiser -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        on_cuda = self.device.type == "cuda"
        return torch.optim.AdamW(
            self.parameter_groups(),
            lr=self.recipe.lr,
            betas=self.recipe.betas,
            eps=self.recipe.eps,
            # The loss scaler of 16-mixed must see the gradients before a fused step would unscale them.
            fused=True if on_cuda and self.trainer.precision != "16-mixed" else None,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What AdamW is given, with the keys that `optim.set_schedule` reads."""
        return optim.parameter_groups(self.trained_parameters(), self.recipe, self.depth)

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    # --- checkpoints -----------------------------------------------------------------------------------------

    def own_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if k.split(".")[0] not in self.frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.merge_ranks()
        state = checkpoint["state_dict"]
        # Statistics were merged after Lightning had collected the state.
        state |= {name: value for name, value in self.named_buffers() if name in state}
        checkpoint["state_dict"] = self.own_state(state)
        # The place in the run is arithmetic on the step; Lightning's loop counters would say less and bind the
        # file to one batch split.
        del checkpoint["loops"]
        checkpoint["epoch"] = checkpoint["global_step"] // max(self.steps_per_epoch, 1)
        hashes = {name: self.frozen_hash(name) for name in self.frozen}
        checkpoint["beit_pretrain"] = {**self.record, "frozen": hashes, "held_out": self.held_out}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.record = record.continued(checkpoint["beit_pretrain"], self.record)
        self.held_out = checkpoint["beit_pretrain"]["held_out"]
        saved = checkpoint["beit_pretrain"]["frozen"]
        for name in self.frozen:
            now = self.frozen_hash(name)
            if saved.get(name) != now:
                raise CheckpointError(
                    f"the {name}'s weights (hash {now[:12]}) are not those the checkpoint was trained with "
                    f"({str(saved.get(name))[:12]}): give the original with {self.came_from}, or start anew "
                    "with another name="
                )
            part: nn.Module = getattr(self, name)
            checkpoint["state_dict"] |= {f"{name}.{k}": v for k, v in part.state_dict().items()}
        checkpoint["loops"] = {
            "fit_loop": fit_loop_state(
                self.trainer,
                step=checkpoint["global_step"],
                steps_per_epoch=self.steps_per_epoch,
                accumulate=self.trainer.accumulate_grad_batches,
            )
        }

    def frozen_hash(self, name: str) -> str:
        """Weight hash of a frozen submodule, worked out once."""
        if name not in self._hashes:
            part: nn.Module = getattr(self, name)
            self._hashes[name] = files.weight_hash(part.state_dict())
        return self._hashes[name]

    def picture_rows(self, batch: Any) -> dict[str, Tensor] | None:
        """Columns of pictures (B, 3, H, W) in [0, 1] that show what the model does with a batch."""
        return None

    def results(self) -> dict[str, Any]:
        """What goes into results.json beside the held-out metrics."""
        return {}
