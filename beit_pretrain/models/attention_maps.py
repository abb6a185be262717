"""Where the tokens of an image look, within one block.

Letters: B images, H heads, L = 1 + N tokens (CLS first, then N = rows * columns patches, row-major).
"""

from __future__ import annotations

from torch import Tensor

from beit_pretrain.models.beit import Beit
from beit_pretrain.models.blocks import Block


def attention_maps(encoder: Beit, image: Tensor, block: int) -> Tensor:
    """Attention probabilities (B, H, L, L) of a block, counted from 0, or from the end as -1.

    Row i is where token i looks; it sums to 1. `image` is normalised, (B, 3, height, width), and of any size that the
    patch divides. The blocks below run as in `encoder.features`; differentiable, and nothing in the encoder changes.
    Raises IndexError if there is no such block, BeitError if the patch does not divide the image.
    """
    number = range(encoder.depth)[block]
    part = encoder.blocks[number]
    assert isinstance(part, Block)
    tokens = encoder.features(image, [number - 1])[0] if number else encoder.embed(image)  # (B, L, D)
    return part.attention(tokens, encoder.bias(encoder.grid_of(image)))
