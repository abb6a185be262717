"""Encoder and head in one: what Transformers give for the same weights, on images that are not square too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from transformers import BeitImageProcessor

from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.models.upernet import SegmentationHead
from beit_pretrain.models.whole import Classifier, MaskedImageModel, Segmenter

TOLERANCE = 1e-5  # of max(1, max |reference|)
FAR = 100 * TOLERANCE

sizes = pytest.mark.parametrize("size", [(48, 48), (72, 40)], ids=["square", "non-square"])


def encoder_of(size: tuple[int, int], **options: Any) -> Beit:
    return Beit(image_size=size, patch_size=8, width=24, depth=6, heads=3, **options)


def strong(whole: Any) -> Any:
    oracles.strengthen(whole.encoder)
    oracles.strengthen(whole.head, seed=1)
    return whole.eval()


def pictures(size: tuple[int, int], images: int = 3) -> Tensor:
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(2))


@sizes
@torch.no_grad()
def test_a_masked_image_model_gives_ids_to_all_patches_as_transformers_do(size: tuple[int, int]) -> None:
    ours = strong(MaskedImageModel(encoder_of(size), MIMHead(width=24, vocab_size=37)))
    twin = oracles.hugging_face_twin(ours.encoder, ours.head, size)
    image, patches = pictures(size), size[0] // 8 * size[1] // 8
    mask = torch.rand(len(image), patches, generator=torch.Generator().manual_seed(3)) < 0.4
    for hidden in (mask, None):
        reference = twin(image, bool_masked_pos=hidden).logits
        found = ours(image, hidden)
        assert found.shape == (3, patches, 37)
        assert oracles.difference(found, reference) <= TOLERANCE
    assert oracles.difference(ours(image, mask), reference) > FAR, "the mask"
    assert torch.equal(ours(image, mask)[mask], ours.head(ours.encoder(image, mask), mask)), "as in training"


@sizes
@torch.no_grad()
def test_a_classifier_gives_what_transformers_and_timm_give(size: tuple[int, int]) -> None:
    encoder = encoder_of(size, rel_pos="per_layer", mask_token=False)
    ours = strong(Classifier(encoder, ClassHead(width=24, classes=11)))
    image = pictures(size)
    theirs = oracles.hugging_face_classifier(encoder, ours.head, size)(image).logits
    assert ours(image).shape == (3, 11)
    assert oracles.difference(ours(image), theirs) <= TOLERANCE
    assert oracles.difference(ours(image), oracles.timm_twin(encoder, size, ours.head)(image)) <= TOLERANCE
    assert oracles.difference(ours(image.flip(-1)), theirs) > FAR


def segmenter_of(size: tuple[int, int], blocks: list[int]) -> Segmenter:
    encoder = encoder_of(size, rel_pos="per_layer", mask_token=False)
    return strong(Segmenter(encoder, SegmentationHead(width=24, channels=24, classes=7), blocks))


@sizes
@torch.no_grad()
def test_a_segmenter_gives_what_transformers_give_of_the_same_blocks(size: tuple[int, int]) -> None:
    ours = segmenter_of(size, [1, 2, 3, 5])
    image = pictures(size)
    twin = oracles.hugging_face_segmenter(ours.encoder, ours.head, size, [1, 2, 3, 5])
    reference = twin(image).logits
    assert ours(image).shape == (3, 7, size[0] // 2, size[1] // 2)
    assert oracles.difference(ours(image), reference) <= TOLERANCE
    ours.blocks = [1, 2, 3, 4]
    assert oracles.difference(ours(image), reference) > FAR


@torch.no_grad()
def test_label_maps_are_those_that_transformers_make() -> None:
    """Larger, smaller, of another shape than the image, a single pixel, and as the logits are."""
    logits = segmenter_of((72, 40), [1, 2, 3, 5])(pictures((72, 40), 5))  # (5, 7, 36, 20)
    outputs, theirs = SimpleNamespace(logits=logits), BeitImageProcessor()
    targets = [(72, 40), (181, 333), (17, 9), (1, 1), (36, 20)]
    for given in (targets, None):
        found = Segmenter.label_maps(logits, given)
        expected = theirs.post_process_semantic_segmentation(outputs, given)
        assert [tuple(one.shape) for one in found] == (given or [(36, 20)] * 5)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.int64 and torch.equal(one, other)
    assert len(found[0].unique()) > 2, "several classes in one map"
    # Classes brought to a size are not what comes of logits brought to it.
    classes = torch.nn.functional.interpolate(found[1][None, None].float(), size=targets[1])[0, 0].long()
    assert not torch.equal(classes, Segmenter.label_maps(logits, targets)[1])


@pytest.mark.parametrize("many", [1, 3])
def test_label_maps_want_a_size_for_each_image(many: int) -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        Segmenter.label_maps(torch.zeros(2, 3, 4, 5), [(8, 10)] * many)
