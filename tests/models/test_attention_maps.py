"""Attention maps equal those that Transformers hands out, on grids that are not square too."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from beit_pretrain.errors import BeitError
from beit_pretrain.models.attention_maps import attention_maps
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.blocks import Attention
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.models.rel_pos import BiasLookup, resize_table

SQUARE, WIDE = (24, 24), (24, 40)
BLOCKS = (0, 1, 2)
TOLERANCE = 1e-6
FAR = 1e-3


def build(image_size: tuple[int, int], rel_pos: Any, **options: Any) -> Beit:
    encoder = Beit(
        image_size=image_size,
        patch_size=8,
        width=32,
        depth=3,
        heads=4,
        rel_pos=rel_pos,
        mask_token=rel_pos != "per_layer",
        drop_path=0.5,
        **options,
    )
    oracles.strengthen(encoder)
    return encoder.eval()


def pictures(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def twin_of(encoder: Beit, image_size: tuple[int, int]) -> Any:
    """Transformers' model with the encoder's weights."""
    if encoder.lookup is not None:
        return oracles.hugging_face_classifier(encoder, ClassHead(width=32, classes=2), image_size)
    if encoder.rel_pos_bias is not None:
        return oracles.hugging_face_twin(encoder, MIMHead(width=32, vocab_size=5), image_size)
    return oracles.hugging_face_encoder(encoder, image_size)


def worst(encoder: Beit, image: Tensor, reference: tuple[Tensor, ...]) -> float:
    return max((attention_maps(encoder, image, b) - reference[b]).abs().max().item() for b in BLOCKS)


@pytest.mark.parametrize("image_size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("rel_pos", ["shared", "per_layer", "none"])
@torch.no_grad()
def test_maps_of_every_block_are_those_of_transformers(rel_pos: str, image_size: tuple[int, int]) -> None:
    encoder, image = build(image_size, rel_pos), pictures(*image_size)
    reference = twin_of(encoder, image_size)(image, output_attentions=True).attentions
    assert worst(encoder, image, reference) <= TOLERANCE
    assert (
        max(maps.max().item() for maps in reference) > 0.3
    )  # otherwise all tokens would look everywhere alike


@torch.no_grad()
def test_absolute_positions_are_seen_by_the_first_block_already() -> None:
    encoder, image = build(SQUARE, "none", abs_pos=True), pictures(*SQUARE)
    assert encoder.pos_embed is not None
    reference = twin_of(encoder, SQUARE)(image, output_attentions=True).attentions
    assert worst(encoder, image, reference) <= TOLERANCE
    encoder.pos_embed.zero_()
    assert (attention_maps(encoder, image, 0) - reference[0]).abs().max() > FAR


@pytest.mark.parametrize("mistake", ["transposed bias", "no bias", "no scale", "queries for keys"])
@pytest.mark.parametrize("rel_pos", ["shared", "per_layer"])
@torch.no_grad()
def test_a_mistake_in_the_logits_would_show(
    mistake: str, rel_pos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, image = build(WIDE, rel_pos), pictures(*WIDE)
    reference = twin_of(encoder, WIDE)(image, output_attentions=True).attentions
    lookup, project = BiasLookup.forward, Attention.project
    if mistake == "transposed bias":
        monkeypatch.setattr(BiasLookup, "forward", lambda *args, **kw: lookup(*args, **kw).transpose(1, 2))
    elif mistake == "no bias":
        monkeypatch.setattr(BiasLookup, "forward", lambda *args, **kw: 0 * lookup(*args, **kw))
    else:
        change = {
            "no scale": lambda q, k: (q * q.shape[-1] ** 0.5, k),
            "queries for keys": lambda q, k: (k, q),
        }
        monkeypatch.setattr(
            Attention,
            "project",
            lambda self, tokens: (*change[mistake](*project(self, tokens)[:2]), project(self, tokens)[2]),
        )
    first = attention_maps(encoder, image, 0)  # nothing else has run before it
    assert (first - reference[0]).abs().max() > FAR


@torch.no_grad()
def test_on_another_grid_the_maps_are_those_of_an_encoder_built_for_it() -> None:
    encoder, other = build(SQUARE, "per_layer"), build((40, 16), "per_layer")
    state = {
        name: resize_table(value, encoder.grid, other.grid) if name.endswith("bias_table") else value
        for name, value in encoder.state_dict().items()
    }
    other.load_state_dict(state)
    image = pictures(40, 16)
    for block in BLOCKS:
        maps = attention_maps(encoder, image, block)
        assert maps.shape == (2, 4, 11, 11)
        torch.testing.assert_close(maps, attention_maps(other, image, block), rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 11))


def test_blocks_count_from_the_end_too_and_nothing_in_the_encoder_changes() -> None:
    encoder, image = build(WIDE, "shared"), pictures(*WIDE)
    before = encoder(image), {name: value.clone() for name, value in encoder.state_dict().items()}
    assert torch.equal(attention_maps(encoder, image, -1), attention_maps(encoder, image, 2))
    assert torch.equal(encoder(image), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in encoder.state_dict().items())
    attention_maps(encoder, image, 1).square().sum().backward()
    table = encoder.get_parameter("rel_pos_bias.relative_position_bias_table")
    assert table.grad is not None and table.grad.abs().sum() > 0
    with pytest.raises(IndexError):
        attention_maps(encoder, image, 3)
    with pytest.raises(BeitError, match="an image of 20 x 24 pixels cannot be cut into patches of 8"):
        attention_maps(encoder, pictures(20, 24), 0)
