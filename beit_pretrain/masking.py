"""Which patches an image hides: blockwise (BEiT paper, Sec. 2.3, Alg. 1) or at random (the ablation).

A mask is a pure function of a 64-bit key, so it depends on no worker, rank or restart. While it grows, it is
one Python integer with a bit per patch: a whole block is then hidden or counted in a single operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, Protocol

import numpy as np

from beit_pretrain.errors import ConfigError

MOST_PATCHES = 2**16  # of a grid: what a block can be at each corner is listed for all of them
TRIES = 10  # draws for one block before the mask is taken as finished; the authors' value


class MaskGenerator(Protocol):
    """What the data part needs of a mask: its size, whether that is kept exactly, and a mask for each key."""

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def count(self) -> int: ...

    @property
    def exact(self) -> bool: ...

    def __call__(self, key: int) -> np.ndarray: ...


class Block(NamedTuple):
    """A rectangle of patches."""

    top: int
    left: int
    height: int
    width: int


class BlockwiseMask:
    """Overlapping random blocks that together hide `count` patches of the grid.

    With `exact` every mask hides precisely `count` patches: random single patches fill what the blocks leave
    open (as BEiT v2 does). Without, it is Algorithm 1 as the authors run it: no block may exceed what is
    still to hide, and a mask ends early when ten draws in a row add nothing: it hides *at most* `count`.

    grid: (rows, cols) of patches.
    min_block: patches below which no block is drawn, except when less than that is left to hide.
    aspect: the flattest height / width of a block; the steepest is 1 / aspect, and the logarithm is uniform.
    Raises ConfigError, all faults at once, when the numbers do not fit the grid or each other.
    """

    def __init__(
        self,
        *,
        grid: Sequence[int],
        count: int,
        min_block: int = 16,
        aspect: float = 0.3,
        exact: bool = True,
    ) -> None:
        faults = _count_faults(grid, count) or _block_faults(grid, count, min_block, aspect)
        if faults:
            raise ConfigError(faults)
        rows, cols = grid
        self.grid = (rows, cols)
        self.count = count
        self.min_block = min_block
        self.aspect = aspect
        self.exact = exact
        # A block has fewer rows and fewer columns than the grid (strictly, in the authors' code).
        self._corner_blocks = [[_corner_block(h, w, cols) for w in range(cols)] for h in range(rows)]

    def __call__(self, key: int) -> np.ndarray:
        """The mask of `key`: (rows, cols) bool, True = hidden."""
        draw = _uniform(key)
        hidden, _ = self._cover(draw)
        if self.exact:
            hidden = _hide_singles(hidden, self.count - hidden.bit_count(), math.prod(self.grid), draw)
        return _to_array(hidden, self.grid)

    def blocks(self, key: int) -> list[Block]:
        """The blocks of the mask of `key`, in the order in which they were laid."""
        return self._cover(_uniform(key))[1]

    def _cover(self, draw: Callable[[], float]) -> tuple[int, list[Block]]:
        """Lays blocks until `count` patches are hidden or no further block is found."""
        hidden, budget = 0, self.count
        blocks: list[Block] = []
        while budget > 0:
            block = self._find(hidden, budget, draw)
            if block is None:
                break
            hidden |= self._bits(block)
            budget = self.count - hidden.bit_count()
            blocks.append(block)
        return hidden, blocks

    def _find(self, hidden: int, budget: int, draw: Callable[[], float]) -> Block | None:
        """A random block that hides at least one further patch and at most `budget`."""
        rows, cols = self.grid
        steepest = -math.log(self.aspect)
        for _ in range(TRIES):
            # Below the minimum the interval is reversed: such blocks are larger than the budget and pass
            # only where they overlap what is hidden already.
            area = self.min_block + (budget - self.min_block) * draw()
            aspect = math.exp(steepest * (2.0 * draw() - 1.0))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= rows or width >= cols:
                continue
            top = int(draw() * (rows - height + 1))
            left = int(draw() * (cols - width + 1))
            block = Block(top, left, height, width)
            if 0 < (self._bits(block) & ~hidden).bit_count() <= budget:
                return block
        return None

    def _bits(self, block: Block) -> int:
        top, left, height, width = block
        return self._corner_blocks[height][width] << (top * self.grid[1] + left)


class RandomMask:
    """`count` patches drawn without regard to their neighbours (the ablation of BEiT paper, Sec. 3.3).

    Raises ConfigError when `count` does not fit the grid.
    """

    exact = True

    def __init__(self, *, grid: Sequence[int], count: int) -> None:
        faults = _count_faults(grid, count)
        if faults:
            raise ConfigError(faults)
        rows, cols = grid
        self.grid = (rows, cols)
        self.count = count

    def __call__(self, key: int) -> np.ndarray:
        """The mask of `key`: (rows, cols) bool, True = hidden."""
        return _to_array(_hide_singles(0, self.count, math.prod(self.grid), _uniform(key)), self.grid)


def _uniform(key: int) -> Callable[[], float]:
    """A stream of numbers in [0, 1) for a key, which is taken modulo 2**64.

    Only `random()` is drawn from: it is the one method whose sequence Python promises to keep. The Mersenne
    twister mixes the key over its whole state, so neighbouring keys share nothing; seeding a NumPy generator
    takes several times as long.
    """
    return Random(key % 2**64).random


def _hide_singles(hidden: int, missing: int, patches: int, draw: Callable[[], float]) -> int:
    """`hidden` with `missing` further patches, uniform over the visible ones."""
    while missing > 0:
        bit = 1 << int(draw() * patches)
        if not hidden & bit:
            hidden |= bit
            missing -= 1
    return hidden


def _corner_block(height: int, width: int, cols: int) -> int:
    """The bits of a block in the top left corner."""
    row = (1 << width) - 1
    return sum(row << (y * cols) for y in range(height))


def _to_array(hidden: int, grid: tuple[int, int]) -> np.ndarray:
    patches = grid[0] * grid[1]
    packed = np.frombuffer(hidden.to_bytes((patches + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=patches, bitorder="little").view(np.bool_).reshape(grid)


def _count_faults(grid: Sequence[int], count: int) -> list[str]:
    rows, cols = grid
    patches = rows * cols
    size = f"the grid of {rows} x {cols} = {patches} patches"
    if patches > MOST_PATCHES:
        return [f"{size} is larger than any encoder's: set a smaller image_size or a larger patch size"]
    if patches < 2:
        return [f"{size} cannot be masked: set a larger image_size or a smaller patch size"]
    if not isinstance(count, int):
        return [
            f"masking.count is {count!r}, but it is a whole number of patches, not a share: "
            f"40 % of {size} is masking.count={max(1, round(0.4 * patches))}"
        ]
    if not 0 < count < patches:
        return [
            f"masking.count is {count}, but of {size} at least one must be hidden and one visible: "
            f"set masking.count between 1 and {patches - 1}, for instance {max(1, round(0.4 * patches))}"
        ]
    return []


def _block_faults(grid: Sequence[int], count: int, min_block: int, aspect: float) -> list[str]:
    rows, cols = grid
    faults: list[str] = []
    if not 0.0 < aspect <= 1.0:
        faults.append(
            f"masking.aspect is {aspect}, but it is the flattest height / width of a block: "
            "set masking.aspect above 0 and at most 1, for instance 0.3"
        )
    if not 1 <= min_block <= count:
        faults.append(
            f"masking.min_block is {min_block}, but a block hides at least one patch and at most "
            f"masking.count={count}: set masking.min_block between 1 and {count}"
        )
    if not faults and not _fits(grid, min_block, aspect):
        faults.append(
            f"masking.min_block is {min_block}, but no block of that size with masking.aspect={aspect} has "
            f"fewer rows and fewer columns than the grid of {rows} x {cols}: set a smaller masking.min_block"
            ", a smaller masking.aspect, or masking=random"
        )
    return faults


def _fits(grid: Sequence[int], area: int, aspect: float) -> bool:
    """Whether some allowed aspect rounds `area` to a block of 1 to rows - 1 by 1 to cols - 1 patches."""
    rows, cols = grid
    # Open interval of aspects with 0.5 < sqrt(area * a) < rows - 0.5 and 0.5 < sqrt(area / a) < cols - 0.5.
    flattest = max(0.25, area**2 / (cols - 0.5) ** 2) / area
    steepest = min((rows - 0.5) ** 2, 4.0 * area**2) / area
    return flattest < steepest and aspect < steepest and 1.0 / aspect > flattest
