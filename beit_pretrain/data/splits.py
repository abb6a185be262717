"""Which images are for what: the parts of a source, those held out, those with labels, the few of few labels."""

from __future__ import annotations

import math

import numpy as np

from beit_pretrain.data.sampler import choose, mix
from beit_pretrain.data.sources import Source
from beit_pretrain.errors import ConfigError, DataError

_HELD_OUT_SALT = 0x76616C  # which samples are held out does not depend on the run's seed
_LIMIT_SALT = 0x6C696D6974


def make_splits(source: Source, val_share: float) -> dict[str, np.ndarray]:
    """Sorted indices of train, val and test; a share of train is held out where the source has no val."""
    splits = {
        name: np.asarray(indices, dtype=np.int64) for name, indices in source.splits.items() if len(indices)
    }
    train = splits.get("train")
    if train is None:
        train = np.setdiff1d(np.arange(len(source)), np.concatenate([[], *splits.values()]).astype(np.int64))
    if "val" not in splits:
        count = math.ceil(val_share * len(train)) if len(train) > 1 else 0
        if count:
            held_out = choose(train, count, _HELD_OUT_SALT, source.labels, spare=1)
            train = np.setdiff1d(train, held_out)
            if len(held_out):
                splits["val"] = held_out
    return splits | {"train": train}


def with_labels(source: Source, splits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The splits without their unlabelled samples; parts that are empty then are left out.

    Samples whose label could not be read stay in: they are counted as unreadable when their turn comes.
    """
    labels = source.labels
    if labels is not None:
        wanted = labels >= 0
        wanted[list(source.flaws)] = True
        known = {name: part[wanted[part]] for name, part in splits.items()}
    else:
        known = {}
    known = {name: part for name, part in known.items() if len(part)}
    if "train" not in known:
        raise DataError(
            "the training images have no labels, which this stage learns from: put those of each class into a "
            "folder of its own and set data=class_folders data.root=<the folder above>"
        )
    return known


def limited(train: np.ndarray, limit: int, seed: int, labels: np.ndarray | None) -> np.ndarray:
    """`limit` of the training samples, by class in proportion; another choice with every seed."""
    if limit > len(train):
        raise ConfigError(
            f"data.train_limit={limit} is more than the {len(train)} training images; set it to {len(train)} "
            "or less, or to null for all"
        )
    return choose(train, limit, mix(seed, _LIMIT_SALT), labels, least=1)


def check_stream(val_share: float, labelled: bool, train_limit: int | None, repeats: int) -> None:
    """What needs images by number, which a stream does not have."""
    asked = {
        "data.val_share": (val_share, 0),
        "data.train_limit": (train_limit, None),
        "data.repeats": (repeats, 1),
    }
    faults = [
        f"{key}={value}: streamed shards cannot be picked from; set it to {'null' if plain is None else plain}, or "
        "data.source.cache to a folder for the shards"
        for key, (value, plain) in asked.items()
        if value != plain
    ]
    if labelled:
        faults.append(
            "this stage needs the labels of all images, which a stream does not tell: set data.source.cache"
        )
    if faults:
        raise ConfigError(faults)
