"""What each of two processes does in the test of the worst images over ranks; importable by a spawned process."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from beit_pretrain.stages.worst import WorstImages

CLASSES = ["earth", "water", "air"]
# Sample number to wrong pixels of 100; 3, 8 and 11 are alike, of the rest each is as bad as its number is low.
OFFERED = {number: 90 - 5 * number for number in range(14)} | {3: 40, 8: 40, 11: 40}


def offer(worst: WorstImages, sample: int, wrong: int, labelled: int = 100) -> None:
    """An image of 10 x 30 pixels of whose labelled ones, all earth, so many are taken for water."""
    truth = torch.full((300,), 255, dtype=torch.uint8)
    truth[:labelled] = 0
    predicted = torch.zeros(300, dtype=torch.uint8)
    predicted[:wrong] = 1
    image = torch.full((3, 10, 30), sample, dtype=torch.uint8)
    worst.offer(sample, image, truth.view(10, 30), predicted.view(10, 30), len(CLASSES))


# Sample number to wrong pixels of 100; 3, 8 and 11 are alike, of the rest each is as bad as its number is low.
OFFERED = {number: 90 - 5 * number for number in range(14)} | {3: 40, 8: 40, 11: 40}


def work(rank: int, folder: Path) -> None:
    """Offers this rank's share of the images, twice as many on rank 0, and writes down the worst of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    worst = WorstImages()
    for sample, wrong in OFFERED.items():
        if (sample % 3 == 0) == bool(rank):
            offer(worst, sample, wrong)
    told = worst.write(folder / f"run-{rank}", CLASSES, "image {}".format)
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()
