"""Masked image modelling: predict the visual tokens of hidden patches (BEiT paper, Sec. 2.3, Eq. 1).

Letters: B images, N patches, L = 1 + N, D width, V vocabulary, M hidden patches of the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit_pretrain.evaluation import MaskedScore, UnigramCounts
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import MIMHead
from beit_pretrain.stages.base import Stage, StepResult
from beit_pretrain.tokenizer import Tokenizer


class Pretrain(Stage):
    """BEiT pre-training with a frozen tokenizer."""

    frozen = ("tokenizer",)
    statistics = ("unigram",)

    def __init__(
        self,
        *,
        encoder: Beit,
        tokenizer: Tokenizer,
        compile: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.encoder = encoder
        self.head = MIMHead(
            width=encoder.width,
            vocab_size=tokenizer.vocab_size,
            init_std=encoder.init_std,
            init_cut=encoder.init_cut,
        )
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.token_cache: Any = None  # where ids are kept that had to be worked out; set afterwards
        patches = encoder.grid[0] * encoder.grid[1]
        self.unigram = UnigramCounts(patches=patches, vocabulary=tokenizer.vocab_size)
        self.score = MaskedScore()
        self.counts_vary = not self.views.mask.exact
        if compile:
            # In place: the names in the state dict stay.
            self.encoder.compile()
            self.tokenizer.compile()

    @property
    def depth(self) -> int:
        return self.encoder.depth

    @property
    def units(self) -> list[nn.Module]:
        return list(self.encoder.blocks)

    def train(self, mode: bool = True) -> Pretrain:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @torch.no_grad()
    def tokens(self, batch: Any, *, held_out: bool = False) -> Tensor:
        """Ids (B, N) int64 of the batch: the stored ones, or the tokenizer's, which are then stored if asked for."""
        if batch.ids is not None:
            return batch.ids.long()
        with torch.autocast(self.device.type, enabled=False):
            ids = self.tokenizer.encode(self.views.coloured(batch.token_image, batch.jitter).float() / 255)
        if self.token_cache is not None:
            self.token_cache.keep(batch.sample, None if held_out else batch.view, ids)
        return ids

    def predict(self, batch: Any) -> Tensor:
        """Logits (M, V) of the hidden patches, row-major over (B, N)."""
        image = self.views.coloured(batch.image, batch.jitter)
        return self.head(self.encoder(self.normalize(image), batch.mask), batch.mask)

    def compute(self, batch: Any, step: int) -> StepResult:
        ids = self.tokens(batch)
        target = ids[batch.mask]  # (M,)
        logits = self.predict(batch)  # (M, V)
        self.unigram.note(ids)
        loss = F.cross_entropy(logits.float(), target, reduction="sum")
        right = (logits.detach().argmax(-1) == target).sum()
        return StepResult(loss, torch.tensor(len(target), device=loss.device), {"accuracy": right})

    def expected_count(self, batch: Any) -> int:
        return len(batch.image) * self.views.mask.count

    def after_step(self, step: int) -> None:
        self.unigram.commit()

    def drop_pending(self) -> None:
        self.unigram.drop()

    def merge_ranks(self) -> None:
        self.unigram.merge_ranks()

    def step_metrics(self) -> dict[str, float]:
        base = self.unigram.baselines()
        return {
            "baseline_loss": base["loss_position"],
            "baseline_accuracy": base["accuracy_position"],
            "perplexity": math.exp(base["loss_global"]),
        }

    def evaluate(self, batch: Any) -> None:
        self.score.update(self.predict(batch), self.tokens(batch, held_out=True)[batch.mask], batch.mask)

    def evaluation(self) -> dict[str, float]:
        result = self.score.result()
        self.score.reset()
        return {f"val/{name}": value for name, value in result.items()}

    @torch.no_grad()
    def picture_rows(self, batch: Any) -> dict[str, Tensor] | None:
        image = self.views.coloured(batch.image, batch.jitter).float() / 255
        ids = self.tokens(batch, held_out=True)
        return painted(self.tokenizer, image, batch.mask, ids, self.predict(batch).argmax(-1))

    def results(self) -> dict[str, Any]:
        """The baselines that a model without pictures would reach; the loss is compared in standard errors."""
        base = self.unigram.baselines()
        if "val/loss" in self.held_out:
            val = self.held_out
            for name, gain in (
                ("loss", base["loss_position"] - val["val/loss"]),
                ("accuracy", val["val/accuracy"] - base["accuracy_position"]),
            ):
                if error := val[f"val/{name}_se"]:  # 0 if all held-out images score alike
                    base[f"{name}_z"] = gain / error
        return {"baseline": base}


def painted(
    tokenizer: Tokenizer, image: Tensor, mask: Tensor, ids: Tensor, predicted: Tensor
) -> dict[str, Tensor] | None:
    """What was hidden and what is seen there, as columns of pictures (B, 3, H, W); None if the tokenizer cannot paint.

    Images (B, 3, H, W) in [0, 1], mask (B, N), true ids (B, N) and predicted ones (M,) of the hidden patches; the
    others are painted as they are.
    """
    true = tokenizer.decode(ids)
    if true is None:
        return None
    mixed = ids.clone()
    mixed[mask] = predicted
    seen = tokenizer.decode(mixed)
    assert seen is not None  # decode paints always or never
    cell = nn.Upsample(size=image.shape[-2:], mode="nearest")
    hidden = cell(mask.view(len(image), 1, *tokenizer.grid).float())
    return {
        "original": image,
        "masked": image * (1 - hidden) + 0.5 * hidden,
        "true tokens": true,
        "predicted tokens": seen,
    }
