"""Run folders as a fine-tuning would leave them, for tests that start from or score a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oracles import strengthen

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import compose
from beit_pretrain.folder import plain

DIGITS = [str(digit) for digit in range(10)]
TINY = ["model=micro", "model.width=24", "model.depth=2", "image_size=32"]


def save_classifier(folder: Path, *overrides: str, classes: Sequence[str] = DIGITS, seed: int = 0) -> Path:
    """A run folder with random weights under which everything matters; the average's are others."""
    cfg = compose(["stage=classify", "data=digits", *TINY, *overrides])
    stage: Any = build_stage(cfg, classes)
    strengthen(stage.encoder, stage.head, seed=seed)
    if stage.ema is not None:
        strengthen(*stage.ema.module.values(), seed=seed + 1)
    about = {**plain(cfg)["data"]["normalize"], "class_names": list(classes)}
    checkpoint = {
        "state_dict": stage.state_dict(),
        "beit_pretrain": record.make_record(plain(cfg), about, {}),
    }
    (folder / "checkpoints").mkdir(parents=True)
    files.write(folder / "checkpoints" / "last.ckpt", checkpoint)
    return folder
