"""Image files below one or several folders."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence

import numpy as np

from beit_pretrain.data.sources import Source, digest
from beit_pretrain.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
_SUFFIXES = tuple(suffix.encode() for suffix in SUFFIXES)


class Folder(Source):
    """Every image file below `root`: a folder, a glob pattern, or a list of them; flat or nested as it comes.

    The order is that of the roots as given, then of the path below the root (by its bytes). Names that
    begin with a dot are passed over, links are followed, a file below two of the roots counts once. A
    pattern's root is what comes before its first wildcard. Labels are the first-level folders, sorted by
    name, if every image lies below such a folder of its root and there are at least two of them; otherwise
    there are none. `/data/train` and `/data/val` below one root would be such folders: give the training
    folder as the root.
    """

    def __init__(self, *, root: str | Sequence[str]) -> None:
        given = [root] if isinstance(root, str) else list(root)
        if not given:
            raise DataError("data.root is an empty list: name at least one folder of images")
        roots: list[bytes] = []
        numbers: list[int] = []
        paths: list[bytes] = []
        seen: set[tuple[int, int]] = set()
        taken: set[bytes] = set()
        for entry in given:
            base, starts = _expand(entry)
            found = sorted(path for start in starts for path in _walk(start, base, seen, taken))
            if not found:
                raise DataError(
                    f"data.root={entry} holds no images ({' '.join(SUFFIXES)}, sub-folders included); "
                    "set data.root to a folder that does, or leave this one out if another root covers it"
                )
            numbers += [len(roots)] * len(found)
            roots.append(base)
            paths += found
        self.roots = roots
        self.root_number = np.array(numbers, dtype=np.int32)
        # One blob and its cuts: a million separate strings would be copied into every worker, page by page,
        # as their reference counts change.
        self.blob = b"".join(paths)
        self.cuts = np.cumsum([0, *(len(path) for path in paths)], dtype=np.int64)
        self._label(paths)

    def _label(self, paths: list[bytes]) -> None:
        classes = [path.partition(b"/")[0] if b"/" in path else None for path in paths]
        names = sorted({name for name in classes if name is not None})
        if None in classes or len(names) < 2:
            return
        number = {name: place for place, name in enumerate(names)}
        self.labels = np.array([number[name] for name in classes if name is not None], dtype=np.int64)
        self.class_names = [os.fsdecode(name) for name in names]

    def __len__(self) -> int:
        return len(self.root_number)

    def read(self, index: int) -> bytes:
        with open(self._path(index), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return os.fsdecode(self._path(index))

    def fingerprint(self) -> str:
        """Over the paths below the roots, not over the files' contents: moved folders stay the same data."""
        return digest("folder", self.blob, self.cuts.tobytes(), self.root_number.tobytes())

    def _path(self, index: int) -> bytes:
        below = self.blob[self.cuts[index] : self.cuts[index + 1]]
        return os.path.join(self.roots[self.root_number[index]], below)


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


def _walk(start: bytes, base: bytes, seen: set[tuple[int, int]], taken: set[bytes]) -> Iterator[bytes]:
    """Paths, relative to `base`, of the images at or below `start`.

    Passes over the folders in `seen` (device, inode) and the files in `taken`, and adds to both.
    """
    cut = len(os.path.join(base, b""))
    stack = [start]
    try:
        if not os.path.isdir(start):
            # A file that a pattern matched itself.
            known = start in taken or _identity(os.path.dirname(start)) in seen
            if _is_image(os.path.basename(start)) and not known:
                taken.add(start)
                yield start[cut:]
            return
        while stack:
            path = stack.pop()
            identity = _identity(path)
            if identity in seen:  # a circle of links, or a folder below two roots
                continue
            seen.add(identity)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        stack.append(entry.path)
                    elif _is_image(entry.name) and entry.is_file() and entry.path not in taken:
                        yield entry.path[cut:]
    except OSError as error:
        raise DataError(
            f"data.root: {os.fsdecode(error.filename or start)} cannot be listed: {error}"
        ) from error


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_image(name: bytes) -> bool:
    return not name.startswith(b".") and name.lower().endswith(_SUFFIXES)
