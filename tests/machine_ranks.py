"""What each of two processes does in the test of the largest over ranks; importable by a spawned process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from beit_pretrain.callbacks.machine import UNKNOWN, largest

VALUES = [[0.25, 1.0, UNKNOWN, 0.5], [0.75, 0.5, UNKNOWN, UNKNOWN]]  # of each rank


def work(rank: int, folder: Path) -> None:
    """Writes down what this rank is told."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(largest(VALUES[rank], torch.device("cpu")), folder / f"{rank}.pt")
    dist.destroy_process_group()
