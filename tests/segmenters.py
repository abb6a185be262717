"""Run folders as a segmentation would leave them, for tests that start from or score one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oracles import strengthen

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import compose
from beit_pretrain.folder import plain

PARTS = ["wall", "floor", "sky"]
TINY = ["model=micro", "model.width=24", "model.depth=2", "image_size=[32,40]", "stage.channels=8"]


def save_segmenter(folder: Path, *overrides: str, classes: Sequence[str] = PARTS, seed: int = 0) -> Path:
    """A run folder with random weights and statistics under which everything matters."""
    cfg = compose(["stage=segment", "data=image_masks", "data.root=scenes", *TINY, *overrides])
    stage: Any = build_stage(cfg, classes)
    strengthen(stage.encoder, stage.head, seed=seed)
    about = {**plain(cfg)["data"]["normalize"], "class_names": list(classes)}
    checkpoint = {
        "state_dict": stage.state_dict(),
        "beit_pretrain": record.make_record(plain(cfg), about, {}),
    }
    (folder / "checkpoints").mkdir(parents=True)
    files.write(folder / "checkpoints" / "last.ckpt", checkpoint)
    return folder
