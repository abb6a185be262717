"""What each of two processes does in the tests of evaluation over ranks; importable by a spawned process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from beit_pretrain.evaluation import ClassScore, MaskedScore, UnigramCounts

PATCHES, VOCABULARY = 6, 5
CLASSES = 7


def noted_ids(rank: int, step: int) -> Tensor:
    """The ids (B, N) of a step; the ranks' batches differ in size."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(VOCABULARY, (2 + rank, PATCHES), generator=generator)


def scored_batches(rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits (T, V), targets (T,) and mask (B, N) of a rank; rank 1 has a single image."""
    generator = torch.Generator().manual_seed(rank)
    batches: list[tuple[Tensor, Tensor, Tensor]] = []
    for size in ([4, 3], [1])[rank]:
        mask = torch.rand(size, PATCHES, generator=generator) < 0.5
        tokens = int(mask.sum())
        logits = torch.randn(tokens, VOCABULARY, generator=generator)
        batches.append((logits, torch.randint(VOCABULARY, (tokens,), generator=generator), mask))
    return batches


def classified_batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Logits (B, C) and labels (B,) of a rank, better than chance; rank 1 has a single image."""
    generator = torch.Generator().manual_seed(rank)
    batches: list[tuple[Tensor, Tensor]] = []
    for size in ([40, 23], [1])[rank]:
        labels = torch.randint(CLASSES - 1, (size,), generator=generator)  # the last class never occurs
        logits = torch.randn(size, CLASSES, generator=generator) + nn.functional.one_hot(labels, CLASSES)
        batches.append((logits, labels))
    return batches


class Counting(nn.Module):
    """A trained module that counts, as DDP wraps it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.unigram = UnigramCounts(patches=PATCHES, vocabulary=VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum()


def work(rank: int, folder: Path) -> None:
    """Counts four steps of which the second is refused, merging after the third and the last; then scores."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(Counting())
    unigram = model.module.unigram
    for step in range(4):
        model(torch.ones(1, 2)).backward()
        unigram.note(noted_ids(rank, step))
        if step == 1:
            unigram.drop()
        else:
            unigram.commit()
        if step >= 2:
            unigram.merge_ranks()
    score, only_rank_0 = MaskedScore(), MaskedScore()
    for batch in scored_batches(rank):
        score.update(*batch)
        if rank == 0:
            only_rank_0.update(*batch)
    classes = ClassScore(CLASSES)
    for batch in classified_batches(rank):
        classes.update(*batch)
    found = {"counts": unigram.counts, "both": score.result(), "only 0": only_rank_0.result()}
    found |= {"classes": classes.result(), "classes again": classes.result()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
