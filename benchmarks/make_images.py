"""JPEGs like ImageNet's, from a few photographs:  python benchmarks/make_images.py OUT --count 200 --photos DIR

What decoding and cropping cost depends on a file's pixels and bytes. Those of ImageNet are mostly 500 x 375 and some
100 KB in the mean. Each image is a region of a photograph, mirrored by chance, rescaled, sharpened, with light noise,
at a quality of 88 to 97, 85% of them with halved chroma. What it lacks in bytes of its own target is made up by texture
whose amplitude falls with 1/f, as that of photographs. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import io
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

KILOBYTES = 90  # mean of the targets; files end up a little below or above
SPREAD = 0.35  # standard deviation of the targets' logarithm
SIDES = (500, 375)
LEAST = 256  # pixels on the shorter side of a photograph that is used
AMPLITUDES = [0.0, *np.geomspace(1.0, 48.0, 17).tolist()]  # of the texture, in levels


def photographs(folders: Iterable[Path] = ()) -> list[Image.Image]:
    """scikit-learn's two, those in scikit-image's package if it is there, and all in the folders."""
    from sklearn.datasets import load_sample_images

    found = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    spec = find_spec("skimage")
    packaged = [Path(str(spec.origin)).parent / "data"] if spec else []
    for folder in [*packaged, *folders]:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
            with Image.open(path) as image:
                if image.mode == "RGB" and min(image.size) >= LEAST:
                    found.append(image.copy())
    return found


def make_images(
    folder: Path, *, count: int, seed: int = 0, photos: Sequence[Path] = (), kilobytes: float = KILOBYTES
) -> list[Path]:
    """Write `count` files to the folder, each a function of the seed, its number and the photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = photographs(photos)
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(_image(np.random.default_rng([seed, number]), sources, kilobytes))
    return paths


def _image(rng: np.random.Generator, sources: Sequence[Image.Image], kilobytes: float) -> bytes:
    size = _size(rng)
    region = _region(rng, sources[rng.integers(len(sources))], size)
    sharp = region.filter(ImageFilter.UnsharpMask(radius=1.0, percent=60, threshold=0))
    pixels = np.asarray(sharp, np.float32) + rng.normal(0, 1.5, (size[1], size[0], 3))
    texture = _texture(rng, (size[1], size[0]))
    quality = int(rng.integers(88, 98))
    subsampling = "4:2:0" if rng.random() < 0.85 else "4:4:4"
    target = 1000 * kilobytes * np.exp(rng.normal(-(SPREAD**2) / 2, SPREAD))

    def encoded(amplitude: float) -> bytes:
        levels = np.clip(pixels + amplitude * texture, 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(levels).save(out, "JPEG", quality=quality, subsampling=subsampling)
        return out.getvalue()

    # Bytes grow with the amplitude: the least that reaches the target.
    place = bisect_left(AMPLITUDES, target, key=lambda amplitude: len(encoded(amplitude)))
    return encoded(AMPLITUDES[min(place, len(AMPLITUDES) - 1)])


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """(width, height): mostly 500 x 375, some upright, a tenth anything."""
    kind = rng.random()
    if kind < 0.1:
        width, height = rng.integers(300, 641, 2).tolist()
        return width, height
    return SIDES if kind < 0.75 else SIDES[::-1]


def _region(rng: np.random.Generator, photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A part of the photograph, resized to `size`: pixels of it are up to twice as large as they were, or smaller."""
    most = min(photo.width / size[0], photo.height / size[1])
    factor = most * rng.uniform(0.5, 1.0) if most > 0.5 else most
    width, height = factor * size[0], factor * size[1]
    left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    box = (left, top, left + width, top + height)
    region = photo.resize(size, Image.Resampling.LANCZOS, box=box)
    return region.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else region


def _texture(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) of standard deviation about 1: amplitudes that fall with 1/f, mostly grey."""
    rows, columns = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / max(shape))
    planes = []
    for _ in range(2):
        plane = np.fft.irfft2(np.fft.rfft2(rng.normal(size=shape)) * falling, s=shape)
        planes.append(plane / plane.std())
    grey, colour = planes
    return np.stack([grey + share * colour for share in (0.3, -0.15, -0.3)], axis=-1).astype(np.float32)


def describe(paths: Sequence[Path]) -> str:
    """Count, mean bytes and mean pixels in one line."""
    pixels = []
    for path in paths:
        with Image.open(path) as image:
            pixels.append(image.width * image.height)
    size = np.mean([path.stat().st_size for path in paths]) / 1000
    return f"{len(paths)} JPEGs, {size:.0f} KB and {np.mean(pixels) / 1e6:.3f} megapixels in the mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders with photographs")
    given = parser.parse_args()
    print(describe(make_images(given.out, count=given.count, seed=given.seed, photos=given.photos)))


if __name__ == "__main__":
    main()
