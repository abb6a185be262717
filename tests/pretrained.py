"""Run folders as a pre-training would leave them, with a tokenizer's, for tests that use or convert an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oracles import strengthen

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import compose
from beit_pretrain.folder import plain

TINY = [
    "model=micro",
    "model.width=24",
    "model.depth=2",
    "image_size=32",
    "masking.count=26",
    "masking.min_block=4",
]
TOKENIZER = [
    "tokenizer.image_size=32",
    "tokenizer.vocab_size=32",
    "tokenizer.hidden=8",
    "tokenizer.code_dim=4",
]


def save_tokenizer(folder: Path, *overrides: str) -> Path:
    """A run folder with a small dVAE of random weights: 4 x 4 pixels per token, as model=micro has patches."""
    cfg = compose(["stage=tokenizer", "data=digits", *TOKENIZER, "tokenizer.layers=2", *overrides])
    return _save(folder, cfg)


def save_pretrained(folder: Path, *overrides: str, seed: int = 0) -> Path:
    """A run folder with random weights under which everything matters, and the tokenizer's beside it."""
    tokenizer = folder.with_name(f"{folder.name}-tokenizer")
    if not tokenizer.exists():
        sizes = [o for o in overrides if o.startswith("image_size=")]
        save_tokenizer(tokenizer, *(o.replace("image_size", "tokenizer.image_size") for o in sizes))
    cfg = compose(["stage=pretrain", "data=digits", *TINY, f"tokenizer.checkpoint={tokenizer}", *overrides])
    return _save(folder, cfg, seed)


def _save(folder: Path, cfg: Any, seed: int | None = None) -> Path:
    stage: Any = build_stage(cfg)
    if seed is not None:
        strengthen(stage.encoder, stage.head, seed=seed)
    state = stage.state_dict()
    if seed is not None:
        state = {name: value for name, value in state.items() if not name.startswith("tokenizer.")}
    about = {**plain(cfg)["data"]["normalize"], "class_names": None}
    checkpoint = {"state_dict": state, "beit_pretrain": record.make_record(plain(cfg), about, {})}
    (folder / "checkpoints").mkdir(parents=True)
    files.write(folder / "checkpoints" / "last.ckpt", checkpoint)
    return folder
