"""Run folders of the published sizes with random weights under which everything matters, for slow tests."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oracles import strengthen

from beit_pretrain.build import make
from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import compose
from beit_pretrain.folder import plain
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.models.upernet import SegmentationHead

DATA = {
    "pretrain": ["data=digits", "tokenizer=dvae", "tokenizer.image_size=112", "masking.count=20"],
    "classify": ["data=digits"],
    "segment": ["data=image_masks", "data.root=scenes"],
}


@contextlib.contextmanager
def whole_run(folder: Path, stage: str, model: str, image_size: str) -> Iterator[Path]:
    """The run folder of `save_whole`; everything in `folder` goes when the block ends: gigabytes would pile up."""
    try:
        yield save_whole(folder / "run", stage, model, image_size)
    finally:
        shutil.rmtree(folder)


def save_whole(folder: Path, stage: str, model: str, image_size: str, *, seed: int = 0) -> Path:
    """A run folder of `model` (base, large) with a head over 8,192 ids, 1,000 classes or 150 classes."""
    cfg = compose([f"stage={stage}", f"model={model}", f"image_size={image_size}", *DATA[stage]])
    encoder = make(cfg.model)
    heads: dict[str, Any] = {
        "pretrain": lambda: MIMHead(width=encoder.width, vocab_size=8192),
        "classify": lambda: ClassHead(width=encoder.width, classes=1000),
        "segment": lambda: SegmentationHead(width=encoder.width, channels=encoder.width, classes=150),
    }
    head = heads[stage]()
    strengthen(encoder, head, seed=seed)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    about = {**plain(cfg)["data"]["normalize"], "class_names": None}
    content = {"state_dict": state, "beit_pretrain": record.make_record(plain(cfg), about, {})}
    (folder / "checkpoints").mkdir(parents=True)
    files.write(folder / "checkpoints" / "last.ckpt", content)
    return folder
