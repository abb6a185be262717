"""Shards: where each sample's image lies in a set of tar files, read from them or from the index beside them.

A set is a folder of tars in webdataset's format (https://github.com/webdataset/webdataset) with `index.json` and
`index.npy`. A sample is members of one key that follow each other: `KEY.jpg` (or another image suffix) and, where
labelled, `KEY.cls` with the class number in ASCII. Samples are numbered through the shards in the index's order.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from beit_pretrain.data.folder import SUFFIXES
from beit_pretrain.errors import DataError

FORMAT = 1
INDEX_JSON, INDEX_NPY = "index.json", "index.npy"
SPLITS = ("train", "val", "test")
# Place and length in bytes of a sample's image in its tar, CRC-32 of these bytes, class number or -1.
INDEX = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4")])

_AGAIN = "copy it again, or write it again: beit-tools shards write"
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_LARGEST = int(np.iinfo(np.uint32).max)  # bytes of an image that an entry can hold
_LONGEST = 16  # blocks looked at for the headers of one member
_EXTENDED = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)  # headers that hold a long name for the next one
META = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over
LABEL = re.compile(rb"\s*(\d{1,9})\s*")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


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

    @cached_property
    def bounds(self) -> np.ndarray:
        """(shards + 1,) int64: samples bounds[i] up to bounds[i + 1] lie in the i-th shard."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    index, sha256 = parse_index(data, path)
    load_entries(index, Path(folder) / INDEX_NPY, sha256)
    return index


def parse_index(data: bytes, path: object) -> tuple[ShardIndex, str]:
    """What index.json holds, with no entries yet, and their SHA-256. `path` is what messages call the file."""
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise DataError(f"{path} has format {content['format']}, this version reads {FORMAT}; {_AGAIN}")
        shards = [Shard(*(entry[name] for name in Shard._fields)) for entry in content["shards"]]
        flaws = {int(sample): str(reason) for sample, reason in content["flaws"]}
        index = ShardIndex(shards, np.empty(0, INDEX), content["class_names"], flaws, content["written"])
        total, sha256 = int(content["samples"]), str(content["sha256"])
        whole = int(index.bounds[-1]) == total and all(0 <= sample < total for sample in flaws)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {_AGAIN}") from error
    if not whole:
        raise DataError(f"{path} is damaged: the samples of its shards are not {total} in all; {_AGAIN}")
    for shard in shards:
        if Path(shard.name).name != shard.name or shard.split not in SPLITS:
            raise DataError(f"{path} is damaged: no shard {shard.name!r} of {shard.split!r} can be; {_AGAIN}")
    return index, sha256


def load_entries(index: ShardIndex, path: Path, sha256: str) -> None:
    """Maps index.npy into memory as the index's entries. DataError if it is not the one that belongs to it."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if found != sha256:
        raise DataError(f"{path} is damaged, or not that of its {INDEX_JSON} (SHA-256); {_AGAIN}")
    index.entries = np.load(path, mmap_mode="r")
    index.sha256 = sha256
    if index.entries.dtype != INDEX or len(index.entries) != index.bounds[-1]:
        raise DataError(f"{path} does not hold the {index.bounds[-1]} entries of its {INDEX_JSON}; {_AGAIN}")


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


# --- what a tar holds ---------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """The members of one key so far."""

    key: str
    row: tuple[int, int, int] | None = None  # offset, size and CRC of the image
    label: int | None = None
    flaw: str | None = None


def scan(path: Path, total: Any = None) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """The samples of one tar: (samples,) INDEX in their order, and the flawed among them as (row, reason).

    Reads the file once, from front to back. `total` is a hash of hashlib to put the whole file's bytes into.
    DataError for a tar that is cut short or damaged, or for a file that is none.
    """
    path = Path(path)
    rows: list[tuple[int, int, int, int]] = []
    flaws: list[tuple[int, str]] = []
    try:
        with path.open("rb") as file:
            reader = _Reader(file.fileno(), total)
            for sample in _samples(path, file, reader):
                offset, size, crc = sample.row or (0, 0, 0)
                flaw = sample.flaw or _flaw(sample)
                if flaw:
                    flaws.append((len(rows), f"sample {sample.key}: {flaw}"))
                rows.append((offset, size, crc, -1 if sample.label is None else sample.label))
            reader.go_to(os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"shard {path.name} cannot be read: {error.strerror}") from error
    return np.array(rows, dtype=INDEX), flaws


def _flaw(sample: _Sample) -> str | None:
    if sample.row is None:
        return f"no image ({' '.join(SUFFIXES)}) among its files"
    return None if sample.row[1] else "its image has no bytes"


def _samples(path: Path, file: BinaryIO, reader: _Reader) -> Iterator[_Sample]:
    sample = None
    for member in _members(path, file):
        key, suffix = member_key(member.name)
        if not suffix or META.match(member.name):
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        if suffix == "cls":
            number = LABEL.fullmatch(reader.begin(member))
            if number is None:
                sample.flaw = f"its label {member.name} is no class number (0, 1, 2, ...)"
            else:
                sample.label = int(number[1])
        elif f".{suffix}".endswith(SUFFIXES) and sample.row is None:
            if member.size > _LARGEST:
                sample.flaw = f"its image has {member.size} bytes, {_LARGEST} are the most"
            else:
                sample.row = member.offset_data, member.size, reader.crc(member)
    if sample is not None:
        yield sample


def member_key(name: str) -> tuple[str, str]:
    """Key and suffix of a member: cut at the first dot of its base name. No suffix: it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower() if stem else ""


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar whose data lies in one piece.

    tarfile takes a broken header for the end of the archive: here the end must be where it says it is.
    """
    size, end = os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep them all  # pyright: ignore[reportAttributeAccessIssue]
                if not end < tar.offset <= size:
                    break
                end = tar.offset
                if member.isreg() and not member.issparse():
                    yield member
    except tarfile.TarError as error:
        head = os.pread(file.fileno(), _BLOCK, 0)
        if not end and head[257:262] != b"ustar":
            raise DataError(_no_tar(path, head)) from error
    if os.pread(file.fileno(), _BLOCK, end) != bytes(_BLOCK):
        raise DataError(
            f"shard {path.name} is cut short or damaged: it has {size} bytes, and at byte {end} neither a whole "
            "file nor the end mark of a tar; copy or write it again"
        )


def _no_tar(path: Path, head: bytes) -> str:
    if not head:
        return f"shard {path.name} is empty (0 bytes); copy or write it again"
    for start, packed in _PACKED.items():
        if head.startswith(start):
            return f"shard {path.name} is compressed ({packed}), not to be read in any order: unpack it to a plain tar"
    return f"shard {path.name} is no tar file; copy or write it again, or leave it out of data.root"


class _Reader:
    """Reads a file from front to back: one pass gives checksums of its parts and of the whole."""

    def __init__(self, descriptor: int, total: Any) -> None:
        self.descriptor = descriptor
        self.total = total
        self.done = 0  # bytes that are in `total`

    def crc(self, member: tarfile.TarInfo) -> int:
        """CRC-32 of a member's data."""
        self.go_to(member.offset_data)
        return self._read(member.offset_data + member.size)

    def go_to(self, place: int) -> None:
        """Puts what lies before `place` into the total."""
        if self.total is not None:
            self._read(place)
        self.done = max(self.done, place)

    def begin(self, member: tarfile.TarInfo) -> bytes:
        """What a member's data begins with."""
        return os.pread(self.descriptor, min(member.size, _BLOCK), member.offset_data)

    def _read(self, end: int) -> int:
        """CRC-32 of what lies between `done` and `end`."""
        crc = 0
        while self.done < end:
            data = os.pread(self.descriptor, min(end - self.done, _CHUNK), self.done)
            if not data:
                raise OSError(errno.EIO, f"it ended at byte {self.done} while it was read")
            if self.total is not None:
                self.total.update(data)
            self.done += len(data)
            crc = zlib.crc32(data, crc)
        return crc


def key_at(descriptor: int, offset: int) -> str | None:
    """The key of the member whose data begins at `offset`; None if no tar header lies before it.

    A long name stands in an extended header before the member's own, of as many blocks as it needs.
    """
    blocks = min(offset // _BLOCK, _LONGEST)
    head = os.pread(descriptor, blocks * _BLOCK, offset - blocks * _BLOCK)
    start = len(head) - _BLOCK
    try:
        for begin in range(start - 2 * _BLOCK, -1, -_BLOCK):
            with suppress(tarfile.HeaderError):
                before = tarfile.TarInfo.frombuf(head[begin : begin + _BLOCK], "utf-8", "surrogateescape")
                if before.type in _EXTENDED and begin + _BLOCK + -(-before.size // _BLOCK) * _BLOCK == start:
                    start = begin
                    break
        with tarfile.open(fileobj=io.BytesIO(head[start:]), mode="r:", encoding="utf-8") as tar:
            member = tar.next()
    except (tarfile.TarError, ValueError):
        return None
    return None if member is None else member_key(member.name)[0]
