"""A discrete VAE that learns its own visual tokens.

Letters: B images, N = rows * cols visual tokens, T the side of the view, V vocabulary, C code width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from beit_pretrain.errors import ConfigError
from beit_pretrain.tokenizer import TrainableTokenizer
from beit_tokenizers.views import check_view, size_of

MOST_LAYERS, MOST_BLOCKS = 10, 256  # 1,024 pixels per token; blocks cost memory and time each


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a 1x1 beside an identity."""

    def __init__(self, *, hidden: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class DVae(TrainableTokenizer):
    """Convolutions to V logits per position, a Gumbel-softmax over the codebook, convolutions back to pixels.

    The relaxation is that of DALL-E (arXiv 2102.12092, Sec. 2.1 and App. A.2). `layers` convolutions of
    stride 2 (2**layers pixels per token), `blocks` residual blocks on either side, V codes of `code_dim`. The
    temperature falls on a cosine from `temperature_start` to `temperature_end` over `temperature_steps`
    optimiser steps, by default 80% of the training.

    A code whose running share of the positions (average over about `use_window` steps) lies below
    `dead_below` of an even share 1 / V is dead: every `use_window` steps it becomes a slightly changed copy
    of a code in use, drawn in proportion to that use. This ends with the annealing, so that the last steps
    part the copies from their models.
    """

    use: Tensor
    pending: Tensor

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        vocab_size: int = 8192,
        code_dim: int = 512,
        hidden: int = 256,
        layers: int = 3,
        blocks: int = 1,
        temperature_start: float = 1.0,
        temperature_end: float = 1 / 16,
        temperature_steps: int | None = None,
        kl_weight: float = 0.0,
        straight_through: bool = False,
        use_window: int = 100,
        dead_below: float = 0.03,
    ) -> None:
        super().__init__()
        _check(temperature_start, temperature_end, temperature_steps, vocab_size, use_window, layers, blocks)
        self.vocab_size = vocab_size
        self.stride = 2**layers
        self.image_size = size_of(image_size, self.stride)
        self.temperature_start = temperature_start
        self.temperature_end = temperature_end
        self.temperature_steps = temperature_steps
        self.annealing = temperature_steps or 0  # optimiser steps; see `plan`
        self.kl_weight = kl_weight
        self.straight_through = straight_through
        self.use_window = use_window
        self.dead_below = dead_below

        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for layer in range(layers):
            down += [nn.Conv2d(hidden if layer else 3, hidden, 4, stride=2, padding=1), nn.ReLU()]
            # At full size only the three colours: `hidden` channels there would be half of all the work.
            colours = 3 if layer == layers - 1 else hidden
            up += [nn.ReLU(), nn.ConvTranspose2d(hidden, colours, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(*down, *(ResidualBlock(hidden=hidden) for _ in range(blocks)))
        self.to_logits = nn.Conv2d(hidden, vocab_size, 1)
        self.codebook = nn.Parameter(torch.randn(vocab_size, code_dim))
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, hidden, 1),
            *(ResidualBlock(hidden=hidden) for _ in range(blocks)),
            *up,
        )
        self.register_buffer("use", torch.full((vocab_size,), 1 / vocab_size))
        # Always zero when a checkpoint is written, which is after an optimiser step.
        self.register_buffer("pending", torch.zeros(vocab_size), persistent=False)

    def plan(self, total_steps: int) -> None:
        if self.temperature_steps is None:
            self.annealing = round(0.8 * total_steps)

    def temperature(self, step: int) -> float:
        """The relaxation's temperature at an optimiser step."""
        done = min(step / self.annealing, 1.0) if self.annealing else 1.0
        swing = 0.5 * (self.temperature_start - self.temperature_end)
        return self.temperature_end + swing * (1 + math.cos(math.pi * done))

    def logits(self, image: Tensor) -> Tensor:
        """Scores (B, V, rows, cols) of images (B, 3, T, T) in [0, 1]."""
        check_view(image, self.image_size)
        return self.to_logits(self.encoder((image - 0.5) / 0.5))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        # Ids must not depend on the precision of the trainer.
        with torch.autocast(image.device.type, enabled=False):
            return self.logits(image.float()).argmax(1).flatten(1)  # (B, N)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return self._paint(F.embedding(ids.view(-1, *self.grid), self.codebook).permute(0, 3, 1, 2))

    def _paint(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, T, T) in [0, 1] of codes (B, C, rows, cols)."""
        return (self.decoder(codes) * 0.5 + 0.5).clamp(0, 1)

    def loss(self, image: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the picture in [-1, 1] plus `kl_weight` times the KL divergence to even use.

        The divergence is in nats per position. In training mode the codes are drawn with torch's global
        generator; in evaluation mode each position takes its best code, as pre-training will see it.
        """
        logits = self.logits(image).float()  # (B, V, rows, cols)
        tau = self.temperature(step)
        if self.training:
            weights = F.gumbel_softmax(logits, tau=tau, hard=self.straight_through, dim=1)
        else:
            weights = F.one_hot(logits.argmax(1), self.vocab_size).permute(0, 3, 1, 2).to(logits.dtype)
        codes = F.conv2d(
            weights.to(self.codebook.dtype), self.codebook.t()[:, :, None, None]
        )  # (B, C, rows, cols)
        recon = F.mse_loss(self.decoder(codes).float(), (image - 0.5) / 0.5)
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * log_q).sum(1).mean() + math.log(self.vocab_size)

        counts = torch.bincount(logits.argmax(1).flatten(), minlength=self.vocab_size)
        if self.training:
            self.pending += counts
        logs = {
            "recon": recon.detach(),
            "kl": kl.detach(),
            "temperature": torch.tensor(tau),
            "perplexity": _perplexity(counts),
            "codebook_use": (self.use >= self.dead_below / self.vocab_size).float().mean(),
        }
        return recon + self.kl_weight * kl, logs

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.pending)
        share = self.pending / self.pending.sum().clamp(min=1)
        self.use.lerp_(share, 1 / self.use_window)
        self.pending.zero_()
        if step < self.annealing and (step + 1) % self.use_window == 0:
            self._revive(step)

    def drop_pending(self) -> None:
        self.pending.zero_()

    def _revive(self, step: int) -> None:
        """Turn dead codes into changed copies of codes in use.

        All ranks hold the same statistics and the generator is seeded with the step, so they agree.
        """
        dead = (self.use < self.dead_below / self.vocab_size).nonzero().flatten()
        if not len(dead):
            return
        draw = torch.Generator().manual_seed(step)
        models = torch.multinomial(self.use.cpu(), len(dead), replacement=True, generator=draw).to(
            dead.device
        )
        noise = torch.randn(len(dead), self.codebook.shape[1], generator=draw).to(dead.device)
        self.codebook[dead] = self.codebook[models] + 0.1 * self.codebook.std() * noise
        weight, bias = self.to_logits.weight, self.to_logits.bias
        noise = torch.randn(len(dead), weight.shape[1], 1, 1, generator=draw).to(dead.device)
        weight[dead] = weight[models] + 0.1 * weight.std() * noise
        assert bias is not None
        bias[dead] = bias[models]


def _perplexity(counts: Tensor) -> Tensor:
    """How many evenly used codes would have the entropy of these counts."""
    share = counts / counts.sum()
    return torch.special.entr(share).sum().exp()


def _check(
    start: float,
    end: float,
    steps: int | None,
    vocab_size: int,
    use_window: int,
    layers: int,
    blocks: int,
) -> None:
    """Refuse settings that cannot be meant, all at once."""
    faults = []
    if not 0 < end <= start:
        faults.append(
            f"tokenizer.temperature_end={end} must lie between 0 and tokenizer.temperature_start={start}"
        )
    if steps is not None and steps < 0:
        faults.append(f"tokenizer.temperature_steps={steps} must be 0 (no annealing) or more, or null")
    if vocab_size < 2:
        faults.append(f"tokenizer.vocab_size={vocab_size} must be at least 2")
    for name, count, least, most in (("layers", layers, 1, MOST_LAYERS), ("blocks", blocks, 0, MOST_BLOCKS)):
        if not least <= count <= most:
            faults.append(f"tokenizer.{name}={count} must be {least} to {most}")
    if use_window < 1:
        faults.append(f"tokenizer.use_window={use_window} must be at least 1 step")
    if faults:
        raise ConfigError(faults)
