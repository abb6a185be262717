"""Colour jitter with Pillow's arithmetic, on a crop of an image.

Contrast is relative to the mean grey of the WHOLE image (the original jitters before it crops), so the whole
image comes along and a sample of its pixels goes through the steps before contrast. As in Pillow, each step
ends in 8 bits with the fraction cut off. It is cut by the cast: torch's `floor` and `trunc` split even a few
thousand values over the threads, which on busy cores takes a hundred times as long.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
_ORDERS = tuple(itertools.permutations((_BRIGHTNESS, _CONTRAST, _SATURATION)))
_SAMPLE = (
    8192  # pixels that stand for the whole image; a grid of them gives its mean to a fraction of a level
)


class Jitter(NamedTuple):
    """One draw: the order of the three steps and each one's factor (1 leaves the image as it is)."""

    order: tuple[int, ...]
    factors: tuple[float, float, float]  # brightness, contrast, saturation


def draw_jitter(rng: random.Random, strength: float) -> Jitter:
    """Factors uniform in [max(0, 1 - strength), 1 + strength] and a random order; no change of hue."""
    order = _ORDERS[int(rng.random() * len(_ORDERS))]
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    first, second, third = (low + (high - low) * rng.random() for _ in range(3))
    return Jitter(order, (first, second, third))


def apply_jitter(crop: Tensor, whole: Tensor, jitter: Jitter) -> Tensor:
    """The jittered crop (3, h, w) uint8 of the image `whole` (3, H, W) uint8."""
    before = jitter.order[: jitter.order.index(_CONTRAST)]
    for step in jitter.order:
        factor = jitter.factors[step]
        if step == _BRIGHTNESS:
            crop = _blend(crop, None, factor)
        elif step == _SATURATION:
            crop = _blend(crop, grey(crop), factor)
        else:
            crop = _blend(crop, _mean_grey(whole, before, jitter), factor)
    return crop


def grey(pixels: Tensor) -> Tensor:
    """ITU-R 601 luma of (3, ...) uint8 as (...) uint8, by Pillow's weights of 16 bits.

    Every product and sum stays below 2**24, so float32 holds it exactly.
    """
    red, green, blue = pixels.to(torch.float32)
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(32768).mul_(2.0**-16).to(torch.uint8)


def _mean_grey(whole: Tensor, before: tuple[int, ...], jitter: Jitter) -> float:
    stride = math.ceil(math.sqrt(whole.shape[1] * whole.shape[2] / _SAMPLE))
    sample = whole[:, ::stride, ::stride]
    for step in before:
        sample = _blend(sample, None if step == _BRIGHTNESS else grey(sample), jitter.factors[step])
    values = grey(sample)
    # A sum of integers, so the mean does not depend on the number of threads.
    return math.floor(int(values.sum()) / values.numel() + 0.5)


def _blend(pixels: Tensor, base: Tensor | float | None, factor: float) -> Tensor:
    """base + factor * (pixels - base) in whole levels from 0 to 255, all uint8; no base is black."""
    values = pixels.to(torch.float32)
    blended = values.mul_(factor) if base is None else values.sub_(base).mul_(factor).add_(base)
    return blended.clamp_(0, 255).to(torch.uint8)
