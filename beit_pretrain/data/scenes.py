"""Views of an image together with its label map, and the batches of segmentation.

Letters: B images, (H, W) an image's own size, (h, w) after resizing, (S, S') the encoder's view.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from beit_pretrain.data.transforms import Box, Crops, Item, numbers, pair
from beit_pretrain.errors import ConfigError
from beit_pretrain.label_maps import IGNORED

_REDRAWS = 10  # of a crop in which one class has too much
_BRIGHTNESS = 32  # levels
_FACTORS = 0.5, 1.5  # of contrast and saturation
_HUE = 36  # degrees


class SceneBatch(NamedTuple):
    """A training batch: crops of one size."""

    image: Tensor  # (B, 3, S, S') uint8
    label_map: Tensor  # (B, S, S') uint8, 255 = ignored
    sample: Tensor  # (B,) int64, index in the data set
    view: Tensor  # (B,) int64, which deterministic view of it


class WholeBatch(NamedTuple):
    """A batch of whole images, each of its own size."""

    images: list[Tensor]  # each (3, H, W) uint8
    label_maps: list[Tensor]  # each (H, W) uint8, 255 = ignored
    sample: Tensor  # (B,) int64, index in the data set
    view: Tensor  # (B,) int64, which deterministic view of it


class PairView(Protocol):
    """From an image (3, H, W) uint8, its label map (H, W) uint8 and a 64-bit key to crops; from items to a batch."""

    def __call__(self, image: Tensor, label_map: Tensor, key: int) -> Crops: ...

    def collate(self, items: Sequence[Item]) -> SceneBatch | WholeBatch: ...


class SceneView:
    """The training view of segmentation: resized by chance, cropped, flipped, distorted in colour, padded.

    What the BEiT authors took over from mmsegmentation for ADE20k:

    - The image is made to just fit into `resize`, (short side, long side) in pixels whichever way it lies
      (None: the shorter side of `image_size` and four times it), times a factor from `scale`.
    - Of up to eleven crops the first is taken in which no class has `cat_max_ratio` of the labelled pixels or
      more, else the last; with 1 the first as it comes.
    - `distortion`: the colours are changed (`distort`).
    - What the crop sticks out at the bottom and right is ignored and has the colour `fill`, RGB in [0, 1],
      the mean of the normalisation.

    Raises ConfigError.
    """

    def __init__(
        self,
        *,
        image_size: Sequence[int],
        resize: Sequence[int] | None = None,
        scale: Sequence[float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip: float = 0.5,
        distortion: bool = True,
        fill: Sequence[float],
    ) -> None:
        faults = []
        sides = (min(image_size), 4 * min(image_size)) if resize is None else tuple(resize)
        if len(sides) != 2 or not 0 < sides[0] <= sides[1]:
            faults.append(
                f"stage.views.resize={list(sides)}: set two numbers of pixels, the short side first, or null for "
                "the shorter side of image_size and four times it"
            )
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            faults.append(f"stage.views.scale={list(scale)}: set two numbers, lower one first, above 0")
        if not 0 < cat_max_ratio <= 1:
            faults.append(
                f"stage.views.cat_max_ratio={cat_max_ratio}: set a share above 0, or 1 for any crop"
            )
        if not 0 <= flip <= 1:
            faults.append(f"stage.views.flip={flip}: set a probability from 0 to 1")
        if faults:
            raise ConfigError(faults)
        self.image_size = pair(image_size)
        self.resize = pair(sides)
        self.scale = (scale[0], scale[1])
        self.cat_max_ratio = cat_max_ratio
        self.flip = flip
        self.distortion = distortion
        self.fill = [min(255, round(255 * value)) for value in fill]

    def __call__(self, image: Tensor, label_map: Tensor, key: int) -> Crops:
        rng = random.Random(key)
        size = self._size((image.shape[1], image.shape[2]), rng)  # (h, w)
        flipped = rng.random() < self.flip
        box, labels = self._crop(label_map, size, rng)
        resized = functional.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
        crop = resized[:, box.top : box.top + box.height, box.left : box.left + box.width]
        if flipped:
            crop, labels = crop.flip(-1), labels.flip(-1)
        # Drawn last, so that geometry is the same without it.
        if self.distortion:
            crop = distort(crop, rng)
        return self._padded(crop, labels)

    def collate(self, items: Sequence[Item]) -> SceneBatch:
        image = torch.stack([item.crops.image for item in items])
        return SceneBatch(image, torch.stack([_map(item) for item in items]), *numbers(items))

    def _size(self, size: tuple[int, int], rng: random.Random) -> tuple[int, int]:
        """What the image is resized to: fitting into the two sides, times a factor by chance."""
        ratio = self.scale[0] + (self.scale[1] - self.scale[0]) * rng.random()
        factor = ratio * min(self.resize[0] / min(size), self.resize[1] / max(size))
        return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))

    def _crop(self, label_map: Tensor, size: tuple[int, int], rng: random.Random) -> tuple[Box, Tensor]:
        """A box of the resized image (h, w), and the label map resized (nearest) as far as it lies in the box."""
        height, width = min(size[0], self.image_size[0]), min(size[1], self.image_size[1])
        rows, cols = _nearest(label_map.shape[0], size[0]), _nearest(label_map.shape[1], size[1])
        labels = label_map.numpy()
        for draw in range(_REDRAWS + 1):
            top, left = _below(rng, size[0] - height + 1), _below(rng, size[1] - width + 1)
            crop = labels[rows[top : top + height, None], cols[left : left + width]]  # (height, width)
            if draw == _REDRAWS or self._is_mixed(crop):
                break
        return Box(top, left, height, width), torch.from_numpy(crop)

    def _is_mixed(self, labels: np.ndarray) -> bool:
        if self.cat_max_ratio == 1:
            return True
        pixels = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
        return bool(pixels.max() < self.cat_max_ratio * pixels.sum())

    def _padded(self, image: Tensor, label_map: Tensor) -> Crops:
        below, beside = (self.image_size[side] - label_map.shape[side] for side in (0, 1))
        if not below and not beside:
            return Crops(image.contiguous(), label_map=label_map.contiguous())
        whole = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].repeat(1, *self.image_size)
        whole[:, : image.shape[1], : image.shape[2]] = image
        return Crops(whole, label_map=pad(label_map, (0, beside, 0, below), value=IGNORED))


class WholeView:
    """The view of evaluation: image and label map as they are."""

    def __call__(self, image: Tensor, label_map: Tensor, key: int) -> Crops:
        del key
        return Crops(image, label_map=label_map)

    def collate(self, items: Sequence[Item]) -> WholeBatch:
        return WholeBatch(
            [item.crops.image for item in items], [_map(item) for item in items], *numbers(items)
        )


def distort(image: Tensor, rng: random.Random) -> Tensor:
    """The image (3, h, w) uint8 with other colours, as SSD is trained (Liu et al. 2016, section 2.2).

    Each by chance 1/2: brightness +-32 levels, contrast x0.5 to 1.5, saturation x0.5 to 1.5, hue +-36 degrees;
    contrast as the second step or as the last. Levels are cut to whole ones from 0 to 255 after each step.
    """
    # All are drawn, whether they happen or not.
    happens = [rng.random() < 0.5 for _ in range(4)]
    brightness = _BRIGHTNESS * (2 * rng.random() - 1)
    contrast, saturation = (_FACTORS[0] + (_FACTORS[1] - _FACTORS[0]) * rng.random() for _ in range(2))
    hue = round(_HUE * (2 * rng.random() - 1) * 256 / 360)  # Pillow's circle has 256 parts
    contrast_first = rng.random() < 0.5
    pixels = image.permute(1, 2, 0).numpy()  # (h, w, 3)
    if happens[0]:
        pixels = _levels(pixels, 1.0, brightness)
    if happens[1] and contrast_first:
        pixels = _levels(pixels, contrast, 0.0)
    if happens[2] or happens[3]:
        pixels = _shift_hsv(pixels, saturation if happens[2] else 1.0, hue if happens[3] else 0)
    if happens[1] and not contrast_first:
        pixels = _levels(pixels, contrast, 0.0)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _levels(pixels: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """factor * pixels + shift, cut to whole levels."""
    table = np.clip(np.arange(256) * factor + shift, 0, 255).astype(np.uint8)
    return table.take(pixels)


def _shift_hsv(pixels: np.ndarray, saturation: float, hue: int) -> np.ndarray:
    hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    hsv[..., 0] += np.uint8(hue % 256)  # around the circle
    hsv[..., 1] = _levels(hsv[..., 1], saturation, 0.0)
    return np.array(Image.frombytes("HSV", (hsv.shape[1], hsv.shape[0]), hsv.tobytes()).convert("RGB"))


def _nearest(before: int, after: int) -> np.ndarray:
    """For each of `after` pixels in a row the one of `before` in whose place its centre lies, (after,) int64."""
    return (2 * np.arange(after) + 1) * before // (2 * after)


def _below(rng: random.Random, count: int) -> int:
    return int(rng.random() * count)


def _map(item: Item) -> Tensor:
    assert item.crops.label_map is not None
    return item.crops.label_map
