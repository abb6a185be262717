"""What each of two processes does in the test of segmentation scores over ranks; importable by a spawned process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from beit_pretrain.dense import SegmentationScore

CLASSES = 9


def labelled_images(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Predictions and label maps (H, W) of a rank, of unequal sizes; class 7 is only predicted, 8 never occurs."""
    generator = torch.Generator().manual_seed(rank)
    images: list[tuple[Tensor, Tensor]] = []
    for size in ([(13, 7), (5, 21), (8, 8)], [(3, 11)])[rank]:
        label_map = torch.randint(CLASSES - 2, size, generator=generator)
        guess = torch.randint(CLASSES - 1, size, generator=generator)
        predicted = torch.where(torch.rand(size, generator=generator) < 0.6, label_map, guess)
        label_map[torch.rand(size, generator=generator) < 0.2] = 255
        images.append((predicted.to(torch.uint8), label_map.to(torch.uint8)))
    return images


def work(rank: int, folder: Path) -> None:
    """Scores the images of a rank, asking twice."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    score = SegmentationScore(CLASSES)
    for images in labelled_images(rank):
        score.update(*images)
    torch.save([score.result(), score.result()], folder / f"{rank}.pt")
    dist.destroy_process_group()
