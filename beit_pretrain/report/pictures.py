"""Pictures of a run as data URIs, small enough that a report can be sent by mail."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from beit_pretrain.errors import BeitError

ENOUGH = 400_000  # bytes up to which a PNG is taken over as it is


class Picture(NamedTuple):
    """One embedded picture, its size in pixels as shown."""

    uri: str
    width: int
    height: int
    caption: str


def embed(path: Path, caption: str, *, side: int = 1400, enough: int = ENOUGH) -> Picture:
    """The PNG at `path`: as it is while small, else at most `side` pixels long and compressed."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            width, height = image.size
            if max(width, height) <= side and len(content) <= enough:
                return Picture(_uri(content, "png"), width, height, caption)
            small = image.convert("RGBA")
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
    ) as error:  # PIL reports broken PNG chunks as SyntaxError
        raise BeitError(f"{path} is not a readable picture ({error}): move the file away") from error
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    flat = Image.new("RGB", small.size, "white")
    flat.paste(small, mask=small.getchannel("A"))
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=86, optimize=True)
    return Picture(_uri(buffer.getvalue(), "jpeg"), *flat.size, caption)


def spread(sheets: list[Path], count: int) -> list[Path]:
    """At most `count` of the sheets, evenly over the run."""
    if len(sheets) <= count:
        return sheets
    return [sheets[round(index * (len(sheets) - 1) / (count - 1))] for index in range(count)]


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
