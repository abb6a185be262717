"""The index, the bias and the resize of relative position tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.rel_pos import (
    BiasLookup,
    RelativePositionBias,
    relative_position_index,
    resize_table,
    table_rows,
)

Grid = tuple[int, int]


def random_table(grid: Grid, heads: int = 3) -> Tensor:
    return torch.randn(table_rows(grid), heads, generator=torch.Generator().manual_seed(0))


def patch_part(table: Tensor, grid: Grid) -> np.ndarray:
    """(2 rows - 1, 2 columns - 1, H)."""
    return table[:-3].reshape(2 * grid[0] - 1, 2 * grid[1] - 1, -1).numpy()


def published_offsets(source: int, target: int) -> np.ndarray:
    """Where the published code sets the old offsets of a side that grows, worked out step by step."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (source - 1)) / (1 - ratio) > target - 1:
            high = ratio
        else:
            low = ratio
    right = []
    place = 1.0
    for i in range(source - 1):
        right.append(place)
        place += ratio ** (i + 1)
    return np.array([-x for x in reversed(right)] + [0.0] + right)


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (5, 2), (1, 4), (1, 1)])
def test_the_index_names_a_row_for_each_offset_and_three_for_cls(grid: Grid) -> None:
    rows, columns = grid
    index = relative_position_index(grid)
    total = (2 * rows - 1) * (2 * columns - 1) + 3
    assert index.dtype == torch.int64 and index.shape == (1 + rows * columns, 1 + rows * columns)
    assert index[0, 0] == total - 1
    assert (index[0, 1:] == total - 3).all() and (index[1:, 0] == total - 2).all()
    places = list(itertools.product(range(rows), range(columns)))
    for (i, (yi, xi)), (j, (yj, xj)) in itertools.product(enumerate(places), repeat=2):
        assert index[1 + i, 1 + j] == (yi - yj + rows - 1) * (2 * columns - 1) + (xi - xj + columns - 1)


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (4, 4)])
def test_the_bias_reads_the_table_and_its_rows_start_at_multiples_of_eight(grid: Grid) -> None:
    part = RelativePositionBias(grid=grid, heads=3)
    assert list(part.state_dict()) == ["relative_position_bias_table"]
    assert (part.relative_position_bias_table == 0).all()
    part.load_state_dict({"relative_position_bias_table": random_table(grid)})
    bias = part(grid)
    expected = random_table(grid)[relative_position_index(grid)].permute(2, 0, 1)
    assert torch.equal(bias, expected)
    assert bias.stride(1) % 8 == 0 and bias.stride(2) == 1


def test_the_gradient_of_the_bias_is_summed_per_row_of_the_table() -> None:
    grid = (3, 5)
    part = RelativePositionBias(grid=grid, heads=2)
    weights = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    (part(grid) * weights).sum().backward()
    expected = torch.zeros(table_rows(grid), 2)
    index = relative_position_index(grid)
    for i, j in itertools.product(range(16), repeat=2):
        expected[index[i, j]] += weights[:, i, j]
    torch.testing.assert_close(part.relative_position_bias_table.grad, expected)


def test_under_autocast_the_bias_comes_in_the_lower_precision_and_the_gradient_does_not() -> None:
    part = RelativePositionBias(grid=(3, 5), heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        bias = part((3, 5))
    assert bias.dtype == torch.bfloat16 and bias.stride(1) % 8 == 0
    bias.float().sum().backward()
    gradient = part.relative_position_bias_table.grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert gradient[-3] == pytest.approx(15)  # would lose counts above 256 if it were summed in bfloat16


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((14, 14), (24, 24)),
        ((14, 14), (32, 32)),
        ((14, 14), (40, 40)),
        ((8, 14), (11, 24)),
        ((7, 12), (14, 16)),
        ((8, 8), (12, 20)),
    ],
)
def test_growing_equals_the_published_geometric_series_with_a_cubic_spline(
    source: Grid, target: Grid
) -> None:
    table = random_table(source)
    resized = resize_table(table, source, target)
    assert resized.shape == (table_rows(target), 3) and resized.dtype == table.dtype
    assert torch.equal(resized[-3:], table[-3:])
    y, x = (published_offsets(*sides) for sides in zip(source, target, strict=True))
    new_y, new_x = (np.clip(np.arange(1 - n, n), s[0], s[-1]) for n, s in zip(target, (y, x), strict=True))
    old, new = patch_part(table, source), patch_part(resized, target)
    for head in range(3):
        expected = RectBivariateSpline(y, x, old[..., head], s=0)(new_y, new_x)
        np.testing.assert_allclose(new[..., head], expected, atol=2e-5)


def test_neighbours_keep_their_values_and_the_farthest_stay_the_farthest() -> None:
    old = patch_part(random_table((14, 14)), (14, 14))
    new = patch_part(resize_table(random_table((14, 14)), (14, 14), (24, 24)), (24, 24))
    np.testing.assert_allclose(new[22:25, 22:25], old[12:15, 12:15], atol=1e-5)
    np.testing.assert_allclose(new[::46, ::46], old[::26, ::26], atol=1e-4)


def test_a_grid_that_stays_returns_the_very_table() -> None:
    table = random_table((3, 5))
    assert resize_table(table, (3, 5), (3, 5)) is table


def test_a_side_that_shrinks_or_stays_keeps_the_values_of_the_offsets_that_still_occur() -> None:
    old = patch_part(random_table((14, 6)), (14, 6))
    new = patch_part(resize_table(random_table((14, 6)), (14, 6), (12, 6)), (12, 6))
    np.testing.assert_allclose(new, old[2:-2], atol=1e-6)


@pytest.mark.parametrize("source", [(1, 1), (2, 2), (3, 2), (4, 3), (4, 5)])
def test_tiny_grids_that_grow_a_lot_stay_within_the_values_they_had(source: Grid) -> None:
    old = patch_part(random_table(source), source)
    new = patch_part(resize_table(random_table(source), source, (16, 19)), (16, 19))
    assert new.min() >= old.min() - 1e-6 and new.max() <= old.max() + 1e-6
    np.testing.assert_allclose(new[0, 0], old[0, 0], atol=1e-6)


def test_just_beyond_the_published_range_of_ratios_the_whole_table_is_used() -> None:
    # 30 -> 31 has q = 1.0024: the published search would stop at 1.01 and cut the far offsets off.
    old = patch_part(random_table((30, 30)), (30, 30))
    new = patch_part(resize_table(random_table((30, 30)), (30, 30), (31, 31)), (31, 31))
    np.testing.assert_allclose(new[::60, ::60], old[::58, ::58], atol=1e-5)


def test_rows_and_columns_are_treated_alike() -> None:
    table = random_table((5, 8))
    flipped = table.clone()
    flipped[:-3] = torch.from_numpy(patch_part(table, (5, 8))).transpose(0, 1).reshape(-1, 3)
    one = patch_part(resize_table(table, (5, 8), (9, 10)), (9, 10))
    other = patch_part(resize_table(flipped, (8, 5), (10, 9)), (10, 9))
    np.testing.assert_allclose(one, other.transpose(1, 0, 2), atol=1e-6)


def test_the_bias_of_another_grid_comes_from_the_resized_table_and_follows_it_when_it_learns() -> None:
    part = RelativePositionBias(grid=(3, 5), heads=3)
    index = relative_position_index((6, 4))
    for seed in (0, 1):  # the second time the grid is known already, the table is not
        with torch.no_grad():
            part.relative_position_bias_table.normal_(generator=torch.Generator().manual_seed(seed))
        table = part.relative_position_bias_table.detach()
        expected = resize_table(table, (3, 5), (6, 4))[index].permute(2, 0, 1)
        torch.testing.assert_close(part((6, 4)), expected)


def test_gradients_reach_the_table_through_another_grid() -> None:
    lookup = BiasLookup(grid=(3, 4))
    table = torch.randn(table_rows((3, 4)), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda table: lookup(table, (5, 2)), table)


def test_a_grid_met_in_inference_mode_can_be_trained_on_afterwards() -> None:
    part = RelativePositionBias(grid=(3, 5), heads=3)
    with torch.inference_mode():
        part((6, 4))
    part((6, 4)).sum().backward()
    assert part.relative_position_bias_table.grad is not None


def test_a_table_of_another_grid_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"grid of 3 x 5 patches has 48 rows, this one has 732: set image_size"
    ):
        resize_table(random_table((14, 14)), (3, 5), (6, 6))
