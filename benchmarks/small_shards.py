"""Shards of given bytes, written with their index in one go, without a data set to start from."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from beit_pretrain.data.shard_index import Shard, ShardIndex, write_index
from beit_pretrain.data.shard_tar import INDEX

BLOCK = tarfile.BLOCKSIZE


def write_shards(
    folder: Path,
    *,
    samples: int,
    shards: int,
    ext: str,
    read: Callable[[int], bytes],
    classes: int | None = None,
) -> None:
    """A shard set in `folder` of `samples` images, `read(i)` each, labelled i % classes if there are classes."""
    entries = np.zeros(samples, INDEX)
    bounds = np.linspace(0, samples, shards + 1).astype(np.int64)
    listed = []
    for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        path = folder / f"train-{number:06d}.tar"
        with path.open("wb") as file:
            place = 0
            for sample in range(first, last):
                data, label = read(sample), -1 if classes is None else sample % classes
                members = [(f"{sample:09d}.{ext}", data)]
                if label >= 0:
                    members.append((f"{sample:09d}.cls", str(label).encode()))
                entries[sample] = (place + BLOCK, len(data), zlib.crc32(data), label)
                for name, content in members:
                    place += file.write(_member(name, content))
            place += file.write(bytes(2 * BLOCK))
        listed.append(Shard(path.name, "train", last - first, place, None))
    names = None if classes is None else [str(number) for number in range(classes)]
    index = ShardIndex(
        shards=listed, entries=entries, class_names=names, flaws={}, written={"by": Path(__file__).name}
    )
    write_index(folder, index)


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)
