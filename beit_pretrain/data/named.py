"""Data sets by name: torchvision's and the Hugging Face hub's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from beit_pretrain.data.decode import to_tensor
from beit_pretrain.data.sources import Source, digest
from beit_pretrain.errors import DataError


class _Layout(NamedTuple):
    """How one of torchvision's data sets is asked for its parts, and where it keeps its labels."""

    train: dict[str, Any]
    test: dict[str, Any]
    labels: str
    classes: str | None


_BY_FLAG = ({"train": True}, {"train": False})
_BY_SPLIT = ({"split": "train"}, {"split": "test"})
_TORCHVISION = {
    "CIFAR10": _Layout(*_BY_FLAG, "targets", "classes"),
    "CIFAR100": _Layout(*_BY_FLAG, "targets", "classes"),
    "MNIST": _Layout(*_BY_FLAG, "targets", "classes"),
    "FashionMNIST": _Layout(*_BY_FLAG, "targets", "classes"),
    "KMNIST": _Layout(*_BY_FLAG, "targets", "classes"),
    "USPS": _Layout(*_BY_FLAG, "targets", None),
    "SVHN": _Layout(*_BY_SPLIT, "labels", None),
    "STL10": _Layout({"split": "train+unlabeled"}, {"split": "test"}, "labels", "classes"),
}


class TorchvisionSource(Source):
    """One of torchvision's data sets by name: its training part, then its test part.

    Those that torchvision keeps as arrays with their labels; the others are folders of images, for
    `data=folder`. STL10's training part includes its 100,000 unlabelled images.
    """

    def __init__(self, *, dataset: str, root: str, download: bool = True) -> None:
        if dataset not in _TORCHVISION:
            near = difflib.get_close_matches(dataset.upper(), _TORCHVISION, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DataError(f"data.dataset={dataset}: {hint}Known: {', '.join(_TORCHVISION)}")
        layout = _TORCHVISION[dataset]
        self.dataset = dataset
        self.parts = _open_torchvision(dataset, layout, Path(root).expanduser(), download)
        labels = [np.asarray(getattr(part, layout.labels), dtype=np.int64) for part in self.parts]
        self.labels = np.concatenate(labels)
        self.class_names = [str(number) for number in range(int(self.labels.max()) + 1)]
        if layout.classes is not None:
            self.class_names = [str(name) for name in getattr(self.parts[0], layout.classes)]
        self.first = len(self.parts[0])  # how many images come before the test part
        self.splits = {"train": np.arange(self.first), "test": np.arange(self.first, len(self.labels))}

    def __len__(self) -> int:
        return self.first + len(self.parts[1])

    def read(self, index: int) -> Tensor:
        part, offset = (self.parts[0], 0) if index < self.first else (self.parts[1], self.first)
        return to_tensor(part[index - offset][0])

    def name(self, index: int) -> str:
        return f"{self.dataset} {index}"

    def fingerprint(self) -> str:
        assert self.labels is not None
        return digest(self.dataset, self.labels.tobytes())


def _open_torchvision(dataset: str, layout: _Layout, root: Path, download: bool) -> list[Any]:
    from filelock import FileLock
    from torchvision import datasets

    make = getattr(datasets, dataset)
    try:
        if not download:
            return [make(str(root), **part) for part in (layout.train, layout.test)]
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{dataset}.lock"):  # the ranks of a run must not unpack over one another
            return [make(str(root), download=True, **part) for part in (layout.train, layout.test)]
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data.dataset={dataset} is not in {root} and could not be downloaded ({reason}); "
            "copy it to data.root, or try again with a network and data.source.download=true"
        ) from error


class HuggingFaceSource(Source):
    """A data set of the Hugging Face hub by name; its splits laid one after another.

    `image` and `label` are column names (label null: none); `splits` says which of the data set's splits is
    train, val and test, null for none.
    """

    def __init__(
        self,
        *,
        dataset: str,
        subset: str | None = None,
        image: str = "image",
        label: str | None = "label",
        splits: Mapping[str, str | None],
    ) -> None:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise DataError(
                "data=huggingface needs the package `datasets`: pip install beit-pretrain[huggingface]"
            ) from error
        try:
            found = datasets.load_dataset(dataset, subset)
        except Exception as error:  # the hub's client raises its own, HTTP's and the file system's errors
            reason = " ".join(str(error).split())
            raise DataError(f"data.dataset={dataset} could not be loaded: {reason}") from error
        if splits.get("train") not in found:
            raise DataError(
                f"data.source.splits.train={splits.get('train')} is no split of {dataset}, which has "
                f"{', '.join(found)}; set it to one of them"
            )
        self.dataset = dataset
        self.column = image
        self.splits: dict[str, np.ndarray] = {}
        self.parts: list[Any] = []
        labels: list[np.ndarray] = []
        for ours in ("train", "val", "test"):
            if splits.get(ours) not in found:
                continue
            part = found[splits[ours]]
            _check_columns(part, dataset, image, label)
            start = len(self)
            self.splits[ours] = np.arange(start, start + len(part))
            self.parts.append(part.cast_column(image, datasets.Image(decode=False)))
            if label is not None:
                labels.append(_integers(part[label], label))
                feature = part.features[label]
                self.class_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.labels = np.concatenate(labels) if labels else None

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, index: int) -> bytes:
        part, row = self._place(index)
        cell = self.parts[part][row][
            self.column
        ]  # {"bytes": ..., "path": ...}; a path where it is not embedded
        if cell is None:
            raise DataError("no image in this row")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def name(self, index: int) -> str:
        part, row = self._place(index)
        return f"{self.dataset} {list(self.splits)[part]} {row}"

    def fingerprint(self) -> str:
        sizes = ",".join(f"{name}:{len(part)}" for name, part in self.splits.items())
        return digest(self.dataset, sizes, b"" if self.labels is None else self.labels.tobytes())

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - int(self.ends[part]) + len(self.parts[part])


def _check_columns(part: Any, dataset: str, image: str, label: str | None) -> None:
    for key, column in (("image", image), ("label", label)):
        if column is not None and column not in part.column_names:
            hint = " (or null for none)" if key == "label" else ""
            raise DataError(
                f"data.source.{key}={column} is no column of {dataset}, which has "
                f"{', '.join(part.column_names)}; set it to one of them{hint}"
            )


def _integers(values: Any, label: str) -> np.ndarray:
    numbers = np.asarray(values[:])
    if not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(
            f"data.source.label={label} holds {numbers.dtype} values, not class numbers; "
            "set another column, or null to train without labels"
        )
    return numbers.astype(np.int64)
