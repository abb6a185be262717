"""Neck, UPerNet and auxiliary head against Transformers', published sizes, and by hand."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit_pretrain.models.beit import Beit
from beit_pretrain.models.blocks import Block
from beit_pretrain.models.default_blocks import blocks_of_null, default_blocks
from beit_pretrain.models.upernet import Neck, SegmentationHead, resized

TOLERANCE = 1e-5  # of max(1, max |reference|)

# Encoder, neck and both heads of 150 classes with one table per block, without a mask token; REFERENCE: the counts of
# the published files (Transformers' have an unused final norm more).
PUBLISHED = [
    ("base", 512, 163_080_812),
    ("base", 640, 163_407_980),
    ("large", 512, 440_398_636),
    ("large", 640, 441_271_084),
]
SIZES = {"base": (768, 12, 12), "large": (1024, 24, 16)}


def head_of(width: int = 24, channels: int = 40, classes: int = 7) -> SegmentationHead:
    head = SegmentationHead(width=width, channels=channels, classes=classes)
    oracles.strengthen(head, seed=1)
    return head.eval()


def maps(rows: int, columns: int, width: int = 24, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch, width, rows, columns, generator=generator) for _ in range(4)]


def small_encoder(image_size: tuple[int, int] = (72, 40)) -> Beit:
    encoder = Beit(
        image_size=image_size,
        patch_size=8,
        width=24,
        depth=6,
        heads=3,
        rel_pos="per_layer",
        mask_token=False,
    )
    oracles.strengthen(encoder)
    return encoder.eval()


@pytest.mark.parametrize(("size", "pixels", "published"), PUBLISHED)
def test_the_parameters_are_as_many_as_published(size: str, pixels: int, published: int) -> None:
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        encoder = Beit(
            image_size=(pixels, pixels),
            width=width,
            depth=depth,
            heads=heads,
            rel_pos="per_layer",
            mask_token=False,
        )
        head = SegmentationHead(width=width, channels=width, classes=150)
    assert sum(p.numel() for part in (encoder, head) for p in part.parameters()) == published


def test_the_blocks_are_those_of_the_published_models() -> None:
    assert default_blocks(12) == [3, 5, 7, 11]
    assert default_blocks(24) == [7, 11, 15, 23]


def test_each_block_is_looked_at_once_where_there_are_four() -> None:
    assert default_blocks(4) == [0, 1, 2, 3] and blocks_of_null(4) == [1, 1, 2, 3]
    for depth in (1, 2, 3, *range(5, 41)):
        assert default_blocks(depth) == blocks_of_null(depth)
    for depth in range(4, 41):
        blocks = default_blocks(depth)
        assert len(set(blocks)) == 4 and blocks == sorted(blocks) and blocks[-1] == depth - 1


@pytest.mark.parametrize("grid", [(8, 8), (9, 5), (2, 7)], ids=str)
@torch.no_grad()
def test_neck_and_heads_give_what_transformers_give_for_the_same_four_maps(grid: tuple[int, int]) -> None:
    rows, columns = grid
    head = head_of(channels=24)  # Transformers have as many channels as the encoder
    twin: Any = oracles.hugging_face_segmenter(small_encoder(), head, (72, 40), default_blocks(6))
    levels, reference = head.neck(maps(rows, columns)), twin.fpn(maps(rows, columns))
    for ours, theirs in zip(levels, reference, strict=True):
        assert oracles.difference(ours, theirs) <= TOLERANCE
    logits, auxiliary = head.with_auxiliary(maps(rows, columns))
    assert oracles.difference(logits, twin.decode_head(reference)) <= TOLERANCE
    assert oracles.difference(auxiliary, twin.auxiliary_head(reference)) <= TOLERANCE
    assert torch.equal(head(maps(rows, columns)), logits)


def test_in_training_too_with_the_statistics_of_the_batch() -> None:
    head = head_of(channels=24)
    twin: Any = oracles.hugging_face_segmenter(small_encoder(), head, (72, 40), default_blocks(6))
    for part in (head, twin):
        part.train()
    head.decode_head.dropout.p = head.auxiliary_head.dropout.p = 0.0  # Transformers have none
    reference = twin.fpn(maps(9, 5))
    theirs = twin.decode_head(reference), twin.auxiliary_head(reference)
    for logits, other in zip(head.with_auxiliary(maps(9, 5)), theirs, strict=True):
        assert oracles.difference(logits, other) <= TOLERANCE
    ours = dict(head.decode_head.bottleneck.bn.named_buffers())
    for name, buffer in twin.decode_head.psp_bottleneck.normalization.named_buffers():
        torch.testing.assert_close(ours[name], buffer, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_whole_model_gives_what_transformers_give_on_a_non_square_image() -> None:
    encoder, head = small_encoder(), head_of(channels=24)
    image = torch.randn(2, 3, 72, 40, generator=torch.Generator().manual_seed(3))
    reference = oracles.hugging_face_segmenter(encoder, head, (72, 40), [1, 2, 3, 5])(image).logits
    tokens = encoder.features(image, [1, 2, 3, 5])
    found = head([t[:, 1:].transpose(1, 2).reshape(2, 24, 9, 5) for t in tokens])
    assert oracles.difference(found, reference) <= TOLERANCE
    # The quirk: the same numbers in its configuration mean other blocks.
    quirk = oracles.hugging_face_segmenter(encoder, head, (72, 40), [0, 1, 2, 4])(image).logits
    assert oracles.difference(found, quirk) > 100 * TOLERANCE


@torch.no_grad()
def test_what_could_be_wrong_in_the_head_would_show() -> None:
    head = head_of(channels=24)
    twin: Any = oracles.hugging_face_segmenter(small_encoder(), head, (72, 40), default_blocks(6))
    levels = twin.fpn(maps(9, 5))
    reference = twin.decode_head(levels)

    def differs() -> bool:
        return oracles.difference(head(maps(9, 5)), reference) > 10 * TOLERANCE

    assert not differs()
    neck: Any = head.neck
    neck.fpn1[2] = nn.GELU(approximate="tanh")  # mild: looked at where it is made
    assert oracles.difference(head.neck(maps(9, 5))[0], levels[0]) > 10 * TOLERANCE, "tanh GELU in the neck"
    neck.fpn1[2] = nn.GELU()
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    assert differs(), "another eps"
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "beit_pretrain.models.upernet.resized",
            lambda x, like: F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True),
        )
        assert differs(), "corners aligned"
    pools: Any = head.decode_head.psp_modules
    pools[2][0] = nn.AdaptiveAvgPool2d(4)
    assert differs(), "another pool"


@torch.no_grad()
def test_a_grid_of_a_single_row_works() -> None:
    levels = Neck(width=24)(maps(1, 3))
    assert [tuple(level.shape[-2:]) for level in levels] == [(4, 12), (2, 6), (1, 3), (1, 1)]
    assert head_of()(maps(1, 3)).shape == (2, 7, 4, 12)


def test_resizing_keeps_what_has_the_size_already() -> None:
    x = torch.rand(1, 2, 3, 4)
    assert resized(x, x) is x


def test_every_weight_of_encoder_and_heads_learns() -> None:
    """The last block's queries of CLS apart, nothing is left out: a rank would wait for it forever."""
    encoder, head = small_encoder().train(), head_of().train()
    image = torch.randn(2, 3, 72, 40, generator=torch.Generator().manual_seed(3))
    tokens = encoder.features(image, default_blocks(6))
    logits, auxiliary = head.with_auxiliary([t[:, 1:].transpose(1, 2).reshape(2, 24, 9, 5) for t in tokens])
    (logits.square().mean() + auxiliary.square().mean()).backward()
    blocks = [block for block in encoder.blocks if isinstance(block, Block)]
    assert len(blocks) == 6
    for part in (encoder, head):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
