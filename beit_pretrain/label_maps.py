"""Label maps: the class of every pixel, (H, W) uint8, and how they become pictures.

Letters: H and W the sides of an image, C classes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from beit_pretrain.errors import DataError
from beit_pretrain.sheets import ELLIPSIS, FAINT, INK, PAPER, fit_text

IGNORED = 255  # pixels without a class: neither learnt from nor counted
THINNEST = 256  # long side of an image over its short one: a longer image would be thousands of windows
LARGEST = 24  # classes that a legend names
PANEL = 480  # longest side of one of several pictures side by side
SMALL = 240  # shorter pictures are magnified up to about this, without smoothing
LETTERS = 84  # lines of text that would fit along a picture's longest side; they are not smaller than TEXT
TEXT = 13
LONGEST = 28  # letters of a class's name that are shown

GREYS = (126, 126, 126), (158, 158, 158)  # the stripes on ignored pixels
STRIPE = 3
WRONG = (214, 39, 40)

Colour = tuple[int, int, int]


def check_aspect(height: int, width: int) -> None:
    """DataError for an image too long and thin to be seen by windows."""
    if max(height, width) > THINNEST * min(height, width):
        raise DataError(
            f"{width} x {height} pixels: for label maps the long side is at most {THINNEST} times the short one; cut "
            "the image into parts"
        )


# --- colours ------------------------------------------------------------------------------------------------


@cache
def palette(classes: int) -> np.ndarray:
    """(C, 3) uint8: colours that lie far apart to the eye, each as far from those before it as can be had.

    The first colours of a longer palette are those of a shorter one. Nearly black, nearly white, greys (ignored
    pixels are grey) and the most glaring are left out. Distances are those of Oklab (Ottosson, 2020).
    """
    steps = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _oklab(grid)
    light, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    use = (light > 0.4) & (light < 0.92) & (chroma > 0.04) & (chroma < 0.22)
    grid, lab = grid[use], lab[use]
    chosen = [int(np.argmin(np.abs(grid - (30, 105, 180)).sum(1)))]  # begin with a blue
    distance = np.full(len(lab), np.inf)
    while len(chosen) < classes:
        distance = np.minimum(distance, ((lab - lab[chosen[-1]]) ** 2).sum(1))
        # To nine digits: the last bits of a root may differ between machines, a choice must not.
        chosen.append(int(np.argmax(np.round(distance, 9))))
    found = grid[chosen[:classes]].astype(np.uint8)
    found.flags.writeable = False  # it is shared
    return found


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """(N, 3) sRGB from 0 to 255 in a space where equal distances look equally large."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    axes = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.array(cones).T) @ np.array(axes).T


def paint(label_map: np.ndarray, classes: int) -> np.ndarray:
    """(H, W) labels as (H, W, 3) uint8 colours; ignored pixels are grey stripes. IndexError if a label is no class."""
    table = np.concatenate([palette(classes), [GREYS[0]]]).astype(np.uint8)
    ignored = label_map == IGNORED
    painted = table[np.where(ignored, np.uint8(classes), label_map)]
    rows, columns = np.ogrid[: label_map.shape[0], : label_map.shape[1]]
    painted[ignored & ((rows + columns) // STRIPE % 2 == 1)] = GREYS[1]
    return painted


def label_png(label_map: np.ndarray, classes: int, *, shift: bool) -> bytes:
    """An indexed PNG whose numbers are those of the data set's files.

    With `shift` (data.source.reduce_zero_label) the classes begin at 1 and ignored pixels are 0, otherwise at 0
    and ignored pixels are 255.
    """
    first, ignored = (1, 0) if shift else (0, IGNORED)
    numbers = np.where(label_map == IGNORED, np.uint8(ignored), label_map + np.uint8(first))
    colours = np.zeros((256, 3), np.uint8)
    colours[first : first + classes] = palette(classes)
    colours[ignored] = GREYS[0]
    picture = Image.fromarray(numbers)
    picture.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


# --- pictures -----------------------------------------------------------------------------------------------


def overlay(
    image: np.ndarray, label_map: np.ndarray, names: Sequence[str], alpha: float = 0.5
) -> Image.Image:
    """An image (H, W, 3) uint8 under the colours of its labels, lines between regions, a legend below or beside.

    `alpha` is the weight of the colours. The image keeps its pixels; a small one is magnified by a whole number.
    """
    factor = _magnify(label_map.shape)
    labels = _repeat(label_map, factor)
    plain, painted = (
        Image.fromarray(pixels) for pixels in (_repeat(image, factor), paint(labels, len(names)))
    )
    picture = Image.blend(plain, painted, alpha)
    picture.paste(PAPER, mask=Image.fromarray(_edges(labels, math.ceil(max(labels.shape) / 1200))))
    size = _text_size(max(picture.size))
    counts = _counts(label_map, len(names))
    entries = _entries(counts, names, lambda i: f"{100 * counts[i] / label_map.size:.1f}%")
    beside = picture.height > picture.width
    legend = _legend(entries, size, room=max(picture.size), down=beside)
    left, top = (picture.width, 0) if beside else (0, picture.height)
    wide, high = max(picture.width, left + legend.width), max(picture.height, top + legend.height)
    sheet = Image.new("RGB", (wide, high), PAPER)
    sheet.paste(picture, (0, 0))
    sheet.paste(legend, (left, top))
    return sheet


def panels(
    image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, names: Sequence[str], title: str
) -> Image.Image:
    """Image, truth, prediction and mistakes side by side under a title, a legend below.

    Mistakes: what is right is faint, what is wrong red. `image` is (H, W, 3) uint8, the label maps are (H, W).
    """
    height, width = truth.shape
    shrink = min(1.0, PANEL / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))]
    small += [
        np.asarray(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in (truth, predicted)
    ]
    picture, true, said = (_repeat(pixels, _magnify(truth.shape)) for pixels in small)
    shown = {"image": picture, "truth": paint(true, len(names)), "prediction": paint(said, len(names))}
    shown["mistakes (red)"] = _mistakes(picture, true, said)
    text = _text_size(len(shown) * max(true.shape))
    heading, plain = ImageFont.load_default(round(1.2 * text)), ImageFont.load_default(text)
    margin, gap = 2 * text, text // 2
    cell = max(true.shape[1], *(math.ceil(plain.getlength(name)) for name in shown))
    wide = 2 * margin + len(shown) * (cell + gap) - gap
    counts = [_counts(label_map, len(names)) for label_map in (truth, predicted)]
    shares = [100 * found / truth.size for found in counts]
    entries = _entries(counts[0] + counts[1], names, lambda i: f"{shares[0][i]:.1f} | {shares[1][i]:.1f}%")
    legend = _legend(entries, text, room=wide - margin, down=False, title="share of truth | prediction")
    top = margin + 4 * text
    sheet = Image.new("RGB", (max(wide, legend.width + margin), top + true.shape[0] + legend.height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin - gap), fit_text(title, heading, sheet.width - 2 * margin), INK, heading)
    for number, (name, pixels) in enumerate(shown.items()):
        left = margin + number * (cell + gap)
        draw.text((left, top - gap), name, FAINT, plain, anchor="ls")
        sheet.paste(Image.fromarray(pixels), (left, top))
    sheet.paste(legend, (margin - text, top + true.shape[0]))
    return sheet


def _mistakes(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(H, W, 3): the image faint and grey where the prediction is right, red where it is wrong."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    shown = np.repeat((190 + grey // 4).astype(np.uint8)[..., None], 3, -1)
    shown[predicted != truth] = WRONG
    ignored = truth == IGNORED
    shown[ignored] = paint(np.where(ignored, truth, np.uint8(0)), 1)[ignored]
    return shown


def _magnify(shape: tuple[int, ...]) -> int:
    return max(1, round(SMALL / max(shape)))


def _repeat(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(H, W) or (H, W, 3), every pixel `factor` times each way."""
    return pixels if factor == 1 else pixels.repeat(factor, 0).repeat(factor, 1)


def _edges(labels: np.ndarray, width: int) -> np.ndarray:
    """(H, W) uint8: 160 (how strongly they are drawn) on lines of `width` pixels where one label meets another."""
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    for _ in range(width - 1):
        edge[:, :-1] |= edge[:, 1:]
        edge[:-1] |= edge[1:]
    return edge * np.uint8(160)


# --- legends ------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    colour: Colour | None  # None: words only
    text: str
    share: str


def _counts(label_map: np.ndarray, classes: int) -> np.ndarray:
    """(C + 1,) pixels of each class, those of none last."""
    found = np.bincount(label_map.ravel(), minlength=256)
    return np.append(found[:classes], found[IGNORED])


def _entries(counts: np.ndarray, names: Sequence[str], say: Callable[[int], str]) -> list[_Entry]:
    """The classes that occur, the largest first, then pixels of none; `say` puts an entry's share into words."""
    order = [int(i) for i in np.argsort(-counts[:-1], kind="stable") if counts[i]]
    colours = [tuple(colour) for colour in palette(len(names)).tolist()]
    found = [_Entry(colours[i], _short(names[i]), say(i)) for i in order[:LARGEST]]
    if len(order) > LARGEST:
        found.append(_Entry(None, f"and {len(order) - LARGEST} more", ""))
    if counts[-1]:
        found.append(_Entry(GREYS[0], "no class", say(len(names))))
    return found


def _legend(entries: Sequence[_Entry], text: int, *, room: int, down: bool, title: str = "") -> Image.Image:
    """Entries in as many columns as fit into `room` pixels across, or (`down`) in columns not longer than that."""
    font = ImageFont.load_default(text)
    line, key = round(1.5 * text), 2 * text  # height of an entry, width of its colour
    ends = [key + math.ceil(font.getlength(entry.text)) + text // 2 for entry in entries]
    cell = max(end + math.ceil(font.getlength(e.share)) for end, e in zip(ends, entries, strict=True)) + text
    if down:
        columns = math.ceil(len(entries) / max(1, (room - 2 * text) // line))
    else:
        columns = min(len(entries), max(1, (room - text) // cell))
    rows = math.ceil(len(entries) / columns)
    head = line if title else 0
    wide = text + max(columns * cell, math.ceil(font.getlength(title)))
    sheet = Image.new("RGB", (wide, 2 * text + head + rows * line), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((text, text + line // 2), title, FAINT, font, anchor="lm")
    for number, (entry, end) in enumerate(zip(entries, ends, strict=True)):
        column, row = (number // rows, number % rows) if down else (number % columns, number // columns)
        left, middle = text + column * cell, text + head + row * line + line // 2
        if entry.colour is not None:
            corners = (left, middle - text // 2, left + round(1.4 * text), middle + text // 2)
            draw.rectangle(corners, entry.colour, outline=FAINT)
        draw.text((left + key, middle), entry.text, INK, font, anchor="lm")
        draw.text((left + end, middle), entry.share, FAINT, font, anchor="lm")
    return sheet


def _text_size(side: int) -> int:
    return max(TEXT, side // LETTERS)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}{ELLIPSIS}"
