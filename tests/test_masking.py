"""Masks against Algorithm 1 in plain Python (`plain_masks`), and what a key promises."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from plain_masks import PlainBlockwiseMask

from beit_pretrain.errors import ConfigError
from beit_pretrain.masking import BlockwiseMask, MaskGenerator, RandomMask

SAMPLES = 20_000
SETTINGS = [((14, 14), 75, 16), ((9, 17), 60, 10)]
PAPER = {"grid": (14, 14), "count": 75, "min_block": 16, "aspect": 0.3}


class Statistics:
    """What 20,000 masks look like."""

    def __init__(self, masks: list[np.ndarray], blocks: list[list[tuple[int, int, int, int]]]) -> None:
        stacked = np.stack(masks).astype(bool)
        self.counts = stacked.sum((1, 2))
        self.heat = stacked.mean(0)
        shapes = np.array([(h, w) for mask in blocks for _, _, h, w in mask])
        self.areas = shapes.prod(1)
        self.log_aspects = np.log(shapes[:, 0] / shapes[:, 1])
        self.blocks_per_mask = np.array([len(mask) for mask in blocks])


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: f"{s[0][0]}x{s[0][1]}")
def both(request: pytest.FixtureRequest) -> tuple[Statistics, Statistics]:
    """Statistics of ours and of the plain version, on different keys."""
    grid, count, min_block = request.param
    ours = BlockwiseMask(grid=grid, count=count, min_block=min_block, aspect=0.3, exact=False)
    plain = PlainBlockwiseMask(grid, count, min_block, 0.3)
    pairs = [plain.mask_and_blocks(key) for key in range(10**9, 10**9 + SAMPLES)]
    return (
        Statistics([ours(key) for key in range(SAMPLES)], [list(ours.blocks(key)) for key in range(SAMPLES)]),
        Statistics([mask for mask, _ in pairs], [blocks for _, blocks in pairs]),
    )


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    size = int(max(a.max(), b.max())) + 1
    share = [np.bincount(x, minlength=size) / len(x) for x in (a, b)]
    return 0.5 * float(np.abs(share[0] - share[1]).sum())


def largest_gap(a: np.ndarray, b: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance of two samples."""
    at = np.union1d(a, b)
    cumulated = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cumulated[0] - cumulated[1]).max())


def test_the_count_histogram_is_that_of_algorithm_1(both: tuple[Statistics, Statistics]) -> None:
    ours, plain = both
    assert len(set(plain.counts)) > 5  # not all at the goal, else this would show nothing
    assert total_variation(ours.counts, plain.counts) <= 0.02


def test_each_patch_is_hidden_as_often_as_in_algorithm_1(both: tuple[Statistics, Statistics]) -> None:
    ours, plain = both
    # Two shares of 20,000 masks differ by 0.005 (one standard deviation); 150 to 200 patches are compared.
    assert np.abs(ours.heat - plain.heat).max() < 0.02
    assert plain.heat.max() - plain.heat.min() > 0.4


def test_block_sizes_aspects_and_numbers_are_those_of_algorithm_1(
    both: tuple[Statistics, Statistics],
) -> None:
    ours, plain = both
    assert largest_gap(ours.areas, plain.areas) < 0.01
    assert largest_gap(ours.log_aspects, plain.log_aspects) < 0.01
    assert total_variation(ours.blocks_per_mask, plain.blocks_per_mask) < 0.02


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("grid", "count", "min_block"), [*SETTINGS, ((8, 8), 26, 4), ((3, 2), 2, 1)])
def test_a_mask_is_its_blocks_and_single_patches_up_to_the_count(
    grid: tuple[int, int], count: int, min_block: int, exact: bool
) -> None:
    generator = BlockwiseMask(grid=grid, count=count, min_block=min_block, exact=exact)
    for key in range(300):
        mask = generator(key)
        assert mask.shape == grid
        assert mask.dtype == np.bool_
        covered = np.zeros(grid, dtype=bool)
        for top, left, height, width in generator.blocks(key):
            assert 0 < height < grid[0]
            assert 0 < width < grid[1]
            assert 0 <= top <= grid[0] - height
            assert 0 <= left <= grid[1] - width
            before = int(covered.sum())
            covered[top : top + height, left : left + width] = True
            assert before < covered.sum() <= count
        if exact:
            assert mask.sum() == count
            assert mask[covered].all()
        else:
            assert np.array_equal(mask, covered)


def test_single_patches_that_reach_the_count_fall_evenly_on_what_the_blocks_leave() -> None:
    grid, count = (6, 5), 15
    exact = BlockwiseMask(grid=grid, count=count, min_block=10)
    added, expected = np.zeros(grid), np.zeros(grid)
    for key in range(SAMPLES):
        covered = np.zeros(grid, dtype=bool)
        for top, left, height, width in exact.blocks(key):
            covered[top : top + height, left : left + width] = True
        added += exact(key) & ~covered
        expected += ~covered * (count - covered.sum()) / (~covered).sum()
    assert expected.min() > 40
    assert np.all(np.abs(added - expected) < 5 * np.sqrt(expected))


@pytest.mark.parametrize(("grid", "count"), [((14, 14), 75), ((5, 9), 44), ((1, 7), 3), ((4, 3), 1)])
def test_random_masks_hide_the_count_and_every_patch_alike(grid: tuple[int, int], count: int) -> None:
    generator = RandomMask(grid=grid, count=count)
    masks = np.stack([generator(key) for key in range(4000)])
    assert generator.exact
    assert masks.dtype == np.bool_
    assert masks.shape[1:] == grid
    assert (masks.sum((1, 2)) == count).all()
    share = count / (grid[0] * grid[1])
    assert np.abs(masks.mean(0) - share).max() < 5 * np.sqrt(share * (1 - share) / 4000)


def test_two_patches_of_a_random_mask_know_nothing_of_each_other() -> None:
    masks = np.stack([RandomMask(grid=(4, 4), count=6)(key) for key in range(SAMPLES)]).reshape(SAMPLES, 16)
    together = masks.T.astype(float) @ masks / SAMPLES
    pairs = together[~np.eye(16, dtype=bool)]
    expected = 6 * 5 / (16 * 15)
    assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected * (1 - expected) / SAMPLES)


GENERATORS: list[MaskGenerator] = [
    BlockwiseMask(grid=(14, 14), count=75),
    BlockwiseMask(grid=(14, 14), count=75, exact=False),
    RandomMask(grid=(14, 14), count=75),
]


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_mask_depends_on_its_key_alone(generator: MaskGenerator) -> None:
    keys = [0, 1, 2**63, 2**64 - 1]
    first = [generator(key).copy() for key in keys]
    for key in range(50):
        generator(key)[:] = True  # the array belongs to the caller
    travelled = pickle.loads(pickle.dumps(generator))  # as to a worker
    for key, mask in zip(reversed(keys), reversed(first), strict=True):
        assert np.array_equal(generator(key), mask)
        assert np.array_equal(travelled(key), mask)
    assert np.array_equal(generator(-1), first[3])  # a signed hash of the same bits


def test_the_masks_of_known_keys_never_change() -> None:
    """A run that goes on after an update of Python or of this file must see the masks it began with."""
    blockwise = BlockwiseMask(grid=(4, 5), count=8, min_block=3)
    found = ["".join("#" if hidden else "." for hidden in blockwise(key).flat) for key in (0, 1, 2**40)]
    assert found == ["......###..###....##", "......####.#.##.#...", "....#.##.#.####....."]


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("step", [1, 2**32, 2**48], ids=["1", "2**32", "2**48"])
def test_masks_of_neighbouring_keys_are_independent(generator: MaskGenerator, step: int) -> None:
    samples = 6000
    masks = np.stack([generator(key * step) for key in range(samples)]).reshape(samples, -1)
    shares = masks.mean(0)
    overlaps = np.array([(a & b).sum() for a, b in pairwise(masks)])
    error = overlaps.std() / np.sqrt(len(overlaps))
    assert abs(overlaps.mean() - (shares**2).sum()) < 4 * error
    again = masks.astype(float) - shares
    correlation = (again[:-1] * again[1:]).mean(0) / again.var(0)  # of each patch with itself, one key on
    assert np.abs(correlation).max() < 5 / np.sqrt(samples)


def test_a_mask_takes_at_most_0_9_of_the_time_of_plain_python() -> None:
    """Seeding included, in turns; the best of a few rounds, as a busy machine slows either."""
    plain = PlainBlockwiseMask((14, 14), 75, 16, 0.3)

    def seconds(generate: Callable[[int], np.ndarray]) -> float:
        start = time.perf_counter()
        for key in range(300):
            generate(key)
        return time.perf_counter() - start

    for exact in (True, False):
        ours = BlockwiseMask(**PAPER, exact=exact)
        rounds = [(seconds(ours), seconds(plain)) for _ in range(9)]
        assert min(a for a, _ in rounds) <= 0.9 * min(b for _, b in rounds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"masking.count is 0, but of the grid of 14 x 14 = 196 patches .* between 1 and 195"),
        ({"count": 196}, r"masking.count is 196, .* set masking.count between 1 and 195, for instance 78"),
        ({"count": 0.4}, r"masking.count is 0.4, .* not a share: 40 % .* is masking.count=78"),
        ({"min_block": 0}, r"masking.min_block is 0, .* set masking.min_block between 1 and 75"),
        ({"min_block": 76}, r"masking.min_block is 76, .* masking.count=75: set .* between 1 and 75"),
        ({"aspect": 0.0}, r"masking.aspect is 0.0, .* set masking.aspect above 0 and at most 1"),
        ({"aspect": 1.5}, r"masking.aspect is 1.5, .* set masking.aspect above 0 and at most 1"),
        (
            {"grid": (1, 1), "count": 1},
            r"grid of 1 x 1 = 1 patches cannot be masked: set a larger image_size",
        ),
        (
            {"grid": (2, 50), "count": 40},
            r"min_block is 16, but no block .* the grid of 2 x 50: set a smaller",
        ),
        ({"grid": (1, 50), "count": 9, "min_block": 1}, r"grid of 1 x 50: .* or masking=random"),
    ],
)
def test_impossible_masks_are_refused_with_what_to_set(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockwiseMask(**{**PAPER, **change})


def test_all_faults_of_the_blocks_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BlockwiseMask(grid=(14, 14), count=75, min_block=80, aspect=2.0)
    assert len(caught.value.faults) == 2


def test_random_masks_refuse_an_impossible_count_too() -> None:
    with pytest.raises(ConfigError, match=r"masking.count is 20, .* between 1 and 11, for instance 5"):
        RandomMask(grid=(4, 3), count=20)


@pytest.mark.parametrize("rows", range(1, 7))
@pytest.mark.parametrize("aspect", [0.1, 0.3, 1.0])
def test_a_block_is_called_impossible_only_when_it_is(rows: int, aspect: float) -> None:
    """Against trying every aspect on a fine scale."""
    for cols in range(1, 9):
        for min_block in range(1, rows * cols - 1):
            tried = np.exp(np.linspace(np.log(aspect), -np.log(aspect), 2001))
            height, width = np.rint(np.sqrt(min_block * tried)), np.rint(np.sqrt(min_block / tried))
            possible = ((height > 0) & (height < rows) & (width > 0) & (width < cols)).any()
            try:
                BlockwiseMask(grid=(rows, cols), count=rows * cols - 1, min_block=min_block, aspect=aspect)
            except ConfigError:
                assert not possible
            else:
                assert possible
