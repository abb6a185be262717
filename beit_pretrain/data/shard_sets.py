"""Which shards a set has and where they lie: a set of this project's writing, or webdataset's, indexed on first use."""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock

from beit_pretrain.data.shard_index import (
    INDEX,
    INDEX_JSON,
    INDEX_NPY,
    Shard,
    ShardIndex,
    load_entries,
    parse_index,
    read_index,
    scan,
    write_index,
)
from beit_pretrain.data.sources import digest
from beit_pretrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from beit_pretrain.data.fetch import ShardCache

_EVERY = 10  # seconds between two lines of progress
_NAMED = 3  # shards that a message names at most

Patterns = dict[str, str | Sequence[str] | None]  # by split


class ShardSet(NamedTuple):
    """Shards that were found. Of streamed ones nothing is known: the index is empty, `urls` are the training part."""

    index: ShardIndex
    urls: list[str]  # path or address of each shard
    samples: int
    cache: ShardCache | None = None  # that remote shards are fetched into


class Place(NamedTuple):
    """A shard's split, and its path or address."""

    split: str
    url: str


def find(
    patterns: Patterns, *, keep: Path | None, limit: int, timeout: float, samples: int | None
) -> ShardSet:
    """The set that data.root and the patterns of the other splits name; ShardSource says what they may be.

    `keep`: folder for what is fetched, at most `limit` bytes, and for indices; None streams remote shards.
    """
    root = patterns["train"]
    if isinstance(root, str) and (root.endswith("/") if is_remote(root) else os.path.isdir(_path(root))):
        for split in ("val", "test"):
            if patterns[split] is not None:
                raise ConfigError(
                    f"data.source.{split}={patterns[split]}: the index in data.root={root} says which shards are for "
                    "what; set it to null"
                )
        found = _remote_set(root, keep, limit, timeout) if is_remote(root) else _local_set(Path(_path(root)))
    else:
        found = _other_shards(_places(patterns), keep, limit, timeout, samples)
    if samples not in (None, found.samples):
        raise ConfigError(
            f"data.source.samples={samples}, but the shards hold {found.samples}; set it to null"
        )
    return found


def is_remote(url: str) -> bool:
    """Whether a shard is fetched from there rather than opened: it has a scheme, or is a command."""
    return url.startswith("pipe:") or re.match(r"[a-zA-Z][\w.+-]*://", url) is not None


def some(words: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(words[:_NAMED]) + (", ..." if len(words) > _NAMED else "")


# --- sets with an index -------------------------------------------------------------------------------------


def _local_set(folder: Path) -> ShardSet:
    if not (folder / INDEX_JSON).exists():
        pattern = folder / ("*.tar" if any(folder.glob("*.tar")) else "train-{000000..000146}.tar")
        raise DataError(
            f"data.root={folder} has no {INDEX_JSON}: set data.root to a folder that beit-tools shards write has "
            f"finished or, for shards of another's making, to a pattern such as {pattern}"
        )
    index = read_index(folder)
    return ShardSet(index, [str(folder / shard.name) for shard in index.shards], len(index.entries))


def _remote_set(prefix: str, keep: Path | None, limit: int, timeout: float) -> ShardSet:
    from beit_pretrain.data.fetch import fetch_small

    data = fetch_small(prefix + INDEX_JSON, timeout=timeout)
    if data is None:
        raise DataError(
            f"data.root={prefix} has no {INDEX_JSON}: set data.root to where shards of beit-tools shards write lie "
            f"or, for shards of another's making, to a pattern such as {prefix}train-{{000000..000146}}.tar"
        )
    index, sha256 = parse_index(data, prefix + INDEX_JSON)
    if keep is None:
        train = [shard for shard in index.shards if shard.split == "train"]
        return _streamed([prefix + shard.name for shard in train], sum(shard.samples for shard in train))
    cache = _cache(keep, limit, timeout)
    load_entries(index, cache.local(prefix + INDEX_NPY, name=INDEX_NPY, size=None, sha256=sha256), sha256)
    return ShardSet(index, [prefix + shard.name for shard in index.shards], len(index.entries), cache)


def _streamed(urls: list[str], samples: int) -> ShardSet:
    return ShardSet(ShardIndex([], np.empty(0, INDEX)), urls, samples)


def _cache(keep: Path, limit: int, timeout: float) -> ShardCache:
    from beit_pretrain.data.fetch import ShardCache  # imports what only remote shards need

    return ShardCache(folder=keep, limit=limit, timeout=timeout)


# --- shards of another's making -----------------------------------------------------------------------------


def _other_shards(
    found: list[Place], keep: Path | None, limit: int, timeout: float, samples: int | None
) -> ShardSet:
    """Shards without an index: streamed, or scanned once, after which the index stays in a folder in `keep`.

    A scan that was interrupted goes on. DataError that names the shards that cannot be used.
    """
    urls, identity = [url for _, url in found], _identity(found)
    if keep is None and any(map(is_remote, urls)):
        if any(split != "train" for split, _ in found):
            raise ConfigError(
                "data.source.cache is null, so shards are streamed, and held-out images cannot be: set it to a folder, "
                "or data.source.val and data.source.test to null"
            )
        if samples is None:
            raise ConfigError(
                "data.source.samples is null: set it to the number of images in these shards, which no index tells, "
                "or set data.source.cache to a folder that they are fetched into and indexed"
            )
        return _streamed(urls, samples)
    if keep is None:
        print("the index of these shards is kept if data.source.cache is set to a folder", file=sys.stderr)
        index = _scan_all(found, None, None)
        return ShardSet(index, urls, len(index.entries))
    cache = _cache(keep, limit, timeout) if any(map(is_remote, urls)) else None
    folder = keep / f"index-{identity[:16]}"
    try:
        keep.mkdir(parents=True, exist_ok=True)
        if _kept(folder) is None:
            with FileLock(f"{folder}.lock"):
                if _kept(folder) is None:  # no other process has made it meanwhile
                    write_index(folder, _scan_all(found, folder / "parts", cache))
                    shutil.rmtree(folder / "parts", ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"data.source.cache={keep} cannot be written to ({error.strerror}); set it to another folder"
        ) from error
    index = read_index(folder)
    return ShardSet(index, urls, len(index.entries), cache)


def _places(patterns: Patterns) -> list[Place]:
    """The shards that patterns name, in order."""
    found: dict[str, Place] = {}
    for split, given in patterns.items():
        key = "data.root" if split == "train" else f"data.source.{split}"
        for pattern in [given] if isinstance(given, str) else given or []:
            try:
                urls = [url for one in braceexpand(pattern) for url in _matches(one)]
            except ValueError as error:
                raise ConfigError(
                    f"{key}={pattern} has a brace without its other half; set it to a pattern"
                ) from error
            if not urls:
                raise ConfigError(f"{key}={pattern} matches no file; set it to a pattern of tar files")
            for url in urls:
                if url in found:
                    raise ConfigError(
                        f"{key}={pattern}: {url} is in two patterns or comes twice; name it once"
                    )
                found[url] = Place(split, url)
    if not any(place.split == "train" for place in found.values()):
        raise ConfigError(
            "data.root names no shard; set it to a folder of shards or to a pattern of tar files"
        )
    return list(found.values())


def _matches(pattern: str) -> list[str]:
    if is_remote(pattern):
        return [pattern]
    path = _path(pattern)
    return sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]


def _path(given: str) -> str:
    return os.path.abspath(os.path.expanduser(given))


def _identity(found: Sequence[Place]) -> str:
    """A hash of paths, sizes and times of change, and of addresses."""
    words: list[str] = []
    missing: list[str] = []
    for split, url in found:
        words += [split, url]
        if is_remote(url):
            continue
        try:
            status = os.stat(url)
            words += [str(status.st_size), str(status.st_mtime_ns)]
        except OSError:
            missing.append(url)
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(found)} shards in data.root, data.source.val and data.source.test are not "
            f"there: {some(missing)}; copy them again or leave them out"
        )
    return digest(*words)


def _kept(folder: Path) -> ShardIndex | None:
    """The index in a folder, if there is a whole one."""
    try:
        return read_index(folder)
    except DataError:
        return None


def _scan_all(found: Sequence[Place], parts: Path | None, cache: ShardCache | None) -> ShardIndex:
    print(f"indexing {len(found)} shards", file=sys.stderr, flush=True)
    told, done, faults = time.monotonic(), [], []
    for number, place in enumerate(found):
        if time.monotonic() > told + _EVERY:
            told = time.monotonic()
            print(f"indexing shard {number + 1} of {len(found)}", file=sys.stderr, flush=True)
        try:
            done.append(_scan_one(place, number, parts, cache))
        except DataError as error:
            faults.append(str(error))
            if len(faults) == _NAMED:  # where a server is down, each costs minutes
                break
    if faults:
        raise DataError(f"shards cannot be used: {'; '.join(faults)}{', ...' * (len(faults) == _NAMED)}")
    flaws, start = {}, 0
    for index in done:
        flaws |= {start + row: reason for row, reason in index.flaws.items()}
        start += len(index.entries)
    shards = [shard for index in done for shard in index.shards]
    return ShardIndex(shards, np.concatenate([index.entries for index in done]), None, flaws)


def _scan_one(place: Place, number: int, parts: Path | None, cache: ShardCache | None) -> ShardIndex:
    """The index of one shard, which is kept until that of all is there."""
    folder = None if parts is None else parts / f"{number:06d}"
    if folder is not None and (index := _kept(folder)) is not None:
        return index
    name, path = _name(place.url, number), Path(place.url)
    if cache is not None and is_remote(place.url):
        path = cache.local(place.url, name=name, size=None, sha256=None)
    rows, flaws = scan(path)
    index = ShardIndex(
        [Shard(name, place.split, len(rows), path.stat().st_size, None)], rows, None, dict(flaws)
    )
    if folder is not None:
        write_index(folder, index)
    return index


def _name(url: str, number: int) -> str:
    """What to call a shard: the tar file in its address, a number where there is none."""
    files = re.findall(r"[^/\s?&=:]+\.tar\b", url)
    return files[-1] if files else f"shard-{number:06d}.tar"
