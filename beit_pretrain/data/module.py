"""One data module over any source: splits, batch arithmetic, loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Generator
from torch.utils.data import Sampler

from beit_pretrain.data.batches import BatchPlan, plan_batch
from beit_pretrain.data.dataset import SceneDataset, ViewDataset
from beit_pretrain.data.sampler import EvalBatches, Key, ResumableLoader, TrainBatches, Window, choose
from beit_pretrain.data.scenes import PairView
from beit_pretrain.data.sources import SceneSource, Source
from beit_pretrain.data.splits import check_stream, limited, make_splits, with_labels
from beit_pretrain.data.stream import StreamDataset, StreamLoader
from beit_pretrain.data.tokens import TokenCache, TokenDataset
from beit_pretrain.data.transforms import EvalView, View
from beit_pretrain.errors import ConfigError, DataError

_SUBSET_SALT = 0x6B6E6E


class DataModule(LightningDataModule):
    """Loaders over the train, val and test part of a source.

    `batch_size` is global. Without splits of the source's own, `val_share` of the training images are held
    out (by class where there are labels, of which each keeps an image to train on), chosen by a hash of each
    index alone. `limit_steps` shortens the epoch, to try something out.

    - `views`, `eval_views`: read when a loader is made; None until then where they are set afterwards.
    - `labelled`: images without a label are left out of every split. DataError if none is left.
    - `scenes`: a label map goes with each image. ConfigError if the source is no SceneSource.
    - `train_on_val`: the held-out images are trained on too and nothing is held out, for a last run with settings
      that were chosen before.
    - `train_limit`: training images used, by class in proportion and at least one of each class if that many
      are asked for; another subset with every seed.
    - `repeats`: views of each image in a row (repeated augmentation, Hoffer et al. 2020). An epoch keeps its
      steps and meets so many times fewer images.
    - `epoch_steps`: updates an epoch; the rest of its order is left out. ConfigError if it has fewer.
    - `shuffle_shards`: shards whose images are mixed at a time, where the source has shards; None: all.
    - `timeout`: seconds without a batch after which the run ends and says what the workers are reading; 0: never.
    """

    # A rank may have no held-out sample at all when there are fewer of them than ranks.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        *,
        source: Source,
        views: View | PairView | None,
        eval_views: View | PairView | None,
        batch_size: int,
        micro_batch_size: int | None,
        workers: int,
        seed: int,
        val_share: float = 0.02,
        max_bad: float = 0.01,
        bad_log: Path | None,
        limit_steps: int | None = None,
        labelled: bool = False,
        scenes: bool = False,
        train_on_val: bool = False,
        train_limit: int | None = None,
        repeats: int = 1,
        epoch_steps: int | None = None,
        shuffle_shards: int | None = None,
        timeout: float = 600.0,
    ) -> None:
        super().__init__()
        _check(batch_size, micro_batch_size, workers, val_share, max_bad, train_limit, repeats, epoch_steps)
        _check_shards(source, shuffle_shards, timeout)
        if source.streamed:
            check_stream(val_share, labelled, train_limit, repeats)
        if scenes and not isinstance(source, SceneSource):
            raise ConfigError(
                "stage=segment needs images with label maps: set data=ade20k, data=image_masks or data=shapes"
            )
        self.source = source
        self.scenes = scenes
        self.views = views
        self.eval_views = eval_views
        self.token_cache: TokenCache | None = None  # set afterwards, before a loader is made
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.workers = workers
        self.seed = seed
        self.max_bad = max_bad
        self.bad_log = None if bad_log is None else Path(bad_log)
        self.limit_steps = limit_steps
        self.repeats = repeats
        self.epoch_steps = epoch_steps
        self.shuffle_shards = shuffle_shards
        self.timeout = timeout
        self._loaders: WeakSet[ResumableLoader] = WeakSet()
        self.splits = make_splits(source, val_share)
        if labelled:
            self.splits = with_labels(source, self.splits)
        if train_on_val and "val" in self.splits:
            self.splits["train"] = np.union1d(self.splits["train"], self.splits.pop("val"))
        if train_limit is not None:
            self.splits["train"] = limited(self.splits["train"], train_limit, seed, source.labels)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the labels. DataError if the source has none."""
        if self.source.class_names is None:
            raise DataError(
                "the classes of these images have no names: set data.source.label to a column of class labels "
                "(ClassLabel), or data=class_folders with data.root above one folder per class"
            )
        return self.source.class_names

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass; what does not fill a last batch is left out that time."""
        steps = len(self.splits["train"]) // self.batch_size
        if steps == 0:
            raise ConfigError(
                f"batch_size={self.batch_size} is more than the {len(self.splits['train'])} training images; "
                f"set batch_size to {len(self.splits['train'])} or less"
            )
        if self.epoch_steps is not None and self.epoch_steps > steps:
            raise ConfigError(
                f"data.epoch_steps={self.epoch_steps} is more than the {steps} batches of {self.batch_size} that "
                f"{len(self.splits['train'])} training images give; set it to {steps} or less, or to null for all"
            )
        return min(given for given in (steps, self.epoch_steps, self.limit_steps) if given is not None)

    def plan(self, world_size: int) -> BatchPlan:
        """The split of the global batch over `world_size` devices. ConfigError if it does not divide."""
        return plan_batch(self.batch_size, self.micro_batch_size, world_size)

    def setup(self, stage: str) -> None:
        """ConfigError if a device would have no held-out image: the others would wait for its part of the score."""
        _, world = self._place()
        for split in self.splits.keys() - {"train"}:
            if world > (count := len(self.splits[split])):
                raise ConfigError(
                    f"{world} devices (trainer.devices x trainer.num_nodes) cannot share {count} {split} images: "
                    f"set trainer.devices and trainer.num_nodes to {count} devices or less, or give more images"
                )

    def on_exception(self, exception: BaseException) -> None:
        """Lightning lets go of the loaders next."""
        for loader in self._loaders:
            loader.end_stuck()

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        if self.source.streamed:
            return self._stream()
        rank, world = self._place()
        batches = TrainBatches(
            indices=self.splits["train"],
            batch_size=self.batch_size,
            micro_batch_size=self.plan(world).micro,
            rank=rank,
            world_size=world,
            seed=self.seed,
            steps_per_epoch=self.steps_per_epoch,
            position=self._position,
            repeats=self.repeats,
            window=self._window(),
        )
        return self._loader(
            self._dataset("train", self.views, scenes=self.scenes), batches, keep_workers=True
        )

    def _stream(self) -> StreamLoader:
        source: Any = self.source
        rank, world = self._place()
        plan = self.plan(world)
        dataset = StreamDataset(
            urls=source.urls,
            samples=len(source),
            view=self.views,  # pyright: ignore[reportArgumentType] streams have no label maps
            seed=self.seed,
            micro_batch_size=plan.micro,
            rank=rank,
            world_size=world,
            steps_per_epoch=self.steps_per_epoch,
            accumulate=plan.accumulate,
            epoch=0,
            start=0,
            max_bad=self.max_bad,
            bad_log=self.bad_log,
            timeout=source.timeout,
            last_dot=source.last_dot,
        )
        return StreamLoader(
            dataset=dataset,
            workers=self.workers,
            position=self._position,
            make=lambda rest: self._loader(rest, None, keep_workers=False),
        )

    def _position(self) -> int:
        return self.trainer.global_step if self.trainer else 0

    def _window(self) -> Window | None:
        if self.source.bounds is None or self.shuffle_shards is None:
            return None
        return Window(np.searchsorted(self.splits["train"], self.source.bounds), self.shuffle_shards)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """The held-out samples, each once, with fixed views; an empty list if none are held out."""
        return self._held_out("val")

    def test_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """The samples of the test part, each once, with fixed views; an empty list if there is no such part."""
        return self._held_out("test")

    def _held_out(self, split: str) -> ResumableLoader | list[ResumableLoader]:
        if split not in self.splits:
            return []
        rank, world = self._place()
        # Whole images are as large as they come, and are looked at one by one anyway.
        size = 1 if self.scenes else self.plan(world).micro
        batches = EvalBatches(indices=self.splits[split], batch_size=size, rank=rank, world_size=world)
        dataset = self._dataset(split, self.eval_views, held_out=True, scenes=self.scenes)
        return self._loader(dataset, batches, keep_workers=True)

    def labelled(
        self, split: str, image_size: tuple[int, int], limit: int | None, crop_pct: float = 1.0
    ) -> ResumableLoader | None:
        """Batches of at most `limit` labelled images of a split, in order, the whole of it on every rank.

        The classes keep their proportions and the choice is the same in every run. None without such a
        split or without labels.
        """
        labels = self.source.labels
        if labels is None or split not in self.splits:
            return None
        known = self.splits[split][labels[self.splits[split]] >= 0]
        if len(known) == 0:
            return None
        chosen = known if limit is None else choose(known, limit, _SUBSET_SALT, labels)
        view = EvalView(image_size=image_size, crop_pct=crop_pct)
        batches = EvalBatches(indices=chosen, batch_size=self.plan(self._place()[1]).micro)
        return self._loader(self._dataset(split, view, held_out=True), batches, keep_workers=False)

    def given(self, split: str, batches: Sampler[list[Key]]) -> ResumableLoader:
        """Just these batches of a split, with the views of the training or, of other splits, the held-out ones."""
        view = self.views if split == "train" else self.eval_views
        return self._loader(
            self._dataset(split, view, held_out=split != "train"), batches, keep_workers=False
        )

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _dataset(
        self, split: str, view: View | PairView | None, *, held_out: bool = False, scenes: bool = False
    ) -> ViewDataset:
        assert view is not None
        settings: dict[str, Any] = {
            "source": self.source,
            "indices": self.splits[split],
            "view": view,
            "seed": self.seed,
            "held_out": held_out,
            "max_bad": self.max_bad,
            "bad_log": self.bad_log,
        }
        if self.token_cache is not None and (view is self.views or view is self.eval_views):
            return TokenDataset(cache=self.token_cache, **settings)
        return SceneDataset(**settings) if scenes else ViewDataset(**settings)

    def _loader(
        self, dataset: ViewDataset | StreamDataset, batches: Sampler[list[Key]] | None, *, keep_workers: bool
    ) -> ResumableLoader:
        """`batches` is None for a dataset that makes its batches itself."""
        # What comes from afar waits for each byte by itself, and may rightly take long: many shards at the beginning
        # of an epoch, a stream that is read up to where the run goes on.
        making: dict[str, Any] = {
            "timeout": 0 if self.source.streamed or self.source.fetched else self.timeout
        }
        if isinstance(dataset, ViewDataset):
            making |= {"batch_sampler": batches, "collate_fn": dataset.collate}
        else:
            making["batch_size"] = None
        loader = ResumableLoader(
            dataset,
            **making,
            num_workers=self.workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=keep_workers and self.workers > 0,
            # A loader draws a base seed for its workers whenever it is iterated: not from the global
            # generator, or a validation in between would change the training.
            generator=Generator().manual_seed(self.seed),
        )
        self._loaders.add(loader)
        return loader


def _check(
    batch: int,
    micro: int | None,
    workers: int,
    val_share: float,
    max_bad: float,
    train_limit: int | None,
    repeats: int,
    epoch_steps: int | None,
) -> None:
    faults = []
    if batch < 1:
        faults.append(f"batch_size={batch}: set 1 or more")
    if micro is not None and micro < 1:
        faults.append(f"micro_batch_size={micro}: set 1 or more, or null for as many as fit the batch")
    if workers < 0:
        faults.append(f"data.workers={workers}: set 0 (load in the training process) or more")
    if not 0 <= val_share < 1:
        faults.append(f"data.val_share={val_share}: set a share from 0 (no held-out images) to below 1")
    if not 0 <= max_bad <= 1:
        faults.append(f"data.max_bad={max_bad}: set a share from 0 to 1")
    if train_limit is not None and train_limit < 1:
        faults.append(f"data.train_limit={train_limit}: set 1 or more, or null for all training images")
    if repeats < 1:
        faults.append(f"data.repeats={repeats}: set 1 (each image once in an epoch) or more")
    if epoch_steps is not None and epoch_steps < 1:
        faults.append(f"data.epoch_steps={epoch_steps}: set 1 or more, or null for all whole batches")
    if faults:
        raise ConfigError(faults)


def _check_shards(source: Source, shuffle_shards: int | None, timeout: float) -> None:
    faults = []
    if shuffle_shards is not None and shuffle_shards < 1:
        faults.append(
            f"data.shuffle_shards={shuffle_shards}: set 1 or more, or null for all (a full shuffle)"
        )
    if timeout < 0:
        faults.append(f"data.timeout={timeout}: set seconds above 0, or 0 for no limit")
    mixed = shuffle_shards or (0 if source.bounds is None else len(source.bounds) - 1)
    # Two windows are open at once while one ends and the next begins.
    if source.room is not None and source.room < mixed + 1:
        faults.append(
            f"data.shuffle_shards={'null' if shuffle_shards is None else shuffle_shards} mixes {mixed} shards at a "
            f"time, but data.source.cache_gb has room for {source.room}, and each would be fetched over and over: set "
            f"data.shuffle_shards={max(1, source.room - 1)} or less, or raise data.source.cache_gb"
        )
    if faults:
        raise ConfigError(faults)
