"""Pictures of what the model does with held-out images, drawn while it trains.

Letters: B images, H and W their sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader

from beit_pretrain.callbacks.isolation import due, isolated

CELL = 96  # small images are magnified to about this width, in pixels
MARGIN, GAP, LINE = 20, 6, 17
PAPER, INK, FAINT = (255, 255, 255), (38, 38, 42), (120, 120, 128)


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
        sheet = draw_sheet(rows, f"step {step:,}")
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


def draw_sheet(columns: Mapping[str, Tensor], title: str) -> Image.Image:
    """A sheet with one titled column per entry, each (B, 3, H, W) in [0, 1], and one row per image.

    Small images are magnified without smoothing; columns of another size are brought to the first one's.
    """
    first = next(iter(columns.values()))
    factor = max(1, round(CELL / first.shape[-1]))
    size = (first.shape[-1] * factor, first.shape[-2] * factor)
    heading, plain = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    titles = [_wrap(name, plain, size[0]) for name in columns]
    top = MARGIN + 30 + max(len(lines) for lines in titles) * LINE
    width = 2 * MARGIN + len(columns) * (size[0] + GAP) - GAP
    height = top + MARGIN + len(first) * (size[1] + GAP) - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), title, INK, heading)
    for number, (lines, images) in enumerate(zip(titles, columns.values(), strict=True)):
        left = MARGIN + number * (size[0] + GAP)
        for above, line in enumerate(reversed(lines)):
            draw.text((left, top - 4 - LINE * (above + 1)), line, FAINT, plain)
        for row, image in enumerate(images):
            sheet.paste(_picture(image, size), (left, top + row * (size[1] + GAP)))
    return sheet


def _picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (H, W, 3)
    picture = Image.fromarray(pixels.cpu().numpy())
    whole = size[0] % picture.width == 0 and size[1] % picture.height == 0
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """The text in lines that fit, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
