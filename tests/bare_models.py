"""Encoder and head without a run around them, in any size, for tests of formats."""

from __future__ import annotations

from typing import Any

from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.models.upernet import SegmentationHead
from beit_pretrain.models.whole import Classifier, MaskedImageModel, Segmenter

SMALL: dict[str, Any] = dict(image_size=(16, 24), patch_size=4, width=24, depth=5, heads=3)


def masked(size: dict[str, Any], **options: Any) -> MaskedImageModel:
    encoder = Beit(**size, **options)
    return MaskedImageModel(encoder, MIMHead(width=encoder.width, vocab_size=64))


def classifier(size: dict[str, Any], pooling: Any = "mean", **options: Any) -> Classifier:
    encoder = Beit(**size, **{"rel_pos": "per_layer", "mask_token": False, **options})
    return Classifier(encoder, ClassHead(width=encoder.width, classes=7, pooling=pooling))


def segmenter(size: dict[str, Any], **options: Any) -> Segmenter:
    encoder = Beit(**size, **{"rel_pos": "per_layer", "mask_token": False, **options})
    head = SegmentationHead(width=encoder.width, channels=encoder.width, classes=5)
    return Segmenter(encoder, head, [0, 1, 2, encoder.depth - 1])
