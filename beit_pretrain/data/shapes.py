"""Drawn scenes with label maps, made where they are used: segmentation without a download.

Every pixel is a function of (split, number): scalars come from Python's generator, noise from the hash of
`sampler`, and only operations that IEEE 754 rounds alike everywhere (+ - * / and comparisons) are used.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from beit_pretrain.data.label_folders import LabelFolders
from beit_pretrain.data.sampler import hashes, mix
from beit_pretrain.data.sources import digest
from beit_pretrain.errors import DataError

CLASSES = ("sky", "ground", "disc", "square", "triangle", "ring", "cross", "pole", "net", "ball")
SCENES = {"training": 1600, "validation": 200}
_OTHER = (
    0  # clutter, and pixels on an edge: what nobody labelled. Class c is c + 1 in the files, as in ADE20k
)
_SIDES = (64, 80, 96, 112)
_LIGHT, _MIDDLE, _DARK = 215, 150, 65  # levels of a colour's brightness
_FINE = 3  # samples of a pixel along each side
_MADE = "made.json"
_VERSION = 1  # of the pictures: another number for the slightest change
_SALT = 0x736861706573

Picture = np.ndarray  # (H, W, 3) float64, 0 to 255
Colour = np.ndarray  # (3,) float64
Place = np.ndarray  # (h, w) float64: one of a shape's own coordinates at every sample, from -1 to 1 inside it


class Shapes(LabelFolders):
    """Scenes of sky, ground and overlapping shapes, drawn into `root` in the layout of ADE20k if not there yet.

    1,600 to train on and 200 for validation, 64 to 112 pixels a side, ten classes. Tints say nothing about the
    class: form and texture do (a ball is a disc with dots, a net is see-through), for sky and ground also the
    place. Things are darker than what they lie on, so that a visual token tells texture rather than brightness.
    Raises DataError for a folder that holds something else.
    """

    def __init__(self, *, root: str) -> None:
        folder = Path(root).expanduser()
        _make(folder, root)
        super().__init__(root=root, classes="classes.txt", class_count=len(CLASSES), reduce_zero_label=True)
        found = {name: len(part) for name, part in self.splits.items()}
        if found != {"train": SCENES["training"], "val": SCENES["validation"]}:
            raise DataError(
                f"data.root={root}: scenes are missing, {found} are left; remove the folder and it is drawn again"
            )

    def fingerprint(self) -> str:
        return digest("shapes", str(_VERSION), super().fingerprint())


def _make(folder: Path, root: str) -> None:
    """Draws all scenes unless they lie there. A folder appears whole or not at all."""
    try:
        if _is_made(folder, root):
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):  # the ranks of a run draw once
            if not _is_made(folder, root):
                part = folder.parent / f".{folder.name}.part"
                shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
                write_shapes(part)
                part.rename(folder)
    except OSError as error:
        raise DataError(
            f"data.root={root}: the scenes cannot be drawn there ({error}); set data.root to a folder that can be "
            "written"
        ) from error


def _is_made(folder: Path, root: str) -> bool:
    """Whether the folder holds the scenes of this version. DataError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    mend = "set data.root to a folder that does not exist yet"
    made = folder / _MADE
    if not made.is_file():
        raise DataError(f"data.root={root} exists and holds no drawn scenes (no {_MADE}); {mend}")
    if made.read_text() != _stamp():
        raise DataError(f"data.root={root} holds other scenes than this version draws; remove it, or {mend}")
    return True


def _stamp() -> str:
    return json.dumps({"version": _VERSION, **SCENES}) + "\n"


def write_shapes(folder: Path) -> None:
    """All scenes as PNG files in the layout of ADE20k, the classes' names, and last the note that it is whole."""
    for split, count in SCENES.items():
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            image, label_map = draw_scene(split, index)
            # Barely compressed: noise does not get smaller, and it would take most of the time.
            for kind, pixels in (("images", image), ("annotations", label_map)):
                Image.fromarray(pixels).save(folder / kind / split / f"{index:05d}.png", compress_level=1)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (folder / _MADE).write_text(_stamp())


# --- one scene ----------------------------------------------------------------------------------------------


def draw_scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene's picture (H, W, 3) uint8 and its map (H, W) uint8: 0 for other, c + 1 for class c."""
    key = mix(_SALT, list(SCENES).index(split), index)
    rng = random.Random(key)
    size = _SIDES[_below(rng, len(_SIDES))], _SIDES[_below(rng, len(_SIDES))]
    picture, label_map = _background(rng, size, key)
    for number in range(4 + _below(rng, 4)):
        _paint(picture, label_map, _thing(rng, size), mix(key, number))
    rows, cols = _grid(size)
    down, right = _between(rng, -0.1, 0.1), _between(rng, -0.1, 0.1)
    light = 1 + down * (2 * rows / size[0] - 1) + right * (2 * cols / size[1] - 1)
    noise = (_noise((*size, 3), mix(key, 101)) - 0.5) * _between(rng, 4, 16)
    lit = picture * light[..., None] + noise
    return (np.clip(lit, 0, 255) + 0.5).astype(np.uint8), label_map


def _background(rng: random.Random, size: tuple[int, int], key: int) -> tuple[Picture, np.ndarray]:
    """Sky, smooth from one colour to another, over ground with a grain; and their label map."""
    rows, cols = _grid(size)
    sky, ground = _colour(rng, _LIGHT), _colour(rng, _LIGHT)
    change = np.array([_between(rng, -30, 30) for _ in range(3)])
    above = sky + change * (2 * rows / size[0] - 1)[..., None]
    cell = 2 + _below(rng, 3)  # pixels
    grain = np.repeat(np.repeat(_noise(size, mix(key, 100)), cell, 0), cell, 1)[: size[0], : size[1]]
    below = ground + (grain[..., None] - 0.5) * _between(rng, 60, 110)
    slope = _between(rng, -0.25, 0.25)
    horizon = size[0] * _between(rng, 0.25, 0.7) + slope * (cols - size[1] / 2)
    is_sky = rows < horizon
    label_map = np.where(is_sky, 1 + CLASSES.index("sky"), 1 + CLASSES.index("ground")).astype(np.uint8)
    return np.where(is_sky[..., None], above, below), label_map


class _Thing(NamedTuple):
    """One object: where it is, how large, how turned, and its colours."""

    kind: str  # a class, or "other"
    centre: tuple[float, float]  # row, column in pixels
    half: tuple[float, float]  # half its height and width in pixels, before it is turned
    turn: tuple[float, float]  # cosine and sine
    colour: Colour
    second: Colour


def _thing(rng: random.Random, size: tuple[int, int]) -> _Thing:
    kinds = (*CLASSES[2:], "other")
    kind = kinds[_below(rng, len(kinds))]
    centre = size[0] * _between(rng, 0.1, 0.9), size[1] * _between(rng, 0.1, 0.9)
    half = min(size) * _between(rng, 0.15, 0.28)
    aspect = _between(rng, 0.8, 1.25)
    steep = _between(rng, -0.4, 0.4)  # tangent of half the angle
    if kind == "pole":
        half_size, steep = (size[0] * _between(rng, 0.2, 0.45), _between(rng, 1.0, 1.7)), 0.15 * steep
    else:
        half_size = (half, half * aspect)
    turn = (1 - steep * steep) / (1 + steep * steep), 2 * steep / (1 + steep * steep)
    first = _DARK if kind in ("pole", "net") else _MIDDLE
    return _Thing(kind, centre, half_size, turn, _colour(rng, first), _colour(rng, _DARK))


_OUTLINES: dict[str, Callable[[Place, Place], np.ndarray]] = {
    "disc": lambda v, u: u * u + v * v < 1,
    "ball": lambda v, u: u * u + v * v < 1,
    "square": lambda v, u: np.maximum(abs(u), abs(v)) < 0.9,
    "triangle": lambda v, u: (2 * abs(u) < v + 1) & (v < 1),
    "ring": lambda v, u: (u * u + v * v < 1) & (u * u + v * v > 0.36),
    "cross": lambda v, u: (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 1),
    "pole": lambda v, u: (abs(u) < 1) & (abs(v) < 1),
    "net": lambda v, u: (abs(u) < 1) & (abs(v) < 1),
    "other": lambda v, u: abs(u) + abs(v) < 1,
}


# Where a surface has its second colour; other kinds are plain.
_MARKS: dict[str, Callable[[Place, Place], np.ndarray]] = {
    "ball": lambda v, u: (_wave(3.5 * u) - 0.5) ** 2 + (_wave(3.5 * v) - 0.5) ** 2 < 0.09,
    "square": lambda v, u: _wave(5 * (u + v)) < 0.5,
    "triangle": lambda v, u: _wave(5 * v) < 0.5,
    "ring": lambda v, u: _wave(5 * u) < 0.35,
    "cross": lambda v, u: (_wave(4 * u) < 0.5) ^ (_wave(4 * v) < 0.5),
}


def _paint(picture: Picture, label_map: np.ndarray, thing: _Thing, key: int) -> None:
    """Lays an object over the scene. Pixels that it covers by about half belong to nobody."""
    (top, left), (v, u) = _own_coordinates(picture.shape[:2], thing)
    inside = _OUTLINES[thing.kind](v, u)
    solid = inside
    if thing.kind == "net":
        solid = inside & ((_wave(2.5 * u) < 0.3) | (_wave(2.5 * v) < 0.3))
    covered = _pixels(inside)  # samples of each pixel, 0 to 9
    opacity = _pixels(solid) / _FINE**2
    shade = 1 + 0.15 * u[1::_FINE, 1::_FINE] + 0.15 * v[1::_FINE, 1::_FINE]
    marks = _MARKS.get(thing.kind)
    share = 0.0 if marks is None else (_pixels(marks(v, u)) / _FINE**2)[..., None]
    colours = (share * thing.second + (1 - share) * thing.colour) * shade[..., None]
    if thing.kind == "other":
        colours = colours + 90 * (_noise(opacity.shape, key) - 0.5)[..., None]
    place = slice(top, top + covered.shape[0]), slice(left, left + covered.shape[1])
    picture[place] += opacity[..., None] * (colours - picture[place])
    label = 1 + CLASSES.index(thing.kind) if thing.kind in CLASSES else _OTHER
    label_map[place][covered > 3] = _OTHER
    label_map[place][covered > 5] = label


def _own_coordinates(size: tuple[int, ...], thing: _Thing) -> tuple[tuple[int, int], tuple[Place, Place]]:
    """The first row and column of the pixels around an object, and its own coordinates at their samples."""
    (y, x), (half_height, half_width), (cosine, sine) = thing.centre, thing.half, thing.turn
    reach_y = abs(sine) * half_width + cosine * half_height + 1
    reach_x = cosine * half_width + abs(sine) * half_height + 1
    top, bottom = max(0, int(y - reach_y)), min(size[0], int(y + reach_y) + 1)
    left, right = max(0, int(x - reach_x)), min(size[1], int(x + reach_x) + 1)
    down = top + (np.arange((bottom - top) * _FINE) + 0.5) / _FINE - y
    across = left + (np.arange((right - left) * _FINE) + 0.5) / _FINE - x
    v = (cosine * down[:, None] - sine * across) / half_height
    u = (sine * down[:, None] + cosine * across) / half_width
    return (top, left), (v, u)


def _pixels(samples: np.ndarray) -> np.ndarray:
    """How many of each pixel's samples are true, (h, w) int64."""
    rows, cols = samples.shape[0] // _FINE, samples.shape[1] // _FINE
    return samples.reshape(rows, _FINE, cols, _FINE).sum(axis=(1, 3))


def _wave(values: Place) -> Place:
    """The part after the point: 0 to 1, again and again."""
    return values - np.floor(values)


def _grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = np.broadcast_arrays(np.arange(size[0])[:, None] + 0.5, np.arange(size[1]) + 0.5)
    return rows, cols


def _noise(shape: tuple[int, ...], key: int) -> np.ndarray:
    """Independent values, uniform from 0 to 1."""
    count = int(np.prod(shape))
    return ((hashes(np.arange(count), key) >> np.uint64(11)) * 2.0**-53).reshape(shape)


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _below(rng: random.Random, count: int) -> int:
    return int(rng.random() * count)


def _colour(rng: random.Random, level: int) -> Colour:
    """A colour of about this brightness and of any tint."""
    tint = np.array([_between(rng, -35, 35) for _ in range(3)])
    return level + tint - tint.sum() / 3 + _between(rng, -12, 12)
