"""What stands on the encoder.

Letters: B images, N patches, L = 1 + N tokens, D width, V vocabulary, C classes, M hidden patches of the whole batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from beit_pretrain.errors import ConfigError
from beit_pretrain.models.beit import initialise
from beit_pretrain.models.blocks import NORM_EPS

Pooling = Literal["mean", "cls"]


class MIMHead(nn.Module):
    """Final norm and linear classifier over visual tokens (BEiT paper, Sec. 2.3, Eq. 1).

    `init_std` and `init_cut` as in the encoder.
    """

    def __init__(
        self, *, width: int, vocab_size: int, init_std: float = 0.02, init_cut: float = 0.02
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.lm_head = nn.Linear(width, vocab_size)
        initialise(self, init_std, init_cut)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits (M, V) of the hidden patches of tokens (B, L, D), ordered as `ids[mask]`; mask (B, N)."""
        # The loss needs the hidden patches only, and the vocabulary is the widest layer of all.
        hidden = tokens[:, 1:][mask]  # (M, D)
        return self.lm_head(self.norm(hidden))  # (M, V)


class ClassHead(nn.Module):
    """Classifier over whole images (BEiT paper, Sec. 2.6).

    `pooling`: "mean" of the patches, then `fc_norm` (CLS is left out), or "cls", the CLS token after `norm`.
    The classifier's initial weights are multiplied by `init_scale`, so that all classes begin alike.
    Raises ConfigError for another pooling.
    """

    def __init__(
        self, *, width: int, classes: int, pooling: Pooling = "mean", init_scale: float = 0.001
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ConfigError(f"stage.pooling={pooling}: set one of {', '.join(get_args(Pooling))}")
        self.pooling = pooling
        norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc_norm = norm if pooling == "mean" else None
        self.norm = norm if pooling == "cls" else None
        self.head = nn.Linear(width, classes)
        initialise(self, std=0.02, cut=2.0)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, C) of tokens (B, L, D)."""
        if self.fc_norm is not None:
            return self.head(self.fc_norm(tokens[:, 1:].mean(1)))
        assert self.norm is not None
        return self.head(self.norm(tokens[:, 0]))
