"""One split of a source under one view, and what happens to images that cannot be read."""

from __future__ import annotations

import csv
import fcntl
import io
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from beit_pretrain.data.decode import decode
from beit_pretrain.data.sampler import Failure, Key, mix
from beit_pretrain.data.scenes import PairView
from beit_pretrain.data.sources import SceneSource, Source
from beit_pretrain.data.transforms import Item, View
from beit_pretrain.errors import DataError, LabelError
from beit_pretrain.label_maps import check_aspect
from beit_pretrain.wording import cell, from_cell, printable

_HEADER = ("sample", "name", "reason")
_LISTED = 10
_HELD_OUT = 0x68656C64  # takes the place of the epoch in keys that must never change
_logger = logging.getLogger(__name__)


class BadImages:
    """The unreadable images of one split: noted once each, and too many of them end the run.

    Workers, ranks and restarts share what they know through the log (a CSV), so that the count is of distinct
    images; without one each process counts its own.
    """

    def __init__(self, *, indices: np.ndarray, max_bad: float, log: Path | None) -> None:
        self.indices = indices  # sorted
        self.max_bad = max_bad
        self.log = log
        self.known: dict[int, tuple[str, str]] = {}
        self._read_up_to = 0  # bytes of the log

    def note(self, sample: int, name: str, reason: str) -> None:
        """Counts the image. Raises DataError once the share of bad ones is above `max_bad`."""
        if sample in self.known:
            return
        reason = " ".join(reason.split())
        _logger.warning("cannot read %s: %s", printable(name), printable(reason))
        if self.log is not None:
            self._read_on(self.log)
            if sample not in self.known:
                _append(self.log, (str(sample), cell(name), cell(reason)))
        self.known[sample] = (name, reason)
        if len(self.known) > self.max_bad * len(self.indices):
            raise DataError(self._story())

    def _read_on(self, log: Path) -> None:
        """What was added to the log since the last look: a broken shard makes it long."""
        if not log.exists():
            return
        with log.open("rb") as file:
            file.seek(self._read_up_to)
            added = file.read()
            self._read_up_to = file.tell()
        for row in csv.reader(io.StringIO(added.decode("utf-8", "surrogateescape"), newline="")):
            # A second header and images of another split are passed over.
            if len(row) == len(_HEADER) and row[0].isdecimal() and self._has(int(row[0])):
                self.known[int(row[0])] = (from_cell(row[1]), from_cell(row[2]))

    def _has(self, sample: int) -> bool:
        place = int(np.searchsorted(self.indices, sample))
        return place < len(self.indices) and int(self.indices[place]) == sample

    def _story(self) -> str:
        bad = [f"{name} ({reason})" for _, (name, reason) in sorted(self.known.items())]
        listed = ", ".join(bad[:_LISTED]) + (", ..." if len(bad) > _LISTED else "")
        return (
            f"{len(bad)} of {len(self.indices)} images cannot be read, more than the share data.max_bad="
            f"{self.max_bad:g} allows: {listed}; mend or remove them, or raise data.max_bad"
        )


def _append(log: Path, row: Sequence[str]) -> None:
    # One write to a file opened for appending: lines of several processes do not mix, and with the lock, where the
    # file system has locks, those of several machines neither.
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX)  # until it is closed
        text = io.StringIO()
        csv.writer(text).writerows([row] if os.fstat(descriptor).st_size else [_HEADER, row])
        os.write(descriptor, text.getvalue().encode("utf-8", "surrogateescape"))
    finally:
        os.close(descriptor)


class ViewDataset(Dataset[Item | Failure]):
    """Samples of one split, seen through one view: images, or images with their label maps.

    The key of a view is mix(seed, epoch, sample), of held-out views a constant in place of the epoch. An
    image that cannot be read is replaced by the next readable one of the split, with that one's own number
    and view.
    """

    def __init__(
        self,
        *,
        source: Source,
        indices: np.ndarray,
        view: View | PairView,
        seed: int,
        held_out: bool,
        max_bad: float,
        bad_log: Path | None,
    ) -> None:
        self.source = source
        self.indices = indices  # sorted
        self.view = view
        self.seed = seed
        self.held_out = held_out
        self.bad = BadImages(indices=indices, max_bad=max_bad, log=bad_log)
        # What each worker is reading (-1: nothing), in memory that it shares with the main process.
        self.reading: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Item | Failure:
        try:
            parts, sample = self._read(key.sample)
        except DataError as error:
            return Failure(str(error))
        view = self.key(key.epoch, sample)
        crops = self.view(*parts, view)  # pyright: ignore[reportCallIssue] _load gives what the view takes
        labels = self.source.labels
        return Item(crops, sample, key.epoch, -1 if labels is None else int(labels[sample]))

    def key(self, epoch: int, sample: int) -> int:
        """The key of a sample's view in an epoch."""
        return mix(self.seed, _HELD_OUT if self.held_out else epoch, sample)

    def collate(self, items: Sequence[Item | Failure]) -> Any:
        """The view's batch, or the first failure among the items."""
        whole = [item for item in items if isinstance(item, Item)]
        failed = [item for item in items if isinstance(item, Failure)]
        return failed[0] if failed else self.view.collate(whole)

    def stuck(self) -> str:
        """What the workers are reading at this moment, in words; empty if nothing."""
        numbers = [] if self.reading is None else self.reading.tolist()
        at_work = [(worker, sample) for worker, sample in enumerate(numbers) if sample >= 0]
        return ", ".join(
            f"worker {worker} is reading {self.source.where(sample)}" for worker, sample in at_work
        )

    def _load(self, sample: int) -> tuple[Tensor, ...]:
        """What is read of a sample. OSError or DataError if it cannot be."""
        data = self.source.read(sample)
        return (decode(data) if isinstance(data, bytes) else data,)

    def _is_reading(self, sample: int) -> None:
        if self.reading is not None and (worker := get_worker_info()) is not None:
            self.reading[worker.id] = sample

    def _read(self, sample: int) -> tuple[tuple[Tensor, ...], int]:
        place = int(np.searchsorted(self.indices, sample))
        for step in range(len(self.indices)):
            candidate = int(self.indices[(place + step) % len(self.indices)])
            self._is_reading(candidate)
            try:
                return self._load(candidate), candidate
            except LabelError:
                raise
            except (DataError, OSError) as error:
                reason = str(error)
            finally:
                self._is_reading(-1)
            self.bad.note(candidate, self.source.name(candidate), reason)
        raise DataError(
            f"none of the {len(self.indices)} images can be read; see {self.bad.log or 'the warnings'}"
        )


class SceneDataset(ViewDataset):
    """Images with their label maps: a pair counts as unreadable if either is.

    A label that is no class ends the run: its image is not at fault, and the next one is likely to have it too.
    """

    def __init__(self, *, source: SceneSource, view: PairView, **settings: Any) -> None:
        super().__init__(source=source, view=view, **settings)
        self.scenes = source

    def _load(self, sample: int) -> tuple[Tensor, ...]:
        (image,) = super()._load(sample)
        check_aspect(*image.shape[1:])
        label_map = self.scenes.label_map(sample)
        if image.shape[1:] != label_map.shape:
            raise DataError(
                f"{_size(image)} pixels, upright by its EXIF orientation, but its label map has {_size(label_map)}"
            )
        return image, label_map


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}"
