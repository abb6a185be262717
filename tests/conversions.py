"""Trained models to convert, small and with weights under which everything matters, and a look at what was written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from classifiers import save_classifier
from PIL import Image
from pretrained import save_pretrained
from segmenters import save_segmenter
from sklearn.datasets import load_sample_image

from beit_pretrain.tools.convert import convert

TABLES = ["model.abs_pos=false", "model.heads=3"]
SHARED = [*TABLES, "model.rel_pos=shared"]
SEGMENT = [*TABLES, "model.depth=4", "stage.channels=24", "stage.blocks=[0,1,2,3]"]
SCALED = "model.layer_scale=0.1"

# Each stage, square and not, and every way to tell tokens' places and to pool.
MODELS: dict[str, Callable[[Path], Path]] = {
    "pretrain": lambda folder: save_pretrained(folder, *SHARED),
    "pretrain, not square": lambda folder: save_pretrained(
        folder, *SHARED, "image_size=[20,32]", "masking.count=16"
    ),
    "classify": lambda folder: save_classifier(folder, *TABLES),
    "classify, not square": lambda folder: save_classifier(folder, *TABLES, SCALED, "image_size=[20,52]"),
    "classify, cls": lambda folder: save_classifier(folder, *TABLES, SCALED, "stage.pooling=cls"),
    "classify, absolute positions": lambda folder: save_classifier(folder),
    "segment": lambda folder: save_segmenter(folder, *SEGMENT, "image_size=32"),
    "segment, not square": lambda folder: save_segmenter(folder, *SEGMENT, SCALED),
}


def saved(name: str, folder: Path) -> Path:
    """The run folder of one of MODELS, made once below `folder`."""
    run = folder / re.sub(r"\W+", "-", name)
    return run if run.exists() else MODELS[name](run)


def converted(source: Path, out: Path, to: str, **options: Any) -> str:
    return convert(str(source), out, to=to, **{"weights": "raw", "mean": None, "std": None, **options})


def converted_once(name: str, folder: Path, to: str) -> Path:
    """What one of MODELS became in a format, made once below `folder`."""
    source = saved(name, folder)
    out = folder / to / source.name
    if not out.exists():
        converted(source, out, to)
    return out


def snippet(folder: Path) -> str:
    """The code of a model card, for this folder."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1].replace('FOLDER = "."', f"FOLDER = {str(folder)!r}")


def photograph(folder: Path) -> Path:
    """photo.jpg, of odd sizes, in a folder."""
    path = folder / "photo.jpg"
    Image.fromarray(load_sample_image("china.jpg")[:301, :453]).save(path, quality=95)
    return path
