"""What a run asks of storage and cores, before it is started: its numbers, disk space, and how fast images come."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beit_pretrain import checks
from beit_pretrain.build import build_data, make
from beit_pretrain.compose import compose
from beit_pretrain.data.decode import decode
from beit_pretrain.data.module import DataModule
from beit_pretrain.data.sampler import Key, mix
from beit_pretrain.data.sources import SceneSource
from beit_pretrain.data.transforms import Item
from beit_pretrain.devices import defers_jitter, processes
from beit_pretrain.errors import ConfigError, DataError
from beit_pretrain.tools.images import usable_cores
from beit_pretrain.wording import printable, times

RATE = 1000.0  # images/s of a device that workers are counted for, where nothing is asked
BATCH = 32  # images of a test's batch at most: a worker holds back a whole one until it is ready
PARTS_SHARE = 1 / 3  # of the test's time for the parts one by one; the rest for the loader

PARTS = {
    "read": "storage. Read from a local disk, or put the images into shards: beit-tools shards write",
    "decode": "decoding. It needs more workers, or smaller images: beit-tools shards write --resize",
    "label map": "reading and decoding label maps. It needs more workers, or smaller images",
    "views": "crops, resizing and colours. It needs more workers",
    "collate": "stacking and copying batches. It needs more workers",
}

Rows = list[tuple[str, str]]


class Cost(NamedTuple):
    """Milliseconds an image: by the clock, waiting included, and of a core."""

    wall: float
    cpu: float


class Speed(NamedTuple):
    """What the loader gives: images/s once it runs, and seconds until its first batch."""

    rate: float
    first: float


def plan(overrides: Sequence[str], *, seconds: float, rate: float | None) -> None:
    """Print the plan of the run that `beit-train` would start; test its loader for about `seconds` (0: not at all).

    Raises ConfigError for a configuration that beit-train would refuse, or that does not train.
    """
    cfg = compose(overrides)
    if cfg.stage is None or cfg.stage.get("name") == "knn":
        raise ConfigError("a plan is for one stage that trains: set stage=pretrain, or another")
    checks.check(cfg, overrides)
    data = build_data(cfg)
    data.bad_log = None  # a plan writes nothing
    data.views = _views(cfg)
    console = Console()
    console.print(_table(f"plan of {cfg.name}", facts(cfg, data)))
    if seconds > 0:
        data.micro_batch_size = _small(data.plan(processes(cfg)).micro)
        parts = {} if data.source.streamed else measure_parts(data, seconds * PARTS_SHARE)
        speed = measure_loader(data, seconds * (1 - PARTS_SHARE))
        if parts:
            console.print(_parts_table(parts))
        console.print(_table("loader", findings(data, parts, speed, rate)))


def _views(cfg: DictConfig) -> Any:
    """What the stage would give its data module, without building its models."""
    if cfg.stage.name == "pretrain":
        return make(cfg.stage.views, defer_jitter=defers_jitter(cfg))
    # A probe whose features are computed once sees images as in evaluation.
    return make(cfg.stage.views if cfg.stage.get("augment", True) else cfg.stage.eval_views)


# --- numbers ------------------------------------------------------------------------------------------------


def facts(cfg: DictConfig, data: DataModule) -> Rows:
    """What follows from the configuration, without a measurement."""
    world = processes(cfg)
    split, steps, epochs = data.plan(world), data.steps_per_epoch, 1 if cfg.debug else cfg.stage.epochs
    parts = [f"{name} {len(data.splits[name]):,}" for name in ("train", "val", "test") if name in data.splits]
    names = data.source.class_names
    rows = [
        ("images", ", ".join(parts)),
        ("classes", f"{len(names):,}" if names else "no labels"),
        ("batch", f"{cfg.batch_size:,} = {times(split)} (devices x images x passes)"),
        ("updates", f"{steps:,} an epoch x {epochs:,} epochs = {steps * epochs:,}"),
        ("workers", f"data.workers={data.workers} for each device; cores here: {usable_cores()}"),
    ]
    return [*rows, *_shard_rows(data, world), *_cache_rows(cfg, data)]


def _shard_rows(data: DataModule, world: int) -> Iterator[tuple[str, str]]:
    source: Any = data.source
    readers = world * max(1, data.workers)
    if source.streamed:
        count = len(source.urls)
        yield "shards", f"{count:,} are streamed, {count / readers:.1f} to each of {readers:,} workers"
    elif source.bounds is not None:
        held = np.diff(np.searchsorted(data.splits["train"], source.bounds))
        held = held[held > 0]  # training images of each shard that has any
        mixed = "all" if data.shuffle_shards is None else f"{min(data.shuffle_shards, len(held)):,}"
        yield (
            "shards",
            f"{len(held):,} to train on, {held.min():,} to {held.max():,} images each; {mixed} mixed at a time; "
            f"{len(held) / readers:.1f} for each of {readers:,} workers",
        )


def _cache_rows(cfg: DictConfig, data: DataModule) -> Iterator[tuple[str, str]]:
    t, source = cfg.tokenizer, cfg.data.source
    if cfg.stage.name == "pretrain" and t.get("cache"):
        images, views = len(data.splits["train"]), t.views
        pairs: Any = data.views
        patches = math.prod(pairs.mask.grid)
        size = (images * views + len(data.splits.get("val", ()))) * (2 * patches + 12)
        yield "token cache", f"{_bytes(size)} for {views:,} views of each image, in {_room(t.cache)}"
    if source.get("cache") and source.get("cache_gb"):
        yield "shard cache", f"up to {source.cache_gb:,} GB of fetched shards, in {_room(source.cache)}"


def _room(folder: str) -> str:
    """A folder that may not be there yet, and what is free where it would lie."""
    path = Path(folder).expanduser().absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return f"{folder} ({_bytes(shutil.disk_usage(there).free)} free)"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


# --- measurements -------------------------------------------------------------------------------------------


def _loader(data: DataModule) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of more workers than cores, which the table says too
        return data.train_dataloader()


def _small(micro: int) -> int:
    return next(size for size in range(min(micro, BATCH), 0, -1) if micro % size == 0)


class _Clock:
    """Adds up what each part costs."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        spent = self.spent.setdefault(name, [0.0, 0.0])
        spent[0] += time.perf_counter() - wall
        spent[1] += time.process_time() - cpu


def measure_parts(data: DataModule, seconds: float) -> dict[str, Cost]:
    """What an image costs in each part, in this process on one thread as in a worker; unreadable ones do not count.

    From the middle of the epoch on, so that the loader's test does not find the files in memory.
    """
    loader = _loader(data)
    batches = loader.batch_sampler
    batches.position = lambda: data.steps_per_epoch // 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _prepare(
            data, loader.dataset, next(iter(batches))[:2], _Clock()
        )  # what happens once, imports and the like
        clock, images, end = _Clock(), 0, time.monotonic() + seconds
        for keys in _repeated(batches):
            images += _prepare(data, loader.dataset, keys, clock)
            if time.monotonic() > end:
                break
    finally:
        torch.set_num_threads(threads)
    if not images:
        raise DataError(f"none of the images looked at in {seconds:.0f} s can be read; look at data.root")
    return {name: Cost(1e3 * wall / images, 1e3 * cpu / images) for name, (wall, cpu) in clock.spent.items()}


def _prepare(data: DataModule, dataset: Any, keys: Sequence[Key], clock: _Clock) -> int:
    """Make a batch as a worker does, part by part; the number of images in it."""
    source, items = data.source, []
    for key in keys:
        try:
            with clock.part("read"):
                image = source.read(key.sample)
            if isinstance(image, bytes):
                with clock.part("decode"):
                    image = decode(image)
            pictures = [image]
            if data.scenes and isinstance(source, SceneSource):
                with clock.part("label map"):
                    pictures.append(source.label_map(key.sample))
        except (DataError, OSError):
            continue
        with clock.part("views"):
            crops = dataset.view(*pictures, mix(data.seed, key.epoch, key.sample))
        items.append(Item(crops, key.sample, key.epoch, -1))
    if items:
        with clock.part("collate"):
            dataset.collate(items)
    return len(items)


def measure_loader(data: DataModule, seconds: float) -> Speed:
    """Images/s of the training loader with its workers, from when each has given a batch."""
    loader = _loader(data)
    began = ready = time.monotonic()
    first, images = 0.0, 0
    for place, batch in enumerate(_repeated(loader)):
        now = time.monotonic()
        if place == 0:
            first = now - began
        if place < max(1, data.workers):
            ready = now
            continue
        images += len(batch.sample)
        if now - ready >= seconds:
            break
    return Speed(images / (time.monotonic() - ready), first)


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


# --- what they say ------------------------------------------------------------------------------------------


def findings(data: DataModule, parts: dict[str, Cost], speed: Speed, rate: float | None) -> Rows:
    """What limits the loader, and how many workers a device needs."""
    workers, cores = data.workers, usable_cores()
    total = sum(cost.wall for cost in parts.values())
    by = f"data.workers={workers}" if workers else "the training process itself (data.workers=0)"
    rows = [("speed", f"{speed.rate:,.0f} images/s by {by}, the first batch after {speed.first:.1f} s")]
    if workers > cores:
        rows.append(("cores", f"{workers} workers share the {cores} here"))
    if parts:
        worst = max(parts, key=lambda name: parts[name].wall)
        share = parts[worst].wall / total
        rows.append(("limit", f"{worst}, {share:.0%} of {total:.2f} ms an image: {PARTS[worst]}"))
    if workers or parts:
        alone = speed.rate / min(workers, cores) if workers else 1e3 / total
        asked = RATE if rate is None else rate
        needed = math.ceil(asked / alone)
        rows.append(
            (
                "needed",
                f"data.workers={needed}, of {alone:,.0f} images/s each, for a device of {asked:,.0f} images/s",
            )
        )
    return rows


def _parts_table(parts: dict[str, Cost]) -> Table:
    table = Table(title="an image in one process", title_justify="left")
    table.add_column("")
    for name in ("ms", "ms of a core", "share"):
        table.add_column(name, justify="right")
    total = sum(cost.wall for cost in parts.values())
    for name, cost in parts.items():
        table.add_row(name, f"{cost.wall:.2f}", f"{cost.cpu:.2f}", f"{cost.wall / total:.0%}")
    return table


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=Text(printable(title)), title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(name), Text(printable(value)))
    return table
