"""Shards in miniature: webdataset writes and reads them, and a set with its index is made of them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from beit_pretrain.data.shard_index import Shard, ShardIndex, write_index
from beit_pretrain.data.shard_tar import scan

Samples = list[dict[str, Any]]


def samples(count: int, *, start: int = 0, classes: int | None = 3) -> Samples:
    """Samples of noise of 0 to 1,500 bytes in place of a JPEG; labelled if there are classes."""
    made = []
    for number in range(start, start + count):
        size = 1 + number * 397 % 1500
        labels = {} if classes is None else {"cls": str(number % classes)}
        noise = np.random.default_rng(number).bytes(size)
        made.append({"__key__": f"{number:09d}", "jpg": noise, **labels})
    return made


def write(path: Path, content: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in content:
            writer.write(sample)
    return path


def read(paths: Sequence[Path]) -> Samples:
    """What webdataset makes of tars: the oracle."""
    found: Samples = []
    for path in paths:
        with path.open("rb") as stream:  # webdataset's own opener leaves files open
            found += group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    return found


def write_set(folder: Path, counts: dict[str, Sequence[int]], **index: Any) -> Samples:
    """Shards of so many samples for each split, with their index. Returns all samples in order."""
    made: Samples = []
    shards, parts = [], []
    for split, sizes in counts.items():
        for number, size in enumerate(sizes):
            content = samples(size, start=len(made))
            path = write(folder / f"{split}-{number:06d}.tar", content)
            total = hashlib.sha256()
            parts.append(scan(path, total)[0])
            shards.append(Shard(path.name, split, size, path.stat().st_size, total.hexdigest()))
            made += content
    write_index(folder, ShardIndex(shards, np.concatenate(parts), **index))
    return made


def archive(path: Path, members: list[tuple[str, bytes]], **settings: Any) -> Path:
    """A tar of these members by Python's writer."""
    with tarfile.open(path, "w", **settings) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def flip(path: Path, place: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
