"""What each of two processes does in the test of batch norm over ranks; importable by a spawned process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit_pretrain.models.batch_norm import BatchNorm

CHANNELS = 5
# Images on each rank, and the size of their maps. A map of one pixel is what pooling to a single bin leaves.
CASES = {
    "halves": ((2, 2), (3, 7)),
    "unequal": ((3, 1), (7, 4)),
    "one pixel": ((1, 1), (1, 1)),
    "in bfloat16": ((3, 1), (7, 4)),
}


def batch(case: str) -> tuple[Tensor, Tensor]:
    """All ranks' images (B, C, H, W), far from zero mean and unit spread, and what their outputs are weighted with."""
    shares, size = CASES[case]
    generator = torch.Generator().manual_seed(3)
    offset = torch.linspace(-4, 4, CHANNELS)[:, None, None]
    image = offset + (1 + offset.abs()) * torch.randn(sum(shares), CHANNELS, *size, generator=generator)
    weight = torch.randn(image.shape, generator=generator)
    dtype = torch.bfloat16 if case == "in bfloat16" else torch.float64
    return image.to(dtype), weight.to(dtype)


def learn(norm: nn.Module, case: str, part: slice) -> dict[str, Any]:
    """Output, gradients and statistics after two passes over a part of the batch."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    norm.to(torch.float32 if case == "in bfloat16" else torch.float64).train()
    images, weights = (whole[part] for whole in batch(case))
    found: dict[str, Any] = {}
    for factor in (1, 2):  # the statistics of the second pass come on top of those of the first
        image = (factor * images).requires_grad_()
        out = norm(image)
        (out * weights).sum().backward()
        found |= {"output": out.detach(), "image": image.grad}
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return {**found, "gradients": gradients, "buffers": dict(norm.named_buffers())}


def work(rank: int, folder: Path) -> None:
    """Every case, on this rank's share of the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for case, (shares, _) in CASES.items():
        start = sum(shares[:rank])
        found[case] = learn(BatchNorm(CHANNELS), case, slice(start, start + shares[rank]))
    try:  # of an accelerator torch takes care, which says that this is none
        BatchNorm(CHANNELS, device="meta")(torch.ones(1, CHANNELS, 2, 2, device="meta"))
    except ValueError as error:
        found["elsewhere"] = str(error)
    norm = BatchNorm(CHANNELS).eval()  # needs no other rank: only rank 0 asks
    if rank == 0:
        found["alone"] = norm(torch.ones(1, CHANNELS, 2, 2))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
