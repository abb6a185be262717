"""Nearest-neighbour classification on frozen features: what pre-training is worth before any fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.errors import DataError
from beit_pretrain.evaluation import block_features, knn_accuracy
from beit_pretrain.models.beit import Beit

REMARK = (
    "Raw pixels are strong on small, centred, grey pictures such as the digits, and mean little elsewhere; the "
    "untrained encoder is the floor that pre-training has to beat."
)


class Knn:
    """Weighted kNN (cosine) on mean-pooled patch tokens of every block.

    The block is chosen on the validation images with the training images as support; where the data have test
    images, the result is that block's accuracy on them, with training and validation images as support.
    """

    def __init__(self, *, k: int, temperature: float, limit: int | None, crop_pct: float) -> None:
        self.k = k
        self.temperature = temperature
        self.limit = limit
        self.crop_pct = crop_pct

    def score(
        self,
        encoders: dict[str, Beit],
        normalize: Callable[[Tensor], Tensor],
        data: Any,
        device: torch.device,
    ) -> dict[str, Any]:
        """Results for each encoder by name and for raw pixels: blocks, the best block and its accuracy."""
        encoder = next(iter(encoders.values()))
        size = tuple(side * encoder.patch_size for side in encoder.grid)
        loaders = {
            split: data.labelled(split, image_size=size, limit=self.limit, crop_pct=self.crop_pct)
            for split in ("train", "val", "test")
        }
        if loaders["train"] is None or loaders["val"] is None:
            raise DataError(
                "kNN needs labels: data.root has no class folders; give labelled images with data=..."
            )
        results = {
            name: self._choose(
                {
                    split: block_features(encoder.eval().to(device), normalize, loader, device)
                    for split, loader in loaders.items()
                    if loader is not None
                }
            )
            for name, encoder in encoders.items()
        }
        pixels = {split: _pixels(loader) for split, loader in loaders.items() if loader is not None}
        return {**results, "pixels": self._choose(pixels), "remark": REMARK}

    def _choose(self, features: dict[str, tuple[list[Tensor], Tensor]]) -> dict[str, Any]:
        classes = 1 + max(int(labels.max()) for _, labels in features.values())

        def accuracy(support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> float:
            return knn_accuracy(*support, *query, k=self.k, temperature=self.temperature, classes=classes)

        train, train_labels = features["train"]
        val, val_labels = features["val"]
        rows = [
            {"block": i, "val": accuracy((train[i], train_labels), (val[i], val_labels))}
            for i in range(len(train))
        ]
        best = max(rows, key=lambda row: row["val"])["block"]
        result: dict[str, Any] = {"blocks": rows, "best_block": best, "accuracy": rows[best]["val"]}
        result["images"] = len(val_labels)
        if "test" in features:
            test, test_labels = features["test"]
            labels = torch.cat([train_labels, val_labels])
            for i, row in enumerate(rows):
                row["test"] = accuracy((torch.cat([train[i], val[i]]), labels), (test[i], test_labels))
            result["accuracy"] = rows[best]["test"]
            result["images"] = len(test_labels)
        return result


def _pixels(loader: Any) -> tuple[list[Tensor], Tensor]:
    """The pictures themselves as the features (S, 3 * H * W) of a single block."""
    batches = list(loader)
    pictures = torch.cat([batch.image.flatten(1).float() for batch in batches])
    return [pictures], torch.cat([batch.label for batch in batches])
