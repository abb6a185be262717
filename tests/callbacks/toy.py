"""A small stage with all that a callback could disturb: dropout, batch statistics, a counter, randomness."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

KNOWN_WARNINGS = (  # Lightning's, about itself and about a toy
    "ignore:`isinstance.treespec, LeafSpec.`:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
)


class Batch(NamedTuple):
    image: Tensor
    label: Tensor
    sample: Tensor
    view: Tensor


class Images(Dataset[Batch]):
    """Uint8 pictures of two classes, bright above or below; non-square, noisy by the sample's index."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        sample = self.first + index
        noise = torch.Generator().manual_seed(sample)
        image = torch.randint(0, 120, (3, 8, 6), generator=noise, dtype=torch.uint8)
        label = sample % 2
        image[:, 4 * label : 4 * label + 4] += 100
        return Batch(image, torch.tensor(label), torch.tensor(sample), torch.tensor(0))


def collate(items: Sequence[Batch]) -> Batch:
    return Batch(*(torch.stack(list(column)) for column in zip(*items, strict=True)))


class Data(LightningDataModule):
    """48 images to learn from, 20 held out."""

    def __init__(self, micro: int = 8, labels: bool = True) -> None:
        super().__init__()
        self.micro, self.labels = micro, labels
        self.asked: list[tuple[str, Any]] = []

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(Images(0, 48), batch_size=self.micro, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(Images(1000, 20), batch_size=5, collate_fn=collate)

    def labelled(self, split: str, **how: Any) -> DataLoader[Batch] | None:
        self.asked.append((split, how))
        images = Images(0, 48) if split == "train" else Images(1000, 20)
        return DataLoader(images, batch_size=7, shuffle=True, collate_fn=collate) if self.labels else None


class Encoder(nn.Module):
    """Two "blocks" over 2 x 2 patches of 8 x 6 images, a first token in front."""

    depth, width = 2, 5

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, self.width, 2, stride=2)
        self.blocks = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(self.depth))
        self.norm = nn.BatchNorm1d(self.width)
        self.drop = nn.Dropout(0.3)

    def features(self, image: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        tokens = self.embed(image).flatten(2).transpose(1, 2)  # (B, 12, D)
        tokens = torch.cat([torch.full_like(tokens[:, :1], 1e3), tokens], 1)
        outputs = []
        for block in self.blocks:
            tokens = self.drop(tokens + block(tokens).tanh())
            outputs.append(tokens)
        return [outputs[i] for i in blocks]

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.features(image, [1])[0][:, 1:].mean(1))


class Toy(LightningModule):
    """Learns the class; what it offers to callbacks is what every stage offers."""

    self_supervised = True

    def __init__(self, epochs: int = 3, steps_per_epoch: int = 6, batch_size: int = 8) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(Encoder.width, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.epochs, self.steps_per_epoch, self.batch_size = epochs, steps_per_epoch, batch_size
        self.latest: dict[str, float] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.modes: list[bool] = []

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def normalize(self, image: Tensor) -> Tensor:
        return image.float() / 255 - 0.5

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.logged.append((self.trainer.global_step, metrics))
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, self.trainer.global_step)

    def picture_rows(self, batch: Batch) -> dict[str, Tensor] | None:
        self.modes.append(self.training or self.encoder.drop.training or torch.is_grad_enabled())
        # A careless stage: it draws from all three generators.
        noise = torch.rand(batch.image.shape) * random.random() * float(np.random.rand())
        image = batch.image.float() / 255
        return {"original": image, "noise": noise}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen += len(batch.image)
        # Global generators on purpose: a callback that draws from one of them changes the run.
        scale = 1 + 0.1 * (random.random() + float(np.random.rand()) + torch.rand(()).item())
        loss = nn.functional.cross_entropy(self.head(self.encoder(self.normalize(batch.image))), batch.label)
        self.latest = {"train/loss": loss.item(), "train/accuracy": 0.25, "train/lr": 0.1}
        return loss * scale

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.head(self.encoder(self.normalize(batch.image))), batch.label)
        self.log("val/loss", loss, batch_size=len(batch.image), logger=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit(stage: Toy, data: Data, folder: Path, callbacks: list[Callback], **options: Any) -> Trainer:
    """Train from a fixed seed on one CPU thread."""
    torch.set_num_threads(1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    shows = any(isinstance(callback, ProgressBar) for callback in callbacks)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": stage.epochs,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            "callbacks": callbacks,
            "enable_progress_bar": shows,
            **quiet,
            **options,
        }
    )
    trainer.fit(stage, datamodule=data)
    return trainer
