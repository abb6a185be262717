"""The encoder equals timm's and Transformers' BEiT, by tests that notice the mistakes one can make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

from beit_pretrain.models import rel_pos
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import ClassHead, MIMHead

TOLERANCE = 1e-5  # of max(1, max |reference|)
FAR = 10 * TOLERANCE  # the mildest mistake, tanh GELU, is off by 13 to 20 tolerances; we are by 0.05

VOCABULARY = 512


@dataclass(frozen=True)
class Size:
    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int


SMALL = Size(image_size=(24, 40), patch_size=8, width=48, depth=3, heads=4)
BASE = Size(image_size=(224, 224), patch_size=16, width=768, depth=12, heads=12)
sizes = pytest.mark.parametrize("size", [SMALL, BASE], ids=["small-non-square", "base-224"])


def build(size: Size, **options: Any) -> Beit:
    encoder = Beit(**vars(size), **options)
    oracles.strengthen(encoder)
    return encoder.eval()


def pictures(size: Size, batch: int) -> Tensor:
    return torch.randn(batch, 3, *size.image_size, generator=torch.Generator().manual_seed(1))


def hidden(encoder: Beit, batch: int) -> Tensor:
    patches = encoder.grid[0] * encoder.grid[1]
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(2)) < 0.4


def set_index(encoder: Beit, index: Callable[[tuple[int, int]], Tensor]) -> None:
    """Make `encoder` read its tables through another index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rel_pos, "relative_position_index", index)
        lookup = rel_pos.BiasLookup(grid=encoder.grid)
    if encoder.rel_pos_bias is None:
        encoder.lookup = lookup
    else:
        encoder.rel_pos_bias.lookup = lookup


INDEX = rel_pos.relative_position_index


def index_transposed(grid: tuple[int, int]) -> Tensor:
    return INDEX(grid).T


def cls_rows_swapped(grid: tuple[int, int]) -> Tensor:
    index, total = INDEX(grid), rel_pos.table_rows(grid)
    to_patch, from_patch = index == total - 3, index == total - 2
    return index.masked_fill(to_patch, total - 2).masked_fill(from_patch, total - 3)


def set_gelu(encoder: Beit, approximate: str) -> None:
    blocks: Any = encoder.blocks
    for block in blocks:
        block.mlp.act = nn.GELU(approximate=approximate)


def set_eps(encoder: Beit, eps: float) -> None:
    for part in encoder.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps


def assert_equal_and_mistakes_show(encoder: Beit, output: Callable[[], Tensor], reference: Tensor) -> None:
    """`output` of `encoder` equals `reference`, but does not with each of the known mistakes."""

    def wrong() -> bool:
        return oracles.difference(output(), reference) > FAR

    for index in (index_transposed, cls_rows_swapped):
        set_index(encoder, index)
        assert wrong(), index.__name__
    set_index(encoder, INDEX)
    set_gelu(encoder, "tanh")
    assert wrong(), "tanh GELU"
    set_gelu(encoder, "none")
    for eps in (1e-12, 1e-5):
        set_eps(encoder, eps)
        assert wrong(), f"eps {eps}"
    set_eps(encoder, 1e-6)
    assert oracles.difference(output(), reference) <= TOLERANCE


@sizes
@torch.no_grad()
def test_a_table_in_each_block_gives_what_timm_gives_and_any_mistake_would_show(size: Size) -> None:
    ours = build(size, rel_pos="per_layer", mask_token=False, abs_pos=size is SMALL)
    image = pictures(size, 1)
    reference = oracles.timm_twin(ours, size.image_size).forward_features(image)
    assert oracles.difference(ours(image), reference) <= TOLERANCE
    if size is SMALL:
        assert_equal_and_mistakes_show(ours, lambda: ours(image), reference)


@sizes
@torch.no_grad()
def test_a_shared_table_gives_what_transformers_gives_and_any_mistake_would_show(size: Size) -> None:
    encoder, head = build(size), MIMHead(width=size.width, vocab_size=VOCABULARY)
    oracles.strengthen(head, seed=3)
    image, mask = pictures(size, 1), hidden(encoder, 1)
    twin = oracles.hugging_face_twin(encoder, head, size.image_size)
    reference = twin(image, bool_masked_pos=mask).logits[mask]
    assert oracles.difference(head(encoder(image, mask), mask), reference) <= TOLERANCE
    assert_equal_and_mistakes_show(encoder, lambda: head(encoder(image, mask), mask), reference)


@sizes
@torch.no_grad()
def test_the_classifier_gives_what_timm_and_transformers_give_and_any_mistake_would_show(size: Size) -> None:
    encoder = build(size, rel_pos="per_layer", mask_token=False)
    head = ClassHead(width=size.width, classes=37)
    oracles.strengthen(head, seed=3)
    image = pictures(size, 1)
    for twin in (
        oracles.timm_twin(encoder, size.image_size, head),
        oracles.hugging_face_classifier(encoder, head, size.image_size),
    ):
        reference = twin(image)
        reference = reference if isinstance(reference, Tensor) else reference.logits
        assert oracles.difference(head(encoder(image)), reference) <= TOLERANCE
        if size is SMALL:
            assert_equal_and_mistakes_show(encoder, lambda: head(encoder(image)), reference)
    with_cls = head.fc_norm(encoder(image).mean(1)) if head.fc_norm else None
    assert with_cls is not None and oracles.difference(head.head(with_cls), reference) > FAR, (
        "CLS in the mean"
    )


def test_the_gradients_of_a_step_are_those_of_timm() -> None:
    """Smoothed cross-entropy on a non-square grid: every parameter, relative to the largest of its gradient."""
    encoder = build(SMALL, rel_pos="per_layer", mask_token=False)
    head = ClassHead(width=SMALL.width, classes=7)
    oracles.strengthen(head, seed=3)
    twin = oracles.timm_twin(encoder, SMALL.image_size, head)
    image, label = pictures(SMALL, 5), torch.tensor([0, 3, 6, 3, 1])
    for logits in (head(encoder(image)), twin(image)):
        nn.functional.cross_entropy(logits, label, label_smoothing=0.1).backward()
    ours = {**dict(encoder.named_parameters()), **dict(head.named_parameters())}
    theirs = dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        gradient, reference = parameter.grad, theirs[name].grad
        assert gradient is not None and reference is not None, name
        assert (gradient - reference).abs().max() <= 1e-4 * reference.abs().max(), name


@torch.no_grad()
def test_on_another_grid_the_encoder_is_the_one_built_for_it_with_resized_tables() -> None:
    ours = build(SMALL, rel_pos="per_layer")
    other = Beit(**{**vars(SMALL), "image_size": (40, 48)}, rel_pos="per_layer").eval()
    state = ours.state_dict()
    for name, value in state.items():
        if name.endswith("relative_position_bias_table"):
            state[name] = rel_pos.resize_table(value, ours.grid, other.grid)
    other.load_state_dict(state)
    image = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(5))
    assert oracles.difference(ours(image), other(image)) <= TOLERANCE
