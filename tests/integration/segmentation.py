"""What small segmentations in tests have in common; what they start from is `pretrain_run`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from beit_pretrain.data.shapes import CLASSES, draw_scene

_FOLDERS = {"training": "training", "validation": "validation", "test": "validation"}  # folder: drawn as

# Crops of 48 x 64 pixels in 12 x 16 patches; scenes are smaller and larger than that.
SMALL_SEGMENT = [
    "stage=segment",
    "data=image_masks",
    "data.root=scenes",
    "data.source.reduce_zero_label=true",
    "data.workers=0",
    "image_size=[48,64]",
    "batch_size=8",
    "stage.epochs=2",
    "stage.channels=16",
    "stage.views.resize=[48,192]",
    "stage.optim.lr=2e-3",
    "stage.optim.warmup_steps=2",
    "trainer.evaluate_every=2",
    "trainer.accelerator=cpu",
    "~callbacks.throughput",
    "logger=csv",
]


def draw_scenes(root: Path, train: int = 24, val: int = 7, test: int = 0) -> None:
    """Some of the embedded scenes in the layout of image_masks; 0 is other, class c is c + 1."""
    for (split, drawn_as), count in zip(_FOLDERS.items(), (train, val, test), strict=True):
        for index in range(count):
            # The test's scenes are others than those of validation.
            scene = draw_scene(drawn_as, index + (100 if split == "test" else 0))
            for kind, pixels in zip(("images", "annotations"), scene, strict=True):
                folder = root / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(pixels)).save(folder / f"{index}.png")
    name_classes(root, CLASSES)


def name_classes(root: Path, names: tuple[str, ...]) -> None:
    (root / "classes.txt").write_text("\n".join(names) + "\n")
