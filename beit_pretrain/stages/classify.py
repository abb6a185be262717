"""Fine-tuning on labelled images (BEiT paper, Sec. 2.6 and 3.1).

Letters: B images, C classes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from beit_pretrain.checkpoint.adapt import check_classes
from beit_pretrain.errors import ConfigError
from beit_pretrain.evaluation import ClassScore
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import ClassHead, Pooling
from beit_pretrain.stages.base import Stage, StepResult


class Classify(Stage):
    """An encoder with a class head, both trained.

    - `classes`: names in the order of the labels.
    - `smoothing`, `mixup`, `cutmix`: soft targets; mixing is drawn once per micro-batch.
    - `erasing`: chance of a rectangle of noise in an image.
    - `ema`: decay of an exponential moving average of all trained weights, kept in the checkpoint and evaluated
      beside them as `val_ema/`; None for none.

    Raises ConfigError with all faults at once.
    """

    monitor = ("val/top1", "max")
    self_supervised = False

    def __init__(
        self,
        *,
        encoder: Beit,
        classes: list[str],
        pooling: Pooling,
        head_init_scale: float,
        smoothing: float,
        mixup: float,
        cutmix: float,
        erasing: float,
        ema: float | None,
        compile: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        _check(smoothing, mixup, cutmix, erasing, ema)
        self.encoder = encoder
        self.classes = list(classes)  # Hydra hands over its own kind of list
        self.head = ClassHead(
            width=encoder.width, classes=len(classes), pooling=pooling, init_scale=head_init_scale
        )
        self.smoothing = smoothing
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=len(classes))
            if mixup or cutmix
            else None
        )
        self.erase = RandomErasing(erasing, mode="pixel") if erasing else None
        self.ema = (
            None
            if ema is None
            else AveragedModel(
                nn.ModuleDict({"encoder": encoder, "head": self.head}),
                multi_avg_fn=get_ema_multi_avg_fn(ema),
            ).requires_grad_(False)
        )
        self.scores = {name: ClassScore(len(classes)) for name in self._models()}
        self.tables: dict[str, dict[str, Any]] = {}  # the last held-out score of each, whole
        if compile:
            self.encoder.compile()

    def _models(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Encoder and head of each set of weights, by what their metrics are called."""
        models: dict[str, tuple[nn.Module, nn.Module]] = {"": (self.encoder, self.head)}
        if self.ema is not None:
            average: Any = self.ema.module
            models["_ema"] = (average["encoder"], average["head"])
        return models

    @property
    def depth(self) -> int:
        return self.encoder.depth

    @property
    def units(self) -> list[nn.Module]:
        return [block for encoder, _ in self._models().values() for block in cast(Beit, encoder).blocks]

    def compute(self, batch: Any, step: int) -> StepResult:
        image, target = self.normalize(batch.image), batch.label
        with _library_draws():
            if self.erase is not None:
                self.erase.device = str(image.device)  # where it makes its noise; by default a GPU
                image = self.erase(image)
            if self.mix is not None:
                image, target = self.mix(image, target)  # target (B, C)
        logits = self.head(self.encoder(image)).float()  # (B, C)
        loss = F.cross_entropy(
            logits, target, reduction="sum", label_smoothing=0.0 if self.mix else self.smoothing
        )
        # Of mixed pictures no single label is right.
        sums = {} if self.mix else {"accuracy": (logits.detach().argmax(-1) == batch.label).sum()}
        return StepResult(loss, torch.tensor(len(image), device=loss.device), sums)

    def expected_count(self, batch: Any) -> int:
        return len(batch.image)

    def after_step(self, step: int) -> None:
        if self.ema is not None:
            self.ema.update_parameters(nn.ModuleDict({"encoder": self.encoder, "head": self.head}))

    # --- held-out score --------------------------------------------------------------------------------------

    def evaluate(self, batch: Any) -> None:
        image = self.normalize(batch.image)
        for name, (encoder, head) in self._models().items():
            self.scores[name].update(head(encoder(image)), batch.label)

    def evaluation(self) -> dict[str, float]:
        metrics = {}
        for name, score in self.scores.items():
            self.tables[name] = {**score.result(), "mistakes": score.mistakes()}
            score.reset()
            metrics |= {f"val{name}/{key}": self.tables[name][key] for key in ("loss", "top1", "top5")}
        return metrics | {"val/images": self.tables[""]["images"]}

    def results(self) -> dict[str, Any]:
        """What each class got right, by the weights that were better on the validation images."""
        if not self.tables:
            return {}
        name = max(self.tables, key=lambda key: self.held_out.get(f"val{key}/top1", 0.0))
        table = self.tables[name]
        support = table["support"]
        return {
            "classification": {
                "split": "test" if self.tested else "val",
                "weights": "ema" if name else "raw",
                "classes": self.classes,
                "support": support,
                "correct": table["correct"],
                "confusion": table["confusion"],
                "mistakes": table["mistakes"],
                "chance": max(support) / sum(support),
            }
        }

    # --- checkpoints -----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # A run killed between its last update and its results has nothing left to evaluate.
        checkpoint["beit_pretrain"]["tables"] = self.tables

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_classes(checkpoint, self.classes)
        super().on_load_checkpoint(checkpoint)
        self.tables = checkpoint["beit_pretrain"]["tables"]


def _check(smoothing: float, mixup: float, cutmix: float, erasing: float, ema: float | None) -> None:
    faults = []
    for key, value in (("smoothing", smoothing), ("erasing", erasing)):
        if not 0 <= value < 1:
            faults.append(f"stage.{key}={value}: set a share from 0 (off) to below 1")
    for key, value in (("mixup", mixup), ("cutmix", cutmix)):
        if value < 0:
            faults.append(f"stage.{key}={value}: set 0 (off) or more, such as 0.8")
    if ema is not None and not 0 < ema < 1:
        faults.append(f"stage.ema={ema}: set a decay between 0 and 1, such as 0.9999, or null")
    if faults:
        raise ConfigError(faults)


@contextmanager
def _library_draws() -> Iterator[None]:
    """timm draws from the generators of Python and NumPy: seed both from torch's, which follows the step."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    seed = int(torch.randint(2**31, ()))
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
