"""Attention in both kernels, and the block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from beit_pretrain.models.blocks import Block, Kernel, attend, choose_kernel

B, H, L, C = 2, 3, 13, 8


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (B, H, L, C) and bias (H, L, L) with rows set apart as the lookup makes them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, L, C)] * 3 + [(H, L, 16)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def in_float64(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out = torch.zeros(B, H, L, C, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            logits = q[b, h] @ k[b, h].T / math.sqrt(C) + bias[h]
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            out[b, h] = weights @ v[b, h]
    return out


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
def test_both_kernels_equal_attention_by_hand_in_float64_with_gradients(kernel: Kernel) -> None:
    ours, exact = inputs(torch.float32), inputs(torch.float64)
    out = attend(ours[0], ours[1], ours[2], ours[3][..., :L], kernel)
    expected = in_float64(exact[0], exact[1], exact[2], exact[3][..., :L])
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn(B, H, L, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, his in zip(ours, exact, strict=True):
        assert mine.grad is not None and his.grad is not None
        torch.testing.assert_close(mine.grad.double(), his.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
def test_no_bias_is_a_bias_of_zero(kernel: Kernel) -> None:
    q, k, v, _ = inputs(torch.float32)
    torch.testing.assert_close(attend(q, k, v, None, kernel), attend(q, k, v, torch.zeros(H, L, L), kernel))


def test_the_kernel_follows_the_device_unless_it_is_named() -> None:
    assert choose_kernel("auto", torch.device("cpu")) == "plain"
    assert choose_kernel("auto", torch.device("cuda", 1)) == "sdpa"
    assert choose_kernel("plain", torch.device("cuda")) == "plain"
    assert choose_kernel("sdpa", torch.device("cpu")) == "sdpa"


def make_block(layer_scale: float = 0.1, drop_path: float = 0.0) -> Block:
    return Block(width=12, heads=3, mlp_ratio=2.0, layer_scale=layer_scale, drop_path=drop_path)


def test_both_branches_are_scaled_by_their_gamma_and_added() -> None:
    block, tokens = make_block(), torch.randn(2, 5, 12)
    nn.init.constant_(block.get_parameter("gamma_1"), 0.0)
    nn.init.constant_(block.get_parameter("gamma_2"), 0.25)
    expected = tokens + 0.25 * block.mlp(nn.functional.layer_norm(tokens, (12,), eps=1e-6))
    torch.testing.assert_close(block(tokens, None, "plain"), expected)


def test_layer_scale_zero_means_no_gammas() -> None:
    assert not [name for name, _ in make_block(layer_scale=0).named_parameters() if "gamma" in name]
    block, tokens = make_block(layer_scale=0), torch.randn(2, 5, 12)
    halfway = tokens + block.attn(block.norm1(tokens), None, "plain")
    torch.testing.assert_close(block(tokens, None, "plain"), halfway + block.mlp(block.norm2(halfway)))


def test_drop_path_drops_whole_images_at_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = make_block(drop_path=0.3).train()
    nn.init.constant_(block.get_parameter("gamma_2"), 0.0)
    token = torch.randn(1, 5, 12)
    change = (block(token.expand(4000, 5, 12), None, "plain") - token).detach()
    branch = (block.eval()(token, None, "plain") - token).detach()
    dropped = (change == 0).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    kept = change[~dropped]
    torch.testing.assert_close(kept, (branch / 0.7).expand_as(kept), atol=1e-5, rtol=1e-4)


def test_the_key_has_no_bias() -> None:
    names = {name for name, _ in make_block().attn.named_parameters()}
    assert names == {"qkv.weight", "q_bias", "v_bias", "proj.weight", "proj.bias"}
    assert {p.shape for n, p in make_block().attn.named_parameters() if n.endswith("_bias")} == {(12,)}
