"""Pictures side by side under their captions, as one picture.

Letters: B images, H and W their sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 96  # small images are magnified to about this width, in pixels
MARGIN, GAP, LINE = 20, 6, 17
PAPER, INK, FAINT = (255, 255, 255), (38, 38, 42), (120, 120, 128)
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

Cell = tuple[str, Image.Image]  # a caption, empty for none, and a picture


def draw_columns(columns: Mapping[str, Tensor], title: str, *, cell: int = CELL) -> Image.Image:
    """A sheet with one titled column per entry, each (B, 3, H, W) in [0, 1], and one row per image.

    Small images are magnified without smoothing to about `cell` pixels; columns of another size are brought to the
    first one's.
    """
    first = next(iter(columns.values()))
    height, width = first.shape[-2:]
    factor = magnification(width, cell)
    size = (width * factor, height * factor)
    cells = [
        ("" if row else name, _sized(picture_of(images[row]), size))
        for row in range(len(first))
        for name, images in columns.items()
    ]
    return draw_cells(cells, title, columns=len(columns))


def draw_cells(
    cells: Sequence[Cell], title: str, *, columns: int, below: Image.Image | None = None
) -> Image.Image:
    """A sheet of equally large pictures, row by row, each under its caption; `below` is a legend at its foot.

    Captions are broken between words; a title that is too long keeps its end, which says more of a path.
    """
    heading, plain = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    wide, high = cells[0][1].size
    captions = [_wrap(caption, plain, wide) for caption, _ in cells]
    rows = [range(at, min(at + columns, len(cells))) for at in range(0, len(cells), columns)]
    heads = [LINE * max(len(captions[number]) for number in row) for row in rows]
    heads[1:] = [head and head + GAP for head in heads[1:]]
    width = 2 * MARGIN + columns * (wide + GAP) - GAP
    height = MARGIN + 30 + sum(heads) + len(rows) * (high + GAP) - GAP + MARGIN
    height += 0 if below is None else below.height + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), fit_text(title, heading, width - 2 * MARGIN), INK, heading)
    top = MARGIN + 30
    for row, head in zip(rows, heads, strict=True):
        top += head
        for column, number in enumerate(row):
            left = MARGIN + column * (wide + GAP)
            for above, line in enumerate(reversed(captions[number])):
                draw.text((left, top - 4 - LINE * (above + 1)), line, FAINT, plain)
            sheet.paste(cells[number][1], (left, top))
        top += high + GAP
    if below is not None:
        sheet.paste(below, (MARGIN, top))
    return sheet


def magnification(side: int, cell: int) -> int:
    """By how much a small picture is magnified, to be about `cell` pixels wide and whole pixels still."""
    return max(1, round(cell / side))


def picture_of(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as a picture; what lies outside is cut off."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (H, W, 3)
    return Image.fromarray(pixels.cpu().numpy())


def _sized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    whole = size[0] % picture.width == 0 and size[1] % picture.height == 0
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """The text in lines that fit, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def fit_text(text: str, font: Any, width: int) -> str:
    """The text, or its end if it is too long."""
    shown = text
    while shown and font.getlength(f"{ELLIPSIS}{shown}") > width:
        shown = shown[1:]
    return text if font.getlength(text) <= width else f"{ELLIPSIS}{shown}"
