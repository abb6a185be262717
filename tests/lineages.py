"""Run folders that begin in one another as trainings would leave them, for tests of what they remember of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beit_pretrain.build import build_run
from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import compose
from beit_pretrain.folder import plain

TOKENIZER = [
    "stage=tokenizer",
    "experiment=digits_tokenizer",
    "tokenizer.vocab_size=16",
    "tokenizer.code_dim=4",
    "tokenizer.hidden=8",
]
PRETRAIN = ["stage=pretrain", "experiment=digits_pretrain", "model.width=24", "model.depth=2"]
ON_DIGITS = ["data=digits", "batch_size=64"]
CPU = ["data.workers=0", "trainer.accelerator=cpu", "logger=csv", "~callbacks.progress"]


def leave(folder: Path, *overrides: str, step: int = 7) -> dict[str, Any]:
    """Make `folder` the run of these overrides after `step` updates that changed nothing; returns its record."""
    cfg = compose([*overrides, *CPU, f"runs={folder.parent}", f"name={folder.name}"])
    stage, _, _, _ = build_run(cfg, plain(cfg))
    state = {k: v for k, v in stage.state_dict().items() if k.split(".")[0] not in stage.frozen}
    about = {**stage.record, "frozen": {name: stage.frozen_hash(name) for name in stage.frozen}}
    content = {
        "state_dict": state,
        "global_step": step,
        "epoch": 1,
        "beit_pretrain": {**about, "held_out": {}},
    }
    files.write(folder / "checkpoints" / "last.ckpt", content)
    return record.read(folder, key="folder")["beit_pretrain"]


def leave_pretrained(folder: Path, tokenizer: Path) -> dict[str, Any]:
    """A pre-training and, if it is not there yet, the training of its tokenizer; returns the former's record."""
    if not tokenizer.exists():
        leave(tokenizer, *TOKENIZER)
    return leave(folder, *PRETRAIN, f"tokenizer.checkpoint={tokenizer}")
