"""A trained segmentation on images of any size and kind: coloured over each image, and as numbers."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files, record
from beit_pretrain.dense import Sliding
from beit_pretrain.errors import CheckpointError, DataError
from beit_pretrain.label_maps import label_png, overlay
from beit_pretrain.origins import load_strictly
from beit_pretrain.stages.segment import Segment
from beit_pretrain.tools.images import count, device_of, list_unreadable, outputs, read_image

KEY = "CHECKPOINT"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of --multi-scale: those of the published scores
ENDINGS = (".overlay.png", ".labels.png")
NAMED = 3  # classes in an image's line


def segment(
    checkpoint: Path,
    images: Sequence[Path],
    *,
    out: Path,
    multi_scale: bool,
    whole: bool,
    alpha: float,
    device: str,
) -> int:
    """Write the overlay and the label map of each image below `out`; 1 if an image could not be read, else 0.

    Raises BeitError if the checkpoint, the device or the images as a whole cannot be used, before anything is
    written, and if a file cannot be written.
    """
    where = device_of(device)
    todo = outputs(images, out, ENDINGS)
    stage, shift = _load(checkpoint)
    stage.to(where)
    stage.sliding = _sliding(stage.sliding, multi_scale=multi_scale, whole=whole)
    print(f"{count(len(todo))}; {stage.sliding.describe()}", flush=True)
    unreadable = []
    for target, path in todo.items():
        try:
            image = read_image(path)
        except DataError as error:
            unreadable.append(str(error))
            continue
        began = time.monotonic()
        label_map = stage.predict(image.to(where)).cpu().numpy()
        seconds = time.monotonic() - began
        _write(target, image, label_map, stage.classes, alpha=alpha, shift=shift)
        height, width = label_map.shape
        print(
            f"{path}: {height} x {width}, {seconds:.1f} s; {_largest(label_map, stage.classes)}", flush=True
        )
    print(f"{count(len(todo) - len(unreadable))} segmented, written to {out}")
    return list_unreadable(unreadable)


def _load(path: Path) -> tuple[Segment, bool]:
    """The trained stage, and whether the classes of its data set's files begin at 1 (0 is none)."""
    saved = record.read(path, key=KEY)
    about = saved["beit_pretrain"]
    cfg = DictConfig(about["config"])
    if cfg.stage.name != "segment":
        raise CheckpointError(
            f"{KEY}={path} is of stage={cfg.stage.name}, which gives no class to a pixel: give a run of stage=segment"
        )
    cfg.stage.compile = False  # it would take longer than a few images
    stage = cast(Segment, build_stage(cfg, about["preprocessing"]["class_names"]))
    for part in ("encoder", "head"):
        load_strictly(getattr(stage, part), record.part(saved, part, key=KEY), f"{KEY}={path}")
    return stage.eval(), about["preprocessing"]["reduce_zero_label"]


def _sliding(trained: Sliding, *, multi_scale: bool, whole: bool) -> Sliding:
    """The prediction as the run has it, but for what is asked for here."""
    one_window = whole or trained.mode == "whole"
    return Sliding(
        crop=trained.crop,
        patch_size=trained.patch_size,
        mode="whole" if one_window else "slide",
        stride=None if one_window else trained.stride,
        scales=SCALES if multi_scale else trained.scales,
        flip=multi_scale or trained.flip,
        windows=trained.windows,
    )


def _write(
    target: Path, image: Tensor, label_map: np.ndarray, names: Sequence[str], *, alpha: float, shift: bool
) -> None:
    """Both files of an image (3, H, W); the numbers first, since a picture is what one looks at."""
    files.write_bytes(Path(f"{target}{ENDINGS[1]}"), label_png(label_map, len(names), shift=shift))
    buffer = io.BytesIO()
    overlay(image.permute(1, 2, 0).numpy(), label_map, names, alpha).save(buffer, "PNG")
    files.write_bytes(Path(f"{target}{ENDINGS[0]}"), buffer.getvalue())


def _largest(label_map: np.ndarray, names: Sequence[str]) -> str:
    pixels: Any = np.bincount(label_map.ravel(), minlength=len(names))
    order = [i for i in np.argsort(-pixels, kind="stable")[:NAMED] if pixels[i]]
    return ", ".join(f"{names[i]} {pixels[i] / label_map.size:.1%}" for i in order)
