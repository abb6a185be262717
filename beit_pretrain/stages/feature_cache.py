"""Features that are computed once and then stand where a data module had images.

Letters: B images of a batch, S images in all, X numbers in a row of features.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from beit_pretrain.errors import ConfigError, DataError
from beit_pretrain.evaluation import sum_over_ranks

CACHES = ("auto", "memory", "disk", "none")
_ROWS = 2**12  # rows that ranks exchange at once


def choose_place(asked: str, size: float, *, memory: float, disk: float) -> str:
    """memory, disk or none for `size` GB of features, with the GB there are of both.

    Raises ConfigError where the place asked for is too small.
    """
    room = {"memory": size <= memory, "disk": size <= disk, "none": True}
    if asked == "auto":
        return next(place for place in room if room[place])
    if not room[asked]:
        there, mend = {
            "memory": (f"stage.cache_gb={memory:g}", "raise stage.cache_gb, or set stage.cache=auto"),
            "disk": (
                f"{disk:.3g} GB that run_dir's disk can spare",
                "set stage.cache=none, or another run_dir",
            ),
        }[asked]
        raise ConfigError(f"stage.cache={asked}: the features take {size:.3g} GB, more than {there}: {mend}")
    return asked


class Cache:
    """Rows (S, X) float32 of the images numbered `samples` (sorted): in memory, or at `path` for all ranks."""

    def __init__(self, samples: np.ndarray, width: int, path: Path | None) -> None:
        self.samples = samples
        self.path = path
        self.shape = (len(samples), width)
        self.memory = torch.zeros(self.shape) if path is None else None
        self.known = torch.zeros(len(samples), dtype=torch.int64)  # above 0: the image could be read

    def create(self) -> None:
        """Make the file, on one rank; what a run that was killed left there is lost."""
        if self.path is not None:
            self._file("w+")

    def write(self, sample: Tensor, row: Tensor) -> None:
        """Keep the rows (B, X) of images numbered `sample` (B,)."""
        place = np.searchsorted(self.samples, sample.cpu().numpy())
        self.known[place] = 1
        if self.memory is not None:
            self.memory[place] = row.cpu()
        else:
            table = self._file("r+")
            table[place] = row.cpu().numpy()
            table.flush()

    def share(self) -> None:
        """Give every rank the rows of all."""
        self.known = sum_over_ranks(self.known)
        if self.memory is not None:
            for part in self.memory.split(_ROWS):
                # A row is zero on all ranks but those that wrote it, and the same on those: see `known`.
                part.copy_(sum_over_ranks(part))
            self.memory /= self.known.clamp(min=1)[:, None]

    def read(self, sample: int) -> Tensor:
        """The row (X,) of an image. DataError if the image could not be read."""
        place = int(np.searchsorted(self.samples, sample))
        if not self.known[place]:
            raise DataError("it could not be read when the features were computed")
        if self.memory is not None:
            return self.memory[place]
        # Opened for each row: an open mapping would be copied whole to a worker process.
        return torch.from_numpy(np.array(self._file("r")[place]))

    def _file(self, mode: Any) -> np.memmap:
        assert self.path is not None
        return np.memmap(self.path, np.float32, mode, shape=self.shape)


class _Source:
    """Rows under the numbers, labels and names of images, in their order."""

    streamed = fetched = False  # whatever the images are

    def __init__(self, source: Any, cache: Cache) -> None:
        self.labels = source.labels
        self.bounds = source.bounds
        self.name = self.where = source.name
        self.read = cache.read


class _Row(NamedTuple):
    image: Tensor  # (X,)


class _View:
    """A view that changes nothing and makes the batches of another one."""

    def __init__(self, view: Any) -> None:
        self.collate = view.collate

    def __call__(self, image: Tensor, key: int) -> _Row:
        del key
        return _Row(image)


def with_features(data: Any, cache: Cache, view: Any) -> Any:
    """A copy of a data module whose batches hold rows (B, X) for images; `view` makes batches of single images."""
    rows = copy.copy(data)
    rows.source = _Source(data.source, cache)
    rows.views = rows.eval_views = _View(view)
    return rows
