"""Remote shards: whole ones in a cache on this machine's disk, and small files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from beit_pretrain.data.transfer import BrokenError, MissingError, pieces
from beit_pretrain.errors import ConfigError, DataError

ATTEMPTS = 4  # to read a file whose transfer breaks off
PAUSE = 1.0  # seconds before the second of them, twice as long before each further one

_GROWTH = 1 << 26  # bytes that are kept free ahead of a transfer whose length is not known
_REMEMBERED = 600.0  # seconds until a shard that could not be fetched is tried again
_WAIT = 0.05  # seconds between looks at a full cache
_OURS = re.compile(r".+\.[0-9a-f]{16}(\.part)?")


def fetch_small(url: str, *, most: int, timeout: float = 60.0) -> bytes | None:
    """What lies at a URL, such as an index; None if nothing does. DataError if it cannot be read whole.

    Of a file of more than `most` bytes somewhat more than these come.
    """
    for wait in waits():
        try:
            with closing(pieces(url, timeout)) as stream:
                data = bytearray()
                for piece in stream:
                    data += piece
                    if len(data) > most:
                        break
                return bytes(data)
        except MissingError:
            return None
        except BrokenError as error:
            reason = str(error)
        time.sleep(wait)
    raise DataError(f"{url} cannot be read: {reason} ({ATTEMPTS} attempts); try the address by hand")


def waits() -> list[float]:
    """Seconds to wait after each attempt."""
    return [PAUSE * 2**attempt for attempt in range(ATTEMPTS - 1)] + [0.0]


class _Held(NamedTuple):
    """A file of the cache: its path, length, time of last use and bytes on the disk."""

    path: Path
    size: int
    used: float
    disk: int


@dataclass(frozen=True)
class _Wanted:
    """A shard: what to call it, where it comes from, what it must be, where it goes."""

    name: str
    url: str
    size: int | None
    sha256: str | None
    path: Path

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def fault(self, size: int, sha256: str) -> str:
        """What is wrong with bytes of this number and hash, or nothing."""
        if self.size is not None and size != self.size:
            return f"{size} bytes{' or more' if size > self.size else ''} instead of {self.size}"
        if self.sha256 is not None and sha256 != self.sha256.lower():
            return f"SHA-256 {sha256} instead of {self.sha256.lower()}"
        return ""


class ShardCache:
    """Shards fetched whole into a folder of at most `limit` bytes; the one not used for longest makes room.

    The processes of a machine share it: each shard is fetched by one of them while the others wait. An open file
    stays readable when its shard is removed; whoever finds a path gone before opening it asks again. A shard that
    cannot be had is remembered for ten minutes, or until a cache is made of the folder again: it has many samples,
    and each is a question.
    """

    def __init__(self, *, folder: Path, limit: int, timeout: float) -> None:
        """`timeout`: seconds without a byte after which a transfer is ended. ConfigError if there is no room."""
        self.folder = Path(folder).expanduser().absolute()
        self.limit = limit
        self.timeout = timeout
        if timeout <= 0:
            raise ConfigError(f"data.source.timeout={timeout:g}: set seconds above 0")
        try:
            self._private.mkdir(parents=True, exist_ok=True)
            (self._private / "writable").touch()
        except OSError as error:
            raise ConfigError(
                f"data.source.cache={folder} cannot be written to ({error.strerror}); set a folder that can"
            ) from error
        free = shutil.disk_usage(self.folder).free + sum(held.disk for held in self._held())
        if not 0 < limit <= free:
            raise ConfigError(
                f"data.source.cache_gb={limit / 1e9:g}: {free / 1e9:.1f} GB are free for data.source.cache={folder}; "
                "set a number above 0 and below that, or a folder on another disk"
            )
        for mark in self._private.glob("*.failed"):
            mark.unlink(missing_ok=True)

    @property
    def _private(self) -> Path:
        return self.folder / ".locks"

    def local(self, url: str, *, name: str, size: int | None, sha256: str | None) -> Path:
        """The path of a shard on this machine, fetched if it is not there. DataError naming it if it cannot be had.

        `size` in bytes and `sha256` are what it must have; None if not known.
        """
        key = hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()[:16]
        wanted = _Wanted(name, url, size, sha256, self.folder / f"{Path(name).name}.{key}")
        if not self._use(wanted):
            with self._lock(wanted.path.name):
                if not self._use(wanted):  # or another process has fetched it meanwhile
                    self._fetch(wanted)
        return wanted.path

    def _lock(self, name: str) -> FileLock:
        return FileLock(self._private / f"{name}.lock")

    def _use(self, wanted: _Wanted) -> bool:
        """Whether the shard is here; if so it is the one that was used last."""
        try:
            os.utime(wanted.path)
            return wanted.size in (None, wanted.path.stat().st_size)
        except FileNotFoundError:
            return False

    def _fetch(self, wanted: _Wanted) -> None:
        """Fetches a shard, or notes why not, while its lock is held."""
        mark = self._private / f"{wanted.path.name}.failed"
        with suppress(FileNotFoundError):
            if time.time() - mark.stat().st_mtime < _REMEMBERED:
                raise DataError(mark.read_text())
        try:
            return self._try(wanted)
        except DataError as error:
            reason = str(error)
        except OSError as error:
            reason = (
                f"shard {wanted.name} cannot be kept in data.source.cache={self.folder}: {error.strerror}; free some "
                "space, or set a smaller data.source.cache_gb or another folder"
            )
        finally:
            wanted.part.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk
            mark.write_text(reason)
        raise DataError(reason)

    def _try(self, wanted: _Wanted) -> None:
        """Attempts until the shard is right; a wrong one is fetched once more only."""
        reason, wrong = "", False
        for wait in waits():
            try:
                reason = wanted.fault(*self._receive(wanted))
            except MissingError as error:
                raise DataError(f"shard {wanted.name} is not to be had from {wanted.url}: {error}") from error
            except BrokenError as error:
                reason = str(error)
                time.sleep(wait)
                continue
            if not reason:
                with self._lock("room"):  # whoever counts must not miss it between two names
                    wanted.part.replace(wanted.path)
                return
            if wrong:
                raise DataError(
                    f"shard {wanted.name} from {wanted.url} has {reason}, twice; put the right one there, or write "
                    "the index again"
                )
            wrong = True
        raise DataError(
            f"shard {wanted.name}: {reason} from {wanted.url} ({ATTEMPTS} attempts); look at the network and the "
            "server, or raise data.source.timeout"
        )

    def _receive(self, wanted: _Wanted) -> tuple[int, str]:
        """Reads the shard into its part; the number of bytes and their SHA-256."""
        if wanted.size is not None:
            self._reserve(wanted, wanted.size)
            return self._copy(wanted, wanted.size)
        with self._lock("growing"):  # two that grow could wait for each other's end
            self._reserve(wanted, 0)
            return self._copy(wanted, 0)

    def _copy(self, wanted: _Wanted, reserved: int) -> tuple[int, str]:
        total, size = hashlib.sha256(), 0
        with wanted.part.open("r+b") as file, closing(pieces(wanted.url, self.timeout)) as stream:
            for piece in stream:
                size += len(piece)
                if size > reserved and wanted.size is not None:
                    break
                if size > reserved:
                    reserved = size + min(_GROWTH, max(0, self.limit - size))
                    self._reserve(wanted, reserved)
                total.update(piece)
                file.write(piece)
            file.flush()
            file.truncate(size)
            os.fsync(file.fileno())
        return size, total.hexdigest()

    def _reserve(self, wanted: _Wanted, size: int) -> None:
        """Gives the part its length, so that it counts before it is filled, once there is room for it."""
        if size > self.limit:
            raise DataError(
                f"shard {wanted.name} has {size} bytes or more, too many for data.source.cache_gb="
                f"{self.limit / 1e9:g}; raise it"
            )
        while True:
            with self._lock("room"):
                held = [h for h in self._held() if h.path != wanted.part and not self._is_stale(h)]
                excess = sum(h.size for h in held) + size - self.limit
                finished = sorted((h for h in held if h.path.suffix != ".part"), key=lambda h: h.used)
                if excess <= sum(h.size for h in finished):
                    for oldest in finished:
                        if excess > 0:
                            oldest.path.unlink(missing_ok=True)
                            excess -= oldest.size
                    with wanted.part.open("ab") as file:
                        file.truncate(size)
                    return
            time.sleep(_WAIT)  # until other transfers have ended: a finished shard can make room

    def _held(self) -> list[_Held]:
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # just removed
                if _OURS.fullmatch(path.name):
                    status = path.stat()
                    found.append(_Held(path, status.st_size, status.st_mtime, status.st_blocks * 512))
        return found

    def _is_stale(self, held: _Held) -> bool:
        """Whether it is what a process left half done that is gone; if so it is removed."""
        if held.path.suffix != ".part":
            return False
        try:
            with self._lock(held.path.stem).acquire(blocking=False):
                held.path.unlink(missing_ok=True)
        except Timeout:
            return False
        return True
