"""Batch norm over the images of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of (B, C, H, W): with several ranks over the images of all of them, on any device.

    On accelerators torch's `nn.SyncBatchNorm` works it out; DDP refuses a module of that kind on the CPU, where it is
    worked out here. Alone, it is `nn.BatchNorm2d`.
    """

    # What the forward pass of nn.SyncBatchNorm asks of a module beyond nn.BatchNorm2d; None: all ranks.
    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        if input.device.type != "cpu":
            return nn.SyncBatchNorm.forward(self, input)  # pyright: ignore[reportArgumentType]
        per_channel = (1, -1, 1, 1)
        x = input.to(self.weight.dtype)  # in mixed precision 16 bits are too few to add up
        count = _SumOverRanks.apply(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = _SumOverRanks.apply(x.sum((0, 2, 3))) / count  # (C,)
        centred = x - mean.view(per_channel)
        variance = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count  # (C,)
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(per_channel) + self.bias.view(per_channel)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, which hold the unbiased variance."""
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum over all ranks too: each rank's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Any:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
