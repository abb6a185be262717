"""From the bytes of an image file to RGB pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from beit_pretrain.errors import DataError


def _find_jpeg_decoder() -> Callable[..., Any] | None:
    try:
        from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportMissingImports] need not be installed
    except (ImportError, OSError, RuntimeError):  # not there, before 0.16, or made for another torch
        try:
            from torchvision.io import decode_jpeg
        except ImportError:  # announced by torchvision 0.29 for a later release
            return None
    return decode_jpeg


_jpeg_decoder = _find_jpeg_decoder()


def decode(data: bytes) -> Tensor:
    """The picture as (3, H, W) uint8 RGB: upright by its EXIF orientation, transparency over white.

    It lies pixel by pixel in memory. Raises DataError with the reason for whatever cannot be shown whole: no
    image, cut short, pixels without a defined range.
    """
    try:
        # Pillow warns of odd metadata and torchvision of its own end, and whether a file is readable must not depend
        # on the warning filter.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            orientation = _orientation(image)
            if orientation == 1 and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                pixels = _decode_jpeg(data, image.size)
                if pixels is not None:
                    return pixels
            image.load()
            upright = image if orientation in (1, None) else ImageOps.exif_transpose(image)
            return to_tensor(upright, image.format)
    except DataError:
        raise
    # Decoders raise whatever their parser met: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise DataError(_reason(error, data)) from error


def to_tensor(image: Image.Image, kind: str | None = None) -> Tensor:
    """An opened picture as (3, H, W) uint8 RGB, pixel by pixel in memory; `kind` is its format, for messages."""
    pixels = np.array(_to_rgb(image, kind or image.format))  # a copy: PIL's own buffer is read-only
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> Tensor | None:
    """The pixels of a JPEG of `size` (width, height), Pillow's to the bit in two thirds of its time.

    None where Pillow has to decide, and to say why not.
    """
    if _jpeg_decoder is None:
        return None
    try:
        pixels = _jpeg_decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB")
    except RuntimeError:
        return None
    # torchcodec turns pictures by itself: not if it reads from the EXIF block what Pillow does not.
    return pixels if pixels.shape == (3, size[1], size[0]) else None


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image format known (the file begins with {data[:8]!r})"
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int | None:
    """EXIF orientation, 1 where a file has none; None if it cannot be read, which says nothing about the pixels."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return None


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and kind != "TIFF"):
        # Gray of 16 bits (portable graymaps arrive in a 32-bit mode, scaled to 16 bits).
        values = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{kind or 'image'} with pixels of 32 bits: their range is not defined")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
