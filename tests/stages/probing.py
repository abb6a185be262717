"""A small encoder, three classes of pictures, and a stage that probes one on the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from beit_pretrain.checkpoint.saving import AtomicCheckpointIO
from beit_pretrain.data.module import DataModule
from beit_pretrain.data.sources import Source
from beit_pretrain.data.transforms import EvalView, OneView
from beit_pretrain.models.beit import Beit
from beit_pretrain.optim import Recipe
from beit_pretrain.stages.probe import Probe

KNOWN_WARNINGS = (
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:Found .* eval mode",
)

NAMES = ["down", "up", "flat"]
LRS = [0.03, 0.003]


class Slopes(Source):
    """Pictures of three classes, brighter below, above or nowhere, in noise; 12 x 10 pixels.

    `wrong` gives the validation images (a quarter, after the first half) labels of another class.
    """

    def __init__(
        self, count: int = 60, bad: tuple[int, ...] = (), held_out: bool = True, wrong: bool = False
    ) -> None:
        draw = np.random.default_rng(0)
        self.labels = np.arange(count) % 3
        slope = np.linspace(-1, 1, 12)[:, None] * np.array([1, -1, 0])[self.labels][:, None, None]
        noise = draw.normal(0, 30, (count, 3, 12, 10))
        self.images = torch.from_numpy(np.clip(128 + 12 * slope[:, None] + noise, 0, 255).astype(np.uint8))
        self.class_names = NAMES
        self.bad = bad
        parts = np.split(np.arange(count), [count // 2, 3 * count // 4])
        self.splits = dict(zip(("train", "val", "test"), parts, strict=True))
        if wrong:
            self.labels[parts[1]] = (self.labels[parts[1]] + 1) % 3
        if not held_out:
            self.splits = {"train": np.arange(count)}

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        if index in self.bad:
            raise OSError("broken")
        return self.images[index]

    def name(self, index: int) -> str:
        return f"slope {index}"

    def fingerprint(self) -> str:
        return "slopes"


class Counting(Beit):
    """Counts the images it sees."""

    seen = 0

    def features(self, image: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        self.seen += len(image)
        return super().features(image, *args, **kwargs)


def encoder(seed: int = 0, **shape: Any) -> Counting:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"image_size": (12, 8), "patch_size": 4, "width": 12, "depth": 2, "heads": 3}
    return Counting(
        **{**options, "layer_scale": 0.0, "drop_path": 0.5, "init_std": 0.1, "init_cut": 0.2, **shape}
    )


def recipe(lr: float = LRS[0], clip: float | None = None) -> Recipe:
    return Recipe(lr=lr, min_lr=0.0, warmup_epochs=0, weight_decay=1e-4, clip=clip)


def probe(folder: Path, **options: Any) -> Probe:
    size = (12, 8)
    defaults: dict[str, Any] = {
        "classes": NAMES,
        "lrs": LRS,
        "poolings": ["cls", "mean", "both"],
        "augment": False,
        "cache": "auto",
        "cache_gb": 1.0,
        "attentive": False,
        "pixels": True,
        "all_labels": False,
        "optim": recipe(),
        "epochs": 4,
        "views": OneView(image_size=size, crop_scale=(0.5, 1.0)),
        "eval_views": EvalView(image_size=size, crop_pct=1.0),
        "normalize": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "seed": 0,
        "log_every": 50,
        "max_bad_steps": 3,
        "run_dir": folder,
    }
    body = options.pop("encoder", None) or encoder()
    torch.manual_seed(1)
    stage = Probe(encoder=body, **{**defaults, **options})
    stage.record = {"preprocessing": {"class_names": list(stage.classes)}, "lineage": {"parents": {}}}
    return stage


def data_of(stage: Probe, source: Source | None = None, batch_size: int = 8) -> DataModule:
    return DataModule(
        source=source or Slopes(),
        views=stage.views,
        eval_views=stage.eval_views,
        batch_size=batch_size,
        micro_batch_size=None,
        workers=0,
        seed=0,
        val_share=0.0,
        max_bad=0.5,
        bad_log=None,
        labelled=True,
    )


def fit(stage: Probe, data: DataModule, ckpt: Path | None = None, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    common = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    torch.set_num_threads(1)
    defaults = {"max_epochs": stage.epochs, "inference_mode": False, "plugins": [AtomicCheckpointIO()]}
    trainer = pl.Trainer(**{**quiet, **common, "enable_model_summary": False, **defaults, **options})
    trainer.fit(stage, datamodule=data, ckpt_path=ckpt)
    return trainer


def weights(stage: Probe) -> dict[str, Tensor]:
    """Of the classifiers that were chosen from, and of those that were tested."""
    twins = {} if stage.twins is None else stage.twins.state_dict(prefix="twins.")
    return {name: value.clone() for name, value in {**stage.bank.state_dict(), **twins}.items()}
