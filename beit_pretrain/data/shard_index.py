"""Shards: the index beside a set of tar files, which says where each sample's image lies.

A set is a folder of tars in webdataset's format (https://github.com/webdataset/webdataset) with `index.json` and
`index.npy`. Samples are numbered through the shards in the index's order. An index may come from somebody who means
harm: nothing in it is more than its type and range allow, and names of shards are plain ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.data.shard_tar import INDEX, PassedOver
from beit_pretrain.errors import DataError
from beit_pretrain.wording import is_whole

FORMAT = 1
INDEX_JSON, INDEX_NPY = "index.json", "index.npy"
SPLITS = ("train", "val", "test")
MOST_BYTES = 1 << 28  # of an index.json, which holds some 200 for a shard
CLASSES = 1_000_000  # that labels may always number; more, if there are more images

_AGAIN = "copy it again, or write it again: beit-tools shards write"
# Of a shard. It becomes a part of paths, addresses and commands.
_NAME = re.compile(r"\w[\w.-]{0,199}")
_MOST = 2**63 - 1  # of any number


class Shard(NamedTuple):
    """One tar file: its name in the set, the split it belongs to, samples in it, size, SHA-256 if known."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str | None


@dataclass
class ShardIndex:
    """What is in a set of shards. `entries` is (n,) INDEX, mapped into memory where it was read from a file."""

    shards: list[Shard]
    entries: np.ndarray
    class_names: list[str] | None = None
    flaws: dict[int, str] = field(default_factory=dict)  # samples known to be unusable, with the reason
    written: dict[str, Any] = field(default_factory=dict)  # how it was written, in the writer's words
    passed_over: PassedOver | None = None  # of shards of another's making; None: not counted

    @cached_property
    def bounds(self) -> np.ndarray:
        """(shards + 1,) int64: samples bounds[i] up to bounds[i + 1] lie in the i-th shard."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """(n,) int64 class numbers, -1 where a sample has none."""
        labels = self.entries["label"].astype(np.int64)
        labels[self._beyond] = -1
        return labels

    @property
    def impossible(self) -> dict[int, str]:
        """Samples whose label numbers more classes than there can be, with the reason: a list of classes is made."""
        numbers = self.entries["label"]
        most = self._classes - 1
        return {
            sample: f"its label {numbers[sample]} is no class number: {most} is the highest for {len(numbers)} images"
            for sample in np.flatnonzero(self._beyond).tolist()
        }

    @property
    def _classes(self) -> int:
        return max(CLASSES, len(self.entries))

    @property
    def _beyond(self) -> np.ndarray:
        return self.entries["label"] >= self._classes

    @cached_property
    def sha256(self) -> str:
        """Of index.npy's bytes, whether it is written or not."""
        total = hashlib.sha256()
        np.save(SimpleNamespace(write=total.update), self.entries)  # pyright: ignore[reportArgumentType]
        return total.hexdigest()

    def split(self, name: str) -> np.ndarray:
        """Numbers of the samples of a split, sorted int64."""
        parts = zip(self.shards, self.bounds[:-1], self.bounds[1:], strict=True)
        ranges = [np.arange(start, end) for shard, start, end in parts if shard.split == name]
        return np.concatenate([np.empty(0, np.int64), *ranges])


# --- the index beside the shards ----------------------------------------------------------------------------


def read_index(folder: Path) -> ShardIndex:
    """The index in a folder. DataError if it is not there, of another format, or damaged."""
    path = Path(folder) / INDEX_JSON
    with _reading(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise DataError(_too_large(path))
        data = file.read()
    index, sha256 = parse_index(data, path)
    load_entries(index, Path(folder) / INDEX_NPY, sha256)
    return index


@contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    try:
        if path.exists() and not path.is_file():  # a pipe would never begin
            raise DataError(f"{path} is no file; {_AGAIN}")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def parse_index(data: bytes, path: object) -> tuple[ShardIndex, str]:
    """What index.json holds, with no entries yet, and their SHA-256. `path` is what messages call the file."""
    if len(data) > MOST_BYTES:
        raise DataError(_too_large(path))
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise DataError(
                f"{path} has format {content['format']!r:.20}, this version reads {FORMAT}; {_AGAIN}"
            )
        shards = [_shard(entry) for entry in content["shards"]]
        total, sha256 = _number("samples", content["samples"]), str(content["sha256"])
        if sum(shard.samples for shard in shards) != total:
            raise ValueError(f"the samples of its shards are not {total} in all")
        flaws = {_number("a flaw's sample", sample): str(reason) for sample, reason in content["flaws"]}
        if any(sample >= total for sample in flaws):
            raise ValueError(f"a flaw is of none of its {total} samples")
        index = ShardIndex(
            shards,
            np.empty(0, INDEX),
            _class_names(content["class_names"]),
            flaws,
            dict(content["written"]),
            _passed_over(content.get("passed_over")),
        )
    # RecursionError: lists in lists without end.
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {_AGAIN}") from error
    return index, sha256


def _too_large(path: object) -> str:
    return f"{path} has more than {MOST_BYTES} bytes, so it is no index of shards; {_AGAIN}"


def _shard(entry: Any) -> Shard:
    name, split, sha256 = entry["name"], entry["split"], entry["sha256"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r:.60} is no name of a shard: letters, digits, _ . - and first none of . and -"
        )
    if split not in SPLITS:
        raise ValueError(f"{split!r:.20} is none of {', '.join(SPLITS)}")
    if not isinstance(sha256, str | None):
        raise ValueError(f"{sha256!r:.20} is no SHA-256")
    return Shard(name, split, _number("samples", entry["samples"]), _number("bytes", entry["bytes"]), sha256)


def _number(what: str, value: Any) -> int:
    if not is_whole(value, 0) or value > _MOST:
        raise ValueError(f"{what} {value!r:.20}")
    return value


def _class_names(names: Any) -> list[str] | None:
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("class_names are no list of names")
    return names


def _passed_over(entry: Any) -> PassedOver | None:
    """None for an index of before these were counted."""
    if entry is None:
        return None
    images, unclear = (_number(name, entry[name]) for name in ("images", "unclear"))
    return PassedOver(images, unclear, str(entry["example"]))


def load_entries(index: ShardIndex, path: Path, sha256: str) -> None:
    """Maps index.npy into memory as the index's entries. DataError if it is not the one that belongs to it."""
    with _reading(path) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataError(f"{path} is damaged, or not that of its {INDEX_JSON} (SHA-256); {_AGAIN}")
    try:
        entries = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # its parser raises whatever it met
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {_AGAIN}") from error
    if entries.dtype != INDEX or entries.shape != (index.bounds[-1],):
        raise DataError(f"{path} does not hold the {index.bounds[-1]} entries of its {INDEX_JSON}; {_AGAIN}")
    if (entries["label"] < -1).any():
        raise DataError(f"{path} is damaged: a label is below -1; {_AGAIN}")
    index.entries, index.sha256 = entries, sha256


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write both files, index.json last: whoever finds it finds the rest. DataError if they cannot be written."""
    content = {
        "format": FORMAT,
        "samples": len(index.entries),
        "sha256": index.sha256,
        "class_names": index.class_names,
        "shards": [shard._asdict() for shard in index.shards],
        "flaws": sorted(index.flaws.items()),
        "written": index.written,
    }
    if index.passed_over is not None:
        content["passed_over"] = index.passed_over._asdict()
    text = json.dumps(content, indent=1) + "\n"
    _atomic(Path(folder) / INDEX_NPY, lambda file: np.save(file, index.entries))
    _atomic(Path(folder) / INDEX_JSON, lambda file: file.write(text.encode()))


def _atomic(path: Path, fill: Callable[[Any], object]) -> None:
    """Fills a temporary file that then takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path} was not written: {error.strerror}; free some space or set another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
