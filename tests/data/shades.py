"""A small source in memory, and a data module over it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit_pretrain.data.module import DataModule
from beit_pretrain.data.sources import Source
from beit_pretrain.data.transforms import TwoViews
from beit_pretrain.masking import RandomMask


class Shades(Source):
    """`count` pictures of noise in memory, with any labels and splits."""

    def __init__(self, count: int, labels: Any = None, splits: dict[str, Any] | None = None) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (count, 3, 12, 10), dtype=np.uint8)
        self.images = torch.from_numpy(noise)
        self.labels = None if labels is None else np.asarray(labels)
        self.class_names = None if labels is None else [f"class {i}" for i in range(max(labels) + 1)]
        self.splits = {name: np.asarray(indices) for name, indices in (splits or {}).items()}

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return str(len(self))


def make_module(source: Source, **changes: Any) -> DataModule:
    mask = RandomMask(grid=(2, 2), count=1)
    views = TwoViews(image_size=(8, 8), token_image_size=(8, 8), mask=mask)
    settings: dict[str, Any] = {
        "views": views,
        "eval_views": views,
        "batch_size": 8,
        "micro_batch_size": None,
        "workers": 0,
        "seed": 1,
        "bad_log": None,
    }
    return DataModule(source=source, **(settings | changes))


def flat(batches: Any) -> list[tuple[Any, ...]]:
    return [tuple(None if part is None else part.tolist() for part in batch) for batch in batches]


class Strategy:
    root_device = torch.device("cpu")
