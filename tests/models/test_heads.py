"""The head of masked image modelling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from beit_pretrain.models.heads import MIMHead


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
