"""Where images come from: the contracts, and the embedded digits."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from beit_pretrain.data.sampler import choose
from beit_pretrain.errors import DataError, LabelError
from beit_pretrain.label_maps import IGNORED

_NAMED = 5  # classes that a remark names at most
_DIGITS_TEST = 397
_DIGITS_VAL = 280
_DIGITS_SALT = 0x646967697473  # fixes the splits for good, whatever the run's seed


class Source(ABC):
    """Images by number.

    `labels` is (n,) int64 with -1 for unknown, or None; `splits` maps train, val and test to sorted indices
    and may lack any of them: what is missing is made from what is there. `bounds` is (shards + 1,) int64 where
    images lie in shards: numbers bounds[i] up to bounds[i + 1] in the i-th. `flaws` are images that are known to
    be unusable, with the reason; to read one is a DataError. `streamed`: images cannot be had by number.
    `room`: how many shards can lie on this machine at a time, None for all. `fetched`: to read may take long, and
    ends by itself where nothing comes.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    splits: Mapping[str, np.ndarray] = {}
    bounds: np.ndarray | None = None
    flaws: Mapping[int, str] = {}
    streamed: bool = False
    room: int | None = None
    fetched: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | Tensor:
        """The image file's bytes, or its pixels (3, H, W) uint8. OSError or DataError if it cannot be had."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the image in a message: its path where it has one."""

    def where(self, index: int) -> str:
        """The place that the image is read from, in words, said without touching a file."""
        return self.name(index)

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of which images these are and in which order, equal in every process."""


class SceneSource(Source):
    """Images with a label map each."""

    class_names: list[str]  # in the order of the labels
    reduce_zero_label = False  # whether files have 0 for ignored pixels and count classes from 1

    @abstractmethod
    def label_map(self, index: int) -> Tensor:
        """(H, W) uint8 over the upright image, 255 = ignored.

        OSError or DataError if it cannot be had, LabelError if a value is no class.
        """

    def look(self, indices: np.ndarray, most: int | None) -> dict[str, Any]:
        """What is labelled: the shares of the classes over at most `most` maps, spread evenly (None: all).

        `share` (C,) is of the labelled pixels, `ignored` of all. Maps that cannot be read are left out.
        LabelError for a value that is no class. DataError if nothing is labelled, and if one class alone is, while
        other pixels are ignored or no map is left that was not looked at.
        """
        count = len(indices) if most is None else min(most, len(indices))
        pixels, read = np.zeros(256, np.int64), 0
        for place in range(count):
            try:
                label_map = self.label_map(int(indices[place * len(indices) // count]))
            except LabelError:
                raise
            except (DataError, OSError):  # counted and noted by whoever needs it
                continue
            pixels += np.bincount(label_map.flatten().numpy(), minlength=256)
            read += 1
        labelled = pixels[: len(self.class_names)]
        if not labelled.any():
            raise DataError(
                f"no pixel is labelled in the {read} label maps that could be read of {count} looked at: every one is "
                f"ignored ({IGNORED}); set data.root to images with label maps"
            )
        if np.count_nonzero(labelled) == 1 and (pixels[IGNORED] or count == len(indices)):
            raise DataError(
                f"{self.class_names[int(labelled.argmax())]} is the only class in the {read} label maps that could be "
                f"read of {count} looked at, and {pixels[IGNORED] / pixels.sum():.1%} of their pixels are ignored "
                f"({IGNORED}); {self._mend_single(count < len(indices))}"
            )
        missing = [name for name, found in zip(self.class_names, labelled, strict=True) if not found]
        remarks = []
        if missing:
            named = f": {', '.join(missing)}" if len(missing) <= _NAMED else ""
            remarks.append(f"{len(missing)} of {len(labelled)} classes never occur{named}")
        return {
            "label_maps": read,
            "share": (labelled / labelled.sum()).tolist(),
            "ignored": float(pixels[IGNORED] / pixels.sum()),
            "remarks": remarks,
        }

    def _mend_single(self, is_partial: bool) -> str:
        """What to do about label maps of one class."""
        if self.reduce_zero_label:
            mend = "if 0 is a class in your files, set data.source.reduce_zero_label=false"
        else:
            mend = f"if {IGNORED} is a class in your files, as in masks of 0 and {IGNORED}, store 1 instead"
        return mend + (", or raise data.check_label_maps if the others are rare" if is_partial else "")


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits (UCI optdigits), 8x8 grey, as 32x32 RGB.

    397 are the test set, 280 of the rest for validation, 1,120 to train on; each part holds the ten classes
    in proportion.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # a second of import time that no other source needs

        pixels, labels = load_digits(return_X_y=True)
        small = torch.from_numpy(pixels).to(torch.float32).view(-1, 1, 8, 8)  # (n, 1, 8, 8) from 0 to 16
        large = functional.interpolate(small * (255 / 16), size=(32, 32), mode="bicubic", align_corners=False)
        self.images = large.round_().clamp_(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)  # (n, 3, 32, 32)
        digits = labels.astype(np.int64)
        self.labels = digits
        self.class_names = [str(digit) for digit in range(10)]
        everything = np.arange(len(digits))
        test = choose(everything, _DIGITS_TEST, _DIGITS_SALT, digits)
        rest = np.setdiff1d(everything, test)
        val = choose(rest, _DIGITS_VAL, _DIGITS_SALT, digits)
        self.splits = {"train": np.setdiff1d(rest, val), "val": val, "test": test}
        self._hash = digest("digits", pixels.astype(np.uint8).tobytes(), digits.tobytes())

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"digit {index}"

    def fingerprint(self) -> str:
        return self._hash


def digest(*parts: str | bytes) -> str:
    """SHA-256 over the parts, each with its length in front."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()
