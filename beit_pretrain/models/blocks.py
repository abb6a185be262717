"""Attention and the transformer block of BEiT.

Letters: B images, L = 1 + N tokens, D width, H heads, C = D / H width of a head, R rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6

Kernel = Literal["plain", "sdpa"]
KernelChoice = Literal["auto", "plain", "sdpa"]
OwnBias = Callable[[Tensor], Tensor]  # table (R, H) -> bias (H, L, L)


def choose_kernel(choice: KernelChoice, device: torch.device) -> Kernel:
    """The kernel for `device`.

    "auto" is SDPA on CUDA and plain elsewhere: with a bias that learns, SDPA on the CPU falls back to slower
    maths (in bfloat16 it even works in float32).
    """
    if choice == "auto":
        return "sdpa" if device.type == "cuda" else "plain"
    return choice


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) over the keys, for q, k (B, H, L, C) and bias (H, L, L): (B, H, L, L)."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, L, L)
    if bias is not None:
        # In place: the product is needed by no gradient, and one pass over (B, H, L, L) is saved.
        logits.add_(bias)
    return logits.softmax(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v for q, k, v (B, H, L, C) and bias (H, L, L): (B, H, L, C)."""
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias[None])
    return probabilities(q, k, bias) @ v  # (B, H, L, C)


class Attention(nn.Module):
    """Multi-head self-attention whose key has no bias; with `table_rows`, a table of its own."""

    def __init__(self, *, width: int, heads: int, table_rows: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = (
            None if table_rows is None else nn.Parameter(torch.zeros(table_rows, heads))  # (R, H)
        )

    def forward(self, tokens: Tensor, bias: Tensor | None, kernel: Kernel) -> Tensor:
        """Tokens (B, L, D) that have looked at each other, with bias (H, L, L) on the logits: (B, L, D)."""
        q, k, v = self.project(tokens)
        return self.proj(attend(q, k, v, bias, kernel).transpose(1, 2).flatten(2))  # (B, L, D)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, L, C) of tokens (B, L, D)."""
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(tokens, self.qkv.weight, qkv_bias)  # (B, L, 3 D)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, L, C)
        return q, k, v


class Block(nn.Module):
    """x + gamma_1 attn(norm1(x)), then x + gamma_2 mlp(norm2(x)); each branch is dropped per image at
    `drop_path`.

    `layer_scale` is what both gammas begin with (LayerScale, CaiT paper, Sec. 2); 0 means no gammas.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float,
        table_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width=width, heads=heads, table_rows=table_rows)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, bias: Tensor | OwnBias | None, kernel: Kernel) -> Tensor:
        """(B, L, D) -> (B, L, D), with bias (H, L, L) on the logits, or with what makes it of the block's own table."""
        attended = self.attn(self.norm1(tokens), self._own(bias), kernel)
        tokens = tokens + self.drop_path(_scaled(attended, self.gamma_1))
        return tokens + self.drop_path(_scaled(self.mlp(self.norm2(tokens)), self.gamma_2))

    def attention(self, tokens: Tensor, bias: Tensor | OwnBias | None) -> Tensor:
        """How much each token looks at each other (B, H, L, L), in sum 1 over the last, of tokens (B, L, D)."""
        q, k, _ = self.attn.project(self.norm1(tokens))
        return probabilities(q, k, self._own(bias))

    def _own(self, bias: Tensor | OwnBias | None) -> Tensor | None:
        if bias is None or isinstance(bias, Tensor):
            return bias
        assert self.attn.relative_position_bias_table is not None
        return bias(self.attn.relative_position_bias_table)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch
