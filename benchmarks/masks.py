"""Time per mask beside a plain Python version of Algorithm 1 of the BEiT paper:  python benchmarks/masks.py

All kinds take turns in one process, round by round, seeding included; given is the median of the rounds and
its ratio to the plain version's.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from beit_pretrain.masking import BlockwiseMask, RandomMask

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain_masks import PlainBlockwiseMask  # pyright: ignore[reportMissingImports]

ROUNDS, MASKS = 21, 500
PLAIN = "plain Python"


def interleaved(
    kinds: Mapping[str, Callable[[int], object]], *, rounds: int = ROUNDS, masks: int = MASKS
) -> dict[str, float]:
    """The median over the rounds of the time per mask in microseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds):
        for name, generate in kinds.items():
            start = time.perf_counter()
            for key in range(turn * masks, (turn + 1) * masks):
                generate(key)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(times) / masks for name, times in seconds.items()}


def main() -> None:
    for grid, count in [((14, 14), 75), ((32, 32), 410)]:
        times = interleaved(
            {
                PLAIN: PlainBlockwiseMask(grid, count, 16, 0.3),
                "blockwise, exact=false": BlockwiseMask(grid=grid, count=count, exact=False),
                "blockwise, exact=true": BlockwiseMask(grid=grid, count=count),
                "random": RandomMask(grid=grid, count=count),
            }
        )
        print(f"\n{grid[0]} x {grid[1]} patches, {count} hidden: microseconds per mask")
        for name, microseconds in times.items():
            print(f"  {name:24s}{microseconds:8.1f}   x {microseconds / times[PLAIN]:.2f}")


if __name__ == "__main__":
    main()
