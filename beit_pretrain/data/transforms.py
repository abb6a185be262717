"""Views: what becomes of an image, as a pure function of (image, key); and the batches they are stacked into.

Letters: B images, N = rows * cols patches, (H, W) an image's own size, (S, S') the encoder's view, (T, T')
the tokenizer's view.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from packaging.version import Version
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from beit_pretrain.data.jitter import Jitter, apply_jitter, draw_jitter, jitter_batch, postpone
from beit_pretrain.data.sampler import mix
from beit_pretrain.errors import ConfigError
from beit_pretrain.masking import MaskGenerator

Interpolation = Literal["bicubic", "lanczos"]

# Since 0.29 torchvision resizes uint8 tensors on the CPU by Lanczos; before, Pillow has to. They differ by
# a level here and there, so a checkpoint records which one made its pictures.
_LANCZOS_TENSORS = Version(torchvision.__version__) >= Version("0.29")
LANCZOS = "torchvision" if _LANCZOS_TENSORS else "pillow"
RESIZE_IMPLEMENTATION = (
    f"torchvision {Version(torchvision.__version__).base_version} uint8 antialias, lanczos by {LANCZOS}"
)
_LARGEST = 2**23  # pixels up to which an image is always resized as a whole
MASK_SALT = 1  # makes the key of a view's mask from that of its crop


class Crops(NamedTuple):
    """What a view makes of one image; None where a view has no such part."""

    image: Tensor  # (3, S, S') uint8
    token_image: Tensor | None = None  # (3, T, T') uint8
    mask: Tensor | None = None  # (N,) bool, True = hidden
    label_map: Tensor | None = None  # (S, S') uint8, 255 = ignored
    jitter: Tensor | None = None  # (5,) float32, from `jitter.row`: left to the device; None: already applied


class Item(NamedTuple):
    """One sample on its way into a batch."""

    crops: Crops
    sample: int
    view: int
    label: int
    ids: Tensor | None = None  # (N,) int32, from a token cache


class PretrainBatch(NamedTuple):
    """A batch of masked image modelling."""

    image: Tensor  # (B, 3, S, S') uint8
    token_image: Tensor | None  # (B, 3, T, T') uint8; exactly one of token_image and ids is set
    ids: Tensor | None  # (B, N) int, from a token cache
    mask: Tensor  # (B, N) bool, True = hidden
    sample: Tensor  # (B,) int64, index in the data set
    view: Tensor  # (B,) int64, which deterministic view of it
    jitter: Tensor | None  # (B, 5) float32, of `jitter.row`; None: already applied


class ImageBatch(NamedTuple):
    """A batch of plain images."""

    image: Tensor  # (B, 3, S, S') uint8
    label: Tensor  # (B,) int64, -1 = unknown
    sample: Tensor  # (B,) int64, index in the data set
    view: Tensor  # (B,) int64, which deterministic view of it


class View(Protocol):
    """From an image (3, H, W) uint8 and a 64-bit key to its crops, and from items to a batch."""

    def __call__(self, image: Tensor, key: int) -> Crops: ...

    def collate(self, items: Sequence[Item]) -> PretrainBatch | ImageBatch: ...


class Box(NamedTuple):
    """A rectangle of an image in pixels."""

    top: int
    left: int
    height: int
    width: int


def resize(
    image: Tensor, size: tuple[int, int], interpolation: Interpolation, *, planes: bool = True
) -> Tensor:
    """Image (3, h, w) uint8 as (3, *size) uint8, antialiased; without `planes` as it lies in memory.

    An image that lies pixel by pixel takes half the time, and putting its planes one after another a tenth.
    """
    if interpolation == "lanczos" and not _LANCZOS_TENSORS:
        resized = _resize_pillow(image, size)
    else:
        resized = functional.resize(image, list(size), InterpolationMode(interpolation), antialias=True)
    return resized.contiguous() if planes else resized


def _resize_pillow(
    image: Tensor,
    size: tuple[int, int],
    how: Image.Resampling = Image.Resampling.LANCZOS,
    part: Box | None = None,
) -> Tensor:
    """Image (3, h, w) as (3, *size), or this part of that, without ever making the rest."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    down, across = picture.height / size[0], picture.width / size[1]
    top, left, height, width = part or Box(0, 0, *size)
    right, bottom = min(picture.width, (left + width) * across), min(picture.height, (top + height) * down)
    box = None if part is None else (left * across, top * down, right, bottom)
    resized = picture.resize((width, height), how, box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def crop_box(
    rng: random.Random, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random box of an image of `size`: share of the area in `scale`, width / height in `ratio`.

    The ratio is uniform in its logarithm. Ten tries that stick out give the central box with the nearest
    ratio (Inception's crop, Szegedy et al. 2015; the distribution of torchvision's RandomResizedCrop).
    """
    height, width = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            return Box(top, left, h, w)
    h = height if width / height >= ratio[0] else max(1, round(width / ratio[0]))
    w = width if width / height <= ratio[1] else max(1, round(height * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


class Cutter:
    """One random crop of an image, jittered in colour and flipped, at its own size."""

    def __init__(
        self, crop_scale: Sequence[float], crop_ratio: Sequence[float], flip: float, jitter: float
    ) -> None:
        faults = []
        for name, pair, most in (("crop_scale", crop_scale, 1.0), ("crop_ratio", crop_ratio, math.inf)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
                limit = " and at most 1" if most == 1.0 else ""
                faults.append(f"{name}={list(pair)}: set two numbers, lower one first, above 0{limit}")
        if not 0 <= flip <= 1:
            faults.append(f"flip={flip}: set a probability from 0 to 1")
        if jitter < 0:
            faults.append(f"jitter={jitter}: set 0 (none) or more")
        if faults:
            raise ConfigError(faults)
        self.scale = (crop_scale[0], crop_scale[1])
        self.ratio = (crop_ratio[0], crop_ratio[1])
        self.flip = flip
        self.jitter = jitter

    def __call__(self, image: Tensor, key: int) -> Tensor:
        crop, flipped, jitter = self._cut(image, key)
        return _ready(crop if jitter is None else apply_jitter(crop, image, jitter), flipped)

    def plain(self, image: Tensor, key: int) -> tuple[Tensor, Tensor | None]:
        """The same crop before its jitter, where that can wait, and what is left of it to `jitter_batch`."""
        crop, flipped, jitter = self._cut(image, key)
        crop, row = (crop, None) if jitter is None else postpone(crop, image, jitter)
        return _ready(crop, flipped), row

    def _cut(self, image: Tensor, key: int) -> tuple[Tensor, bool, Jitter | None]:
        rng = random.Random(key)
        top, left, height, width = crop_box(rng, (image.shape[1], image.shape[2]), self.scale, self.ratio)
        crop = image[:, top : top + height, left : left + width]  # (3, h, w)
        flipped = rng.random() < self.flip
        # Drawn last, so that another strength leaves boxes and flips as they are.
        return crop, flipped, draw_jitter(rng, self.jitter) if self.jitter else None


def _ready(crop: Tensor, flipped: bool) -> Tensor:
    """The crop, or its mirror image, pixel by pixel in memory, as resampling reads it fastest."""
    crop = crop.flip(-1) if flipped else crop
    # Planes are interleaved by `stack`, which takes half as long for it as `contiguous`.
    together = crop.permute(1, 2, 0).contiguous() if crop.stride(0) == 1 else torch.stack(crop.unbind(), -1)
    return together.permute(2, 0, 1)


class TwoViews:
    """The pre-training view: ONE crop box cut at two sizes, for encoder and tokenizer, and a mask.

    BEiT paper, Appendix (hyperparameters of pre-training): colour jitter, flip, random resized crop;
    bicubic for the encoder, Lanczos for the DALL-E tokenizer. No `token_image_size` leaves the second view
    out.

    With `defer_jitter` the colour jitter is left to `coloured`, on the device, where it can wait: the views are still
    without it, and the draw goes with them. Pixels differ a little, as jitter then comes after resampling.

    When called, `mask_key` draws the mask (None: it is derived from `key`), and without `token_view` the
    tokenizer's view is not cut.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        token_image_size: tuple[int, int] | None,
        mask: MaskGenerator,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: float = 0.4,
        token_interpolation: Interpolation = "lanczos",
        defer_jitter: bool = False,
    ) -> None:
        if token_interpolation not in ("lanczos", "bicubic"):
            raise ConfigError(f"token_interpolation={token_interpolation}: set lanczos or bicubic")
        if not isinstance(defer_jitter, bool):
            raise ConfigError(f"stage.views.defer_jitter={defer_jitter}: set auto, true or false")
        self.image_size = pair(image_size)
        self.token_image_size = None if token_image_size is None else pair(token_image_size)
        self.mask = mask
        self.cut = Cutter(crop_scale, crop_ratio, flip, jitter)
        self.token_interpolation: Interpolation = token_interpolation
        self.defer_jitter = defer_jitter

    def __call__(
        self, image: Tensor, key: int, *, mask_key: int | None = None, token_view: bool = True
    ) -> Crops:
        crop, jitter = self.cut.plain(image, key) if self.defer_jitter else (self.cut(image, key), None)
        planes = jitter is None  # else the device puts them in order
        small = resize(crop, self.image_size, "bicubic", planes=planes)  # (3, S, S')
        token = None
        if token_view and self.token_image_size is not None:
            token = resize(crop, self.token_image_size, self.token_interpolation, planes=planes)  # (3, T, T')
        hidden = self.mask(mix(key, MASK_SALT) if mask_key is None else mask_key)  # (rows, cols)
        return Crops(small, token, torch.from_numpy(hidden).flatten(), jitter=jitter)

    def coloured(self, images: Tensor, jitter: Tensor | None) -> Tensor:
        """A batch's image or token_image (B, 3, H, W) uint8, after the jitter that was left to the device, if any."""
        return images if jitter is None else jitter_batch(images, jitter)

    def collate(self, items: Sequence[Item]) -> PretrainBatch:
        mask = _stack([item.crops.mask for item in items])
        jitter = _stack([item.crops.jitter for item in items])
        stack = _stack if jitter is None else _stack_pixels
        image = stack([item.crops.image for item in items])
        token = stack([item.crops.token_image for item in items])
        assert image is not None and mask is not None
        return PretrainBatch(image, token, None, mask, *numbers(items), jitter)


class OneView:
    """A random crop at one size, as a tokenizer is trained on."""

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: float = 0.0,
    ) -> None:
        self.image_size = pair(image_size)
        self.cut = Cutter(crop_scale, crop_ratio, flip, jitter)

    def __call__(self, image: Tensor, key: int) -> Crops:
        return Crops(resize(self.cut(image, key), self.image_size, "bicubic"))  # (3, S, S')

    def collate(self, items: Sequence[Item]) -> ImageBatch:
        return image_batch(items)


class EvalView:
    """The centre of an image, resized until it just covers image_size / crop_pct; nothing is random.

    `rounding` says where the crop begins if the margins are odd: `round` as in torchvision and the published scores,
    `int` as in Transformers. Of a long thin image, which would grow to gigabytes, Pillow makes nothing but the crop.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        crop_pct: float = 0.875,
        rounding: Callable[[float], int] = round,
    ) -> None:
        if not 0 < crop_pct <= 1:
            raise ConfigError(f"crop_pct={crop_pct}: set a share of the image above 0 and at most 1")
        self.image_size = pair(image_size)
        self.rounding = rounding
        # The small term keeps 224 / 0.875 at 256, whatever the last bit of the quotient.
        self.cover = tuple(math.floor(side / crop_pct + 1e-6) for side in image_size)

    def __call__(self, image: Tensor, key: int) -> Crops:
        del key
        (height, width), (rows, cols) = image.shape[1:], self.cover
        # Whichever side binds keeps its length; the other follows, cut to whole pixels, and is never too short.
        covering = max(rows, cols * height // width), max(cols, rows * width // height)
        top, left = (self.rounding((covering[side] - self.image_size[side]) / 2) for side in (0, 1))
        if covering[0] * covering[1] > max(_LARGEST, 16 * rows * cols):
            centre = Box(top, left, *self.image_size)
            return Crops(_resize_pillow(image, covering, Image.Resampling.BICUBIC, centre))
        resized = resize(image, covering, "bicubic")
        return Crops(resized[:, top : top + self.image_size[0], left : left + self.image_size[1]])

    def collate(self, items: Sequence[Item]) -> ImageBatch:
        return image_batch(items)


def pair(size: Sequence[int]) -> tuple[int, int]:
    """(rows, cols) of two numbers, whatever kind of sequence the configuration holds."""
    rows, cols = size
    return rows, cols


def image_batch(items: Sequence[Item]) -> ImageBatch:
    """The items of a view of one crop as a batch."""
    label = torch.tensor([item.label for item in items], dtype=torch.int64)
    return ImageBatch(torch.stack([item.crops.image for item in items]), label, *numbers(items))


def numbers(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Which samples, and which views of them: (B,) int64 each."""
    sample = torch.tensor([item.sample for item in items], dtype=torch.int64)
    return sample, torch.tensor([item.view for item in items], dtype=torch.int64)


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return default_collate(given) if given else None  # in a worker, right into the memory that it shares


def _stack_pixels(images: Sequence[Tensor | None]) -> Tensor | None:
    """Images (3, H, W) that lie pixel by pixel as (B, 3, H, W) that does so too: `torch.stack` takes them apart."""
    batch = _stack([None if image is None else image.permute(1, 2, 0) for image in images])
    return None if batch is None else batch.permute(0, 3, 1, 2)
