"""How well the features of each block tell classes apart, asked while the model trains.

Letters: B images, L = 1 + N tokens, D width, S images in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from beit_pretrain.callbacks.isolation import due, isolated
from beit_pretrain.evaluation import Encoder, Labelled, block_features, knn_accuracy


class _Stage(Protocol):
    self_supervised: bool
    steps_per_epoch: int

    @property
    def total_steps(self) -> int: ...

    def normalize(self, image: Tensor) -> Tensor: ...

    def log_metrics(self, metrics: dict[str, float]) -> None: ...


class OnlineKnn(Callback):
    """Weighted kNN (cosine) on every block's mean-pooled patch tokens: train images vote on held-out ones.

    Every `every_epochs` epochs and after the last, on at most `limit` images of each side (None: all), logs
    the accuracy as `knn/block_{i}`, the highest as `knn/best` and its block as `knn/best_block`. The best
    block is chosen on the very images it is reported for: a guide while training, not a result. Stages that learn
    from labels measure themselves and are left alone.
    """

    def __init__(
        self,
        every_epochs: int,
        image_size: int | Sequence[int],
        limit: int | None,
        crop_pct: float = 1.0,
        k: int = 20,
        temperature: float = 0.07,
    ) -> None:
        self.every_epochs = every_epochs
        sides = [image_size, image_size] if isinstance(image_size, int) else image_size
        self.image_size = (sides[0], sides[1])
        self.limit = limit
        self.crop_pct = crop_pct
        self.k = k
        self.temperature = temperature
        self._off = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._off or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        stage = cast(_Stage, pl_module)
        if not stage.self_supervised:
            self._off = True
            return
        if not due(
            step=trainer.global_step,
            steps_per_epoch=stage.steps_per_epoch,
            total_steps=stage.total_steps,
            every_epochs=self.every_epochs,
        ):
            return
        encoder = dict(pl_module.named_children()).get("encoder")
        if encoder is None:
            self._skip("this stage has no encoder")
            return
        train, held_out = self._loader(trainer, "train"), self._loader(trainer, "val")
        if train is None or held_out is None:
            self._skip("the data have no labels")
            return
        with isolated(trainer, pl_module):
            support, query = (
                block_features(cast(Encoder, encoder), stage.normalize, loader, pl_module.device)
                for loader in (train, held_out)
            )
        if len(support[1]) < self.k:
            self._skip(f"{len(support[1])} labelled training images, but callbacks.knn.k={self.k}")
            return
        stage.log_metrics(self._score(support, query, pl_module.device))

    def _loader(self, trainer: Trainer, split: str) -> Iterable[Labelled] | None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        return data.labelled(split, image_size=self.image_size, limit=self.limit, crop_pct=self.crop_pct)

    def _score(
        self, support: tuple[list[Tensor], Tensor], query: tuple[list[Tensor], Tensor], device: torch.device
    ) -> dict[str, float]:
        # Numbered anew, so that gaps between the labels cost nothing.
        names, labels = torch.unique(torch.cat([support[1], query[1]]), return_inverse=True)
        voters, asked = labels.to(device).split([len(support[1]), len(query[1])])
        accuracy = [
            knn_accuracy(
                s.to(device),
                voters,
                q.to(device),
                asked,
                k=self.k,
                temperature=self.temperature,
                classes=len(names),
            )
            for s, q in zip(support[0], query[0], strict=True)
        ]
        best = max(range(len(accuracy)), key=accuracy.__getitem__)
        return {
            **{f"knn/block_{i}": value for i, value in enumerate(accuracy)},
            "knn/best": accuracy[best],
            "knn/best_block": best,
        }

    def _skip(self, why: str) -> None:
        rank_zero_info(f"No kNN while training: {why}.")
        self._off = True
