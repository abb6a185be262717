"""Fill a token cache before any training, and say what caches hold."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from beit_pretrain import checks
from beit_pretrain.build import add_token_cache, build_data, build_stage
from beit_pretrain.cluster.launch import launched
from beit_pretrain.compose import compose
from beit_pretrain.data.sampler import Key
from beit_pretrain.data.token_files import NUMBER, record_type, stored
from beit_pretrain.data.tokens import HELD_OUT, TokenCache
from beit_pretrain.devices import accelerator, processes
from beit_pretrain.errors import ConfigError, DataError
from beit_pretrain.wording import is_whole, printable

_LINE_EVERY = 10.0  # seconds between lines of progress
_CHECKED = 2**12  # records that are looked at together


class _Batches(Sampler[list[Key]]):
    """Images in one view, in batches of one size: a convolution may round otherwise in a smaller batch.

    The last one is filled up with images from the beginning.
    """

    def __init__(self, indices: np.ndarray, view: int, size: int) -> None:
        self.indices = indices
        self.view = view
        self.size = size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.indices), self.size):
            rows = np.arange(first, first + self.size) % len(self.indices)
            yield [Key(sample, self.view) for sample in self.indices[rows].tolist()]


def build(overrides: Sequence[str]) -> None:
    """Store the ids that are missing: of the training images in all views, of the held-out ones in theirs.

    Several processes (srun, torchrun) take a share each and need not wait for one another.
    """
    arguments = ["stage=pretrain", *overrides]
    cfg = compose(arguments)
    if cfg.stage.name != "pretrain":
        raise ConfigError(f"stage={cfg.stage.name} learns no tokens: leave stage out, or set stage=pretrain")
    checks.check(cfg, arguments)
    if cfg.tokenizer.get("cache") is None:
        raise ConfigError("there is no cache to fill: set tokenizer.cache=FOLDER tokenizer.views=NUMBER")
    launch = launched()
    stage: Any = build_stage(cfg)
    data = build_data(cfg)
    data.views, data.eval_views, data.bad_log = stage.views, stage.eval_views, None
    add_token_cache(cfg, stage, data)
    cache: TokenCache = data.token_cache
    said = cache.story(data.splits)
    if launch.rank == 0:
        print(said, flush=True)
    stage.to(_device(cfg.trainer.accelerator, launch.local_rank)).eval()
    size = data.plan(processes(cfg)).micro
    for split, view in [*(("train", view) for view in range(cache.views)), ("val", HELD_OUT)]:
        share = data.splits.get(split, np.zeros(0, np.int64))[launch.rank :: launch.processes]
        missing = _missing(cache, share, view)
        if len(missing) == 0:
            continue
        told = _Progress(cache.place(view).name, len(missing)) if launch.rank == 0 else None
        with warnings.catch_warnings(action="ignore"):  # of more workers than cores
            loader = data.given(split, _Batches(missing, max(view, 0), size))
        for batch in loader:
            if batch.ids is None:  # another process may have been here
                stage.tokens(
                    stage.transfer_batch_to_device(batch, stage.device, 0), held_out=view == HELD_OUT
                )
            if not cache.stores:
                raise DataError(
                    f"{cache.folder} cannot be written: free some space; the same command goes on"
                )
            if told:
                told.add(size)
    if launch.rank == 0 or not any(len(cache.missing(data.splits["train"], v)) for v in range(cache.views)):
        print(cache.story(data.splits), flush=True)


def show(root: Path) -> None:
    """Print what each cache below a folder holds."""
    found = sorted(root.glob("*/cache.json"))
    if not found:
        raise DataError(f"{root} holds no token cache: give the folder that tokenizer.cache names")
    for path in found:
        try:
            made_of = json.loads(path.read_text())
            if not all(is_whole(made_of[key], 1) for key in ("tokens", "vocabulary", "samples")):
                raise ValueError("a number of it is none")
            record = record_type(made_of["tokens"])
            line = (
                f"{path.parent}: {made_of['tokens']} ids below {made_of['vocabulary']:,} of each image, seed "
                f"{made_of['seed']}, {made_of['device']}, tokenizer {made_of['weights'][:12]}, images "
                f"{made_of['images'][:12]}"
            )
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
            raise DataError(f"{path} is damaged: remove {path.parent}") from error
        print(printable(line))
        for folder in sorted(entry for entry in path.parent.iterdir() if entry.is_dir()):
            there = stored(folder, made_of["samples"], record)
            size = there * (record.itemsize + NUMBER.itemsize)
            said = f"{folder.name}: {there:,} of {made_of['samples']:,} images, {size / 1e9:.3g} GB"
            print(f"  {printable(said)}")


def _device(asked: str, local_rank: int) -> torch.device:
    kind = accelerator(asked)
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)


def _missing(cache: TokenCache, share: np.ndarray, view: int) -> np.ndarray:
    """Those of the images whose ids are not there, or do not agree with their checksum."""
    parts = np.split(share, range(_CHECKED, len(share), _CHECKED))
    return np.concatenate([part[~cache.read(part, np.full(len(part), view))[1]] for part in parts])


class _Progress:
    """A line now and then: images done, images/s and the time left."""

    def __init__(self, name: str, images: int) -> None:
        self.name = name
        self.images = images
        self.done = 0
        self.began = self.said = time.monotonic()

    def add(self, images: int) -> None:
        self.done = min(self.done + images, self.images)
        now = time.monotonic()
        if self.done < self.images and now - self.said < _LINE_EVERY:
            return
        self.said = now
        rate = self.done / max(now - self.began, 1e-9)
        left = (self.images - self.done) / rate
        print(
            f"{self.name}: {self.done:,} of {self.images:,} images of this process, {rate:,.0f} images/s, "
            f"{left / 60:,.1f} min left",
            flush=True,
        )
