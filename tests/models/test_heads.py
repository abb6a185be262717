"""The heads against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from beit_pretrain.errors import ConfigError
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import ClassHead, MIMHead


def test_logits_are_those_of_the_hidden_patches_in_the_order_of_their_ids() -> None:
    torch.manual_seed(0)
    head = MIMHead(width=8, vocab_size=11)
    nn.init.normal_(head.norm.weight)
    tokens = torch.randn(2, 7, 8)
    mask = torch.tensor([[True, False, True, False, False, True], [False, True, False, False, False, False]])
    logits = head(tokens, mask)
    assert logits.shape == (4, 11)
    every = head.lm_head(nn.functional.layer_norm(tokens, (8,), head.norm.weight, head.norm.bias, eps=1e-6))
    for row, (image, patch) in enumerate([(0, 0), (0, 2), (0, 5), (1, 1)]):
        torch.testing.assert_close(logits[row], every[image, 1 + patch])  # CLS stands in front


def test_a_mask_that_hides_nothing_gives_no_logits() -> None:
    head = MIMHead(width=8, vocab_size=11)
    assert head(torch.randn(2, 7, 8), torch.zeros(2, 6, dtype=torch.bool)).shape == (0, 11)


@pytest.mark.parametrize(("cut", "std"), [(0.02, 0.02 * 0.53956), (2.0, 0.02)])
def test_the_head_begins_like_the_encoder(cut: float, std: float) -> None:
    torch.manual_seed(0)
    head = MIMHead(width=64, vocab_size=1024, init_cut=cut)
    assert list(head.state_dict()) == ["norm.weight", "norm.bias", "lm_head.weight", "lm_head.bias"]
    weight = head.lm_head.weight.detach()
    assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(weight.numel()))
    assert (head.lm_head.bias == 0).all() and (head.norm.weight == 1).all() and (head.norm.bias == 0).all()


def normalised(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """A layer norm over D, written out."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classes_are_read_off_the_normed_mean_of_the_patches_or_the_normed_cls_token(pooling: Any) -> None:
    torch.manual_seed(0)
    head = ClassHead(width=8, classes=5, pooling=pooling, init_scale=1.0)
    norm = head.fc_norm if pooling == "mean" else head.norm
    assert norm is not None and (head.norm is None) == (pooling == "mean")
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    tokens = 1e-3 * torch.randn(3, 7, 8)  # small, so that the norm's eps counts
    pooled = (
        torch.stack([tokens[:, n] for n in range(1, 7)]).sum(0) / 6 if pooling == "mean" else tokens[:, 0]
    )
    expected = normalised(pooled, norm) @ head.head.weight.T + head.head.bias
    torch.testing.assert_close(head(tokens), expected)
    names = ["fc_norm" if pooling == "mean" else "norm", "head"]
    assert list(head.state_dict()) == [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]


def test_all_classes_begin_nearly_alike() -> None:
    torch.manual_seed(0)
    weight = (head := ClassHead(width=64, classes=1000)).head.weight.detach()
    assert weight.std().item() == pytest.approx(0.001 * 0.02, rel=4 / math.sqrt(weight.numel()))
    assert weight.abs().max() > 4 * 0.001 * 0.02, "the normal is not to be cut off"
    assert (head.head.bias == 0).all()
    torch.manual_seed(0)
    torch.testing.assert_close(ClassHead(width=64, classes=1000, init_scale=1.0).head.weight * 0.001, weight)
    torch.testing.assert_close(
        head(torch.randn(2, 5, 64)).softmax(-1), torch.full((2, 1000), 0.001), atol=1e-5, rtol=0
    )


def test_another_pooling_is_refused() -> None:
    pooling: Any = "max"
    with pytest.raises(ConfigError, match=r"stage\.pooling=max: set one of mean, cls"):
        ClassHead(width=8, classes=5, pooling=pooling)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "layer_scale", "parameters"),
    [(768, 12, 12, 0.1, 86_530_984), (1024, 24, 16, 1e-5, 304_430_568)],
    ids=["base", "large"],
)
def test_classifiers_have_the_published_number_of_parameters(
    width: int, depth: int, heads: int, layer_scale: float, parameters: int
) -> None:
    with torch.device("meta"):
        encoder = Beit(
            image_size=(224, 224),
            width=width,
            depth=depth,
            heads=heads,
            layer_scale=layer_scale,
            rel_pos="per_layer",
            mask_token=False,
        )
        head = ClassHead(width=width, classes=1000)
    assert sum(p.numel() for part in (encoder, head) for p in part.parameters()) == parameters
