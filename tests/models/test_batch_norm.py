"""Batch norm over ranks against torch's over the whole batch in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batch_norm_ranks import CASES, CHANNELS, batch, learn, work
from torch import nn
from torch.multiprocessing.spawn import spawn

from beit_pretrain.models.batch_norm import BatchNorm

# In bfloat16 the output is rounded, and gradients are summed in it.
TOLERANCE: dict[str, dict[str, Any]] = {"in bfloat16": {"rtol": 2e-2, "atol": 2e-2}}
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", [case for case, (shares, size) in CASES.items() if size != (1, 1)])
def test_alone_it_is_the_batch_norm_of_torch(case: str) -> None:
    everything = slice(None)
    ours, theirs = (learn(kind(CHANNELS), case, everything) for kind in (BatchNorm, nn.BatchNorm2d))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    norms = BatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS)
    for norm in norms:
        norm.load_state_dict(nn.BatchNorm2d(CHANNELS).state_dict() | ours["buffers"])
        norm.eval().to(ours["output"].dtype)
    image, _ = batch(case)
    assert torch.equal(norms[0](image), norms[1](image))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_all_their_images(case: str, ranks: list[dict[str, Any]]) -> None:
    whole = learn(nn.BatchNorm2d(CHANNELS), case, slice(None))
    parts = [rank[case] for rank in ranks]
    close = TOLERANCE.get(case, EXACT)
    for key in ("output", "image"):
        together = torch.cat([part[key] for part in parts])
        assert together.dtype == whole[key].dtype
        torch.testing.assert_close(together, whole[key], **close)
    for name, gradient in whole["gradients"].items():  # DDP sums those of the ranks
        torch.testing.assert_close(sum(part["gradients"][name] for part in parts), gradient, **close)
    for part in parts:
        torch.testing.assert_close(part["buffers"], whole["buffers"], rtol=1e-6, atol=1e-6)


def test_a_rank_that_evaluates_waits_for_no_other(ranks: list[dict[str, Any]]) -> None:
    expected = nn.BatchNorm2d(CHANNELS).eval()(torch.ones(1, CHANNELS, 2, 2))
    torch.testing.assert_close(ranks[0]["alone"], expected)


def test_on_an_accelerator_it_is_left_to_torch(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["elsewhere"].startswith("SyncBatchNorm expected input tensor to be on GPU")


def test_its_state_is_that_of_torch() -> None:
    ours, theirs = BatchNorm(CHANNELS).state_dict(), nn.BatchNorm2d(CHANNELS).state_dict()
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
