"""Training a tokenizer on images alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit_pretrain.stages.base import Stage, StepResult
from beit_pretrain.tokenizer import TrainableTokenizer, collapse


class TrainTokenizer(Stage):
    """Fits a `TrainableTokenizer`; its own `loss` says what is minimised and logged."""

    def __init__(self, *, tokenizer: TrainableTokenizer, **base: Any) -> None:
        super().__init__(**base)
        self.tokenizer = tokenizer
        self._score: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.tokenizer.plan(self.total_steps)

    def compute(self, batch: Any, step: int) -> StepResult:
        loss, metrics = self.tokenizer.loss(batch.image.float() / 255, step)
        n = len(batch.image)
        return StepResult(
            loss * n,
            torch.tensor(n, device=loss.device),
            {name: value.detach() * n for name, value in metrics.items()},
        )

    def expected_count(self, batch: Any) -> int:
        return len(batch.image)

    def after_step(self, step: int) -> None:
        self.tokenizer.after_step(step)

    def drop_pending(self) -> None:
        self.tokenizer.drop_pending()

    def evaluate(self, batch: Any) -> None:
        # A loss with noise in it draws from its own generator, so that training does not notice.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            loss, metrics = self.tokenizer.loss(batch.image.float() / 255, self.trainer.global_step)
        self.tokenizer.drop_pending()
        n = torch.tensor(float(len(batch.image)), dtype=torch.float64, device=loss.device)
        for name, value in {"count": torch.ones_like(loss), "loss": loss, **metrics}.items():
            self._score[name] = self._score.get(name, torch.zeros_like(n)) + value.detach().double() * n

    def evaluation(self) -> dict[str, float]:
        names = sorted(self._score)
        total = torch.stack([self._score[name] for name in names])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        sums = dict(zip(names, total.tolist(), strict=True))
        self._score = {}
        return {f"val/{name}": sums[name] / sums["count"] for name in names if name != "count"}

    def results(self) -> dict[str, Any]:
        remark = collapse(self.held_out, self.tokenizer.vocab_size)
        return {"remarks": [remark]} if remark else {}

    @torch.no_grad()
    def picture_rows(self, batch: Any) -> dict[str, Tensor] | None:
        image = batch.image.float() / 255
        painted = self.tokenizer.decode(self.tokenizer.encode(image))
        return None if painted is None else {"original": image, "reconstruction": painted}
