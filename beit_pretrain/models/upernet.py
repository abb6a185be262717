"""Semantic segmentation on the encoder: a pyramid from four of its blocks, UPerNet, and an auxiliary head.

UPerNet is Xiao et al. 2018; on BEiT as in the paper, Sec. 3.2. Letters: B images, C classes, D the encoder's width,
E channels of the head, (h, w) the encoder's grid. Parameters are named as in the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit_pretrain.models.batch_norm import BatchNorm

POOL_SCALES = (1, 2, 3, 6)  # bins along each side in pyramid pooling
AUXILIARY_CHANNELS = 256
DROPOUT = 0.1  # of whole channels before each classifier


class ConvNorm(nn.Module):
    """Convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, out_channels, kernel_size=kernel_size, padding=kernel_size // 2, bias=False
        )
        self.bn = BatchNorm(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Neck(nn.Module):
    """Four maps of one grid as a pyramid: 4x and 2x as fine by learned upsampling, as it is, half as fine."""

    def __init__(self, *, width: int) -> None:
        super().__init__()

        def doubled() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

        self.fpn1 = nn.Sequential(doubled(), BatchNorm(width), nn.GELU(), doubled())
        self.fpn2 = nn.Sequential(doubled())

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, D, h, w) of four blocks, lowest first -> (B, D, ...) at 4h, 2h, h and h // 2 rows.

        A side of a single patch stays one in the coarsest map.
        """
        first, second, third, last = maps
        halved = [min(2, side) for side in last.shape[-2:]]
        return [self.fpn1(first), self.fpn2(second), third, F.max_pool2d(last, kernel_size=halved)]


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest map, a top-down path through the others, and all of them fused."""

    def __init__(self, *, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNorm(width, channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvNorm(width + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvNorm(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = classifier(channels, classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Pyramid (B, D, ...), finest first -> logits (B, C, ...) of the finest level's size."""
        *fine, coarse = levels
        pooled = [resized(pool(coarse), coarse) for pool in self.psp_modules]
        path = [self.bottleneck(torch.cat([coarse, *pooled], dim=1))]  # coarsest first
        for level, lateral in zip(reversed(fine), reversed(self.lateral_convs), strict=True):
            path.append(lateral(level) + resized(path[-1], level))
        top, *rest = path
        smooth = [conv(x) for conv, x in zip(self.fpn_convs, reversed(rest), strict=True)]  # finest first
        fused = torch.cat([resized(x, smooth[0]) for x in (*smooth, top)], dim=1)  # (B, 4E, ...)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))


class FCNHead(nn.Module):
    """One convolution and a classifier on one level: a second loss that reaches the middle of the encoder."""

    def __init__(self, *, width: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(width, AUXILIARY_CHANNELS, 3))
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = classifier(AUXILIARY_CHANNELS, classes)

    def forward(self, level: Tensor) -> Tensor:
        """(B, D, h, w) -> logits (B, C, h, w)."""
        return self.conv_seg(self.dropout(self.convs(level)))


class SegmentationHead(nn.Module):
    """Neck, UPerNet of `channels` channels, and the auxiliary head, which only training needs."""

    def __init__(self, *, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.neck = Neck(width=width)
        self.decode_head = UPerHead(width=width, channels=channels, classes=classes)
        self.auxiliary_head = FCNHead(width=width, classes=classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, D, h, w) of four blocks, lowest first -> logits (B, C, 4h, 4w)."""
        return self.decode_head(self.neck(maps))

    def with_auxiliary(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The logits, and those of the auxiliary head (B, C, h, w), which looks at the third block's map."""
        levels = self.neck(maps)
        return self.decode_head(levels), self.auxiliary_head(levels[2])


def maps_of(tokens: Sequence[Tensor], image: Tensor, patch_size: int) -> list[Tensor]:
    """Tokens (B, L, D) of several blocks for images (B, 3, H, W) as maps (B, D, h, w), without CLS."""
    grid = [side // patch_size for side in image.shape[-2:]]
    return [t[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous() for t in tokens]


def classifier(channels: int, classes: int) -> nn.Conv2d:
    """The last layer: 1 x 1, small at first, so that all classes begin alike."""
    layer = nn.Conv2d(channels, classes, kernel_size=1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return layer


def resized(x: Tensor, like: Tensor) -> Tensor:
    """(B, E, ...) at the height and width of `like`, bilinear between pixel centres."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
