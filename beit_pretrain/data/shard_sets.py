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
    INDEX_JSON,
    INDEX_NPY,
    MOST_BYTES,
    Shard,
    ShardIndex,
    load_entries,
    parse_index,
    read_index,
    write_index,
)
from beit_pretrain.data.shard_tar import INDEX, PassedOver, scan
from beit_pretrain.data.sources import digest
from beit_pretrain.errors import ConfigError, DataError
from beit_pretrain.wording import printable

if TYPE_CHECKING:
    from beit_pretrain.data.fetch import ShardCache

_EVERY = 10  # seconds between two lines of progress
_NAMED = 3  # shards that a message names at most
_MOST_UNCLEAR = 0.01  # share of images that share a key, without a rule which of them is meant

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
    patterns: Patterns,
    *,
    keep: Path | None,
    limit: int,
    timeout: float,
    samples: int | None,
    last_dot: bool = False,
) -> ShardSet:
    """The set that data.root and the patterns of the other splits name; ShardSource says what they may be.

    `keep`: folder for what is fetched, at most `limit` bytes, and for indices; None streams remote shards.
    `last_dot`: where keys end in shards without an index.
    """
    root = patterns["train"]
    if isinstance(root, str) and (root.endswith("/") if is_remote(root) else os.path.isdir(_path(root))):
        for split in ("val", "test"):
            if patterns[split] is not None:
                raise ConfigError(
                    f"data.source.{split}={patterns[split]}: the index in data.root={root} says which shards are for "
                    "what; set it to null"
                )
        if last_dot:
            raise ConfigError(
                f"data.source.key_until=last_dot: the index in data.root={root} says what the samples are; set it to "
                "null"
            )
        found = _remote_set(root, keep, limit, timeout) if is_remote(root) else _local_set(Path(_path(root)))
    else:
        found = _other_shards(_places(patterns), keep, limit, timeout, samples, last_dot)
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

    data = fetch_small(prefix + INDEX_JSON, most=MOST_BYTES, timeout=timeout)
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
    found: list[Place], keep: Path | None, limit: int, timeout: float, samples: int | None, last_dot: bool
) -> ShardSet:
    """Shards without an index: streamed, or scanned once, after which the index stays in a folder in `keep`.

    A scan that was interrupted goes on. DataError that names the shards that cannot be used.
    """
    urls, identity = [url for _, url in found], _identity(found, last_dot)
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
        index = _scan_all(found, None, None, last_dot)
        return ShardSet(index, urls, len(index.entries))
    cache = _cache(keep, limit, timeout) if any(map(is_remote, urls)) else None
    folder = keep / f"index-{identity[:16]}"
    try:
        keep.mkdir(parents=True, exist_ok=True)
        if _kept(folder) is None:
            with FileLock(f"{folder}.lock"):
                if _kept(folder) is None:  # no other process has made it meanwhile
                    write_index(folder, _scan_all(found, folder / "parts", cache, last_dot))
                    shutil.rmtree(folder / "parts", ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"data.source.cache={keep} cannot be written to ({error.strerror}); set it to another folder"
        ) from error
    index = read_index(folder)
    if index.passed_over is None:
        print(
            f"the index in {folder} is of an earlier version, which did not count the images that are passed over; "
            "remove it to have it made again",
            file=sys.stderr,
        )
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


def _identity(found: Sequence[Place], last_dot: bool) -> str:
    """A hash of paths, sizes and times of change, of addresses, and of where keys end."""
    words: list[str] = ["last dot"] if last_dot else []
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


def _scan_all(
    found: Sequence[Place], parts: Path | None, cache: ShardCache | None, last_dot: bool
) -> ShardIndex:
    print(f"indexing {len(found)} shards", file=sys.stderr, flush=True)
    told, done, faults = time.monotonic(), [], []
    for number, place in enumerate(found):
        if time.monotonic() > told + _EVERY:
            told = time.monotonic()
            print(f"indexing shard {number + 1} of {len(found)}", file=sys.stderr, flush=True)
        try:
            done.append(_scan_one(place, number, parts, cache, last_dot))
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
    entries = np.concatenate([index.entries for index in done])
    passed_over = _together([index.passed_over for index in done if index.passed_over])
    _say_passed_over(passed_over, int(np.count_nonzero(entries["size"])) + passed_over.images, last_dot)
    return ShardIndex(shards, entries, None, flaws, passed_over=passed_over)


def _together(parts: Sequence[PassedOver]) -> PassedOver:
    unclear = sum(part.unclear for part in parts)
    examples = [part.example for part in parts if (part.unclear if unclear else part.images)]
    return PassedOver(sum(part.images for part in parts), unclear, [*examples, ""][0])


def _say_passed_over(passed_over: PassedOver, images: int, last_dot: bool) -> None:
    """A line where images are passed over; DataError where many share a key without a rule which one is meant."""
    if passed_over.unclear > _MOST_UNCLEAR * images:
        raise DataError(
            f"{passed_over.unclear:,} of {images:,} images ({passed_over.unclear / images:.1%}) in data.root share "
            f"their key with another, such as {passed_over.example}: a key ends at the first dot of a name, and a "
            "sample has one image; if each is a picture to learn from, set data.source.key_until=last_dot, which makes "
            "each a sample of its own; otherwise rename or leave out those that are none"
        )
    if passed_over.images:
        print(
            f"{passed_over.images:,} of {images:,} images ({passed_over.images / images:.1%}) are passed over, such "
            f"as {printable(passed_over.example)}: a key, which ends at the {'last' if last_dot else 'first'} dot of "
            "a name, has one image, and links are not followed",
            file=sys.stderr,
        )


def _scan_one(
    place: Place, number: int, parts: Path | None, cache: ShardCache | None, last_dot: bool
) -> ShardIndex:
    """The index of one shard, which is kept until that of all is there."""
    folder = None if parts is None else parts / f"{number:06d}"
    if folder is not None and (index := _kept(folder)) is not None:
        return index
    name, path = _name(place.url, number), Path(place.url)
    if cache is not None and is_remote(place.url):
        path = cache.local(place.url, name=name, size=None, sha256=None)
    rows, flaws, passed_over = scan(path, last_dot=last_dot)
    shard = Shard(name, place.split, len(rows), path.stat().st_size, None)
    index = ShardIndex([shard], rows, None, dict(flaws), passed_over=passed_over)
    if folder is not None:
        write_index(folder, index)
    return index


def _name(url: str, number: int) -> str:
    """What to call a shard: the tar file in its address in plain letters, a number where there is none."""
    files = re.findall(r"[^/\s?&=:]+\.tar\b", url)
    return re.sub(r"[^\w.-]|^[.-]", "_", files[-1])[-200:] if files else f"shard-{number:06d}.tar"
