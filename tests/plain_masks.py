"""Algorithm 1 of the BEiT paper in plain Python, to the letter: the oracle of tests and benchmark."""

from __future__ import annotations

import math
import random

import numpy as np

PlainBlock = tuple[int, int, int, int]  # top, left, height, width


class PlainBlockwiseMask:
    """Algorithm 1 with loops over the cells of an integer grid and the methods of Python's `random`."""

    def __init__(self, grid: tuple[int, int], count: int, min_block: int, aspect: float) -> None:
        self.height, self.width = grid
        self.goal = count
        self.min_block = min_block
        self.max_block = count
        self.log_aspect = (math.log(aspect), math.log(1.0 / aspect))

    def _add_block(self, rng: random.Random, mask: np.ndarray, budget: int, blocks: list[PlainBlock]) -> int:
        added = 0
        for _ in range(10):
            area = rng.uniform(self.min_block, budget)
            aspect = math.exp(rng.uniform(*self.log_aspect))
            h = int(round(math.sqrt(area * aspect)))  # noqa: RUF046  (to the letter)
            w = int(round(math.sqrt(area / aspect)))  # noqa: RUF046
            if w < self.width and h < self.height:
                top = rng.randint(0, self.height - h)
                left = rng.randint(0, self.width - w)
                overlap = mask[top : top + h, left : left + w].sum()
                if 0 < h * w - overlap <= budget:
                    for i in range(top, top + h):
                        for j in range(left, left + w):
                            if mask[i, j] == 0:
                                mask[i, j] = 1
                                added += 1
                    blocks.append((top, left, h, w))
                if added > 0:
                    break
        return added

    def mask_and_blocks(self, key: int) -> tuple[np.ndarray, list[PlainBlock]]:
        rng = random.Random(key)
        mask = np.zeros((self.height, self.width), dtype=int)
        blocks: list[PlainBlock] = []
        hidden = 0
        while hidden < self.goal:
            budget = min(self.goal - hidden, self.max_block)
            added = self._add_block(rng, mask, budget, blocks)
            if added == 0:
                break
            hidden += added
        return mask, blocks

    def __call__(self, key: int) -> np.ndarray:
        return self.mask_and_blocks(key)[0]
