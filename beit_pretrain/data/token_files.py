"""What a token cache is made of: records of ids in files of which each has one writer.

A writer appends records to NAME.ids and, after them, the numbers of their samples to NAME.samples. What is torn at the
end of either is passed over, and a record that does not agree with its checksum is nobody's.

Letters: N visual tokens.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

NOWHERE = np.uint32(2**32 - 1)  # the record of a sample that has none
NUMBER = np.dtype("<i8")  # of a sample


def record_type(tokens: int) -> np.dtype:
    """A record: N ids, and a CRC-32 of them together with cache, sample and view."""
    return np.dtype([("ids", "<u2", (tokens,)), ("crc", "<u4")])


class Parts:
    """What the writers of one view have left so far, as this process last saw it.

    A writer's NAME.ids holds records and NAME.samples whose they are. `table` gives each sample the number of its
    latest record; numbers run through the stretches of records in the order in which they were found.
    """

    def __init__(self, folder: Path, samples: int, record: np.dtype) -> None:
        self.folder = folder
        self.record = record
        self.table = np.full(samples, NOWHERE, np.uint32)
        self.found = 0
        self.firsts: list[int] = []  # of each stretch: the number of its first record
        self.stretches: list[tuple[str, int]] = []  # and in which file, from which row on
        self.rows: dict[str, int] = {}  # known of each file
        self.maps: dict[str, np.ndarray] = {}
        self.looked = 0.0
        self.look()

    def look(self) -> None:
        """Take in what was added. Later writers come later in the order of names, and mend what was damaged."""
        with suppress(FileNotFoundError):
            for name in sorted(entry.name for entry in os.scandir(self.folder)):
                if name.endswith(".ids"):
                    self.take(name.removesuffix(".ids"))
        self.looked = time.monotonic()

    def take(self, name: str) -> None:
        ids, numbers = self.folder / f"{name}.ids", self.folder / f"{name}.samples"
        known = self.rows.get(name, 0)
        rows = min(_size(ids) // self.record.itemsize, _size(numbers) // NUMBER.itemsize)
        if rows <= known:
            return
        added = np.fromfile(numbers, NUMBER, rows - known, offset=known * NUMBER.itemsize)
        places = np.arange(self.found, self.found + len(added), dtype=np.uint32)
        real = (added >= 0) & (added < len(self.table))
        self.table[added[real]] = places[real]
        self.maps[name] = np.asarray(np.memmap(ids, self.record, "r", shape=(rows,)))
        self.firsts.append(self.found)
        self.stretches.append((name, known))
        self.rows[name] = rows
        self.found += len(added)

    def record_of(self, sample: int) -> Any:
        """The latest record that is said to be the sample's, of one that has any."""
        number = int(self.table[sample])
        stretch = bisect_right(self.firsts, number) - 1
        name, row = self.stretches[stretch]
        return self.maps[name][row + number - self.firsts[stretch]]


def stored(folder: Path, samples: int, record: np.dtype) -> int:
    """How many images' ids are in a view's folder, without a table of all samples: these may be any number."""
    found = [np.empty(0, NUMBER)]
    for ids in sorted(folder.glob("*.ids")):
        numbers = ids.with_suffix(".samples")
        rows = min(_size(ids) // record.itemsize, _size(numbers) // NUMBER.itemsize)
        if rows:
            found.append(np.fromfile(numbers, NUMBER, rows))
    known = np.unique(np.concatenate(found))
    return int(np.count_nonzero((known >= 0) & (known < samples)))


class Writer:
    """The files of this process for one view. Its name is new with every start: nothing follows a torn record."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        before = sum(1 for _ in folder.glob("*.ids"))
        self.name = f"{before:06d}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL
        self.files = [os.open(folder / f"{self.name}.{end}", flags, 0o666) for end in ("ids", "samples")]

    def append(self, records: np.ndarray, samples: np.ndarray) -> None:
        """Records first: those that no number tells of do not count. OSError if the disk is full."""
        for file, data in zip(self.files, (records.tobytes(), samples.tobytes()), strict=True):
            if os.write(file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        for file in self.files:
            os.close(file)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
