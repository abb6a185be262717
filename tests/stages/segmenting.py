"""Small pictures with label maps, and a stage that learns them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit_pretrain.data.module import DataModule
from beit_pretrain.data.scenes import SceneBatch, SceneView, WholeView
from beit_pretrain.data.sources import SceneSource
from beit_pretrain.dense import Sliding
from beit_pretrain.models.beit import Beit
from beit_pretrain.optim import Recipe
from beit_pretrain.stages.segment import Segment

NAMES = ["earth", "water", "air", "fire"]
SIZE = (12, 8)  # of a crop


class Fields(SceneSource):
    """Pictures of 13 x 9 to 21 x 20 pixels in fields of four shades with noise, one shade to a class.

    The share of ignored pixels differs; of the images `blank` nothing is labelled. Every second image is for
    validation.
    """

    def __init__(self, count: int = 16, blank: Sequence[int] = ()) -> None:
        draw = np.random.default_rng(0)
        self.class_names = NAMES
        self.images, self.maps = [], []
        for number in range(count):
            rows, cols = np.ogrid[: 13 + number % 9, : 9 + number * 5 % 12]
            labels = ((rows + number) // 5 + cols // (3 + number % 3)) % 4
            shade = 40 + 55 * labels + draw.normal(0, 12, (3, *labels.shape))
            ignored = draw.random(labels.shape) < (1 if number in blank else number % 4 / 5)
            self.images.append(torch.from_numpy(np.clip(shade, 0, 255).astype(np.uint8)))
            self.maps.append(torch.from_numpy(np.where(ignored, 255, labels).astype(np.uint8)))
        self.splits = {"train": np.arange(0, count, 2), "val": np.arange(1, count, 2)}

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def label_map(self, index: int) -> Tensor:
        return self.maps[index]

    def name(self, index: int) -> str:
        return f"/fields/{index}.png"

    def fingerprint(self) -> str:
        return "fields"


def sliding(**options: Any) -> Sliding:
    return Sliding(**{"crop": SIZE, "patch_size": 4, "windows": 3, **options})


def segment(folder: Path = Path("."), *, shape: dict[str, Any] | None = None, **options: Any) -> Any:
    """A stage in which nothing is left to chance but the initial weights: no stochastic depth, no dropout."""
    defaults: dict[str, Any] = {
        "classes": NAMES,
        "blocks": None,
        "channels": 10,
        "auxiliary_weight": 0.4,
        "predict": sliding(),
        "optim": Recipe(lr=0.01, min_lr=0.0, schedule="poly", warmup_epochs=0, clip=None),
        "epochs": 2,
        "views": SceneView(image_size=SIZE, fill=[0.4, 0.5, 0.6], distortion=False),
        "eval_views": WholeView(),
        "normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.5]},
        "seed": 0,
        "log_every": 1,
        "max_bad_steps": 3,
        "run_dir": folder,
    }
    torch.manual_seed(0)
    form = {"image_size": SIZE, "patch_size": 4, "width": 12, "depth": 3, "heads": 3, "drop_path": 0.0}
    form |= {"rel_pos": "per_layer", "mask_token": False, **(shape or {})}
    stage = Segment(encoder=Beit(**form), **{**defaults, **options})
    for module in stage.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    stage.record = {"preprocessing": {"class_names": list(stage.classes)}, "lineage": {"parents": {}}}
    return stage


def data_of(stage: Any, source: SceneSource, batch_size: int = 4, micro: int | None = None) -> DataModule:
    return DataModule(
        source=source,
        views=stage.views,
        eval_views=stage.eval_views,
        batch_size=batch_size,
        micro_batch_size=micro,
        workers=0,
        seed=0,
        val_share=0.0,
        max_bad=0.0,
        bad_log=None,
        scenes=True,
    )


def crops(count: int = 3, size: tuple[int, int] = SIZE, ignored: float = 0.3, seed: int = 1) -> SceneBatch:
    """A batch of noise with random labels."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (count, 3, *size), generator=generator).to(torch.uint8)
    label_map = torch.randint(len(NAMES), (count, *size), generator=generator).to(torch.uint8)
    label_map[torch.rand(label_map.shape, generator=generator) < ignored] = 255
    return SceneBatch(image, label_map, torch.arange(count), torch.zeros(count, dtype=torch.int64))
