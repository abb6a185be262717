"""Labelled images in one folder per class, such as ImageNet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from beit_pretrain.data.folder import SUFFIXES, FileSource, inode, is_folder, is_image, is_lost, listing, walk
from beit_pretrain.data.sources import digest
from beit_pretrain.errors import DataError

_NAMED = 5  # classes that a message names at most
# timm's lists of class folders, by their length; Google's has two more, which are often found beside them.
_IMAGENET = {1000: ("imagenet-1k", "ImageNet-1k"), 21841: ("imagenet-22k", "ImageNet-22k of fall 2011")}
_GOOGLE = ("imagenet-21k-goog", "Google's list of 21,843 classes")


class ClassFolders(FileSource):
    """Images at `<root>/<split>/<class>/`, at any depth below it; `train`, `val` and `test` name the splits.

    A split of val and test is left out if it is null or its folder is not there. With `train` null the class
    folders lie in the root itself, beside those of val and test. Classes are the folders below train, sorted
    by name (by its bytes); `classes` is the number expected, null for any. Within a class the order is that
    of the paths' bytes. Names that begin with a dot are passed over, links are followed.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str | None = "train",
        val: str | None = "val",
        test: str | None = None,
        classes: int | None = None,
    ) -> None:
        self.root = root
        folders = _split_folders(root, {"train": train, "val": val, "test": test})
        found = {split: _class_folders(root, split, folders) for split in folders}
        names = found["train"]
        _check_classes(root, train, names, classes)
        for split in found:
            _check_known(root, split, found[split], names)
        places = [(split, name) for split in found for name in found[split]]
        super().__init__(
            _images(os.path.join(folders[split], name), folders[split]) for split, name in places
        )
        number = {name: label for label, name in enumerate(names)}
        self.labels = np.repeat([number[name] for _, name in places], self.sizes).astype(np.int64)
        self.class_names = [os.fsdecode(name) for name in names]
        self._check_filled(len(names))
        self.places = [(split, os.fsdecode(name)) for split, name in places]
        ends = [0, *self.ends.tolist()]
        self.splits, group = {}, 0
        for split, classes_there in found.items():
            start, group = group, group + len(classes_there)
            self.splits[split] = np.arange(ends[start], ends[group])

    def fingerprint(self) -> str:
        """Over splits, class names and paths, not over the files' contents: a moved root is the same data."""
        return digest(
            "class folders", json.dumps(self.places), self.blob, self.cuts.tobytes(), self.sizes.tobytes()
        )

    def _check_filled(self, classes: int) -> None:
        """The training part comes first: one group per class."""
        assert self.class_names is not None
        empty = [name for name, size in zip(self.class_names, self.sizes[:classes], strict=True) if not size]
        if empty:
            raise DataError(
                f"data.root={self.root}: {len(empty)} of {classes} class folders without a training image "
                f"({' '.join(SUFFIXES)}): {_some(empty)}; complete or remove them"
            )


def _split_folders(root: str, given: dict[str, str | None]) -> dict[str, bytes]:
    """The folder of each split that is there."""
    if not isinstance(root, str):
        raise DataError(f"data.root={root}: class folders have one root; set data.root to a single folder")
    path = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(path):
        what = "is a file, not a folder" if os.path.exists(path) else "does not exist"
        raise DataError(f"data.root={root} {what}; set data.root to the folder that the images lie below")
    folders = {"train": os.path.join(path, given["train"] or "")}
    if not os.path.isdir(folders["train"]):
        raise DataError(
            f"data.root={root} has no folder {given['train']}; set data.source.train to the one that holds the "
            "class folders, or to null if they lie in data.root itself"
        )
    for split in ("val", "test"):
        name = given[split]
        if name is not None and os.path.isdir(folder := os.path.join(path, name)):
            folders[split] = folder
        elif name is not None and is_lost(folder):
            raise DataError(lost(root, folder, split))
    return {split: os.fsencode(os.path.normpath(folder)) for split, folder in folders.items()}


def _class_folders(root: str, split: str, folders: dict[str, bytes]) -> list[bytes]:
    """Names of the class folders of a split, sorted. DataError if images lie beside them."""
    others = {path for other, path in folders.items() if other != split}
    names: list[bytes] = []
    loose: list[bytes] = []
    with listing(folders[split]), os.scandir(folders[split]) as entries:
        for entry in entries:
            if entry.name.startswith(b".") or entry.path in others:
                continue
            if is_folder(entry):
                names.append(entry.name)
            elif is_image(entry.name):
                loose.append(entry.name)
            elif is_lost(entry.path):  # it may have been a class
                raise DataError(lost(root, os.fsdecode(entry.path), split))
    if loose:
        instead = "" if split == "train" else f", or set data.source.{split}=null to leave this part out"
        raise DataError(
            f"data.root={root}: {_count(len(loose), 'image')} in {os.fsdecode(folders[split])} outside of any class "
            f"folder, such as {os.fsdecode(min(loose))}; move each into the folder of its class{instead}"
        )
    return sorted(names)


def _images(folder: bytes, split: bytes) -> tuple[bytes, list[bytes]]:
    # Seen before the walk begins: a link back to the split would put all classes into this one.
    return folder, sorted(walk(folder, folder, {inode(split)}, set()))


def _check_classes(root: str, train: str | None, found: Sequence[bytes], expected: int | None) -> None:
    where = f"data.root={root}" if train is None else f"data.root={root} (data.source.train={train})"
    if len(found) < 2:
        raise DataError(
            f"{where} has {_count(len(found), 'class folder')}{_in_brackets(found)}, at least 2 are needed; set "
            "data.root and data.source.train so that together they lead to the folder right above the classes"
        )
    if expected is None or len(found) == expected:
        return
    mend = "".join(f"{part}, or " for part in _differences(set(map(os.fsdecode, found)), expected))
    raise DataError(
        f"{where} has {_count(len(found), 'class folder')}, not the {expected} of data.source.classes; {mend}set "
        "data.source.classes=null to train on what is there"
    )


def _differences(found: set[str], expected: int) -> Iterator[str]:
    """What is missing and what is too many, where the classes are those of a list with `expected` names."""
    if expected not in _IMAGENET:
        return
    from timm.data.imagenet_info import ImageNetInfo  # slow to import, and only a mistake needs it

    subset, title = _IMAGENET[expected]
    listed = set(ImageNetInfo(subset).label_names())
    if len(found & listed) <= len(found) / 2:  # other images, of which just the number was expected
        return
    if missing := sorted(listed - found):
        yield f"add what {title} has: {_some(missing)}"
    if extra := sorted(found - listed):
        known = set(ImageNetInfo(_GOOGLE[0]).label_names()) if expected == 21841 else set()
        whence = f" (they are in {_GOOGLE[1]})" if set(extra) <= known else ""
        yield f"move away what {title} has not: {_some(extra)}{whence}"


def _check_known(root: str, split: str, found: Sequence[bytes], names: Sequence[bytes]) -> None:
    if unknown := sorted(set(found) - set(names)):
        raise DataError(
            f"data.root={root}: {split} has {_count(len(unknown), 'class folder')} that train has not: "
            f"{_some([os.fsdecode(name) for name in unknown])}; add training images of them, remove them, or "
            f"set data.source.{split}=null"
        )


def lost(root: str, path: str, split: str) -> str:
    """What to say of a link to nothing where a folder of this split may have been."""
    instead = "" if split == "train" else f", or set data.source.{split}=null to leave this part out"
    return (
        f"data.root={root}: {path} is a link to {os.readlink(path)}, which is not there: bring it back or remove the "
        f"link{instead}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", ... ({len(names)} in all)" if len(names) > _NAMED else "")


def _in_brackets(names: Sequence[bytes]) -> str:
    return f" ({_some([os.fsdecode(name) for name in names])})" if names else ""
