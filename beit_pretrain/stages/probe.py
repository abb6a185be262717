"""Linear probes: what a frozen encoder has learnt, read off with as little learning as possible.

Letters as in `models.probes`.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from beit_pretrain import optim
from beit_pretrain.checkpoint.adapt import check_classes
from beit_pretrain.errors import ConfigError, DataError, LockLost
from beit_pretrain.evaluation import sum_over_ranks
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.blocks import Block
from beit_pretrain.models.probes import POOLINGS, Inputs, ProbeBank, pooled_row
from beit_pretrain.stages.base import Stage, StepResult
from beit_pretrain.stages.feature_cache import CACHES, Cache, choose_place, with_features

PICTURE = 32  # side down to which pictures are averaged for the classifiers on pixels
SURVEYED = 2**14  # training images, evenly spaced, whose features set the scale of all
_BATCH = 64  # images in a pass that only computes features
_SPARED = 0.1  # share of the free disk space that a cache leaves


class Score(NamedTuple):
    """Of each classifier over one split."""

    images: int
    loss: list[float]
    accuracy: list[float]


class Probe(Stage):
    """Linear classifiers on the features of every block of a frozen encoder, all trained at once.

    - `classes`: names in the order of the labels.
    - `lrs`, `poolings`: a classifier for each pair and block. The best is chosen on the validation images at the end
      of training.
    - `augment`: train on `views`, a new crop in each epoch. Otherwise images are seen as in evaluation and their
      features are computed once.
    - `cache`: where these features stay: memory, disk, none, or auto, the first of them that has the room; `cache_gb`
      is how much memory (GB = 10^9 bytes) each process may take for them.
    - `attentive`: also a learned pooling of the last block's tokens for each learning rate; nothing is cached then.
    - `pixels`: also classifiers on the pictures themselves, averaged down to at most 32 x 32 pixels.
    - `all_labels`: where the data have a test part, tested are twins of all classifiers that learn from training and
      validation images together; the choice is still by those that never saw a validation image.

    Raises ConfigError with all faults at once.
    """

    frozen = ("encoder",)
    came_from = "init_from"
    monitor = ("val/best", "max")
    self_supervised = False

    def __init__(
        self,
        *,
        encoder: Beit,
        classes: Sequence[str],
        lrs: Sequence[float],
        poolings: Sequence[str],
        augment: bool,
        cache: str,
        cache_gb: float,
        attentive: bool,
        pixels: bool,
        all_labels: bool,
        compile: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        faults = [*_rates(lrs, self.recipe), *_choices(poolings, cache, cache_gb)]
        if cache in ("memory", "disk") and (augment or attentive):
            why = "stage.augment" if augment else "stage.attentive"
            faults.append(
                f"stage.cache={cache}: with {why}=true there is nothing to keep; set stage.cache=auto"
            )
        if faults:
            raise ConfigError(faults)
        size = [min(PICTURE, side * encoder.patch_size) for side in encoder.grid]
        self.encoder = encoder.requires_grad_(False).eval()
        self._bank = partial(
            ProbeBank,
            width=encoder.width,
            depth=encoder.depth,
            classes=len(classes),
            lrs=lrs,
            poolings=poolings,
            pixels=3 * size[0] * size[1] if pixels else 0,
            heads=cast(Block, encoder.blocks[0]).attn.heads if attentive else None,
        )
        self.bank = self._bank()
        self.twins: ProbeBank | None = None  # learn from validation images too
        self.all_labels = all_labels
        self._chosen_by: np.ndarray | None = None  # the validation images, once they are trained on
        self.classes = list(classes)
        self.lrs = lrs
        self.poolings = poolings
        self.picture = (size[0], size[1]) if pixels else None
        if not augment:
            self.views = self.eval_views
        self.cache = "none" if augment or attentive else cache
        self.cache_gb = cache_gb
        self.scores: dict[str, Score] = {}  # of val and test
        self._sums = self._no_sums()
        self._lent: Any = None  # the data module that gives features instead of images
        if compile:
            self.encoder.compile()

    @property
    def depth(self) -> int:
        return self.encoder.depth

    def train(self, mode: bool = True) -> Probe:
        super().train(mode)
        self.encoder.eval()
        return self

    # --- learning -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def inputs(self, image: Tensor) -> Inputs:
        """What the classifiers see of images (B, 3, H, W) uint8, or of rows (B, X) that were computed before."""
        if image.dtype != torch.uint8:
            return Inputs(image, None)
        image = self.normalize(image)
        tokens = self.encoder.features(image, range(self.depth))  # K x (B, L, D)
        picture = None if self.picture is None else F.adaptive_avg_pool2d(image, self.picture)
        return Inputs(pooled_row(tokens, picture), tokens[-1])

    def _answers(self, bank: ProbeBank, inputs: Inputs, label: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each image and classifier, and whether it was right, each (B, n)."""
        logits = bank(inputs)  # (B, n, C)
        target = label[:, None].expand(logits.shape[:2])  # (B, n)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return loss.view(target.shape), logits.detach().argmax(-1) == target

    def compute(self, batch: Any, step: int) -> StepResult:
        inputs = self.inputs(batch.image)
        # Sums over classifiers, not means: each gets the gradient that it would get alone.
        loss = self._answers(self.bank, inputs, batch.label)[0]
        if self.twins is not None and self._chosen_by is not None:
            chosen_by = torch.from_numpy(np.isin(batch.sample.cpu().numpy(), self._chosen_by)).to(loss.device)
            loss = loss.masked_fill(chosen_by[:, None], 0.0).sum()
            loss = loss + self._answers(self.twins, inputs, batch.label)[0].sum()
        return StepResult(loss.sum(), torch.tensor(len(batch.image), device=loss.device))

    def expected_count(self, batch: Any) -> int:
        return len(batch.image)

    def step_metrics(self) -> dict[str, float]:
        """In place of the sum: the mean over classifiers, where an image that one does not learn from counts as 0."""
        banks = 1 if self.twins is None else 2
        return {
            "loss": float(self._totals["loss"] / self._totals["count"]) / (banks * len(self.bank.classifiers))
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = []
        banks = [self.bank] if self.twins is None else [self.bank, self.twins]
        for lr, parts in (
            (lr, parts) for bank in banks for lr, parts in zip(self.lrs, bank.by_lr, strict=True)
        ):
            for group in optim.parameter_groups(parts.named_parameters(), self.recipe, self.depth):
                name = f"lr_{lr:g}_{'decay' if group['decay'] else 'no_decay'}"
                groups.append({**group, "lr": lr, "lr_scale": lr / self.recipe.lr, "group": name})
        return groups

    # --- features, computed once ----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        splits = self._data().splits
        if "val" not in splits:
            raise DataError(
                "stage=probe chooses its best classifier on validation images, and these data have none: set "
                "data.val_share above 0"
            )
        if self.twins is None and self.all_labels and "test" in splits:
            self.twins = self._bank()
            self.twins.share_scales(self.bank)
            self._chosen_by = splits["val"]
            self._data().splits = {**splits, "train": np.union1d(splits["train"], splits["val"])}
        super().setup(stage)

    def _data(self) -> Any:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def on_fit_start(self) -> None:
        data = self._data()
        cache = self._open_cache(data)
        if cache is None and self.bank.scale.images:
            return  # a run that goes on has its scales from the checkpoint
        self._survey(data, cache)
        if cache is None:
            return
        cache.share()
        self.trainer.strategy.barrier()
        rows = with_features(data, cache, self.eval_views)
        # Only these two and only during the fit: all else that is asked of the data module is answered with images.
        data.train_dataloader, data.val_dataloader = rows.train_dataloader, rows.val_dataloader
        self._lent = data

    def teardown(self, stage: str) -> None:
        if self._lent is not None:
            del self._lent.train_dataloader, self._lent.val_dataloader
            self._lent = None
            if self.trainer.is_global_zero:
                with suppress(LockLost):
                    self.before_writing()
                    self._cache_path.unlink(missing_ok=True)

    @property
    def _cache_path(self) -> Path:
        return self.run_dir / "features.f32"

    def _open_cache(self, data: Any) -> Cache | None:
        if self.cache == "none" or data.limit_steps is not None:  # a trial run sees few of the images
            return None
        samples = np.union1d(data.splits["train"], data.splits["val"])
        width = len(self.bank.scale.mean)
        size = len(samples) * width * 4e-9
        self.run_dir.mkdir(parents=True, exist_ok=True)
        free = (1 - _SPARED) * 1e-9 * shutil.disk_usage(self.run_dir).free
        place = choose_place(self.cache, size, memory=self.cache_gb, disk=free)
        place = self.trainer.strategy.broadcast(place)  # between two ranks' looks a disk may fill up
        how = {"memory": "once, kept in memory", "disk": f"once, kept in {self._cache_path}"}
        if self.trainer.is_global_zero:
            what = how.get(place, "anew in every epoch")
            print(f"Features of {len(samples)} images ({size:.3g} GB): computed {what}.", flush=True)
        if place == "none":
            return None
        cache = Cache(samples, width, self._cache_path if place == "disk" else None)
        if self.trainer.is_global_zero:
            cache.create()
        self.trainer.strategy.barrier()
        return cache

    @torch.no_grad()
    def _survey(self, data: Any, cache: Cache | None) -> None:
        """Fills the cache, and sets the scales from training images unless a checkpoint has set them."""
        train = data.splits["train"]
        if self._chosen_by is not None:
            train = np.setdiff1d(train, self._chosen_by)
        most = SURVEYED if data.limit_steps is None else data.steps_per_epoch * data.batch_size
        surveyed = train[:: math.ceil(len(train) / most)]
        scales = [(self.bank.scale, self.bank.groups)]
        if self.bank.token_scale is not None:
            scales.append((self.bank.token_scale, [self.encoder.width]))
        # Beside the sums of x and x^2, how many x there were.
        moments = [torch.zeros(3, len(scale.mean), dtype=torch.float64) for scale, _ in scales]
        with self.trainer.precision_plugin.forward_context():
            for batch in self._once(data, surveyed if cache is None else cache.samples):
                row, tokens = self.inputs(batch.image.to(self.device))
                if cache is not None:
                    cache.write(batch.sample, row)
                mine = torch.from_numpy(np.isin(batch.sample.numpy(), surveyed))
                for total, x in zip(moments, (row, tokens), strict=False):
                    assert x is not None
                    x = x.cpu()[mine].double().flatten(0, -2)
                    total += torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x.sum(0), len(x))])
        for (scale, groups), total in zip(scales, moments, strict=True):
            total = sum_over_ranks(total)
            if not scale.images:
                scale.set(total[:2], int(total[2, 0]), groups)

    def _once(self, data: Any, samples: np.ndarray) -> Iterable[Any]:
        """Batches of this rank's share of images, as they are seen in evaluation."""
        once = copy.copy(data)
        once.splits = {"val": samples}
        once.eval_views = self.eval_views
        once.batch_size, once.micro_batch_size = _BATCH * self.trainer.world_size, _BATCH
        return once.val_dataloader()

    # --- held-out score -------------------------------------------------------------------------------------

    def _no_sums(self) -> Tensor:
        """Images, loss and right answers of each classifier, (3, n)."""
        return torch.zeros(3, len(self.bank.classifiers), dtype=torch.float64)

    @torch.no_grad()
    def evaluate(self, batch: Any) -> None:
        bank = self.twins if self.twins is not None and self.trainer.testing else self.bank
        loss, right = self._answers(bank, self.inputs(batch.image), batch.label)
        sums = torch.stack([torch.ones_like(loss), loss, right.to(loss)])  # (3, B, n)
        self._sums += sums.cpu().double().sum(1)

    def evaluation(self) -> dict[str, float]:
        images, loss, right = sum_over_ranks(self._sums)
        self._sums = self._no_sums()
        split = "test" if self.trainer.testing else "val"
        now = Score(int(images[0]), (loss / images).tolist(), (right / images).tolist())
        self.scores[split] = now
        best = self._best(*self.poolings)
        metrics = {"val/loss": now.loss[best], "val/best": now.accuracy[best], "val/images": now.images}
        for block in range(self.depth):
            metrics[f"val/block_{block}"] = now.accuracy[self._best(*self.poolings, block=block)]
        return metrics

    def _best(self, *poolings: str, block: int | None = None) -> int:
        """The classifier with the highest accuracy on the validation images; of equals, that of the lowest loss."""
        val = self.scores["val"]
        asked = [
            i
            for i, one in enumerate(self.bank.classifiers)
            if one.pooling in poolings and block in (None, one.block)
        ]
        return max(asked, key=lambda i: (val.accuracy[i], -val.loss[i]))

    def results(self) -> dict[str, Any]:
        """Accuracy of the best learning rate of each block and pooling, and of the best classifier of all."""
        if "val" not in self.scores:
            return {}
        test = self.scores.get("test")

        def row(*poolings: str, block: int | None = None) -> dict[str, Any]:
            i = self._best(*poolings, block=block)
            accuracy = {"val": self.scores["val"].accuracy[i], "test": test and test.accuracy[i]}
            return {**self.bank.classifiers[i]._asdict(), **accuracy}

        best = row(*self.poolings)
        attentive = [row("attentive")] if self.bank.token_scale is not None else []
        return {
            "probe": {
                "rows": [row(name, block=i) for i in range(self.depth) for name in self.poolings],
                "best": best,
                "accuracy": best["val"] if test is None else best["test"],
                "images": (test or self.scores["val"]).images,
                "attentive": attentive,
                "pixels": None if self.picture is None else row("pixels"),
            }
        }

    # --- checkpoints ----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # A run that was killed after its last evaluation still has to choose.
        val = self.scores.get("val")
        checkpoint["beit_pretrain"]["scores"] = None if val is None else val._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_classes(checkpoint, self.classes)
        super().on_load_checkpoint(checkpoint)
        if (then := checkpoint["beit_pretrain"]["scores"]) is not None:
            self.scores["val"] = Score(**then)


def _rates(lrs: Sequence[float], recipe: optim.Recipe) -> Iterator[str]:
    wrong = [lr for lr in lrs if not isinstance(lr, int | float) or not 0 < lr < math.inf]
    if wrong or len(set(lrs)) < max(len(lrs), 1):
        yield f"stage.lrs={list(lrs)}: set one or more different numbers above 0"
    elif recipe.lr != lrs[0]:
        yield f"stage.optim.lr={recipe.lr} has no use here: set the learning rates with stage.lrs and leave it out"
    if recipe.clip is not None:
        yield f"stage.optim.clip={recipe.clip} would tie the classifiers together: set it to null"


def _choices(poolings: Sequence[str], cache: str, cache_gb: float) -> Iterator[str]:
    if not poolings or len(set(poolings)) < len(poolings) or not set(poolings) <= set(POOLINGS):
        yield f"stage.poolings={list(poolings)}: set one or more different ones of {', '.join(POOLINGS)}"
    if cache not in CACHES:
        yield f"stage.cache={cache}: set one of {', '.join(CACHES)}"
    if not cache_gb >= 0:
        yield f"stage.cache_gb={cache_gb}: set a number of GB from 0"
