"""Encoder and head as one module: what a trained model is used as, without a stage around it.

Letters: B images, N patches, L = 1 + N tokens, D the encoder's width, V vocabulary, C classes, (H, W) an image's size,
(h, w) the encoder's grid. Parameters are named `encoder.*` and `head.*`, as in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.models.upernet import SegmentationHead, maps_of


class Headless(nn.Module):
    """An encoder alone: what is left of a model whose head was not kept."""

    def __init__(self, encoder: Beit) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """Tokens (B, L, D) of normalised images (B, 3, H, W)."""
        return self.encoder(image)


class MaskedImageModel(nn.Module):
    """What pre-training leaves: an encoder that predicts the visual token of every patch."""

    def __init__(self, encoder: Beit, head: MIMHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) of normalised images (B, 3, H, W); patches where `mask` (B, N) is True are hidden."""
        return self.head.lm_head(self.head.norm(self.encoder(image, mask)[:, 1:]))


class Classifier(nn.Module):
    """An encoder with a class head."""

    def __init__(self, encoder: Beit, head: ClassHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, 3, H, W)."""
        return self.head(self.encoder(image))


class Segmenter(nn.Module):
    """An encoder whose `blocks`, counted from 0, feed neck and UPerNet."""

    def __init__(self, encoder: Beit, head: SegmentationHead, blocks: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.head, self.blocks = encoder, head, list(blocks)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C, 4h, 4w) of normalised images (B, 3, H, W), of sides that the patch divides."""
        tokens = self.encoder.features(image, self.blocks)
        return self.head(maps_of(tokens, image, self.encoder.patch_size))

    @staticmethod
    def label_maps(logits: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
        """The class of each pixel (H, W) int64, for each image of logits (B, C, ...).

        `sizes` are (H, W) of each image, to which its logits are brought first, bilinear between pixel centres;
        None leaves them at the model's own size. ValueError if there is not one for each image.
        """
        if sizes is None:
            return list(logits.argmax(1))
        return [
            F.interpolate(one[None], size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(0)
            for one, size in zip(logits, sizes, strict=True)
        ]
