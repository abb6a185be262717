"""Small run folders as a training would leave them, for tests that start from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import compose
from beit_pretrain.folder import plain

DIGITS_TOKENIZER = [
    "stage=tokenizer",
    "experiment=digits_tokenizer",
    "tokenizer.vocab_size=16",
    "tokenizer.code_dim=4",
    "tokenizer.hidden=8",
]


def save_run(folder: Path, overrides: list[str], **preprocessing: Any) -> Path:
    """A run folder with the untrained weights of these overrides."""
    cfg = compose(overrides)
    stage = build_stage(cfg)
    normalize = plain(cfg)["data"]["normalize"]
    checkpoint = {
        "state_dict": {k: v for k, v in stage.state_dict().items() if k.split(".")[0] not in stage.frozen},
        "beit_pretrain": record.make_record(plain(cfg), {**normalize, **preprocessing}, {}),
    }
    (folder / "checkpoints").mkdir(parents=True)
    files.write(folder / "checkpoints" / "last.ckpt", checkpoint)
    return folder


def save_tokenizer(folder: Path) -> Path:
    return save_run(folder, DIGITS_TOKENIZER)


def save_pretrained(folder: Path, tokenizer: Path) -> Path:
    return save_run(folder, [*pretrain(tokenizer), "model.width=24", "model.depth=1"])


def pretrain(tokenizer: Path) -> list[str]:
    """Overrides of a sound pre-training."""
    return ["stage=pretrain", "experiment=digits_pretrain", f"tokenizer.checkpoint={tokenizer}"]
