"""The images that a tool is given, as files and folders, and the device it works on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from beit_pretrain.data.decode import decode
from beit_pretrain.data.folder import is_image
from beit_pretrain.devices import ACCELERATORS, accelerator
from beit_pretrain.errors import BeitError, DataError


def device_of(asked: str) -> torch.device:
    """The device behind --device; BeitError if it is unknown or not there."""
    if asked not in ACCELERATORS:
        raise BeitError(f"--device {asked}: set one of {', '.join(ACCELERATORS)}")
    kind = accelerator(asked)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, True):
        raise BeitError(f"--device {asked}, but there is no such GPU here: set it to auto or cpu")
    return torch.device(kind)


def find_images(given: Sequence[Path], without: tuple[str, ...] = ()) -> Iterator[tuple[Path, Path]]:
    """Paths of images as given or below a folder, by name, and each without that folder.

    Below folders, files that end with one of `without` (earlier results) are passed over. DataError for a folder
    without images.
    """
    for entry in given:
        if not entry.is_dir():
            yield entry, Path(entry.name)
            continue
        below = sorted(
            path
            for path in entry.rglob("*")
            if is_image(os.fsencode(path.name))
            and not (without and path.name.endswith(without))
            and path.is_file()
        )
        if not below:
            raise DataError(f"{entry} holds no images: give a folder that does, or files")
        yield from ((path, path.relative_to(entry)) for path in below)


def read_image(path: Path) -> Tensor:
    """The picture as (3, H, W) uint8 RGB; DataError, which names the file, if it cannot be read."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def count(images: int) -> str:
    return f"{images:,} image{'' if images == 1 else 's'}"
