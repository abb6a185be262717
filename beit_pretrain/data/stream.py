"""Shards that are neither here nor fetched: read from front to back while they arrive, and never stored.

Nothing in them can be reached by number. So the order depends on ranks and workers, and to go on within an epoch
means to read it again up to there.
"""

from __future__ import annotations

import io
import logging
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from copy import copy
from itertools import count, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from beit_pretrain.data.dataset import BadImages
from beit_pretrain.data.decode import decode
from beit_pretrain.data.fetch import waits
from beit_pretrain.data.sampler import Failure, hashes, mix
from beit_pretrain.data.shard_tar import LABEL_BYTES, META, Member, Sample, is_image, member_key
from beit_pretrain.data.transfer import BrokenError, MissingError, pieces
from beit_pretrain.data.transforms import Item, View
from beit_pretrain.errors import BeitError, ConfigError, DataError

BUFFER = 1000  # undecoded samples that each reader mixes; 110 MB of ImageNet's

_LARGEST = 1 << 30  # bytes of an image: a compressed shard can hold more than it has
_HELD = 1 << 31  # bytes of images that a buffer holds at most, and one image more; ImageNet's take 110 MB
_IN_VAIN = 100  # reads behind the end of a stream
_SHARDS = 0x73747265616D  # salts of the order of shards, and of the samples in a buffer
_MIXED = 0x6D69786564
_logger = logging.getLogger(__name__)


class _Raw(NamedTuple):
    """A sample as it lies in its shard; a flaw is why it cannot be used."""

    name: str
    number: int  # CRC-32 of its name
    image: bytes
    label: int
    flaw: str | None


class StreamDataset(IterableDataset[Any]):
    """One rank's micro-batches of an epoch from step `start` on, ready-made; to be loaded with batch_size=None.

    The shards of an epoch are permuted and dealt to lanes, one per worker of every rank. A lane reads its shards one
    after another, mixes them in a buffer, and begins again where it runs out. The loader takes batches from the
    workers in turn, beginning with the first: micro-batch b of an epoch is of lane b % workers, whichever worker has
    to make it after a restart. What lies before is read again without being decoded.

    An image that cannot be read is replaced by the next readable one of its lane, which has its own turn too; so
    places are counted without looking at images. `samples`: how many there are, for the share of unreadable ones.
    `timeout`: seconds to wait for a byte. `last_dot`: where a key ends in a name, else at the first one.
    """

    def __init__(
        self,
        *,
        urls: Sequence[str],
        samples: int,
        view: View,
        seed: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        steps_per_epoch: int,
        accumulate: int,
        epoch: int,
        start: int,
        max_bad: float,
        bad_log: Path | None,
        timeout: float,
        last_dot: bool = False,
    ) -> None:
        self.urls = list(urls)
        self.samples = samples
        self.view = view
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = steps_per_epoch
        self.accumulate = accumulate
        self.epoch = epoch
        self.start = start
        self.timeout = timeout
        self.last_dot = last_dot
        self.bad = BadImages(indices=np.arange(samples), max_bad=max_bad, log=bad_log)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return self._batches(worker.id, worker.num_workers) if worker else self._batches(0, 1)

    def _batches(self, worker: int, workers: int) -> Iterator[Any]:
        batch = self.start * self.accumulate + worker
        lane = self.rank * workers + batch % workers
        skip = batch // workers * self.micro_batch_size
        items = self._items(lane, self.world_size * workers, skip)
        try:
            for _ in range(batch, self.steps_per_epoch * self.accumulate, workers):
                yield self.view.collate([next(items) for _ in range(self.micro_batch_size)])
        except BeitError as error:
            yield Failure(str(error))

    def _items(self, lane: int, lanes: int, skip: int) -> Iterator[Item]:
        """What a lane gives after its first `skip` places, without end."""
        order = np.argsort(hashes(np.arange(len(self.urls)), self.seed, _SHARDS, self.epoch))
        mine = order[lane::lanes]
        places = 1  # that the next readable image fills
        for turn in count():
            served = False
            for raw in _mixed(self._raws(mine), self.seed, _MIXED, self.epoch, lane, turn):
                if skip:
                    skip, served = skip - 1, True
                elif (item := self._item(raw, turn)) is None:
                    places += 1
                else:
                    yield from repeat(item, places)
                    places, served = 1, True
            if not served and len(mine) == len(order):
                raise DataError(
                    f"none of the {len(order)} shards has an image that can be read; see "
                    f"{self.bad.log or 'the warnings'}"
                )
            if not served:  # other lanes' shards, rather than none
                mine = np.roll(order, -lane)

    def _item(self, raw: _Raw, turn: int) -> Item | None:
        """The sample under its view; None, and noted, if it cannot be read."""
        try:
            if raw.flaw:
                raise DataError(raw.flaw)
            image = decode(raw.image)
        except DataError as error:
            reason = str(error)
        else:
            crops = self.view(image, mix(self.seed, self.epoch, raw.number, turn))
            return Item(crops, raw.number, self.epoch, raw.label)
        self._note(raw.name, reason)
        return None

    def _note(self, name: str, reason: str) -> None:
        # Bad ones are so few that two rarely fall on one number.
        self.bad.note(zlib.crc32(name.encode("utf-8", "surrogateescape")) % self.samples, name, reason)

    def _raws(self, shards: np.ndarray) -> Iterator[_Raw]:
        """The samples of shards one after another; a shard is left, and noted, where it breaks."""
        for shard in shards:
            try:
                yield from self._read(self.urls[shard])
            except DataError as error:
                reason = str(error)
            else:
                continue
            self._note(_name(self.urls[shard]), reason)

    def _read(self, url: str) -> Iterator[_Raw]:
        """The samples of a shard in their order. A transfer that breaks is begun again and passes over what was had."""
        done, reason = 0, ""
        for wait in waits():
            try:
                with closing(pieces(url, self.timeout)) as stream:
                    for place, raw in enumerate(_samples(stream, _name(url), self.last_dot)):
                        if place == done:
                            done += 1
                            yield raw
                return
            except MissingError as error:
                raise DataError(f"{url}: {error}") from error
            except BrokenError as error:
                reason = str(error)
            except BeitError:
                raise
            except Exception as error:  # parsers of archives raise whatever they met
                reason = str(error) or type(error).__name__
                raise DataError(f"{url} is no whole tar file ({reason}) after {done} samples") from error
            time.sleep(wait)
        raise DataError(f"{url}: {reason}, after {done} samples")


class StreamLoader:
    """Loads a stream anew for every epoch from the step that `position` gives: there is nothing to store.

    `make`: a loader of one epoch's rest. ConfigError if a reader would have no shard.
    """

    def __init__(
        self,
        *,
        dataset: StreamDataset,
        workers: int,
        position: Callable[[], int],
        make: Callable[[StreamDataset], Iterable[Any]],
    ) -> None:
        shards, world = len(dataset.urls), dataset.world_size
        if shards < world * max(1, workers):
            fewer = f"data.workers to {shards // world} or less, or " if shards >= world else ""
            raise ConfigError(
                f"{shards} shards cannot be dealt to {world} devices with data.workers={workers} each; set {fewer}"
                "data.source.cache to a folder for them, where they need not be dealt"
            )
        if dataset.rank == 0:
            _logger.warning(
                "the %d shards are streamed: a run that goes on reads its epoch again up to where it was, and their "
                "order depends on the number of devices and workers; data.source.cache=<folder> avoids both",
                shards,
            )
        self.stream = (
            dataset  # under the name `dataset` Lightning would take it for one that cannot tell its length
        )
        self.position = position
        self.make = make

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, wherever the next iteration begins."""
        return self.stream.steps_per_epoch * self.stream.accumulate

    def __iter__(self) -> Iterator[Any]:
        rest = copy(self.stream)
        rest.epoch, rest.start = divmod(self.position(), rest.steps_per_epoch)
        return iter(self.make(rest))


def _mixed(raws: Iterable[_Raw], *salt: int) -> Iterator[_Raw]:
    """Each sample once, in an order that hashes draw from a buffer."""
    held: list[_Raw] = []
    size = 0
    for place, raw in enumerate(raws):
        if len(held) < BUFFER and (not held or size + len(raw.image) <= _HELD):
            held.append(raw)
            size += len(raw.image)
            continue
        slot = mix(*salt, place) % len(held)
        size += len(raw.image) - len(held[slot].image)
        yield held[slot]
        held[slot] = raw
        while size > _HELD and len(held) > 1:
            size -= len(held[-1].image)
            yield held.pop()
    for slot in np.argsort(hashes(np.arange(len(held)), *salt)):
        yield held[slot]


# --- a tar as it arrives ------------------------------------------------------------------------------------


class _Pieces(io.RawIOBase):
    """A stream of pieces as a file to read from front to back.

    Whoever reads on and on behind its end is stopped: tarfile does so for a member whose header says a size that
    would take for ever.
    """

    def __init__(self, stream: Iterator[bytes]) -> None:
        self.stream = stream
        self.rest = memoryview(b"")
        self.in_vain = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.rest:
            self.rest = memoryview(next(self.stream, b""))
            self.in_vain += not self.rest
            if self.in_vain > _IN_VAIN:
                raise tarfile.ReadError("unexpected end of data")
        size = min(len(buffer), len(self.rest))
        buffer[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size


def _samples(stream: Iterator[bytes], shard: str, last_dot: bool) -> Iterator[_Raw]:
    """The samples of a tar: members that follow each other and share a key. TarError where it ends too early."""
    sample = None
    file = io.BufferedReader(_Pieces(stream), 1 << 20)
    with tarfile.open(
        fileobj=file, mode="r|*", tarinfo=Member, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all  # pyright: ignore[reportAttributeAccessIssue]
            key, suffix = member_key(member.name, last_dot)
            if not suffix or META.match(member.name) or not member.isreg() or member.issparse():
                continue
            if sample is None or sample.key != key:
                if sample is not None:
                    yield from _of_sample(sample, shard)
                sample = Sample(key)
            if suffix == "cls":
                sample.set_label(member.name, _content(tar, member, LABEL_BYTES))
            elif is_image(suffix) and sample.takes(member.name, suffix):
                if member.size > _LARGEST:
                    sample.flaw = f"its image has {member.size} bytes, {_LARGEST} are the most"
                else:
                    sample.image = _content(tar, member, member.size)
    if sample is not None:
        yield from _of_sample(sample, shard)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    content = tar.extractfile(member)
    assert content is not None  # it is a regular file
    return content.read(most)


def _of_sample(sample: Sample, shard: str) -> Iterator[_Raw]:
    """A sample, and each further image of its key for which there is no rule whether it is the one that is meant."""
    label = -1 if sample.label is None else sample.label
    yield _raw(f"{shard}/{sample.key}", sample.image or b"", label, sample.fault())
    for other in sample.unclear:
        flaw = (
            f"it shares its key with {sample.taken}, as a key ends at the first dot of a name; "
            "data.source.key_until=last_dot makes it a sample of its own"
        )
        yield _raw(f"{shard}/{other}", b"", -1, flaw)


def _raw(name: str, image: bytes, label: int, flaw: str | None) -> _Raw:
    return _Raw(name, zlib.crc32(name.encode("utf-8", "surrogateescape")), image, label, flaw)


def _name(url: str) -> str:
    """What to call a shard: the last part of its address, without a query."""
    return url.rpartition("/")[2].partition("?")[0]
