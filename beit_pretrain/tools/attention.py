"""Where each head of one block looks from one patch of an image: drawn over it, and as numbers.

Letters: H heads, N patches of a grid of (rows, cols), (height, width) the pixels that the model sees.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import BeitError, DataError
from beit_pretrain.models.attention_maps import attention_maps
from beit_pretrain.sheets import FAINT, PAPER, draw_cells, fit_text, magnification
from beit_pretrain.tools.embed import block_number
from beit_pretrain.tools.images import count, device_of, list_unreadable, outputs, read_image
from beit_pretrain.tools.load import Loaded, load
from beit_pretrain.wording import printable, times

ENDINGS = (".attention.png", ".attention.npz")
COLOURS = "viridis"  # equal steps look equal, to the colour-blind too
STRENGTH = 0.7  # weight of the colours over the grey picture
FAINTEST = 64  # its darkest grey
CELL = 224  # pixels that small pictures are magnified to
LARGEST = 448  # longest side of a map in pixels; larger ones are shrunk
BAR = 96  # pixels of the scale
TINY = np.finfo(np.float32).tiny
MARK = (255, 60, 40)
Patch = tuple[int, int]  # row and column


def attention(
    checkpoint: str,
    images: Sequence[Path],
    *,
    out: Path,
    patch: str | None,
    block: int | None,
    options: dict[str, Any],
    device: str,
) -> int:
    """Write both files of each image below `out`; 1 if an image could not be read, else 0.

    `patch` is `row,column`, None for the CLS token; `block` is counted from 0, or from the end as -1, None for the
    last; `options` are those of `load`. Raises BeitError if one of them, the device or the images as a whole cannot be
    used, before anything is written, and if a file cannot be written.
    """
    where = device_of(device)
    todo = outputs(images, out, ENDINGS)
    loaded = load(checkpoint, device=where, **options)
    query = None if patch is None else _patch_of(patch, loaded.encoder.grid)
    number = block_number(block, loaded.encoder.depth)
    looks = "the CLS token" if query is None else f"patch {query[0]},{query[1]}"
    print(
        f"{count(len(todo))}; from {looks} of {times(loaded.encoder.grid)} patches in block {number}",
        flush=True,
    )
    unreadable = []
    for target, path in todo.items():
        try:
            pixels = loaded.preprocess.crop(read_image(path))  # (3, height, width) uint8
        except DataError as error:
            unreadable.append(str(error))
            continue
        maps, to_cls = _looks(loaded, pixels, query, number)
        title = f"block {number}, from {looks}: {printable(path.name)}"
        _write(target, pixels, maps, to_cls, query=query, block=number, title=title)
        head, row, column = np.unravel_index(int(maps.argmax()), maps.shape)
        print(
            f"{printable(path)}: most, {_percent(maps.max())}, from head {head} to patch {row},{column}",
            flush=True,
        )
    print(f"{count(len(todo) - len(unreadable))} drawn, written to {out}")
    return list_unreadable(unreadable)


def _patch_of(text: str, grid: Patch) -> Patch:
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise BeitError(f"--patch {text}: give row,column, counted from 0, such as 7,4") from None
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise BeitError(
            f"--patch {text} is outside of the grid of {times(grid)} patches: set 0,0 to {grid[0] - 1},{grid[1] - 1}, "
            "row and column"
        )
    return row, column


@torch.inference_mode()
def _looks(loaded: Loaded, pixels: Tensor, query: Patch | None, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of each head's attention: those of the patches (H, rows, cols), and of the CLS token (H,), float32."""
    device = loaded.encoder.cls_token.device
    rows, columns = loaded.encoder.grid
    image = loaded.preprocess.normalize(pixels.to(device))[None]  # (1, 3, height, width)
    token = 0 if query is None else 1 + query[0] * columns + query[1]
    row = attention_maps(loaded.encoder, image, block)[0, :, token].float().cpu()  # (H, 1 + N)
    return row[:, 1:].unflatten(1, (rows, columns)).numpy(), row[:, 0].numpy()


def _write(
    target: Path,
    pixels: Tensor,
    maps: np.ndarray,
    to_cls: np.ndarray,
    *,
    query: Patch | None,
    block: int,
    title: str,
) -> None:
    """Both files of an image; the numbers first, since a picture is what one looks at."""
    picture = pixels.permute(1, 2, 0).cpu().numpy()  # (height, width, 3)
    buffer = io.BytesIO()
    patch = np.array([] if query is None else query, dtype=np.int64)
    np.savez_compressed(buffer, attention=maps, cls=to_cls, patch=patch, block=np.int64(block), image=picture)
    files.write_bytes(Path(f"{target}{ENDINGS[1]}"), buffer.getvalue())
    buffer = io.BytesIO()
    attention_sheet(picture, maps, to_cls, query=query, title=title).save(buffer, "PNG")
    files.write_bytes(Path(f"{target}{ENDINGS[0]}"), buffer.getvalue())


def attention_sheet(
    picture: np.ndarray, maps: np.ndarray, to_cls: np.ndarray, *, query: Patch | None, title: str
) -> Image.Image:
    """The picture (height, width, 3) uint8 with the patch outlined, a map over it for each head, and their mean.

    Every map has a scale of its own, from 0 to its largest share, which its caption gives with the share of the CLS
    token: heads differ a hundredfold, and on one scale most maps would be black.
    """
    image = _sized(Image.fromarray(picture))
    # Faint, or a bright sky would pass for attention.
    grey = image.convert("L").point([FAINTEST + value // 2 for value in range(256)]).convert("RGB")
    names = [*(f"head {head}" for head in range(len(maps))), "mean"]
    cells = [("what the model sees", _marked(image, query, maps.shape[1:]))]
    for name, shares, cls in zip(names, [*maps, maps.mean(0)], [*to_cls, to_cls.mean()], strict=True):
        painted = Image.fromarray(_coloured(shares / max(shares.max(), TINY))).resize(
            image.size, Image.Resampling.NEAREST
        )
        shown = _marked(Image.blend(grey, painted, STRENGTH), query, maps.shape[1:])
        cells.append((f"{name}: up to {_percent(shares.max())}, CLS {_percent(cls)}", shown))
    columns = min(len(cells), max(2, round((len(cells) * 1.5 * image.height / image.width) ** 0.5)))
    even = 1 / (1 + maps[0].size)
    legend = _scale(f"largest of each map (even: {_percent(even)})", columns * image.width)
    return draw_cells(cells, title, columns=columns, below=legend)


def _sized(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest > LARGEST:
        wide, high = (max(1, round(side * LARGEST / longest)) for side in picture.size)
        return picture.resize((wide, high), Image.Resampling.LANCZOS)
    factor = magnification(longest, CELL)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _coloured(shares: np.ndarray) -> np.ndarray:
    """(...) in [0, 1] as colours (..., 3) uint8."""
    return matplotlib.colormaps[COLOURS](shares, bytes=True)[..., :3]


def _marked(picture: Image.Image, query: Patch | None, grid: tuple[int, ...]) -> Image.Image:
    """The picture with the patch that looks outlined."""
    if query is None:
        return picture
    high, wide = picture.height / grid[0], picture.width / grid[1]
    top, left = round(query[0] * high), round(query[1] * wide)
    bottom, right = round((query[0] + 1) * high) - 1, round((query[1] + 1) * wide) - 1
    marked = picture.copy()
    draw = ImageDraw.Draw(marked)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=PAPER)
    draw.rectangle((left, top, right, bottom), outline=MARK, width=2)
    return marked


def _scale(text: str, width: int) -> Image.Image:
    """The colours from 0 to a map's largest share, in words too."""
    font = ImageFont.load_default(size=13)
    scale = Image.new("RGB", (width, 24), PAPER)
    bar = Image.fromarray(_coloured(np.linspace(0, 1, BAR))[None]).resize((BAR, 12), Image.Resampling.NEAREST)
    scale.paste(bar, (14, 8))
    draw = ImageDraw.Draw(scale)
    draw.text((0, 14), "0", FAINT, font, anchor="lm")
    rest = fit_text(text, font, width - BAR - 22)
    draw.text((BAR + 22, 14), rest, FAINT, font, anchor="lm")
    return scale


def _percent(share: float) -> str:
    """Three digits that count: on large grids an even share is far below a percent."""
    return f"{100 * share:.3g}%"
