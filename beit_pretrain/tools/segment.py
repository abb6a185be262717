"""A trained segmentation on images of any size and kind: coloured over each image, and as numbers."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.dense import Sliding
from beit_pretrain.errors import CheckpointError, DataError
from beit_pretrain.label_maps import check_aspect, label_png, overlay
from beit_pretrain.models.whole import Segmenter
from beit_pretrain.tools.images import count, device_of, list_unreadable, outputs, read_image
from beit_pretrain.tools.load import Loaded, load
from beit_pretrain.wording import bracket, printable

KEY = "CHECKPOINT"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of --multi-scale: those of the published scores
ENDINGS = (".overlay.png", ".labels.png")
NAMED = 3  # classes in an image's line
# What a run's own prediction may ask of memory and time; the published scores have scales up to 1.75 and strides of
# two thirds of the crop.
LARGEST_SCALE, MOST_WINDOWS, DENSEST = 8, 1024, 32


def segment(
    checkpoint: str,
    images: Sequence[Path],
    *,
    out: Path,
    multi_scale: bool,
    whole: bool,
    alpha: float,
    options: dict[str, Any],
    device: str,
) -> int:
    """Write the overlay and the label map of each image below `out`; 1 if an image could not be read, else 0.

    `options` are those of `load`. Raises BeitError if the checkpoint, the device or the images as a whole cannot be
    used, before anything is written, and if a file cannot be written.
    """
    where = device_of(device)
    todo = outputs(images, out, ENDINGS)
    loaded = load(checkpoint, device=where, **options)
    model = loaded.model
    if not isinstance(model, Segmenter):
        raise CheckpointError(
            f"{KEY}={checkpoint} is of stage={loaded.stage}, which gives no class to a pixel: give a run of "
            "stage=segment"
        )
    names = loaded.labels or [str(i) for i in range(model.head.decode_head.conv_seg.out_channels)]
    # Whether the classes of its data set's files begin at 1 (0 is none).
    shift = bool(loaded.about["preprocessing"].get("reduce_zero_label"))
    sliding = _sliding(loaded, f"{KEY}={checkpoint}", multi_scale=multi_scale, whole=whole)
    print(f"{count(len(todo))}; {sliding.describe()}", flush=True)

    def scores(pixels: Tensor) -> Tensor:
        return model(loaded.preprocess.normalize(pixels)).float()

    unreadable = []
    for target, path in todo.items():
        try:
            image = _read(path)
        except DataError as error:
            unreadable.append(str(error))
            continue
        began = time.monotonic()
        label_map = sliding.predict(scores, image.to(where)).cpu().numpy()
        seconds = time.monotonic() - began
        _write(target, image, label_map, names, alpha=alpha, shift=shift)
        height, width = label_map.shape
        said = f"{height} x {width}, {seconds:.1f} s; {_largest(label_map, names)}"
        print(printable(f"{path}: {said}"), flush=True)
    print(f"{count(len(todo) - len(unreadable))} segmented, written to {out}")
    return list_unreadable(unreadable)


def _read(path: Path) -> Tensor:
    """The picture, (3, H, W) uint8; DataError, which names the file, if it cannot be read or is too long and thin."""
    image = read_image(path)
    try:
        check_aspect(*image.shape[1:])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return image


def _sliding(loaded: Loaded, given: str, *, multi_scale: bool, whole: bool) -> Sliding:
    """The prediction as the run has it, but for what is asked for here; of other programs with windows of its size."""
    node = loaded.about["config"]["stage"].get("predict")
    if node is None:
        trained = Sliding(crop=loaded.preprocess.image_size, patch_size=loaded.encoder.patch_size)
    else:
        trained = _trained(node, given)
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


def _trained(node: Any, given: str) -> Sliding:
    """The prediction of a run's configuration; CheckpointError if it is none, or one that no machine has room for."""
    try:
        sliding = Sliding(**{name: value for name, value in node.items() if name != "_target_"})
    except (TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{given} has a stage.predict that is none ({error}): give another checkpoint"
        ) from error
    sides = zip(sliding.stride, sliding.crop, strict=True)
    if (
        max(sliding.scales) > LARGEST_SCALE
        or sliding.windows > MOST_WINDOWS
        or any(step * DENSEST < side for step, side in sides)
    ):
        raise CheckpointError(
            f"{given} was made to predict with scales={bracket(sliding.scales)}, windows={sliding.windows} and stride="
            f"{bracket(sliding.stride)} of {bracket(sliding.crop)}, more than any needs: give another checkpoint"
        )
    return sliding


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
