"""The contract between pre-training and whatever turns an image into visual tokens.

Letters: B images, N = rows * cols visual tokens, T the side of the tokenizer's view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

# Perplexity below which tokens say too little: 2 bits of a patch, of the 13 that 8192 tokens could say.
COLLAPSED = 4.0


def collapse(held_out: Mapping[str, float], vocab_size: int) -> str:
    """What to say of a tokenizer that gives nearly all patches one of a few tokens, or nothing.

    held_out: its held-out metrics. Without a perplexity among them nothing is known. Of few tokens in all, a quarter
    in even use is the limit.
    """
    perplexity = held_out.get("val/perplexity")
    if perplexity is None or not perplexity < min(COLLAPSED, vocab_size / 4):
        return ""
    return (
        f"the tokenizer has collapsed: of its {vocab_size:,} tokens, held-out images have as few as {perplexity:.1f} "
        "in even use (val/perplexity), which leaves little to predict: train it for longer (stage.epochs), or with a "
        "larger tokenizer.kl_weight"
    )


class Tokenizer(nn.Module, ABC):
    """Images to ids in `range(vocab_size)` and, where it can paint, back.

    `image_size` is the (height, width) it was made for and `stride` the pixels per token along each side,
    so `grid` = image_size // stride must equal the encoder's patch grid.
    """

    vocab_size: int
    image_size: tuple[int, int]
    stride: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """Ids (B, N) int64 of images (B, 3, T, T) in [0, 1]; row-major, normalised in here, without gradient."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor | None:
        """Pictures (B, 3, T, T) in [0, 1] of ids (B, N) on `grid`; None if this tokenizer cannot paint."""


class TrainableTokenizer(Tokenizer):
    """A tokenizer that `stage=tokenizer` can train."""

    @abstractmethod
    def plan(self, total_steps: int) -> None:
        """Called before training with the optimiser steps there will be in all, for schedules of its own."""

    @abstractmethod
    def loss(self, image: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over images (B, 3, T, T) in [0, 1] at optimiser step `step`, and scalars to log.

        Statistics that outlive the step (code counts, averages) are only noted here and take effect in
        `after_step`, so that a step refused for a NaN leaves no trace.
        """

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Called once after each optimiser update, on all ranks: agree on the noted statistics and apply them."""

    @abstractmethod
    def drop_pending(self) -> None:
        """Forget what `loss` noted since the last update; called when the update is refused."""
