"""Where a token lies: relative position bias and absolute positions, on any grid.

Letters: H heads, L = 1 + N tokens (CLS first, then N = rows * columns patches, row-major), P = L rounded up
to a multiple of 8, R = (2 rows - 1)(2 columns - 1) + 3 rows of a table.

A table holds one row per offset (query minus key) between two patches, row-major over
(1 - rows .. rows - 1) x (1 - columns .. columns - 1), then three rows for CLS -> patch, patch -> CLS and
CLS -> CLS. This is the layout of the published checkpoints.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from scipy.optimize import root_scalar
from torch import Tensor, nn

from beit_pretrain.errors import CheckpointError

Grid = tuple[int, int]

CLS_ROWS = 3  # CLS -> patch, patch -> CLS, CLS -> CLS, at the end of every table
PUBLISHED_RATIOS = (1.01, 1.5)  # between these the published code looks for the ratio of its geometric series


def table_rows(grid: Grid) -> int:
    """R, the rows of a table for `grid`."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + CLS_ROWS


def relative_position_index(grid: Grid) -> Tensor:
    """The row of the table that each (query, key) pair reads: (L, L) int64."""
    rows, columns = grid
    y = torch.arange(rows).repeat_interleave(columns)  # (N,)
    x = torch.arange(columns).repeat(rows)  # (N,)
    down = y[:, None] - y[None, :] + rows - 1  # (N, N), 0 .. 2 rows - 2
    right = x[:, None] - x[None, :] + columns - 1  # (N, N), 0 .. 2 columns - 2
    index = torch.empty(1 + rows * columns, 1 + rows * columns, dtype=torch.int64)
    total = table_rows(grid)
    index[1:, 1:] = down * (2 * columns - 1) + right
    index[0, :] = total - 3
    index[:, 0] = total - 2
    index[0, 0] = total - 1
    return index  # (L, L)


def _growth_ratio(source: int, target: int) -> float:
    """Ratio q such that source - 1 terms of 1 + q + q^2 + ... sum to target - 1; for target > source > 2."""
    terms, reach = source - 1, target - 1

    def excess(ratio: float) -> float:
        return sum(ratio**i for i in range(terms)) - reach

    low, high = PUBLISHED_RATIOS
    if not excess(low) <= 0 <= excess(high):
        return root_scalar(excess, bracket=(0.0, float(reach))).root
    while high - low > 1e-6:  # the published bisection, so that resized tables agree with published ones
        ratio = (low + high) / 2
        low, high = (low, ratio) if excess(ratio) > 0 else (ratio, high)
    return ratio


@functools.cache
def _side_matrix(source: int, target: int) -> np.ndarray:
    """What turns values at the offsets of a side of `source` patches into those of `target` patches.

    (2 target - 1, 2 source - 1) float64. An interpolating spline is linear in its values, and over a grid it
    acts on each axis separately, so the whole resize of a table is one such matrix from either side.
    """
    offsets = np.arange(1.0 - target, target)  # what the new grid asks for
    known = np.arange(1.0 - source, source)  # where the old values lie on that axis
    order = 1
    if target > source > 2:
        ratio = _growth_ratio(source, target)
        steps = np.cumsum(ratio ** np.arange(source - 1))
        known = np.concatenate([-steps[::-1], [0.0], steps])
        order = 3 if ratio <= PUBLISHED_RATIOS[1] else 1
    if source == 1:
        return np.ones((2 * target - 1, 1))
    offsets = np.clip(offsets, known[0], known[-1])
    return make_interp_spline(known, np.eye(len(known)), k=order)(offsets)


def _resize(table: Tensor, source_grid: Grid, rows: Tensor, columns: Tensor) -> Tensor:
    """Table (R, H) with its patch part seen through the two float64 side matrices: (R', H), same dtype."""
    heads = table.shape[1]
    with torch.autocast(table.device.type, enabled=False):
        patch_part = table[:-CLS_ROWS].double().unflatten(0, (2 * source_grid[0] - 1, 2 * source_grid[1] - 1))
        patch_part = torch.einsum("yj,jih,xi->yxh", rows, patch_part, columns)
    return torch.cat([patch_part.reshape(-1, heads).to(table.dtype), table[-CLS_ROWS:]])  # (R', H)


def resize_table(table: Tensor, source_grid: Grid, target_grid: Grid) -> Tensor:
    """Table (R, H) of `source_grid` as one (R', H) for `target_grid`; differentiable in the table.

    Rows and columns are treated alike and apart, so grids need not be square; the three CLS rows are copied.
    - A side that grows: the old offsets are set at 0 and +-(1 + q + q^2 + ...), with q such that the last one
      falls on the last new offset. Close offsets thus keep their values while far ones are spread. Cubic
      interpolation up to q = 1.5, where this equals the published code; above (tiny grids that grow a lot)
      cubic curves swing far beyond the values that they join, so straight lines are used.
    - A side that shrinks keeps the values of the offsets that still occur.
    - A side of 1 or 2 patches has no series to stretch: offsets beyond it repeat the last value.

    Raises CheckpointError if the table does not have the rows of `source_grid`.
    """
    if table.shape[0] != table_rows(source_grid):
        raise CheckpointError(
            f"a relative position table for a grid of {source_grid[0]} x {source_grid[1]} patches has "
            f"{table_rows(source_grid)} rows, this one has {table.shape[0]}: set image_size and "
            "model.patch_size to those the checkpoint was trained with"
        )
    if source_grid == target_grid:
        return table
    matrices = (_side_matrix(*sides) for sides in zip(source_grid, target_grid, strict=True))
    rows, columns = (torch.from_numpy(matrix).to(table.device) for matrix in matrices)
    return _resize(table, source_grid, rows, columns)


def resize_positions(positions: Tensor, source: Grid, target: Grid) -> Tensor:
    """Absolute position embeddings (1, L, D) for another grid: CLS as it is, patches bicubic."""
    if source == target:
        return positions
    patches = positions[:, 1:].transpose(1, 2).unflatten(2, source)  # (1, D, rows, columns)
    patches = nn.functional.interpolate(patches, size=target, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def _padded_index(grid: Grid) -> Tensor:
    """`relative_position_index` with P columns, flat: (L * P,) int32. What the filling reads is cut off."""
    index = relative_position_index(grid)
    filling = -index.shape[1] % 8
    return nn.functional.pad(index, (0, filling)).flatten().int()


class _Elsewhere(NamedTuple):
    """What a grid other than the built one needs: index (L * P,) and the two side matrices."""

    index: Tensor
    rows: Tensor
    columns: Tensor


class BiasLookup(nn.Module):
    """The way from a table of the built grid to the attention bias of any grid; holds no parameters.

    The bias has a row stride of P: memory-efficient attention on CUDA wants multiples of 8 and would
    otherwise copy the bias anew in every block. Under autocast it comes in the lower precision, for the same
    reason.
    """

    index: Tensor

    def __init__(self, *, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("index", _padded_index(grid), persistent=False)
        self._elsewhere: dict[tuple[Grid, torch.device], _Elsewhere] = {}

    def forward(self, table: Tensor, grid: Grid) -> Tensor:
        """Bias (H, L, L) of `grid` from a table (R, H) of the built grid; differentiable on any grid."""
        index = self.index
        if grid != self.grid:
            index, rows, columns = self._other_grid(grid, table.device)
            table = _resize(table, self.grid, rows, columns)
        length = 1 + grid[0] * grid[1]
        bias = table.t().index_select(1, index).unflatten(1, (length, -1))  # (H, L, P)
        device = table.device.type
        if torch.is_autocast_enabled(device):
            bias = bias.to(torch.get_autocast_dtype(device))
        return bias[..., :length]  # (H, L, L)

    @torch.compiler.disable()
    def _other_grid(self, grid: Grid, device: torch.device) -> _Elsewhere:
        if (grid, device) not in self._elsewhere:
            # Tensors made in inference mode could never be used in training afterwards.
            with torch.inference_mode(False):
                matrices = (_side_matrix(*sides) for sides in zip(self.grid, grid, strict=True))
                rows, columns = (torch.from_numpy(matrix).to(device) for matrix in matrices)
                self._elsewhere[grid, device] = _Elsewhere(_padded_index(grid).to(device), rows, columns)
        return self._elsewhere[grid, device]


class RelativePositionBias(nn.Module):
    """One table for all blocks, zero at first; this is how pre-training has it."""

    def __init__(self, *, grid: Grid, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(grid), heads))  # (R, H)
        self.lookup = BiasLookup(grid=grid)

    def forward(self, grid: Grid) -> Tensor:
        """The bias that every block adds to its attention logits on `grid`: (H, L, L)."""
        return self.lookup(self.relative_position_bias_table, grid)
