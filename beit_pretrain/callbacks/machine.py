"""What a process uses of its machine, and the worst of it over all processes."""

from __future__ import annotations

import resource
import sys

import torch
import torch.distributed as dist

UNKNOWN = -float("inf")  # what a process cannot say: the largest over all leaves it out
MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of ru_maxrss


def largest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over all ranks, which must call this at the same step."""
    if not dist.is_initialized():
        return values
    row = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(row, op=dist.ReduceOp.MAX)
    return row.tolist()


def peak_memory() -> float:
    """The most main memory that this process has had so far, in GB (10^9 bytes), without its data workers."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS / 1e9


def peak_gpu_memory(device: torch.device) -> float:
    """The most GPU memory that tensors have had since the last call, in GB (10^9 bytes)."""
    if device.type != "cuda":
        return UNKNOWN
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def gpu_idle(device: torch.device) -> float:
    """Share of about the last second in which the GPU ran nothing; unknown without nvidia-ml-py, or on a MIG part."""
    if device.type != "cuda":
        return UNKNOWN
    try:
        return 1 - torch.cuda.utilization(device) / 100
    except Exception:  # the driver's library has a type of its own for each way to fail; none may end a run
        return UNKNOWN
