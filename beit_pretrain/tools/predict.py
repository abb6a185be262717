"""The likeliest classes of images: on the terminal, and as a table."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len, set_cell_size

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.models.whole import Classifier
from beit_pretrain.tools.images import batches, count, device_of, find_images, list_unreadable
from beit_pretrain.tools.load import load
from beit_pretrain.wording import cell, printable, times

KEY = "CHECKPOINT"
NAME = 24  # columns of the terminal for a class
LONGER = 20  # columns by which a path may pass the usual ones before it sticks out by itself
Ranking = list[tuple[str, float]]  # classes and their probabilities, the likeliest first


def predict(
    checkpoint: str,
    images: Sequence[Path],
    *,
    top: int,
    out: Path | None,
    options: dict[str, Any],
    batch_size: int,
    device: str,
) -> int:
    """Print the `top` classes of each image, and write them to `out`, a CSV file; 1 if one cannot be read, else 0.

    `options` are those of `load`. Raises BeitError if the checkpoint, the device, the images as a whole or `out`
    cannot be used, before anything is written.
    """
    where = device_of(device)
    if out is not None and out.suffix != ".csv":
        raise ConfigError(f"--out {out}: set the name of a table, which ends with .csv")
    paths = [path for path, _ in find_images(images)]
    loaded = load(checkpoint, device=where, **options)
    model, preprocess = loaded.model, loaded.preprocess
    if not isinstance(model, Classifier):
        raise CheckpointError(
            f"{KEY}={checkpoint} is of stage={loaded.stage}, which gives no class to an image: give a run of "
            "stage=classify, or other weights that were fine-tuned to classes"
        )
    names = loaded.labels or [str(number) for number in range(model.head.head.out_features)]
    top = min(top, len(names))
    line = _lines(paths, names)
    unreadable: list[str] = []
    print(f"{count(len(paths))}, {len(names):,} classes, {times(preprocess.image_size)} pixels", flush=True)
    with ExitStack() as stack, torch.inference_mode():
        write = None
        for found, pixels in batches(paths, preprocess.crop, size=batch_size, unreadable=unreadable):
            share = model(preprocess.normalize(pixels.to(where))).float().softmax(1)  # (B, C)
            if out is not None and write is None:  # until now a table of before stayed what it was
                write = stack.enter_context(_table(out, top))
            for path, values, numbers in zip(found, *(t.tolist() for t in share.topk(top)), strict=True):
                ranking = [(names[number], value) for number, value in zip(numbers, values, strict=True)]
                print(line(path, ranking))
                if write is not None:
                    write(path, ranking)
    written = f", written to {out}" if write is not None else ""
    print(f"{count(len(paths) - len(unreadable))} classified{written}")
    return list_unreadable(unreadable)


def _lines(paths: Sequence[Path], names: Sequence[str]) -> Callable[[Path, Ranking], str]:
    """What writes an image's line, with its columns below those of the others; long paths stay whole."""
    lengths = sorted(cell_len(printable(path)) for path in paths)
    wide = min(lengths[-1], lengths[len(lengths) // 2] + LONGER)
    narrow = min(NAME, max(cell_len(printable(name)) for name in names))

    def line(path: Path, ranking: Ranking) -> str:
        told = printable(path)
        cells = [told + " " * (wide - cell_len(told))]
        for name, share in ranking:
            name = printable(name)
            short = name if cell_len(name) <= narrow else set_cell_size(name, narrow - 1) + "…"
            cells.append(f"{share:6.1%} {set_cell_size(short, narrow)}")
        return "  ".join(cells).rstrip()

    return line


@contextmanager
def _table(out: Path, top: int) -> Iterator[Callable[[Path, Ranking], None]]:
    """What writes a row of a CSV file, which is there under its name when the block has ended well."""
    with files.atomic(out) as file:
        text = codecs.getwriter("utf-8")(file, "surrogateescape")  # names of files as they are
        writer = csv.writer(text, lineterminator="\n")
        columns = (f"{column}_{rank}" for rank in range(1, top + 1) for column in ("class", "probability"))
        writer.writerow(["file", *columns])

        def write(path: Path, ranking: Ranking) -> None:
            shares = (value for name, share in ranking for value in (cell(name), f"{share:.6g}"))
            writer.writerow([cell(path), *shares])

        yield write
