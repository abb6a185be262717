"""The tokenizer's ids of K views of each image, kept on disk: what is there need not be cut and encoded again.

A cache is a folder named by a hash of all that its ids depend on, with a folder for each view. Each process writes
files of its own (`token_files`), so any number of ranks, runs and machines add to a cache at once. A record is used
only if it agrees with a checksum over cache, sample, view and ids; what is damaged, or of another place, is missing.

Letters: B images, N visual tokens.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from beit_pretrain.data.dataset import ViewDataset
from beit_pretrain.data.sampler import Failure, Key, mix
from beit_pretrain.data.sources import digest
from beit_pretrain.data.token_files import NOWHERE, NUMBER, Parts, Writer, record_type
from beit_pretrain.data.transforms import MASK_SALT, Item, TwoViews
from beit_pretrain.errors import ConfigError, DataError

HELD_OUT = -1  # the view number of held-out images, whose only view never changes
VOCABULARY = 2**16  # ids that fit a record
_LOOK_AGAIN = 60.0  # seconds after which what is missing is looked for anew
_logger = logging.getLogger(__name__)


class TokenCache:
    """Ids (N,) of `views` views of images numbered 0 to `samples` - 1, and of their held-out view.

    `made_of` describes all that the ids depend on, in plain containers; `vocabulary` is the number of ids there can
    be. A view number is from 0 to `views` - 1, or HELD_OUT. DataError if the folder belongs to something else.
    """

    def __init__(
        self,
        *,
        root: Path,
        made_of: Mapping[str, Any],
        samples: int,
        tokens: int,
        vocabulary: int,
        views: int,
    ) -> None:
        if vocabulary > VOCABULARY:
            raise ConfigError(
                f"tokenizer.cache={root} holds ids below {VOCABULARY}, but this tokenizer has {vocabulary}: set "
                "tokenizer.cache=null tokenizer.views=null"
            )
        self.root = root
        self.views = views
        self.samples = samples
        self.record = record_type(tokens)
        made_of = {**made_of, "samples": samples, "tokens": tokens, "vocabulary": vocabulary}
        text = json.dumps(made_of, indent=1, sort_keys=True)
        name = digest("token cache", text)
        self.folder = root.expanduser() / name[:16]
        self._salt = zlib.crc32(name.encode())
        self._describe(text)
        self._parts: dict[int, Parts] = {}
        self._writers: dict[int, Writer] = {}
        self.stores = True

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: it reads, and maps the files itself."""
        return {**vars(self), "_parts": {}, "_writers": {}}

    def _describe(self, text: str) -> None:
        path = self.folder / "cache.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
                temporary.write_text(text)
                os.replace(temporary, path)
            found = path.read_text(errors="replace")
        except OSError as error:
            raise ConfigError(
                f"tokenizer.cache={self.root} cannot be written ({error.strerror}): set it to another folder"
            ) from error
        if found != text:
            raise DataError(f"{path} is damaged: remove {self.folder}, whose ids will be made anew")

    def place(self, view: int) -> Path:
        """The folder of a view."""
        return self.folder / ("held-out" if view == HELD_OUT else f"view-{view:04d}")

    def read(self, samples: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, N) uint16 of images `samples` (B,) in `views` (B,), and (B,) whether they are there."""
        ids = np.zeros((len(samples), *self.record["ids"].shape), np.uint16)
        known = np.zeros(len(samples), bool)
        self._forget(views)
        for view in set(views.tolist()):
            mine = np.flatnonzero(views == view)
            self._fill(view, samples, mine, ids, known)
            missing = mine[~known[mine]]
            if len(missing) and time.monotonic() - self._parts[view].looked > _LOOK_AGAIN:
                self._parts[view].look()
                self._fill(view, samples, missing, ids, known)
        return ids, known

    def _fill(
        self, view: int, samples: np.ndarray, rows: np.ndarray, ids: np.ndarray, known: np.ndarray
    ) -> None:
        if view not in self._parts:
            self._parts[view] = Parts(self.place(view), self.samples, self.record)
        parts = self._parts[view]
        for row in rows[parts.table[samples[rows]] != NOWHERE].tolist():
            record = parts.record_of(int(samples[row]))
            if record["crc"] == self._crc(int(samples[row]), view, record["ids"]):
                ids[row], known[row] = record["ids"], True

    def keep(self, sample: torch.Tensor, view: torch.Tensor | None, ids: torch.Tensor) -> None:
        """Store a batch's ids (B, N) of images `sample` (B,) in views `view` (B,), or in the held-out one."""
        views = np.full(len(sample), HELD_OUT) if view is None else view.cpu().numpy()
        self.write(sample.cpu().numpy(), views, ids.cpu().numpy())

    def write(self, samples: np.ndarray, views: np.ndarray, ids: np.ndarray) -> None:
        """Store the ids (B, N) of images `samples` (B,) in `views` (B,), but for those that are there already."""
        if not self.stores:
            return
        missing = ~self.read(samples, views)[1]
        for view in set(views[missing].tolist()):
            rows = np.flatnonzero(missing & (views == view))
            records = np.zeros(len(rows), self.record)
            records["ids"] = stored = ids[rows].astype("<u2")
            pairs = zip(samples[rows].tolist(), stored, strict=True)
            records["crc"] = [self._crc(sample, view, row) for sample, row in pairs]
            try:
                if view not in self._writers:
                    self._writers[view] = Writer(self.place(view))
                self._writers[view].append(records, samples[rows].astype(NUMBER))
            except OSError as error:
                self.stores = False
                _logger.warning(
                    "token cache: %s cannot be written (%s); the tokenizer runs on, and no more is stored",
                    self.place(view),
                    error.strerror,
                )
                return
            self._parts[view].take(self._writers[view].name)

    def _crc(self, sample: int, view: int, ids: np.ndarray) -> int:
        return zlib.crc32(ids.tobytes(), zlib.crc32(struct.pack("<qi", sample, view), self._salt))

    def look(self) -> None:
        """Take in what any process has stored since the last look."""
        for parts in self._parts.values():
            parts.look()

    def _forget(self, views: np.ndarray) -> None:
        """One table per view is large, and a view that was left does not come back for an epoch."""
        for view in self._parts.keys() - {HELD_OUT, *views.tolist()}:
            del self._parts[view]
            if view in self._writers:
                self._writers.pop(view).close()

    # --- how much is there ------------------------------------------------------------------------------------

    def missing(self, indices: np.ndarray, view: int) -> np.ndarray:
        """Those of the images `indices` whose ids nobody has stored yet; checksums are not looked at."""
        table = Parts(self.place(view), self.samples, self.record).table
        return indices[table[indices] == NOWHERE]

    def story(self, splits: Mapping[str, np.ndarray]) -> str:
        """What is there of the images of train and val, in words. ConfigError if the disk cannot take the rest."""
        train, held_out = splits["train"], splits.get("val", np.zeros(0, np.int64))
        left = [len(self.missing(train, view)) for view in range(self.views)]
        rest = sum(left) + len(self.missing(held_out, HELD_OUT))
        wanted = len(train) * self.views + len(held_out)
        size = self.record.itemsize + NUMBER.itemsize
        free = shutil.disk_usage(self.folder).free
        if rest * size > free:
            raise ConfigError(
                f"tokenizer.cache={self.root}: the ids of {len(train):,} images in tokenizer.views={self.views} views "
                f"take {rest * size / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free there: set fewer "
                "tokenizer.views, or tokenizer.cache to a larger disk"
            )
        rate = "the tokenizer runs for the rest" if rest else "the tokenizer does not run"
        return (
            f"token cache {self.folder}: {left.count(0)} of {self.views} views complete, {wanted - rest:,} of "
            f"{wanted:,} images are there ({(wanted - rest) * size / 1e9:.3g} GB); {rate}"
        )


class TokenDataset(ViewDataset):
    """Images in `cache.views` views that come round again, with their ids where all of a batch are stored.

    A crop is that of epoch modulo K, a mask that of the epoch, as without a cache. Where ids are given, the
    tokenizer's view is not cut.
    """

    def __init__(self, *, view: TwoViews, cache: TokenCache, **settings: Any) -> None:
        super().__init__(view=view, **settings)
        self.two_views = view
        self.cache = cache
        self._epoch = -1

    def __getitem__(self, key: Key) -> Item | Failure:
        return self._cut(key, token_view=True)

    def __getitems__(self, keys: Sequence[Key]) -> Sequence[Item | Failure]:
        """A whole batch: all with ids, or all with the tokenizer's view."""
        if (epoch := max(key.epoch for key in keys)) != self._epoch:
            self._epoch = epoch
            self.cache.look()
        return self._stored(keys) or [self[key] for key in keys]

    def _stored(self, keys: Sequence[Key]) -> list[Item | Failure] | None:
        """The batch with its ids; None if any is missing."""
        ids, known = self._ids([key.sample for key in keys], keys)
        if not all(there or self._unusable(key.sample) for key, there in zip(keys, known, strict=True)):
            return None
        items: list[Item | Failure] = []
        for row, key in enumerate(keys):
            item = self._cut(key, token_view=False)
            if isinstance(item, Failure):
                return [item]
            if item.sample != key.sample:  # an image that cannot be read, and its neighbour in its place
                ids[row], known[row] = (part[0] for part in self._ids([item.sample], [key]))
            if not known[row]:
                return None
            items.append(item._replace(ids=ids[row]))
        return items

    def _ids(self, samples: Sequence[int], keys: Sequence[Key]) -> tuple[torch.Tensor, np.ndarray]:
        """Ids (B, N) int32 of the samples in the views of the keys, and (B,) whether they are there."""
        views = np.array([HELD_OUT if self.held_out else key.epoch % self.cache.views for key in keys])
        ids, known = self.cache.read(np.array(samples), views)
        return torch.from_numpy(ids.astype(np.int32)), known

    def _unusable(self, sample: int) -> bool:
        """Whether it is known that another image takes this one's place: its ids cannot be there."""
        return sample in self.bad.known or sample in self.source.flaws

    def _cut(self, key: Key, *, token_view: bool) -> Item | Failure:
        try:
            (image,), sample = self._read(key.sample)
        except DataError as error:
            return Failure(str(error))
        view = key.epoch % self.cache.views
        crops = self.two_views(
            image,
            self.key(view, sample),
            mask_key=mix(self.key(key.epoch, sample), MASK_SALT),
            token_view=token_view,
        )
        return Item(crops, sample, view, -1)

    def collate(self, items: Sequence[Item | Failure]) -> Any:
        batch = super().collate(items)
        stored = [item.ids for item in items if isinstance(item, Item) and item.ids is not None]
        return batch._replace(ids=torch.stack(stored)) if stored and not isinstance(batch, Failure) else batch
