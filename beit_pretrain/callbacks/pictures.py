"""Pictures of what the model does with held-out images, drawn while it trains."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from beit_pretrain.callbacks.isolation import due, isolated
from beit_pretrain.sheets import draw_columns


class _Stage(Protocol):
    steps_per_epoch: int

    @property
    def total_steps(self) -> int: ...

    def picture_rows(self, batch: Any) -> dict[str, Tensor] | None: ...


class Pictures(Callback):
    """Draws a sheet of the first `count` held-out images every `every_epochs` epochs and after the last.

    The sheet goes to `run_dir/pictures/step-%08d.png` and to loggers that take images. The images, their
    crops and their masks are the same each time. Stages that have nothing to show are left alone.
    """

    def __init__(self, run_dir: str | Path, every_epochs: int, count: int = 8) -> None:
        self.folder = Path(run_dir) / "pictures"
        self.every_epochs = every_epochs
        self.count = count
        self._batch: Any = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only rank 0 draws: nothing in here waits for another rank.
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        stage, step = cast(_Stage, pl_module), trainer.global_step
        if not due(
            step=step,
            steps_per_epoch=stage.steps_per_epoch,
            total_steps=stage.total_steps,
            every_epochs=self.every_epochs,
        ):
            return
        with isolated(trainer, pl_module):
            if self._batch is None:
                self._batch = _first(trainer, self.count)
            batch = pl_module.transfer_batch_to_device(self._batch, pl_module.device, 0)
            rows = stage.picture_rows(batch)
        if rows is None:
            return
        sheet = draw_columns(rows, f"step {step:,}")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.png"
        draft = path.with_suffix(".part")
        sheet.save(draft, format="PNG")
        draft.replace(path)
        _to_loggers(trainer, sheet, step)


def _first(trainer: Trainer, count: int) -> Any:
    """A batch of the first held-out images of this rank, collated as in validation."""
    loader: DataLoader[Any] = trainer.datamodule.val_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
    assert loader.batch_sampler is not None
    keys = list(islice(chain.from_iterable(loader.batch_sampler), count))
    return next(iter(DataLoader(loader.dataset, batch_sampler=[keys], collate_fn=loader.collate_fn)))


def _to_loggers(trainer: Trainer, sheet: Image.Image, step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image("pictures", np.asarray(sheet), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image("pictures", [sheet], step)
