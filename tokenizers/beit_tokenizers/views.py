"""The view a tokenizer is made for: its size, and whether an image has it.

Letters: B images, T the side of the tokenizer's view.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from beit_pretrain.errors import ConfigError


def size_of(image_size: int | Sequence[int], stride: int) -> tuple[int, int]:
    """(height, width) in pixels of one number or a pair, both of which the stride must divide."""
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or any(side < stride or side % stride for side in pair):
        down = max(stride, min(pair) // stride * stride)
        raise ConfigError(
            f"tokenizer.image_size={image_size}: not a multiple of the tokenizer's stride {stride};"
            f" set tokenizer.image_size to {down}, {down + stride} or a pair of such numbers"
        )
    return int(pair[0]), int(pair[1])


def check_view(image: Tensor, image_size: tuple[int, int]) -> None:
    """Refuse an image (B, 3, T, T) of another size than the tokenizer was made for."""
    if tuple(image.shape[1:]) != (3, *image_size):
        raise ConfigError(
            f"the tokenizer is for images of 3 x {image_size[0]} x {image_size[1]} and was given"
            f" {' x '.join(str(n) for n in image.shape[1:])}; set tokenizer.image_size to its view's size"
        )
