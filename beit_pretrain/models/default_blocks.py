"""The blocks that a segmentation's head looks at where nobody names them; without torch, for configurations too."""

from __future__ import annotations


def default_blocks(depth: int) -> list[int]:
    """Four blocks, counted from 0, after a third, half, two thirds and all of the depth.

    Each once, as Transformers needs them, where there are four: 0, 1, 2, 3 of 4.
    """
    spread = blocks_of_null(depth)
    return [min(block, depth - 4 + i) for i, block in enumerate(spread)] if depth >= 4 else spread


def blocks_of_null(depth: int) -> list[int]:
    """What stage.blocks=null stands for in the runs that stored it so: 1, 1, 2, 3 of 4, otherwise as above."""
    return [-(-depth * part // 6) - 1 for part in (2, 3, 4, 6)]
