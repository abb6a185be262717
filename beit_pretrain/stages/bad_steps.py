"""The file that a refused step leaves behind: all that `beit-tools replay` needs to take it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from beit_pretrain.checkpoint import files


def keep_bad_step(
    run_dir: Path,
    *,
    step: int,
    rank: int,
    batches: Sequence[Any],
    state: Mapping[str, Tensor],
    record: Mapping[str, Any],
    precision: str,
) -> Path:
    """Write the micro-batches (named tuples of tensors) and weights of a step; returns the file."""
    path = run_dir / "bad_steps" / f"step-{step:08d}-rank{rank}.pt"
    files.write(
        path,
        {
            "beit_pretrain": dict(record),
            "state_dict": dict(state),
            "batches": [
                {k: v.cpu() for k, v in batch._asdict().items() if v is not None} for batch in batches
            ],
            "step": step,
            "rank": rank,
            "precision": precision,
        },
    )
    return path
