"""What stands on the encoder.

Letters: B images, N patches, L = 1 + N tokens, D width, V vocabulary, M hidden patches of the whole batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from beit_pretrain.models.beit import initialise
from beit_pretrain.models.blocks import NORM_EPS


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
