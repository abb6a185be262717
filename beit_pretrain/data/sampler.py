"""Order is arithmetic: which sample comes when is computed from the seed and the step, never remembered.

Letters: n samples in the split, g global optimiser step, r rank of W, m micro-batch of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from beit_pretrain.cluster.ending import gone, kill
from beit_pretrain.data.workers import Watch, before_workers, begin_worker
from beit_pretrain.errors import DataError

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ORDER = 0x6F72646572  # salt of epoch orders, so that they share no draw with the views
_SHARDS = 0x736872647321


class Key(NamedTuple):
    """One item of a batch. The epoch travels with the sample, so persistent workers need no `set_epoch`.

    Where samples are repeated inside an epoch, `epoch` counts on per view: epoch * repeats + repeat.
    """

    sample: int
    epoch: int


class Failure(NamedTuple):
    """What a worker sends instead of a batch when the run has to end."""

    message: str


def mix(*values: int) -> int:
    """A 64-bit hash of small integers, the one source of keys: SplitMix64 (Steele et al. 2014), chained."""
    state = 0
    for value in values:
        state = ((state ^ (value & _WORD)) + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def hashes(values: np.ndarray, *salt: int) -> np.ndarray:
    """`mix(*salt, value)` of every value at once, (n,) uint64. One-to-one: distinct values never collide."""
    state = values.astype(np.uint64)
    if salt:
        state ^= np.uint64(mix(*salt))
    state += np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class Window(NamedTuple):
    """Shards that are mixed at a time: places cuts[i] up to cuts[i + 1] of a split lie in its i-th shard."""

    cuts: np.ndarray  # (shards + 1,) int64
    shards: int


def epoch_order(n: int, seed: int, epoch: int, window: Window | None = None) -> np.ndarray:
    """The permutation of range(n) for one epoch, (n,) int64.

    Sorted by hash rather than drawn from a library's generator, whose stream may change with its version. With a
    `window` the shards are permuted, and so many of them at a time are mixed sample by sample: what is read at any
    moment lies in few files.
    """
    keys = hashes(np.arange(n), seed, _ORDER, epoch)
    if window is None or window.shards >= len(window.cuts) - 1:
        return np.argsort(keys)
    shards = np.argsort(hashes(np.arange(len(window.cuts) - 1), seed, _SHARDS, epoch))
    parts = []
    for first in range(0, len(shards), window.shards):
        places = [np.arange(*window.cuts[s : s + 2]) for s in shards[first : first + window.shards]]
        mixed = np.concatenate(places)
        parts.append(mixed[np.argsort(keys[mixed])])
    return np.concatenate(parts)


def choose(
    indices: np.ndarray,
    count: int,
    salt: int,
    labels: np.ndarray | None = None,
    *,
    least: int = 0,
    spare: int = 0,
) -> np.ndarray:
    """`count` of `indices`, sorted; by class in proportion, given the `labels` of the whole source.

    Each sample's rank is a hash of its own index, so the choice does not depend on the order of the others.
    Seats of the classes go by largest remainder (smaller class number first among equals). Every class gets
    `least` seats if it has as many samples and `count` is enough for all, and keeps `spare` samples out of
    the choice, which may then be smaller than `count`.
    """
    ranked = indices[np.argsort(hashes(indices, salt))]
    if labels is None:
        return np.sort(ranked[:count])
    mine = labels[ranked]
    _, sizes = np.unique(mine, return_counts=True)
    seats = _seats(sizes, count, least, spare)
    by_class = np.argsort(mine, kind="stable")  # within a class still by hash
    place = np.arange(len(ranked)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its class
    return np.sort(ranked[by_class[place < np.repeat(seats, sizes)]])


def _seats(sizes: np.ndarray, count: int, least: int, spare: int) -> np.ndarray:
    """How many of each class: in proportion to `sizes` (C,) between the bounds, `count` in all."""
    high = np.maximum(sizes - spare, 0)
    low = np.minimum(least, high)
    count = min(count, int(high.sum()))
    if low.sum() > count:
        low = np.zeros_like(low)
    shares = count * sizes / max(1, sizes.sum())
    if ((shares < low) | (shares > high)).any():
        from scipy.optimize import root_scalar  # rarely needed, and slow to import

        # The factor at which the bounded shares add up to the count; at 0 they are too few, at 1 too many.
        excess = root_scalar(lambda factor: np.clip(factor * sizes, low, high).sum() - count, bracket=(0, 1))
        shares = np.clip(excess.root * sizes, low, high)
    seats = np.floor(shares).astype(int)
    left = count - int(seats.sum())
    seats[np.argsort(seats - shares, kind="stable")[:left]] += 1
    return seats


class TrainBatches(Sampler[list[Key]]):
    """This rank's micro-batches from the current step to the end of its epoch.

    Step s of an epoch uses rows s*batch_size onward of that epoch's order; micro-batch m of rank r takes
    rows (m*W + r)*micro_batch_size of those. With `repeats` each sample fills that many rows in a row, each
    with a view of its own, and an epoch of as many steps meets so many times fewer samples (repeated
    augmentation, Hoffer et al. 2020). `position` gives the optimiser step g and is read whenever an iteration
    begins, so a run that starts again anywhere goes on with exactly the remaining keys.
    """

    def __init__(
        self,
        *,
        indices: np.ndarray,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        steps_per_epoch: int,
        position: Callable[[], int],
        repeats: int = 1,
        window: Window | None = None,
    ) -> None:
        assert batch_size % (micro_batch_size * world_size) == 0
        assert 0 < steps_per_epoch <= len(indices) // batch_size
        self.indices = indices
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch
        self.accumulate = batch_size // (micro_batch_size * world_size)
        self.position = position
        self.repeats = repeats
        self.window = window

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, wherever the next iteration begins."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        # Not a generator itself: the position is that of the call, not of the first `next`.
        epoch, start = divmod(self.position(), self.steps_per_epoch)
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[Key]]:
        order = self.indices[epoch_order(len(self.indices), self.seed, epoch, self.window)]
        micro, repeats = self.micro_batch_size, self.repeats
        for step in range(start, self.steps_per_epoch):
            for m in range(self.accumulate):
                row = step * self.batch_size + (m * self.world_size + self.rank) * micro
                yield [
                    Key(int(order[j // repeats]), epoch * repeats + j % repeats)
                    for j in range(row, row + micro)
                ]


class EvalBatches(Sampler[list[Key]]):
    """Every sample exactly once over any number of ranks: rank r takes indices r::W, nothing is padded.

    Ranks get equally many batches (of sizes that differ by at most one) wherever there are samples enough,
    because a wrapped model may talk to the other ranks in each forward pass.
    """

    def __init__(self, *, indices: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.share = indices[rank::world_size]
        largest = -(-len(indices) // world_size)
        self.batches = min(-(-largest // batch_size), len(self.share))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        if self.batches == 0:
            return
        for part in np.array_split(self.share, self.batches):
            yield [Key(sample, 0) for sample in part.tolist()]


class ResumableLoader(DataLoader[Any]):
    """A loader whose position is a function of the step: there is nothing to store.

    A failure that a worker met is raised here as one line; the loader's own transport would wrap it in a
    traceback. So is the silence of workers for `timeout` seconds (0: no limit), with what they are reading: a file
    system that hangs must not hang the run.
    """

    def __init__(self, dataset: Any, *, num_workers: int, timeout: float = 0, **settings: Any) -> None:
        if num_workers:
            before_workers()
            settings |= {"timeout": timeout, "worker_init_fn": begin_worker}
        super().__init__(dataset, num_workers=num_workers, **settings)
        self._workers: list[BaseProcess] = []
        if timeout and num_workers:
            dataset.reading = torch.full((num_workers,), -1).share_memory_()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batches: Any = super().__iter__()
        if self.num_workers:
            self._workers = batches._workers
        return self._checked(batches)

    def end_stuck(self) -> None:
        """Kill the workers that are reading at this moment: to let go of a loader takes seconds for each of them."""
        data: Any = self.dataset
        if self.timeout:
            numbers = data.reading.tolist()
            kill(worker for worker, sample in zip(self._workers, numbers, strict=False) if sample >= 0)

    def _checked(self, batches: Any) -> Iterator[Any]:
        with Watch(self._workers, 2 * self.timeout) as watch:
            while True:
                try:
                    with watch.waiting():
                        batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, EOFError, OSError) as error:
                    if watch.ended or str(error).startswith("DataLoader timed out"):
                        break
                    if not isinstance(error, RuntimeError) and (dead := gone(self._workers)):
                        # It died while it handed something over; as torch says it of other moments.
                        raise RuntimeError(
                            f"DataLoader worker (pid(s) {dead}) exited unexpectedly"
                        ) from error
                    raise
                if isinstance(batch, Failure):
                    raise DataError(batch.message)
                yield batch
        data: Any = self.dataset
        reading = data.stuck()
        look = (
            "look at the storage that it lies on" if reading else "is a process stopped, or the memory full?"
        )
        # torch ends its workers by a signal that they leave to this process, and may wait for them for ever.
        kill(self._workers)
        self._iterator = None
        del batches
        raise DataError(
            f"the data workers gave nothing for {(2 if watch.ended else 1) * self.timeout:g} s (data.timeout): "
            f"{reading or 'they are reading nothing'}; {look}, or raise data.timeout"
        )
