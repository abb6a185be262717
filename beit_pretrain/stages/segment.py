"""Semantic segmentation with UPerNet (BEiT paper, Sec. 3.2).

Letters: B images, C classes, D the encoder's width, (H, W) an image's size, (h, w) the encoder's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit_pretrain.checkpoint.adapt import check_classes
from beit_pretrain.dense import SegmentationScore, Sliding
from beit_pretrain.errors import ConfigError
from beit_pretrain.label_maps import IGNORED
from beit_pretrain.models.batch_norm import BatchNorm
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.default_blocks import blocks_of_null, default_blocks
from beit_pretrain.models.upernet import SegmentationHead, maps_of
from beit_pretrain.stages.base import Stage, StepResult
from beit_pretrain.stages.worst import WorstImages


class Segment(Stage):
    """An encoder with neck, UPerNet and auxiliary head, all trained; the loss is the mean over labelled pixels.

    - `classes`: names in the order of the labels.
    - `blocks`: four blocks, counted from 0 in rising order and the last one among them, that the neck starts from;
      None for those that it stands for in runs that stored it (`blocks_of_null`); new ones store four numbers.
    - `channels`: of UPerNet.
    - `auxiliary_weight`: of the auxiliary head's loss.
    - `predict`: how whole images are segmented.

    Raises ConfigError with all faults at once.
    """

    monitor = ("val/miou", "max")
    self_supervised = False
    counts_vary = True  # pixels may be without a label

    def __init__(
        self,
        *,
        encoder: Beit,
        classes: list[str],
        blocks: Sequence[int] | None,
        channels: int,
        auxiliary_weight: float,
        predict: Sliding,
        compile: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        _check(blocks, encoder.depth, channels, auxiliary_weight)
        self.encoder = encoder
        self.classes = list(classes)  # Hydra hands over its own kind of list
        self.blocks = list(blocks) if blocks is not None else blocks_of_null(encoder.depth)
        self.head = SegmentationHead(width=encoder.width, channels=channels, classes=len(classes))
        self.auxiliary_weight = auxiliary_weight
        self.sliding = predict
        self.score = SegmentationScore(len(classes))
        self.worst = WorstImages()
        self.look: dict[str, Any] = {}  # what the label maps looked like before the start
        self.table: dict[str, Any] = {}  # the last held-out score, whole
        self._features = torch.compile(encoder.features) if compile else encoder.features
        self._norms = [module for module in self.head.modules() if isinstance(module, BatchNorm)]
        self._before: list[Tensor] = []  # the norms' running statistics before the step

    @property
    def depth(self) -> int:
        return self.encoder.depth

    @property
    def units(self) -> list[nn.Module]:
        return list(self.encoder.blocks)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> the four blocks' maps (B, D, h, w)."""
        return maps_of(self._features(image, self.blocks), image, self.encoder.patch_size)

    # --- one step --------------------------------------------------------------------------------------------

    def compute(self, batch: Any, step: int) -> StepResult:
        if not self._before:
            self._before = [buffer.clone() for buffer in self._running()]
        target = batch.label_map.long()  # (B, H, W)
        logits, decode, auxiliary = self.losses(self.maps(self.normalize(batch.image)), target)
        return StepResult(
            decode + self.auxiliary_weight * auxiliary,
            (target != IGNORED).sum(),
            {
                "decode": decode,
                "auxiliary": auxiliary,
                "accuracy": (logits.detach().argmax(1) == target).sum(),
            },
        )

    def losses(self, maps: Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits (B, C, H, W) of maps (B, D, h, w) at the size of the target (B, H, W), and the summed
        cross-entropy of both heads over the labelled pixels."""
        logits, auxiliary = (_at(found, target) for found in self.head.with_auxiliary(maps))
        decode, second = (
            F.cross_entropy(found, target, ignore_index=IGNORED, reduction="sum")
            for found in (logits, auxiliary)
        )
        return logits, decode, second

    def expected_count(self, batch: Any) -> int:
        return batch.label_map.numel()

    def _running(self) -> list[Tensor]:
        return [buffer for norm in self._norms for buffer in norm.buffers()]

    def after_step(self, step: int) -> None:
        self._before = []

    def drop_pending(self) -> None:
        """Running statistics of a refused update would carry its NaN on."""
        for buffer, before in zip(self._running(), self._before, strict=True):
            buffer.copy_(before)
        self._before = []

    # --- held-out score --------------------------------------------------------------------------------------

    def logits(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8, of sides that the patch divides -> logits (B, C, 4h, 4w)."""
        return self.head(self.maps(self.normalize(image))).float()

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """An image (3, H, W) uint8 of any size -> the class of each pixel (H, W) uint8, as `predict` is set."""
        return self.sliding.predict(self.logits, image)

    def evaluate(self, batch: Any) -> None:
        for image, label_map, sample in zip(
            batch.images, batch.label_maps, batch.sample.tolist(), strict=True
        ):
            predicted = self.predict(image)
            self.score.update(predicted, label_map)
            self.worst.offer(sample, image, label_map, predicted, len(self.classes))

    def evaluation(self) -> dict[str, float]:
        self.table = self.score.result()
        self.score.reset()
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.table["worst"] = self.worst.write(self.run_dir, self.classes, data.source.name)
        return {f"val/{key}": self.table[key] for key in ("miou", "macc", "aacc", "images")}

    def results(self) -> dict[str, Any]:
        """IoU and accuracy of each class, the worst images, and what the label maps looked like at the start."""
        if not self.table:
            return {}
        keys = ("iou", "accuracy", "pixels", "mistakes", "ignored", "worst")
        return {
            "segmentation": {
                "split": "test" if self.tested else "val",
                "classes": self.classes,
                **{key: self.table[key] for key in keys},
                "how": self.sliding.describe(),
                "look": self.look,
            }
        }

    # --- checkpoints -----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # A run killed between its last update and its results has nothing left to evaluate.
        checkpoint["beit_pretrain"]["table"] = self.table

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_classes(checkpoint, self.classes)
        super().on_load_checkpoint(checkpoint)
        self.table = checkpoint["beit_pretrain"]["table"]


def _at(logits: Tensor, target: Tensor) -> Tensor:
    """Logits (B, C, ...) in float32 at the size of the label maps (B, H, W), bilinear between pixel centres."""
    return F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)


def _check(blocks: Any, depth: int, channels: Any, auxiliary_weight: Any) -> None:
    faults = []
    four = isinstance(blocks, Sequence) and len(blocks) == 4 and all(type(block) is int for block in blocks)
    rising = four and all(0 <= a <= b for a, b in pairwise(blocks)) and blocks[-1] == depth - 1
    if blocks is not None and not rising:
        faults.append(
            f"stage.blocks={blocks}: set four blocks in rising order, the last one {depth - 1}, the encoder's last, "
            f"such as {default_blocks(depth)}, or leave it out"
        )
    if type(channels) is not int or channels < 1:
        faults.append(f"stage.channels={channels}: set a whole number from 1")
    if not isinstance(auxiliary_weight, int | float) or auxiliary_weight < 0:
        faults.append(f"stage.auxiliary_weight={auxiliary_weight}: set 0 (no auxiliary loss) or more")
    if faults:
        raise ConfigError(faults)
