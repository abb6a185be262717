"""The order over shards: exact on any number of nodes, ranks and workers and after any restart, within few files."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from beit_pretrain.data.sampler import Key, TrainBatches, Window, epoch_order

SIZES = [7, 13, 1, 9, 0, 21, 4, 12, 30, 5]  # of the shards; no number of ranks or batches divides them
HELD_OUT = [3, 20, 21, 55]


def _indices() -> np.ndarray:
    return np.setdiff1d(np.arange(sum(SIZES)), HELD_OUT)


def _window(shards: int) -> Window:
    bounds = np.concatenate([[0], np.cumsum(SIZES)])
    return Window(np.searchsorted(_indices(), bounds), shards)


def _shard(samples: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(SIZES), samples, side="right")


def _batches(world: int, rank: int, micro: int, accumulate: int, step: int, shards: int) -> TrainBatches:
    size = world * micro * accumulate
    return TrainBatches(
        indices=_indices(),
        batch_size=size,
        micro_batch_size=micro,
        rank=rank,
        world_size=world,
        seed=5,
        steps_per_epoch=len(_indices()) // size,
        position=lambda: step,
        window=_window(shards),
    )


@pytest.mark.parametrize("shards", [1, 3, 4, 9])
def test_an_order_is_a_permutation_that_reads_few_shards_at_a_time(shards: int) -> None:
    indices, orders = _indices(), []
    for epoch in range(4):
        places = epoch_order(len(indices), 1, epoch, _window(shards))
        assert sorted(places) == list(range(len(indices)))
        drawn = _shard(indices[places])
        # A shard that was left never comes again, and no more than so many are open at once.
        first = {s: int(np.flatnonzero(drawn == s)[0]) for s in set(drawn.tolist())}
        last = {s: int(np.flatnonzero(drawn == s)[-1]) for s in first}
        open_at = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(drawn))]
        assert max(open_at) <= shards
        orders.append(places.tolist())
    assert len({tuple(order) for order in orders}) == 4


def test_with_all_shards_at_once_it_is_a_full_shuffle() -> None:
    plain = epoch_order(len(_indices()), 1, 2)
    assert (epoch_order(len(_indices()), 1, 2, _window(len(SIZES))) == plain).all()
    assert (epoch_order(len(_indices()), 1, 2, _window(99)) == plain).all()


def test_within_a_window_every_order_is_equally_likely() -> None:
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        order = epoch_order(6, 3, epoch, Window(np.array([0, 1, 2, 6]), 1))
        mixed = order[(order >= 2)] - 2  # the shard of four
        counts[np.arange(4), mixed] += 1
    statistic = float(((counts - 1000) ** 2 / 1000).sum())
    assert statistic < 9 + 5 * np.sqrt(18)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "layout", [(n, r, a) for n in (1, 2, 3) for r in (1, 2, 4) for a in (1, 2) if 24 % (n * r * a) == 0]
)
def test_every_sample_once_on_any_layout_and_after_any_restart_on_any_other(
    layout: tuple[int, int, int], shards: int
) -> None:
    """Nodes, ranks each, accumulation: one global batch of 24, stopped at every step, gone on with another layout."""
    nodes, ranks, accumulate = layout
    world = nodes * ranks
    size, steps = 24, len(_indices()) // 24
    micro = size // (world * accumulate)
    for epoch in range(2):
        rows: list[list[Key]] = []  # of each step, in the order of the global batch
        per_rank = [
            list(_batches(world, rank, micro, accumulate, epoch * steps, shards)) for rank in range(world)
        ]
        for step in range(steps):
            parts = [per_rank[r][step * accumulate + m] for m in range(accumulate) for r in range(world)]
            rows.append([key for part in parts for key in part])
        seen = Counter(key.sample for row in rows for key in row)
        used = _indices()[epoch_order(len(_indices()), 5, epoch, _window(shards))][: steps * size]
        assert seen == Counter(used.tolist())
        for stop in range(steps):
            other = {1: 3, 2: 6, 3: 2, 4: 1, 6: 8, 8: 12, 12: 4}[world]
            rest = [
                list(_batches(other, rank, size // other, 1, epoch * steps + stop, shards))
                for rank in range(other)
            ]
            after = [[key for r in range(other) for key in rest[r][step]] for step in range(steps - stop)]
            assert after == rows[stop:]
