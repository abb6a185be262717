"""The images that a tool is given, as files and folders, and the device it works on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from beit_pretrain.cluster.ending import die_with_parent, kill, killed_worker
from beit_pretrain.data.decode import decode
from beit_pretrain.data.folder import walk
from beit_pretrain.data.workers import before_workers
from beit_pretrain.devices import ACCELERATORS, accelerator
from beit_pretrain.errors import BeitError, DataError, WorkerError
from beit_pretrain.wording import printable

READERS = 8  # processes at most
LIMIT = 600.0  # seconds without a batch after which storage counts as hanging


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

    Folders are walked as in training. Below them, files that end with one of `without` (earlier results) are passed
    over. DataError for a folder without images.
    """
    for entry in given:
        if not os.path.isdir(entry):
            yield entry, Path(entry.name)
            continue
        start = os.fsencode(entry)
        found = (Path(os.fsdecode(path)) for path in walk(start, start, set(), set(), key="IMAGES"))
        below = sorted(path for path in found if not (without and path.name.endswith(without)))
        if not below:
            raise DataError(f"{entry} holds no images: give a folder that does, or files")
        yield from ((entry / path, path) for path in below)


def outputs(given: Sequence[Path], out: Path, endings: tuple[str, ...]) -> dict[Path, Path]:
    """Each image by the path that its results begin with: below a given folder as it lies there.

    Results end with `endings`; below folders, earlier ones are passed over. Raises DataError if two images, or an
    image and a result, would share a file.
    """
    found: dict[Path, Path] = {}
    for path, below in find_images(given, without=endings):
        target = out / below.with_suffix("")
        other = found.setdefault(target, path)
        if os.path.realpath(other) != os.path.realpath(path):  # the same one may be given twice
            raise DataError(
                f"{other} and {path} would both become {target}{endings[0]}: let one of them go to another folder "
                "(--out), or rename it"
            )
    inputs = {os.path.realpath(path) for path in found.values()}
    for target in found:
        for result in (os.path.realpath(f"{target}{ending}") for ending in endings):
            if result in inputs:
                raise DataError(f"{result} is one of the images and would be written over: set another --out")
    return found


def read_image(path: Path) -> Tensor:
    """The picture as (3, H, W) uint8 RGB; DataError, which names the file, if it cannot be read."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


class _Crops(Dataset[Any]):
    """Crops of images by their paths: workers need not hold the list of all of them."""

    def __init__(self, crop: Callable[[Tensor], Tensor]) -> None:
        self.crop = crop

    def __getitem__(self, path: Path) -> tuple[Path, Tensor | str]:
        """The crop, or why there is none."""
        try:
            return path, self.crop(read_image(path))
        except DataError as error:
            return path, str(error)


def _collate(items: Sequence[tuple[Path, Tensor | str]]) -> tuple[list[Path], Tensor | None, list[str]]:
    crops = [(path, crop) for path, crop in items if isinstance(crop, Tensor)]
    together = torch.stack([crop for _, crop in crops]) if crops else None
    return [path for path, _ in crops], together, [fault for _, fault in items if isinstance(fault, str)]


def batches(
    paths: Sequence[Path], crop: Callable[[Tensor], Tensor], *, size: int, unreadable: list[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Images in their order, up to `size` at a time: paths, and `crop` of each (B, 3, H, W) uint8.

    If there are several batches, processes read ahead, two batches each. What cannot be read is left out, and
    `unreadable` gets its line. DataError where they give nothing for `LIMIT` seconds.
    """
    workers = min(READERS, usable_cores()) if len(paths) > size else 0
    if workers:
        before_workers()
    loader = DataLoader(
        _Crops(crop),
        size,
        sampler=paths,
        collate_fn=_collate,
        num_workers=workers,
        timeout=LIMIT if workers else 0,
        worker_init_fn=_begin,
    )
    loaded: Any = iter(loader)
    done = 0
    try:
        for found, pixels, faults in loaded:
            done += size
            unreadable += faults
            if found:
                yield found, pixels
    except RuntimeError as error:
        if killed_worker(error) is not None:
            raise WorkerError(
                "a process that reads images was killed (out of memory?): give a smaller --batch-size"
            ) from error
        if not str(error).startswith("DataLoader timed out"):
            raise
        kill(loaded._workers)
        among = paths[done : done + size]
        raise DataError(
            f"{printable(among[0])}, or one of the {len(among) - 1} after it, could not be read in {LIMIT:g} s: look "
            "at the storage that they lie on"
        ) from error


def _begin(worker: int) -> None:
    die_with_parent()


def usable_cores() -> int:
    """Cores that this process may use; a Slurm job has fewer than its node."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def list_unreadable(unreadable: Sequence[str]) -> int:
    """Print them at the end; the command's exit code."""
    if not unreadable:
        return 0
    print(f"{len(unreadable):,} could not be read:", *(f"  {printable(u)}" for u in unreadable), sep="\n")
    return 1


def count(images: int) -> str:
    return f"{images:,} image{'' if images == 1 else 's'}"
