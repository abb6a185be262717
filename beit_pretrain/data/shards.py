"""Images in shards: tar files that are read at the places their index gives."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from beit_pretrain.data.shard_index import SPLITS, Shard, ShardIndex
from beit_pretrain.data.shard_sets import find, is_remote, some
from beit_pretrain.data.shard_tar import key_at
from beit_pretrain.data.sources import Source, digest
from beit_pretrain.errors import ConfigError, DataError

_OPEN = 64  # shards that a process keeps open
_OPEN_FETCHED = 16  # the same of fetched ones: their space is free only when they are closed
_logger = logging.getLogger(__name__)


class _OpenFile:
    """A file that closes when its last user has done with it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardSource(Source):
    """Images in shards of webdataset's format, of this project's writing or another's.

    - `root`: a folder with index.json; an address ending in / that has one; or patterns of the training shards, in
      brace notation or with wildcards, local or remote. `val`, `test`: patterns, where `root` is one.
    - `class_names`: a file with one name a line, in the order of the labels; null: the index's, else the numbers.
    - `cache`: folder for fetched shards, of at most `cache_gb` (10^9 bytes), and for the index of shards of
      another's making. Without one remote shards are `streamed`: they are no more than `urls` to train on.
    - `timeout`: seconds without a byte after which a transfer is ended.
    - `samples`: number of training samples, which streamed shards without an index do not tell.
    - `key_until`: last_dot where a key ends at the last dot of a name; null: at the first one, as in webdataset.

    Every image is compared with its CRC-32 in the index as it is read.
    """

    def __init__(
        self,
        *,
        root: str | Sequence[str],
        val: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        class_names: str | None = None,
        cache: str | None = None,
        cache_gb: float = 100,
        timeout: float = 60,
        samples: int | None = None,
        key_until: str | None = None,
    ) -> None:
        if key_until not in (None, "last_dot"):
            raise ConfigError(f"data.source.key_until={key_until}: set it to last_dot, or to null")
        patterns = {"train": root, "val": val, "test": test}
        keep = None if cache is None else Path(cache).expanduser().absolute()
        self.last_dot = key_until is not None
        found = find(
            patterns,
            keep=keep,
            limit=int(cache_gb * 1e9),
            timeout=timeout,
            samples=samples,
            last_dot=self.last_dot,
        )
        self.index, self.urls, self.samples, self.cache = found
        self.timeout = timeout
        self.streamed = any(map(is_remote, self.urls)) and keep is None
        if self.streamed:
            return
        self.bounds = self.index.bounds
        self.flaws = self.index.impossible | self.index.flaws
        self.fetched = self.cache is not None
        sizes = [shard.bytes for shard in self.index.shards]
        if self.cache is not None and sum(sizes) > self.cache.limit:
            self.room = self.cache.limit // max(sizes)
        self.splits = {name: part for name in SPLITS if len(part := self.index.split(name))}
        labels = self.index.labels
        if len(labels) and labels.max() >= 0:
            self.labels = labels
            self.class_names = _class_names(class_names, self.index, int(labels.max()) + 1)
        self._open = self._keep_open()
        self._look()

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int) -> bytes:
        if index in self.flaws:
            raise DataError(self.flaws[index])
        number, shard = self._shard(index)
        offset, size, crc, _ = self.index.entries[index].item()
        data = self._bytes(number, size, offset)
        if len(data) < size:
            raise DataError(
                f"shard {shard.name} is cut short: it ends before byte {offset + size} of {shard.bytes}; copy or write "
                "it again"
            )
        if zlib.crc32(data) != crc:
            sample = self._key(number, offset) or index - int(self.index.bounds[number])
            raise DataError(
                f"shard {shard.name}, sample {sample}: its bytes are not those that were written (CRC); copy or write "
                "the shard again"
            )
        return data

    def name(self, index: int) -> str:
        """The shard and the key in it, of remote ones and where it cannot be read the number in it."""
        number, shard = self._shard(index)
        offset = int(self.index.entries[index]["offset"])
        key = None if is_remote(self.urls[number]) else self._key(number, offset)
        return self.where(index) if key is None else f"{shard.name}:{key}"

    def where(self, index: int) -> str:
        number, shard = self._shard(index)
        return f"{shard.name}, sample {index - int(self.index.bounds[number])}"

    def fingerprint(self) -> str:
        """Over what the index says and the sizes of the splits: shards that were moved or renamed are the same data."""
        if self.streamed:
            return digest("streamed shards", str(self.samples), *["last dot"] * self.last_dot, *self.urls)
        sizes = [f"{name} {len(part)}" for name, part in self.splits.items()]
        return digest("shards", self.index.sha256, *sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = self._keep_open()

    def _shard(self, index: int) -> tuple[int, Shard]:
        """The shard that a sample lies in."""
        number = int(np.searchsorted(self.index.bounds, index, side="right")) - 1
        return number, self.index.shards[number]

    def _key(self, number: int, offset: int) -> str | None:
        """The key of the sample whose image lies there in a shard; None if it cannot be read."""
        try:
            return key_at(self._open(number).descriptor, offset, self.last_dot) if offset else None
        except (DataError, OSError):
            return None

    def _bytes(self, number: int, size: int, offset: int) -> bytes:
        """At most `size` bytes of a shard: fewer where it ends."""
        # pread moves no position: workers share what was open before they were forked.
        file = self._open(number)
        size = min(size, max(0, file.size - offset))  # an index that promises more makes no memory
        if not size:
            return b""
        data = os.pread(file.descriptor, size, offset)
        while len(data) < size and (more := os.pread(file.descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def _keep_open(self) -> Any:
        """Opens shards by number, and keeps those used last."""
        return lru_cache(_OPEN if self.cache is None else _OPEN_FETCHED)(self._open_shard)

    def _open_shard(self, number: int) -> _OpenFile:
        shard, url = self.index.shards[number], self.urls[number]
        cache = self.cache if is_remote(url) else None
        for attempt in range(2):
            path = (
                url
                if cache is None
                else cache.local(url, name=shard.name, size=shard.bytes, sha256=shard.sha256)
            )
            try:
                # O_NONBLOCK: a pipe of that name would wait for a writer.
                return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError as error:
                # The cache may have made room in between.
                if attempt or cache is None:
                    raise DataError(
                        f"shard {shard.name} cannot be opened ({path}): {error.strerror}; copy or write it again"
                    ) from error
        raise AssertionError("the second attempt returns or raises")

    def _look(self) -> None:
        """A warning if shards on this machine are missing or of another size, DataError if none is there."""
        missing, other = [], []
        local = [
            (shard, url)
            for shard, url in zip(self.index.shards, self.urls, strict=True)
            if not is_remote(url)
        ]
        for shard, url in local:
            try:
                if (size := os.stat(url).st_size) != shard.bytes:
                    other.append(f"{shard.name} ({size} bytes instead of {shard.bytes})")
            except OSError:
                missing.append(shard.name)
        if local and len(missing) == len(self.urls):
            raise DataError(
                f"none of the {len(missing)} shards is where its index is, such as {local[0][1]}; set data.root to the "
                "folder that holds both"
            )
        faults = [f"{len(missing)} are not there: {some(missing)}"] if missing else []
        faults += [f"{len(other)} have another size: {some(other)}"] if other else []
        if faults:
            _logger.warning(
                "of %d shards %s; their images count as unreadable (data.max_bad); copy or write them again",
                len(self.urls),
                ", ".join(faults),
            )


def _class_names(given: str | None, index: ShardIndex, classes: int) -> list[str]:
    """Names for at least so many classes: of a file, of the index, or their numbers."""
    names, source = index.class_names, f"the index names {len(index.class_names or [])} classes"
    if given is not None:
        try:
            names = Path(given).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.source.class_names={given} cannot be read: {error}") from error
        source = f"data.source.class_names={given} has {len(names)} lines"
    if names is None:
        return [str(number) for number in range(classes)]
    if len(names) < classes:
        raise DataError(
            f"{source}, but there are labels up to {classes - 1}; set data.source.class_names to a file with a name "
            f"a line for all {classes}"
        )
    return names
