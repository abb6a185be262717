"""Images and label maps in two parallel folders, such as ADE20k."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.data.class_folders import lost
from beit_pretrain.data.decode import check_png
from beit_pretrain.data.folder import SUFFIXES, FileSource, is_lost, walk
from beit_pretrain.data.sources import SceneSource, digest
from beit_pretrain.errors import DataError, LabelError
from beit_pretrain.label_maps import IGNORED

_NAMED = 3  # files that a message names at most
_MOST = 255  # classes: the 256th value of a byte is what is ignored
_MAP = ".png"
_PNG_DEPTH = 24  # where a PNG file says how many bits a value has


class LabelFolders(FileSource, SceneSource):
    """Images at `<root>/<images>/<split>/` with label maps of the same names at `<root>/<annotations>/<split>/`.

    A map is the PNG file whose path below its folder is that of the image but for the suffix; sub-folders are
    included. `train`, `val` and `test` name the splits; one of val and test is left out if it is null or has
    no folder of images. `classes` is a file, seen from the root, with one name per line or ADE20k's table
    (objectInfo150.txt); `class_count` the number expected in it, null for any.

    Values are class numbers from 0, 255 is ignored. With `reduce_zero_label` 0 is ignored as well and classes
    are numbered from 1 in the files, as in ADE20k.
    """

    def __init__(
        self,
        *,
        root: str,
        images: str = "images",
        annotations: str = "annotations",
        train: str = "training",
        val: str | None = "validation",
        test: str | None = None,
        classes: str | None,
        class_count: int | None = None,
        reduce_zero_label: bool,
    ) -> None:
        path = _root(root)
        self.class_names = _class_names(root, path, classes, class_count)
        self.classes = classes
        self.reduce_zero_label = reduce_zero_label
        found: dict[str, list[bytes]] = {}
        folders: list[bytes] = []
        self.map_folders: list[bytes] = []
        for split, name in (("train", train), ("val", val), ("test", test)):
            if name is None or (split != "train" and not _is_there(root, path / images / name, split)):
                continue
            folders.append(os.fsencode(path / images / name))
            self.map_folders.append(os.fsencode(path / annotations / name))
            found[split] = _pairs(root, split, folders[-1], self.map_folders[-1])
        super().__init__(zip(folders, found.values(), strict=True))
        starts = [0, *self.ends.tolist()]
        self.splits = {split: np.arange(starts[i], starts[i + 1]) for i, split in enumerate(found)}

    def fingerprint(self) -> str:
        """Over splits, paths and classes, not over the files' contents: a moved root is the same data."""
        facts = json.dumps([list(self.splits), self.class_names, self.reduce_zero_label])
        return digest("label folders", facts, self.blob, self.cuts.tobytes(), self.sizes.tobytes())

    def map_name(self, index: int) -> str:
        """The path of a label map."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        stem = _stem(self.blob[self.cuts[index] : self.cuts[index + 1]])
        return os.fsdecode(os.path.join(self.map_folders[group], stem)) + _MAP

    def label_map(self, index: int) -> Tensor:
        name = self.map_name(index)
        values = _values(Path(name).read_bytes(), name)  # (H, W) integers
        if int(values.max()) > IGNORED:
            self._refuse(int(values.max()), name)
        labels = values.astype(np.uint8)
        if self.reduce_zero_label:
            labels = np.where(labels == IGNORED, IGNORED, labels - np.uint8(1)).astype(
                np.uint8
            )  # 0 becomes 255
        wrong = (labels >= len(self.class_names)) & (labels != IGNORED)
        if wrong.any():
            self._refuse(int(values[wrong].max()), name)
        return torch.from_numpy(labels)

    def look(self, indices: np.ndarray, most: int | None) -> dict[str, Any]:
        found = super().look(indices, most)
        share = found["share"]
        if self.reduce_zero_label and found["ignored"] and share[-1] == 0 and all(share[:-1]):
            found["remarks"].append(
                f"the last class, {self.class_names[-1]}, never occurs though all others do: if the first class is 0 "
                "in your files, set data.source.reduce_zero_label=false"
            )
        return found

    def _refuse(self, value: int, name: str) -> None:
        count, first = len(self.class_names), int(self.reduce_zero_label)
        if value == count and not self.reduce_zero_label:
            mend = "if the first class is 1 in your files, set data.source.reduce_zero_label=true (0 is then ignored)"
        else:
            mend = f"add what is missing to data.source.classes={self.classes}, or mend the file"
        raise LabelError(
            f"label map {name} has the value {value}, which is none of the {count} classes: with "
            f"data.source.reduce_zero_label={str(self.reduce_zero_label).lower()} they are {first} to "
            f"{count - 1 + first}, and {'0 and ' * first}{IGNORED} {'are' if first else 'is'} ignored; {mend}"
        )


# --- label maps ---------------------------------------------------------------------------------------------


def _values(data: bytes, name: str) -> np.ndarray:
    """The numbers of a PNG file as they are stored, (H, W). DataError if it cannot be read as one."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            check_png(data)
            image.load()
            mode, values = image.mode, np.array(image)
    except Image.UnidentifiedImageError as error:
        raise DataError(f"label map {name} is no PNG file (it begins with {data[:8]!r})") from error
    except Exception as error:  # decoders raise whatever their parser met
        raise DataError(
            f"label map {name}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if mode not in ("1", "L", "P", "I") and not mode.startswith("I;16"):
        raise LabelError(
            f"label map {name} holds colours (mode {mode}), not class numbers; store the number of each pixel's class "
            "as a grey value or a palette's index"
        )
    depth = data[_PNG_DEPTH]
    if mode == "L" and depth in (2, 4):  # Pillow stretches these to 0..255
        values //= 255 // ((1 << depth) - 1)
    return values


# --- layout -------------------------------------------------------------------------------------------------


def _root(root: str) -> Path:
    if not isinstance(root, str):
        raise DataError(
            f"data.root={root}: images with label maps have one root; set data.root to a single folder"
        )
    path = Path(root).expanduser().absolute()
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(
            f"data.root={root} {what}; set data.root to the folder above those of images and label maps"
        )
    return path


def _is_there(root: str, folder: Path, split: str) -> bool:
    """Whether a split has a folder of images. DataError for a link to one that is not there."""
    if is_lost(str(folder)):
        raise DataError(lost(root, str(folder), split))
    return folder.is_dir()


def _pairs(root: str, split: str, images: bytes, maps: bytes) -> list[bytes]:
    """The images of a split, sorted, each of which has its label map."""
    for folder, option in ((images, "images"), (maps, "annotations")):
        if not os.path.isdir(folder):
            raise DataError(
                f"data.root={root} has no folder {os.fsdecode(os.path.relpath(folder, os.fsencode(_root(root))))}; set "
                f"data.root, data.source.{option} and data.source.{split} so that together they lead to one"
            )
    found = sorted(walk(images, images, set(), set()))
    given = [path for path in walk(maps, maps, set(), set()) if path.endswith(_MAP.encode())]
    stems = Counter(map(_stem, found))
    mapped = {_stem(path) for path in given}
    faults = [
        (stems.keys() - mapped, f"without a label map ({_MAP} of the same name)"),
        (mapped - stems.keys(), f"only as a label map, without an image ({' '.join(SUFFIXES)})"),
        ({stem for stem, count in stems.items() if count > 1}, "more than one image for one label map"),
    ]
    told = [f"{what}: {_some(names)}" for names, what in faults if names]
    if not found:
        told.insert(0, "no image")
    if told:
        raise DataError(
            f"data.root={root}: {os.fsdecode(images)} and {os.fsdecode(maps)} do not match: {'; '.join(told)}. "
            f"Complete or remove them{'' if split == 'train' else f', or set data.source.{split}=null'}"
        )
    return found


def _stem(path: bytes) -> bytes:
    return os.path.splitext(path)[0]


def _some(names: Iterable[bytes]) -> str:
    listed = sorted(map(os.fsdecode, names))
    return f"{len(listed)} ({', '.join(listed[:_NAMED])}{', ...' if len(listed) > _NAMED else ''})"


# --- classes ------------------------------------------------------------------------------------------------


def _class_names(root: str, folder: Path, classes: str | None, expected: int | None) -> list[str]:
    key = f"data.source.classes={'null' if classes is None else classes}"
    if classes is None or not (folder / Path(classes).expanduser()).is_file():
        raise DataError(
            f"{key} names no file in data.root={root}: set it to a text file with the names of the classes, one per "
            "line, in the order of their numbers"
        )
    lines = [
        line
        for line in (folder / Path(classes).expanduser()).read_text(encoding="utf-8-sig").splitlines()
        if line.strip()
    ]
    header = [cell.strip() for cell in lines[0].split("\t")] if lines else []
    is_table = "Idx" in header and "Name" in header
    names = _table(lines[1:], header, key) if is_table else [line.strip() for line in lines]
    faults = []
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        faults.append(f"{key} has names twice ({', '.join(twice)}); give every class its own")
    if not 2 <= len(names) <= _MOST:
        faults.append(f"{key} has {len(names)} names; give 2 to {_MOST}, one per line")
    elif expected not in (None, len(names)):
        faults.append(
            f"{key} has {len(names)} names, not the {expected} of data.source.class_count; complete it, or set "
            "data.source.class_count=null"
        )
    if faults:
        raise DataError("; ".join(faults))
    return names


def _table(lines: Sequence[str], header: Sequence[str], key: str) -> list[str]:
    """The first of each class's names in ADE20k's table (columns apart by tabs, names by comma or semicolon)."""
    names = []
    for number, line in enumerate(lines, start=1):
        row = dict(zip(header, (cell.strip() for cell in line.split("\t")), strict=False))
        if row["Idx"] != str(number) or not row.get("Name"):
            raise DataError(f"{key}: line {number + 1} should have Idx {number} and a Name, not {line!r}")
        names.append(re.split("[,;]", row["Name"])[0].strip())
    return names
