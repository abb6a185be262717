"""Colour jitter with Pillow's arithmetic: on a crop of an image, or on a batch of crops on any device.

Contrast is relative to the mean grey of the WHOLE image (the original jitters before it crops), so the whole
image comes along, and a sample of its pixels goes through the steps before contrast. As in Pillow, each step
ends in 8 bits with the fraction cut off.

A batch on a device and a crop in a worker go through the same float32 operations one by one, so they agree to the
bit. NumPy takes half as long as torch for a crop: its operations cost less to start and stay on one thread.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
_ORDERS = tuple(itertools.permutations((_BRIGHTNESS, _CONTRAST, _SATURATION)))
_CUT_OFF = 32  # levels, of 256, that brightness and contrast may cut off together in a draw that waits
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's weights of red, green and blue
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
    """The jittered crop (3, h, w) uint8 of the image `whole` (3, H, W) uint8; pixel by pixel in memory."""
    return _apply(crop, jitter, mean_grey(whole, jitter))


def postpone(crop: Tensor, whole: Tensor, jitter: Jitter) -> tuple[Tensor, Tensor]:
    """The crop to resample now, and what `jitter_batch` is to do with it later, (5,) float32.

    Resampling and jitter can change places but for what is cut off at black and white, where fine detail is lost
    before it is averaged. A draw that cuts off much is applied at once; a saturation that comes last can still wait.
    """
    mean = mean_grey(whole, jitter)
    table = _table(jitter, jitter.order, mean)
    if np.count_nonzero((table == 0) | (table == 255)) - 2 >= _CUT_OFF:
        brightness, contrast, saturation = jitter.factors
        now, later = (1.0, saturation) if jitter.order[-1] == _SATURATION else (saturation, 1.0)
        crop = _apply(crop, jitter._replace(factors=(brightness, contrast, now)), mean)
        jitter = jitter._replace(factors=(1.0, 1.0, later))
    return crop, row(jitter, mean)


def row(jitter: Jitter, mean: float) -> Tensor:
    """A draw for `jitter_batch`, (5,) float32.

    Number of the order, factors of brightness, contrast and saturation, mean grey that contrast is relative to.
    """
    return torch.tensor([_ORDERS.index(jitter.order), *jitter.factors, mean])


def _apply(crop: Tensor, jitter: Jitter, mean: float) -> Tensor:
    pixels = np.ascontiguousarray(crop.permute(1, 2, 0).numpy())  # (h, w, 3)
    place = jitter.order.index(_SATURATION)
    for steps in (jitter.order[:place], (_SATURATION,), jitter.order[place + 1 :]):
        if steps == (_SATURATION,):
            if jitter.factors[_SATURATION] != 1.0:
                pixels = _saturate(pixels, jitter.factors[_SATURATION])
        elif steps:
            # Python's own translation of bytes is several times as fast as NumPy's indexing.
            levels = bytearray(pixels).translate(_table(jitter, steps, mean).tobytes())
            pixels = np.frombuffer(levels, np.uint8).reshape(pixels.shape)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _table(jitter: Jitter, steps: tuple[int, ...], mean: float) -> np.ndarray:
    """What brightness and contrast among the steps make of each level, (256,) uint8."""
    levels = np.arange(256, dtype=np.float32)
    for step in steps:
        if step != _SATURATION:
            _step(levels, step, jitter.factors[step], mean)
    return levels.astype(np.uint8)


def _saturate(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Pixels (h, w, 3) uint8 at so many times their distance from grey."""
    values = pixels.transpose(2, 0, 1).astype(np.float32, order="C")  # (3, h, w): grey adds up whole planes
    _step(values, _SATURATION, factor, 0.0)
    saturated = np.empty_like(pixels)
    for channel, plane in enumerate(values.astype(np.uint8)):
        saturated[..., channel] = plane
    return saturated


def jitter_batch(images: Tensor, draws: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8, each jittered by its row of draws (B, 5) from `row`; nothing waits for the device.

    The same levels as from `apply_jitter`, also of crops that were resized in between.
    """
    number = draws[:, 0].long()
    # As permutations are numbered: by the first of the steps, then whether the other two are the wrong way round.
    first = number // 2
    lower, higher = (first == _BRIGHTNESS).long(), 2 - (first == _SATURATION).long()
    second = torch.where(number % 2 == 0, lower, higher)
    factors, mean = draws[:, 1:4], draws[:, 4].view(-1, 1, 1, 1)
    values = images.to(torch.float32, memory_format=torch.contiguous_format)
    for steps in (first, second, 3 - first - second):  # (B,) each
        step = steps.view(-1, 1, 1, 1)
        red, green, blue = values.split(1, 1)
        grey = (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2]).add_(0.5)  # as `_grey` does it
        grey = grey.to(torch.int16).to(torch.float32)  # (B, 1, H, W)
        base = torch.where(step == _SATURATION, grey, torch.where(step == _CONTRAST, mean, 0.0))
        factor = factors.gather(1, steps[:, None]).view(-1, 1, 1, 1)
        # A cast cuts off the fraction: on a CPU, torch's `trunc` splits even a few thousand values over the threads,
        # which on busy cores takes a hundred times as long.
        levels = values.sub_(base).mul_(factor).add_(base).clamp_(0, 255).to(torch.int16)
        values = levels.to(torch.float32)
    return values.to(torch.uint8)


def mean_grey(whole: Tensor, jitter: Jitter) -> float:
    """Mean grey of the image, as it is right before the contrast step."""
    stride = math.ceil(math.sqrt(whole.shape[1] * whole.shape[2] / _SAMPLE))
    values = whole.numpy()[:, ::stride, ::stride].astype(np.float32, order="C")
    for step in jitter.order[: jitter.order.index(_CONTRAST)]:
        _step(values, step, jitter.factors[step], 0.0)
    grey = _grey(values)
    return math.floor(int(grey.sum(dtype=np.float64)) / grey.size + 0.5)


def _step(values: np.ndarray, step: int, factor: float, mean: float) -> None:
    """Whole levels (3, h, w) become base + factor * (levels - base) in place: base is black, the mean or each grey."""
    if step == _BRIGHTNESS:
        values *= np.float32(factor)
    else:
        base = np.float32(mean) if step == _CONTRAST else _grey(values)
        values -= base
        values *= np.float32(factor)
        values += base
    np.clip(values, np.float32(0), np.float32(255), out=values)
    np.trunc(values, out=values)


def _grey(values: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma (h, w) in whole levels of RGB (3, h, w), by Pillow's weights of 16 bits.

    Products and sums are multiples of 2**-16 below 256, which float32 holds exactly.
    """
    grey = values[0] * _LUMA[0]
    grey += values[1] * _LUMA[1]
    grey += values[2] * _LUMA[2]
    grey += np.float32(0.5)
    return np.trunc(grey, out=grey)
