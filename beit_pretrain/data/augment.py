"""The training view of fine-tuning: a random crop under RandAugment."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor

from beit_pretrain.data.sampler import mix
from beit_pretrain.data.transforms import Crops, Cutter, ImageBatch, Item, image_batch, pair, resize
from beit_pretrain.errors import ConfigError

_AUGMENT_SALT = 2
# What timm reads; it passes over a section without a number, and takes its default set for an unknown one.
_NUMBER = r"\d+(\.\d+)?"
_POLICY = re.compile(rf"rand(-([mn]\d+|mmax\d+|inc[01]|(p|mstd){_NUMBER}|t(weights|3aw?)))*")


class FineTuneView:
    """A random crop, flipped, resized (bicubic) and put through RandAugment (Cubuk et al. 2020).

    `rand_augment` is a policy in timm's notation; without one the crop's colours are jittered instead.
    `fill` is what rotations and shifts leave behind, per RGB channel in [0, 1]: the mean of the
    normalisation, as in timm and BEiT (Appendix, hyperparameters of fine-tuning). Raises ConfigError.
    """

    def __init__(
        self,
        *,
        image_size: Sequence[int],
        crop_scale: Sequence[float],
        crop_ratio: Sequence[float],
        flip: float,
        rand_augment: str | None,
        jitter: float,
        fill: Sequence[float],
    ) -> None:
        self.image_size = pair(image_size)
        self.cut = Cutter(crop_scale, crop_ratio, flip, jitter if rand_augment is None else 0.0)
        self.policy = None if rand_augment is None else _policy(rand_augment, self.image_size, fill)

    def __call__(self, image: Tensor, key: int) -> Crops:
        small = resize(self.cut(image, key), self.image_size, "bicubic")  # (3, S, S')
        return Crops(small if self.policy is None else _augment(small, self.policy, mix(key, _AUGMENT_SALT)))

    def collate(self, items: Sequence[Item]) -> ImageBatch:
        return image_batch(items)


def _policy(text: str, size: tuple[int, int], fill: Sequence[float]) -> RandAugment:
    if not _POLICY.fullmatch(text):
        raise ConfigError(
            f"stage.views.rand_augment={text}: set a policy in timm's notation, rand and then any of m (strength), "
            "n (steps), p (chance of each), mstd (noise of m), mmax, inc1 and t (set of steps: tweights, t3a, t3aw), "
            "such as rand-m9-mstd0.5-inc1, or null for colour jitter"
        )
    policy = rand_augment_transform(
        text,
        {
            "translate_const": int(min(size) * 0.45),  # pixels
            "img_mean": tuple(min(255, round(255 * value)) for value in fill),
            "interpolation": Image.Resampling.BICUBIC,
        },
    )
    for step in policy.ops:
        if step.name.startswith("Posterize"):
            step.level_fn = partial(_at_least_one_bit, step.level_fn)
    return policy


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], *arguments: Any) -> tuple[int]:
    """timm asks for 0 bits and fewer at the ends of its scale, which newer Pillows refuse."""
    return (max(1, level_fn(*arguments)[0]),)


def _augment(image: Tensor, policy: RandAugment, key: int) -> Tensor:
    """The image (3, S, S') uint8 after the policy, whose draws are a function of the key."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    # timm draws from the global generators of Python and NumPy, which belong to the training.
    before = random.getstate(), np.random.get_state()
    random.seed(key)
    np.random.seed(key % (1 << 32))
    try:
        changed = policy(picture)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous()
