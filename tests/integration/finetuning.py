"""What small fine-tunings in tests have in common; what they start from is `pretrain_run`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# The recipe may be tuned without a test that hangs on it.
_OWN = [
    "stage.smoothing=0.1",
    "stage.optim.lr=4e-3",
    "stage.optim.min_lr=1e-5",
    "stage.optim.betas=[0.9,0.98]",
    "stage.optim.layer_decay=0.75",
    "stage.optim.clip=3.0",
]
_LEAN = [
    "stage.optim.warmup_epochs=0",
    "trainer.evaluate_every=1",
    "trainer.accelerator=cpu",
    "~callbacks.knn",
    "~callbacks.pictures",
    "~callbacks.throughput",
    "logger=csv",
]
SMALL_FINETUNE = [
    "stage=classify",
    "experiment=digits_finetune",
    "model.width=32",
    "model.heads=2",
    "model.depth=2",
    "batch_size=64",
    "stage.epochs=1",
    *_OWN,
    *_LEAN,
]


def paint(root: Path, *classes: str) -> None:
    """Folders of striped pictures, 20 x 28 pixels; the stripes are as wide as their class's name is long."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                stripes = np.arange(28) // (1 + len(name)) % 2 * 200.0
                pixels = np.clip(stripes[None, :, None] + rng.normal(20, 10, (20, 28, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")


def on_folders(root: str) -> list[str]:
    """Without a recipe: the checkpoint says what the encoder is like."""
    data = ["data=class_folders", f"data.root={root}", "data.workers=0", "batch_size=8"]
    return ["stage=classify", *data, "stage.epochs=1", "stage.views.rand_augment=null", *_LEAN]
