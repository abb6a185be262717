"""The gradients of an update, whole or in shares on the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def scale_and_clip(optimizer: torch.optim.Optimizer, factor: Tensor | None, largest: float | None) -> Tensor:
    """Multiply all gradients with `factor`, then bring their norm to at most `largest`; None leaves them as they are.

    Returns the norm of all before clipping, the same on every rank.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    if factor is not None:
        for grad in grads:
            grad.mul_(factor.to(grad.dtype))
    norm = nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):  # what this rank's shares contribute
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(params, largest or float("inf"), norm)
    return norm
