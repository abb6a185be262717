"""How well windows of shards mix, beside a full shuffle:  python benchmarks/shuffle.py

200,000 images of 1,000 classes in 200 shards, batches of 1,024: `data.shuffle_shards` from 1 to all, over shards that
were written shuffled (as `beit-tools shards write` does) and class by class. Given are the classes in a batch, and how
many of the images that were in one batch with an image are so again in the next epoch.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from beit_pretrain.data.sampler import Window, epoch_order, hashes

IMAGES, CLASSES, SHARDS, BATCH, EPOCHS = 200_000, 1_000, 200, 1_024, 3


def batches(seed: int, epoch: int, window: Window) -> np.ndarray:
    """The images of each batch, (batches, BATCH)."""
    order = epoch_order(IMAGES, seed, epoch, window)
    return order[: IMAGES // BATCH * BATCH].reshape(-1, BATCH)


def again(one: np.ndarray, other: np.ndarray) -> float:
    """Of the pairs in one batch of `one`, so many are in one batch of `other` for each image."""
    batch_of = np.full(IMAGES, -1)
    batch_of[other] = np.arange(len(other))[:, None]
    total = 0
    for images in one:
        _, counts = np.unique(batch_of[images][batch_of[images] >= 0], return_counts=True)
        total += int((counts * (counts - 1)).sum())
    return total / one.size


def main() -> None:
    cuts = np.linspace(0, IMAGES, SHARDS + 1).astype(np.int64)
    sorted_by_class = np.arange(IMAGES) * CLASSES // IMAGES
    shuffled = sorted_by_class[np.argsort(hashes(np.arange(IMAGES), 7))]
    print(
        "| shards at a time | classes in a batch, written shuffled | written by class | companions met again |"
    )
    print("|---|---|---|---|")
    for shards in (1, 8, 32, 100, SHARDS):
        window = Window(cuts, shards)
        drawn = [batches(0, epoch, window) for epoch in range(EPOCHS)]
        rows = [
            np.mean([len(np.unique(labels[images])) for epoch in drawn for images in epoch])
            for labels in (shuffled, sorted_by_class)
        ]
        met = np.mean([again(one, other) for one, other in pairwise(drawn)])
        name = f"{shards} of {SHARDS}" if shards < SHARDS else "all: a full shuffle"
        print(f"| {name} | {rows[0]:.0f} | {rows[1]:.0f} | {met:.1f} of {BATCH - 1:,} |")


if __name__ == "__main__":
    main()
