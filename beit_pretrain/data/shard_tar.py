"""What a tar file holds: samples in webdataset's format, and the place of each one's image.

A sample is members of one key that follow each other: `KEY.jpg` (or another image suffix) and, where labelled,
`KEY.cls` with the class number in ASCII. A key ends at the first dot of a name, which is webdataset's rule, or at the
last one where that is asked for. Of several images of a key, one whose whole suffix is that of an image comes first.
Whoever made the tar may mean harm: what is read of a header is bounded, and what is none ends the reading.
"""

from __future__ import annotations

import errno
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from beit_pretrain.data.folder import SUFFIXES
from beit_pretrain.errors import DataError

# Place and length in bytes of a sample's image in its tar, CRC-32 of these bytes, class number or -1.
INDEX = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4")])
LABEL = re.compile(rb"\s*(\d{1,9})\s*")
LABEL_BYTES = tarfile.BLOCKSIZE  # of a .cls that are looked at
META = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_LARGEST = int(np.iinfo(np.uint32).max)  # bytes of an image that an entry can hold
_LONGEST = 16  # blocks looked at for the headers of one member
_LONG_NAME = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)  # headers that hold a long name for the next one
_EXTENDED = (*_LONG_NAME, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGLINK)
_MOST_EXTENDED = 1 << 16  # bytes of one of these
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class PassedOver(NamedTuple):
    """Images that are no sample's: further ones of a key, links, sparse files.

    `unclear` are those among them whose key has several images with more than a suffix behind its first dot, so that
    no rule says which one is meant; `example` is one of these, if there are any.
    """

    images: int = 0
    unclear: int = 0
    example: str = ""


class Scan(NamedTuple):
    """The samples of a tar: (samples,) INDEX in their order, the flawed ones as (row, reason), what is in none."""

    rows: np.ndarray
    flaws: list[tuple[int, str]]
    passed_over: PassedOver


@dataclass
class Sample:
    """The members of one key so far. `image` is what the reader keeps of the one that counts."""

    key: str
    image: Any = None
    label: int | None = None
    flaw: str | None = None
    taken: str = ""  # name of its image
    plain: bool = False  # whether nothing but a suffix follows the key in that name
    passed: list[str] = field(default_factory=list)  # names of its other images

    def takes(self, name: str, suffix: str) -> bool:
        """Whether this image is the one that counts, so far; every other one is in `passed`."""
        plain = f".{suffix}" in SUFFIXES
        if self.taken and (self.plain or not plain):
            self.passed.append(name)
            return False
        if self.taken:
            self.passed.append(self.taken)
        self.taken, self.plain = name, plain
        return True

    @property
    def unclear(self) -> list[str]:
        """The other images, where no rule says which one is meant."""
        return [] if self.plain else self.passed

    def set_label(self, name: str, data: bytes) -> None:
        if number := LABEL.fullmatch(data):
            self.label = int(number[1])
        else:
            self.flaw = f"its label {name} is no class number (0, 1, 2, ...)"

    def fault(self) -> str | None:
        """Why the sample cannot be used."""
        if self.flaw is None and not self.taken:
            return f"no image ({' '.join(SUFFIXES)}) among its files"
        return self.flaw


def member_key(name: str, last_dot: bool) -> tuple[str, str]:
    """Key and suffix of a member: cut at a dot of its base name. No suffix: it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    cut = base.rfind(".") if last_dot else base.find(".")
    if cut < 1 or base.startswith("."):
        return name, ""
    return f"{folder}{slash}{base[:cut]}", base[cut + 1 :].lower()


def is_image(suffix: str) -> bool:
    """Whether a member with this suffix, such as jpg or left.jpg, is an image."""
    return f".{suffix}".endswith(SUFFIXES)


# --- from front to back -------------------------------------------------------------------------------------


def scan(path: Path, total: Any = None, *, last_dot: bool = False) -> Scan:
    """The samples of one tar, whose keys end at the first dot of a name, or at the last one.

    Reads the file once, from front to back. `total` is a hash of hashlib to put the whole file's bytes into.
    DataError for a tar that is cut short or damaged, or for a file that is none.
    """
    path = Path(path)
    rows: list[tuple[int, int, int, int]] = []
    flaws: list[tuple[int, str]] = []
    passed: list[str] = []
    unclear: list[str] = []
    try:
        with path.open("rb") as file:
            reader = _Reader(file.fileno(), total)
            for sample in _samples(path, file, reader, last_dot, passed):
                offset, size, crc = sample.image or (0, 0, 0)
                flaw = sample.fault() or (None if size else "its image has no bytes")
                if flaw:
                    flaws.append((len(rows), f"sample {sample.key}: {flaw}"))
                rows.append((offset, size, crc, -1 if sample.label is None else sample.label))
                passed += sample.passed
                unclear += sample.unclear
            reader.go_to(os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"shard {path.name} cannot be read: {error.strerror}") from error
    example = [*unclear[:1], *passed[:1], ""][0]
    return Scan(np.array(rows, dtype=INDEX), flaws, PassedOver(len(passed), len(unclear), example))


def _samples(
    path: Path, file: BinaryIO, reader: _Reader, last_dot: bool, passed: list[str]
) -> Iterator[Sample]:
    """The samples of a tar, each with offset, size and CRC of its image. Images that are no files are `passed`."""
    sample = None
    for member in _members(path, file):
        key, suffix = member_key(member.name, last_dot)
        if not suffix or META.match(member.name):
            continue
        if not member.isreg() or member.issparse():
            if is_image(suffix) and not member.isdir():
                passed.append(member.name)
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if suffix == "cls":
            sample.set_label(member.name, reader.begin(member))
        elif is_image(suffix) and sample.takes(member.name, suffix):
            if member.size > _LARGEST:
                sample.flaw = f"its image has {member.size} bytes, {_LARGEST} are the most"
            else:
                sample.image = member.offset_data, member.size, reader.crc(member)
    if sample is not None:
        yield sample


class Member(tarfile.TarInfo):
    """A member whose headers tarfile reads within bounds.

    It takes whatever is no header for the end of an archive: here only the end mark is that, and ReadError comes for
    the rest. The maps of sparse files are left unread: `sparse` says that there is one.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        # Its parsers raise whatever they met.
        except (
            tarfile.HeaderError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise tarfile.ReadError(str(error)) from error

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and not 0 <= self.size <= _MOST_EXTENDED:
            raise tarfile.InvalidHeaderError(f"a header of {self.size} bytes")  # pyright: ignore[reportAttributeAccessIssue]
        return super()._proc_member(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]

    def _leave_map(self, member: tarfile.TarInfo, *rest: object) -> None:
        del rest
        member.sparse = []  # pyright: ignore[reportAttributeAccessIssue]

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _leave_map

    def _proc_sparse(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        """The old form of GNU tar: its map goes on in blocks, each of which says whether there is another."""
        _, more, size = self._sparse_structs  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(_MOST_EXTENDED // tarfile.BLOCKSIZE):
            if not more:
                break
            block = cast(BinaryIO, tarfile_.fileobj).read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise tarfile.TruncatedHeaderError("truncated header")  # pyright: ignore[reportAttributeAccessIssue]
            more = bool(block[504])
        if more:
            raise tarfile.InvalidHeaderError(f"a map of more than {_MOST_EXTENDED} bytes")  # pyright: ignore[reportAttributeAccessIssue]
        self._leave_map(self)
        self.offset_data = cast(BinaryIO, tarfile_.fileobj).tell()
        tarfile_.offset = self.offset_data + self._block(self.size)  # pyright: ignore[reportAttributeAccessIssue]
        self.size = size
        return self


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, whose end must be where it says it is."""
    size, end = os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(
            fileobj=file, mode="r:", tarinfo=Member, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep them all  # pyright: ignore[reportAttributeAccessIssue]
                if not end < tar.offset <= size or member.size < 0:
                    break
                end = tar.offset
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
        return os.pread(self.descriptor, min(member.size, LABEL_BYTES), member.offset_data)

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


def key_at(descriptor: int, offset: int, last_dot: bool = False) -> str | None:
    """The key of the member whose data begins at `offset`; None if no tar header lies before it.

    A long name stands in an extended header before the member's own, of as many blocks as it needs.
    """
    blocks = min(offset // _BLOCK, _LONGEST)
    try:
        head = os.pread(descriptor, blocks * _BLOCK, offset - blocks * _BLOCK)
        start = len(head) - _BLOCK
        for begin in range(start - 2 * _BLOCK, -1, -_BLOCK):
            with suppress(tarfile.HeaderError):
                before = tarfile.TarInfo.frombuf(head[begin : begin + _BLOCK], "utf-8", "surrogateescape")
                if before.type in _LONG_NAME and begin + _BLOCK + -(-before.size // _BLOCK) * _BLOCK == start:
                    start = begin
                    break
        with tarfile.open(
            fileobj=io.BytesIO(head[start:]), mode="r:", tarinfo=Member, encoding="utf-8"
        ) as tar:
            member = tar.next()
    except (tarfile.TarError, ValueError, OverflowError):
        return None
    return None if member is None else member_key(member.name, last_dot)[0]
