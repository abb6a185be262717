"""Order: every key exactly once, wherever a run is cut and however it is split over ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from beit_pretrain.data.sampler import (
    EvalBatches,
    Key,
    TrainBatches,
    choose,
    epoch_order,
    hashes,
    mix,
)

LAYOUTS = [
    (1, 4, 1),
    (1, 3, 2),
    (2, 2, 1),
    (2, 3, 2),
    (3, 1, 4),
    (4, 2, 3),
    (5, 1, 1),
]  # world, micro, accumulate


def _batches(rank: int, layout: tuple[int, int, int], n: int, position: int, seed: int = 5) -> TrainBatches:
    world, micro, accumulate = layout
    size = world * micro * accumulate
    return TrainBatches(
        indices=np.arange(100, 100 + n),
        batch_size=size,
        micro_batch_size=micro,
        rank=rank,
        world_size=world,
        seed=seed,
        steps_per_epoch=n // size,
        position=lambda: position,
    )


def _splitmix64(state: int, count: int) -> list[int]:
    """The published generator, written from its definition."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def test_mix_of_one_value_is_splitmix64_and_reproduces_its_published_first_output() -> None:
    assert mix(0) == 0xE220A8397B1DCDAF  # first output of the reference implementation seeded with 0
    for value in (1, 7, 2**63, 2**64 - 1):
        assert mix(value) == _splitmix64(value, 1)[0]


def test_mix_depends_on_every_value_their_order_and_their_number() -> None:
    tuples = [(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    keys = {mix(*values) for values in tuples} | {mix(a, b) for a in range(12) for b in range(12)}
    assert len(keys) == 12**3 + 12**2
    assert mix(1, 2) != mix(2, 1)
    assert all(0 <= key < 2**64 for key in keys)


def test_neighbouring_keys_share_half_their_bits() -> None:
    flips = [bin(mix(3, sample) ^ mix(3, sample + 1)).count("1") for sample in range(2000)]
    assert abs(float(np.mean(flips)) - 32) < 0.5


def test_hashes_are_mix_of_every_value() -> None:
    values = np.array([0, 1, 5, 10**12, 2**62])
    assert hashes(values, 3, 4).tolist() == [mix(3, 4, value) for value in values.tolist()]
    assert hashes(values).tolist() == [mix(value) for value in values.tolist()]


def test_an_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    orders = [epoch_order(997, seed, epoch) for seed in range(3) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(997))
    assert len({order.tobytes() for order in orders}) == 9
    # A known answer: a run that goes on under another version of numpy must meet the same order.
    assert epoch_order(8, 0, 0).tolist() == sorted(range(8), key=lambda i: mix(0, 0x6F72646572, 0, i))


def test_every_place_of_an_order_is_equally_likely() -> None:
    n, epochs = 20, 4000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), epoch_order(n, 1, epoch)] += 1
    expected = epochs / n
    statistic = float(((counts - expected) ** 2 / expected).sum())  # chi-square, about (n - 1)^2 degrees
    assert abs(statistic - (n - 1) ** 2) < 5 * np.sqrt(2 * (n - 1) ** 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [60, 67])
def test_over_all_ranks_the_used_part_of_each_epoch_comes_exactly_once(
    layout: tuple[int, int, int], n: int
) -> None:
    world, micro, accumulate = layout
    size = world * micro * accumulate
    steps = n // size
    for epoch in range(3):
        per_rank = [list(_batches(rank, layout, n, epoch * steps)) for rank in range(world)]
        assert all(
            len(batches) == len(_batches(0, layout, n, 0)) == steps * accumulate for batches in per_rank
        )
        assert all(len(batch) == micro for batches in per_rank for batch in batches)
        keys = Counter(key for batches in per_rank for batch in batches for key in batch)
        assert set(keys.values()) == {1}
        used = 100 + epoch_order(n, 5, epoch)[: steps * size]
        assert set(keys) == {Key(sample, epoch) for sample in used.tolist()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_step_holds_the_same_samples_on_any_number_of_ranks(layout: tuple[int, int, int]) -> None:
    world, _, accumulate = layout
    size = world * layout[1] * accumulate
    alone = list(_batches(0, (1, size, 1), 67, 0))
    per_rank = [list(_batches(rank, layout, 67, 0)) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [per_rank[rank][step * accumulate + m] for m in range(accumulate) for rank in range(world)]
        assert [key for part in parts for key in part] == whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_restart_at_any_step_goes_on_with_exactly_the_remaining_keys(layout: tuple[int, int, int]) -> None:
    world, micro, accumulate = layout
    steps = 67 // (world * micro * accumulate)
    for rank in range(world):
        whole = [batch for epoch in range(2) for batch in _batches(rank, layout, 67, epoch * steps)]
        for position in range(2 * steps):
            end = (position // steps + 1) * steps * accumulate  # an iteration goes to the end of its epoch
            rest = list(_batches(rank, layout, 67, position))
            assert rest == whole[position * accumulate : end]


def test_the_position_is_that_of_the_moment_when_an_iteration_begins() -> None:
    batches = _batches(0, (1, 4, 1), 20, 0)
    now = {"step": 2}
    batches.position = lambda: now["step"]
    iterator = iter(batches)
    now["step"] = 4
    assert len(list(iterator)) == 3
    assert len(list(batches)) == 1


@pytest.mark.parametrize("n", [0, 1, 5, 16, 397])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_evaluation_meets_every_sample_once_without_padding(n: int, world: int, size: int) -> None:
    indices = np.arange(n) * 3
    samplers = [EvalBatches(indices=indices, batch_size=size, rank=r, world_size=world) for r in range(world)]
    per_rank = [list(sampler) for sampler in samplers]
    for rank, (sampler, batches) in enumerate(zip(samplers, per_rank, strict=True)):
        assert len(batches) == len(sampler)
        assert all(1 <= len(batch) <= size for batch in batches)
        assert [key.sample for batch in batches for key in batch] == indices[rank::world].tolist()
    assert sorted(key for batches in per_rank for b in batches for key in b) == [
        Key(i, 0) for i in indices.tolist()
    ]
    if size > 1 and n >= world:
        assert len({len(batches) for batches in per_rank}) == 1


def test_choosing_by_class_keeps_proportions_and_the_exact_count() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 7])
    for count in (0, 1, 20, 31, 157, 400):
        chosen = choose(np.arange(157), count, 9, labels)
        assert len(chosen) == len(set(chosen.tolist())) == min(count, 157)
        assert (np.diff(chosen) > 0).all()
        sizes = np.bincount(labels[chosen], minlength=3)
        assert (np.abs(sizes - min(count, 157) * np.array([100, 50, 7]) / 157) < 1).all()


def test_a_choice_depends_on_the_indices_alone_and_larger_ones_contain_smaller_ones() -> None:
    indices = np.arange(1000)
    small, large = choose(indices, 50, 1), choose(indices, 200, 1)
    assert set(small) < set(large)
    assert np.array_equal(small, choose(np.random.default_rng(0).permutation(indices), 50, 1))
    assert not np.array_equal(small, choose(indices, 50, 2))
