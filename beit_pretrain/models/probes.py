"""Classifiers on frozen features, many at once.

Letters: B images, n classifiers, L = 1 + N tokens, D width, K blocks, C classes, P values of a small picture, F
features of one input, X = 2KD + P values of a row: CLS and the mean of the patches after each block, then the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from timm.layers import AttentionPoolLatent  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

Pooling = Literal["cls", "mean", "both"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
INIT_STD = 0.01  # of a classifier's weights
# Part of an input's mean variance that is added to the variance of each feature: one that hardly varies over the
# training images (a corner that is always black) must not be blown up in others.
FLOOR = 1e-3


class Inputs(NamedTuple):
    """What classifiers see of a batch."""

    row: Tensor  # (B, X) float32
    tokens: Tensor | None  # (B, L, D) after the last block, for attentive probes


class Classifier(NamedTuple):
    """One classifier: what it sees and how fast it learns. `pixels` has no block."""

    pooling: str  # cls, mean, both, pixels or attentive
    block: int | None
    lr: float


class Standardize(nn.Module):
    """(x - mean) / deviation with constants of the training images: each input at the same scale, nothing learnt.

    A classifier on it is still linear in the features. Batch statistics, which MAE (arXiv 2111.06377, App. A.1)
    takes for the same end, would differ between ranks and micro-batches.
    """

    mean: Tensor
    deviation: Tensor
    images: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.register_buffer(
            "images", torch.zeros((), dtype=torch.int64)
        )  # behind the constants; 0: not yet set

    def set(self, moments: Tensor, images: int, groups: Sequence[int]) -> None:
        """Constants from the sums of x and x^2, moments (2, features) float64, over `images` vectors.

        `groups` are the sizes of the inputs within a vector, each with a floor of its own.
        """
        mean, square = moments / images
        variance = square - mean**2
        variance = torch.where(variance > 1e-10 * square, variance, 0.0)  # below it is rounding
        parts = [part + FLOOR * part.mean() for part in variance.split(list(groups))]
        # An input that never varies at all says nothing: leave it at its scale.
        deviation = torch.cat([torch.where(part > 0, part, 1.0) for part in parts]).sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.images.fill_(images)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


class StackedLinear(nn.Module):
    """K linear classifiers that share nothing, as one: (B, K, F) -> logits (B, K, C)."""

    def __init__(self, *, blocks: int, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, classes, features).normal_(std=INIT_STD))
        self.bias = nn.Parameter(torch.zeros(blocks, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.baddbmm(
            self.bias[:, None], x.transpose(0, 1), self.weight.transpose(1, 2)
        )  # (K, B, C)
        return logits.transpose(0, 1)


class AttentiveProbe(nn.Module):
    """One learned query gathers the tokens, a linear classifier follows: (B, L, D) -> logits (B, 1, C)."""

    def __init__(self, *, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        self.linear = StackedLinear(blocks=1, features=width, classes=classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.pool(tokens)[:, None])


class ProbeBank(nn.Module):
    """Classifiers for every learning rate, pooling and block; `by_lr[i]` holds all of learning rate i.

    They share no parameter, so with AdamW each learns as if alone. `pixels` is P, 0 for none; `heads` those of the
    attentive probes on the last block, None for none.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        classes: int,
        lrs: Sequence[float],
        poolings: Sequence[str],
        pixels: int,
        heads: int | None,
    ) -> None:
        super().__init__()
        self.width, self.depth, self.pixels = width, depth, pixels
        self.poolings = list(poolings)
        self.scale = Standardize(2 * depth * width + pixels)
        self.token_scale = Standardize(width) if heads is not None else None
        self.by_lr = nn.ModuleList()
        self.classifiers: list[Classifier] = []  # in the order of `forward`
        for lr in lrs:
            parts = nn.ModuleDict()
            for name in poolings:
                features = 2 * width if name == "both" else width
                parts[name] = StackedLinear(blocks=depth, features=features, classes=classes)
                self.classifiers += [Classifier(name, block, lr) for block in range(depth)]
            if pixels:
                parts["pixels"] = StackedLinear(blocks=1, features=pixels, classes=classes)
                self.classifiers.append(Classifier("pixels", None, lr))
            if heads is not None:
                parts["attentive"] = AttentiveProbe(width=width, heads=heads, classes=classes)
                self.classifiers.append(Classifier("attentive", depth - 1, lr))
            self.by_lr.append(parts)

    def share_scales(self, other: ProbeBank) -> None:
        """See features at the scales of another bank, now and when they are set."""
        self.scale, self.token_scale = other.scale, other.token_scale

    @property
    def groups(self) -> list[int]:
        """Sizes of the inputs within a row."""
        return [self.width] * (2 * self.depth) + ([self.pixels] if self.pixels else [])

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, n, C) in the order of `classifiers`, in float32 whatever the autocast."""
        with torch.autocast(inputs.row.device.type, enabled=False):
            row = self.scale(inputs.row)  # (B, X)
            pooled, picture = row.split([row.shape[1] - self.pixels, self.pixels], dim=1)
            pooled = pooled.unflatten(1, (self.depth, 2, self.width))  # (B, K, 2, D)
            seen = {"cls": pooled[:, :, 0], "mean": pooled[:, :, 1], "both": pooled.flatten(2)}
            seen["pixels"] = picture[:, None]  # (B, 1, P)
            if self.token_scale is not None:
                assert inputs.tokens is not None
                seen["attentive"] = self.token_scale(inputs.tokens.float())  # (B, L, D)
            logits = [
                part(seen[name])
                for parts in self.by_lr
                if isinstance(parts, nn.ModuleDict)
                for name, part in parts.items()
            ]
            return torch.cat(logits, dim=1)


def pooled_row(tokens: Sequence[Tensor], picture: Tensor | None) -> Tensor:
    """The row (B, X) of tokens (B, L, D) after each block and a small picture (B, ...), in float32."""
    pooled = [
        torch.stack([t[:, 0].float(), t[:, 1:].float().mean(1)], dim=1) for t in tokens
    ]  # K x (B, 2, D)
    parts = [torch.stack(pooled, dim=1).flatten(1)]
    if picture is not None:
        parts.append(picture.float().flatten(1))
    return torch.cat(parts, dim=1)
