"""Features of images after any block of a trained encoder, as a file of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import ConfigError
from beit_pretrain.tools.embeddings import WRITERS, check_ending
from beit_pretrain.tools.images import batches, count, device_of, find_images, list_unreadable
from beit_pretrain.tools.load import load
from beit_pretrain.wording import either, times

# From tokens (B, 1 + N, D), of which the first is CLS.
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda tokens: tokens[:, 1:].mean(1),  # (B, D)
    "cls": lambda tokens: tokens[:, 0],  # (B, D)
    "both": lambda tokens: torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1),  # (B, 2 D)
    "patches": lambda tokens: tokens[:, 1:],  # (B, N, D), row by row
}


def embed(
    checkpoint: str,
    images: Sequence[Path],
    *,
    out: Path,
    block: int | None,
    pooling: str,
    options: dict[str, Any],
    batch_size: int,
    device: str,
) -> int:
    """Write the features of images to `out`, .npz or .parquet; 1 if an image cannot be read, else 0.

    They are the tokens that leave a block, pooled, without any norm, as kNN takes them too. `block` counts from 0, or
    from the end if it is negative; None is the last. `options` are those of `load`. Raises BeitError if the
    checkpoint, the device, the images as a whole or `out` cannot be used, before anything is written.
    """
    where = device_of(device)
    check_ending(out)
    if pooling not in POOLINGS:
        raise ConfigError(f"--pooling {pooling}: set {either(list(POOLINGS))}")
    paths = [path for path, _ in find_images(images)]
    loaded = load(checkpoint, device=where, **options)
    encoder, preprocess = loaded.encoder, loaded.preprocess
    number = block_number(block, encoder.depth)
    facts = {
        "block": number,
        "pooling": pooling,
        "checkpoint": files.weight_hash(encoder.state_dict()),
        "image_size": list(preprocess.image_size),
    }
    unreadable: list[str] = []
    shape: tuple[int, ...] = ()
    print(
        f"{count(len(paths))}, block {number} of 0..{encoder.depth - 1}, {times(preprocess.image_size)} pixels",
        flush=True,
    )
    progress = Progress(console=Console(stderr=True), transient=True)
    with ExitStack() as stack, torch.inference_mode(), progress:
        write = None
        task = progress.add_task("", total=len(paths))
        for found, pixels in batches(paths, preprocess.crop, size=batch_size, unreadable=unreadable):
            (tokens,) = encoder.features(preprocess.normalize(pixels.to(where)), [number])  # (B, 1 + N, D)
            features = POOLINGS[pooling](tokens.float()).contiguous().cpu().numpy()  # and the rest is let go
            if write is None:  # until now a file of before stayed what it was
                shape = features.shape[1:]
                write = stack.enter_context(WRITERS[out.suffix](out, shape, facts))
            write([str(path) for path in found], features)
            progress.advance(task, len(found))
    read = count(len(paths) - len(unreadable))
    print(f"{read} embedded" + (f" as {times(shape)} float32, written to {out}" if shape else ""))
    return list_unreadable(unreadable)


def block_number(asked: int | None, depth: int) -> int:
    """The block's number from 0."""
    number = depth - 1 if asked is None else asked + depth * (asked < 0)
    if not 0 <= number < depth:
        raise ConfigError(
            f"--block {asked}: this encoder has {depth}; set 0 to {depth - 1}, or -{depth} to -1 from the end"
        )
    return number
