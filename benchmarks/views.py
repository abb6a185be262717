"""Images a second of one core, from JPEG files to batches of pre-training:  python benchmarks/views.py

- The original's order of operations with Pillow: the whole picture jittered, flipped, cut at two sizes, floats.
- `TwoViews` with the jitter left to the device, and with all of it on the CPU.
- What cannot be avoided for exact pixels: decoding and two resizes of the same boxes, without a loader.
- Reading from shards beside reading from memory.

CPU time of this process and its one worker, taking turns; the median of the rounds and of their ratios.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_images import describe, make_images
from measuring import Costs, faster, interleaved, machine, median, spread, table
from PIL import Image, ImageEnhance
from small_shards import write_shards
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from beit_pretrain.data.dataset import ViewDataset
from beit_pretrain.data.folder import Folder
from beit_pretrain.data.jitter import draw_jitter
from beit_pretrain.data.sampler import Key, ResumableLoader, mix
from beit_pretrain.data.shards import ShardSource
from beit_pretrain.data.sources import Source, digest
from beit_pretrain.data.transforms import TwoViews, crop_box, resize
from beit_pretrain.masking import BlockwiseMask

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain_masks import PlainBlockwiseMask  # pyright: ignore[reportMissingImports]

ROUNDS, PASSES = 5, 4
BATCH = 128  # as falls to a device in the recipe of base (16 devices)
IMAGE, TOKEN = (224, 224), (112, 112)
SCALE, RATIO, FLIP, JITTER = (0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.4
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

PILLOW = "the original's order, Pillow"
DEFERRED, WHOLE = "TwoViews, jitter on the device", "TwoViews, all on the CPU"
CEILING = "decoding and two resizes"
SHARDS, MEMORY = "from shards", "from memory"


class PillowViews(Dataset[tuple[Tensor, ...]]):
    """Two views as the BEiT authors make them, with the draws of `TwoViews`: same boxes, flips and factors."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.mask = PlainBlockwiseMask((14, 14), 75, 16, 0.3)

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        with self.paths[key.sample].open("rb") as file, Image.open(file) as opened:
            image = opened.convert("RGB")
        seed = mix(0, key.epoch, key.sample)
        rng = random.Random(seed)
        box = crop_box(rng, (image.height, image.width), SCALE, RATIO)
        flipped = rng.random() < FLIP
        jitter = draw_jitter(rng, JITTER)
        for step in jitter.order:
            image = ENHANCERS[step](image).enhance(jitter.factors[step])
        crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        if flipped:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        small = crop.resize(IMAGE[::-1], Image.Resampling.BICUBIC)
        token = crop.resize(TOKEN[::-1], Image.Resampling.LANCZOS)
        return (
            functional.normalize(_floats(small), [0.5] * 3, [0.5] * 3),
            0.8 * _floats(token) + 0.1,
            torch.from_numpy(self.mask(seed)).flatten(),
        )

    def collate(self, items: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [torch.stack(parts) for parts in zip(*items, strict=True)]


def _floats(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


class Memory(Source):
    """Files that were read beforehand."""

    def __init__(self, paths: list[Path]) -> None:
        self.files = [path.read_bytes() for path in paths]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def name(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return digest(*self.files)


def dataset(source: Source, *, deferred: bool) -> ViewDataset:
    view = TwoViews(
        image_size=IMAGE,
        token_image_size=TOKEN,
        mask=BlockwiseMask(grid=(14, 14), count=75),
        crop_scale=SCALE,
        crop_ratio=RATIO,
        flip=FLIP,
        jitter=JITTER,
        defer_jitter=deferred,
    )
    indices = np.arange(len(source))
    return ViewDataset(
        source=source, indices=indices, view=view, seed=0, held_out=False, max_bad=0.0, bad_log=None
    )


def loader(data: Any, count: int, passes: int) -> ResumableLoader:
    """All images so many times over, with one worker that stays, as in a training."""
    keys = [Key(sample, epoch) for epoch in range(passes) for sample in range(count)]
    batches = [keys[place : place + BATCH] for place in range(0, len(keys), BATCH)]
    return ResumableLoader(
        data, batch_sampler=batches, num_workers=1, collate_fn=data.collate, persistent_workers=True
    )


def exhaust(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def alone(data: ViewDataset, count: int) -> None:
    for sample in range(count):
        data[Key(sample, 0)]


def ceiling(files: list[bytes]) -> None:
    for sample, data in enumerate(files):
        with warnings.catch_warnings(action="ignore"):
            image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        rng = random.Random(mix(0, 0, sample))
        top, left, height, width = crop_box(rng, (image.shape[1], image.shape[2]), SCALE, RATIO)
        crop = image[:, top : top + height, left : left + width]
        resize(crop, IMAGE, "bicubic")
        resize(crop, TOKEN, "lanczos")


def rows(costs: Costs, names: list[str], base: str, images: int) -> list[list[str]]:
    return [
        [
            name,
            f"{1000 * median(costs, name) / images:.2f}",
            f"{images / median(costs, name):.0f}",
            f"{images / median(costs, name, 'wall'):.0f}",
            f"{faster(costs, name, base):.2f}",
            f"{spread(costs, name):.0%}",
        ]
        for name in names
    ]


def measure(paths: list[Path], shards: Path, *, rounds: int, passes: int) -> None:
    folder, memory = Folder(root=str(paths[0].parent)), Memory(paths)
    write_shards(shards, samples=len(paths), shards=4, ext="jpg", read=memory.read)
    count = len(paths)
    through: dict[str, Callable[[], None]] = {
        name: partial(exhaust, loader(data, count, passes))
        for name, data in {
            PILLOW: PillowViews(paths),
            DEFERRED: dataset(folder, deferred=True),
            WHOLE: dataset(folder, deferred=False),
            MEMORY: dataset(memory, deferred=True),
            SHARDS: dataset(ShardSource(root=str(shards)), deferred=True),
        }.items()
    }
    header = ["CPU ms per image", "images/s of a core", "images/s by the clock", "ratio", "spread"]
    interleaved(through, 1)  # workers start
    costs = interleaved(through, rounds)
    print("\nThrough a loader with one worker:\n")
    print(table(["from files", *header], rows(costs, [PILLOW, DEFERRED, WHOLE], PILLOW, passes * count)))
    print()
    print(table(["jitter on the device", *header], rows(costs, [MEMORY, SHARDS], MEMORY, passes * count)))
    direct = interleaved(
        {
            CEILING: lambda: ceiling(memory.files),
            DEFERRED: partial(alone, dataset(memory, deferred=True), count),
            WHOLE: partial(alone, dataset(memory, deferred=False), count),
        },
        rounds,
    )
    print("\nWithout a loader, from memory:\n")
    print(table(["", *header], rows(direct, [CEILING, DEFERRED, WHOLE], CEILING, count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs; else some are made")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders to make them from")
    parser.add_argument("--count", type=int, default=200, help="images that are made")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--passes", type=int, default=PASSES, help="over the images in a round with a worker")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = Path(temporary) / "images", Path(temporary) / "shards"
        shards.mkdir()
        if given.images is None:
            make_images(folder, count=given.count, photos=given.photos)
        else:
            folder = given.images
        paths = sorted(folder.glob("*.jpg"))
        print(machine("torch", "torchvision", "pillow"))
        print(describe(paths))
        measure(paths, shards, rounds=given.rounds, passes=given.passes)


if __name__ == "__main__":
    main()
