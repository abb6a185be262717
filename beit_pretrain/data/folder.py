"""Image files below one or several folders."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from beit_pretrain.data.sources import Source, digest
from beit_pretrain.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
_SUFFIXES = tuple(suffix.encode() for suffix in SUFFIXES)


class FileSource(Source):
    """Image files in groups, each group below a folder of its own: what sources of files have in common."""

    def __init__(self, groups: Iterable[tuple[bytes, list[bytes]]]) -> None:
        """`groups`: a folder, and the paths below it, as often as there are groups."""
        self.folders: list[bytes] = []
        blobs: list[bytes] = []
        lengths: list[np.ndarray] = []
        for folder, paths in groups:
            self.folders.append(folder)
            blobs.append(b"".join(paths))
            lengths.append(np.fromiter(map(len, paths), np.int64, len(paths)))
        # One blob and its cuts: a million separate strings would be copied into every worker, page by page,
        # as their reference counts change.
        self.blob = b"".join(blobs)
        self.cuts = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
        self.sizes = np.array([len(part) for part in lengths])  # images of each group
        self.ends = self.sizes.cumsum()

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def read(self, index: int) -> bytes:
        with open(self._path(index), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return os.fsdecode(self._path(index))

    def _path(self, index: int) -> bytes:
        group = int(np.searchsorted(self.ends, index, side="right"))
        return os.path.join(self.folders[group], self.blob[self.cuts[index] : self.cuts[index + 1]])


class Folder(FileSource):
    """Every image file below `root`: a folder, a glob pattern, or a list of them; flat or nested as it comes.

    The order is that of the roots as given, then of the path below the root (by its bytes). Names that
    begin with a dot are passed over, links are followed, a file below two of the roots counts once. A link
    to nothing that is named like an image counts as one, which cannot be read. A pattern's root is what comes
    before its first wildcard. Labels are the first-level folders, sorted by name, if every image lies below
    such a folder of its root and there are at least two of them; otherwise there are none. `/data/train` and
    `/data/val` below one root would be such folders: give the training folder as the root.
    """

    def __init__(self, *, root: str | Sequence[str]) -> None:
        given = [root] if isinstance(root, str) else list(root)
        if not given:
            raise DataError("data.root is an empty list: name at least one folder of images")
        groups: list[tuple[bytes, list[bytes]]] = []
        seen: set[tuple[int, int]] = set()
        taken: set[bytes] = set()
        for entry in given:
            base, starts = _expand(entry)
            found = sorted(path for start in starts for path in walk(start, base, seen, taken))
            if not found:
                raise DataError(
                    f"data.root={entry} holds no images ({' '.join(SUFFIXES)}, sub-folders included); "
                    "set data.root to a folder that does, or leave this one out if another root covers it"
                )
            groups.append((base, found))
        super().__init__(groups)
        self._label([path for _, paths in groups for path in paths])

    def _label(self, paths: list[bytes]) -> None:
        classes = [path.partition(b"/")[0] if b"/" in path else None for path in paths]
        names = sorted({name for name in classes if name is not None})
        if None in classes or len(names) < 2:
            return
        number = {name: place for place, name in enumerate(names)}
        self.labels = np.array([number[name] for name in classes if name is not None], dtype=np.int64)
        self.class_names = [os.fsdecode(name) for name in names]

    def fingerprint(self) -> str:
        """Over the paths below the roots, not over the files' contents: moved folders stay the same data."""
        numbers = np.repeat(np.arange(len(self.folders), dtype=np.int32), self.sizes)
        return digest("folder", self.blob, self.cuts.tobytes(), numbers.tobytes())


def _expand(entry: str) -> tuple[bytes, list[bytes]]:
    """The root of `entry` and the folders and files to begin at."""
    path = os.path.abspath(os.path.expanduser(entry))
    if os.path.isdir(path):
        return os.fsencode(path), [os.fsencode(path)]
    if not glob.has_magic(path):
        what = "is a file, not a folder" if os.path.exists(path) else "does not exist"
        raise DataError(f"data.root={entry} {what}; set data.root to a folder of images")
    fixed = path
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise DataError(f"data.root={entry} matches nothing; set data.root to a folder of images")
    return os.fsencode(fixed), [os.fsencode(match) for match in matches]


def walk(
    start: bytes, base: bytes, seen: set[tuple[int, int]], taken: set[bytes], key: str = "data.root"
) -> Iterator[bytes]:
    """Paths, relative to `base`, of the images at or below `start`.

    Passes over the folders in `seen` (device, inode) and the files in `taken`, and adds to both. What cannot be looked
    at counts as an image if it is named like one: reading it says why. DataError, which names `key`, for a folder that
    cannot be listed, and for a link to nothing that may have been one.
    """
    cut = len(os.path.join(base, b""))
    stack = [start]
    with listing(start, key):
        if not os.path.isdir(start):
            # A file that a pattern matched itself.
            known = start in taken or inode(os.path.dirname(start)) in seen
            if not is_image(os.path.basename(start)):
                _check_link(start, key)
            elif not known:
                taken.add(start)
                yield start[cut:]
            return
        while stack:
            path = stack.pop()
            place = inode(path)
            if place in seen:  # a circle of links, or a folder below two roots
                continue
            seen.add(place)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if is_folder(entry):
                        stack.append(entry.path)
                    elif not is_image(entry.name):
                        if entry.is_symlink():
                            _check_link(entry.path, key)
                    elif _is_readable_or_lost(entry) and entry.path not in taken:
                        yield entry.path[cut:]


@contextmanager
def listing(folder: bytes, key: str = "data.root") -> Iterator[None]:
    """Turns a folder's OSError into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{key}: {os.fsdecode(error.filename or folder)} cannot be listed: {error}"
        ) from error


def is_folder(entry: os.DirEntry[bytes]) -> bool:
    """False too for what cannot be looked at, such as a circle of links."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_lost(path: str | bytes) -> bool:
    """Whether it is a link to what is not there, such as a disk that is not mounted."""
    return os.path.islink(path) and not os.path.exists(path)


def _is_readable_or_lost(entry: os.DirEntry[bytes]) -> bool:
    """Whether it is a file or cannot be looked at; not a pipe or a device, which may never end."""
    try:
        return entry.is_file() or not os.path.exists(entry.path)
    except OSError:
        return True


def _check_link(path: bytes, key: str) -> None:
    """DataError for a link to nothing that has no suffix: it may have led to a folder of images."""
    if is_lost(path) and not os.path.splitext(path)[1]:
        raise DataError(
            f"{key}: {os.fsdecode(path)} is a link to {os.fsdecode(os.readlink(path))}, which is not there: bring it "
            "back, or remove the link"
        )


def inode(folder: bytes) -> tuple[int, int]:
    """(device, inode): the same folder has one, by whichever path it is reached."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_image(name: bytes) -> bool:
    """Whether a file of this name counts as an image."""
    return not name.startswith(b".") and name.lower().endswith(_SUFFIXES)
