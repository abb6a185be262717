"""From the bytes of an image file to RGB pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from beit_pretrain.errors import DataError


def decode(data: bytes) -> Tensor:
    """The picture as (3, H, W) uint8 RGB: upright by its EXIF orientation, transparency over white.

    Raises DataError with the reason for whatever cannot be shown whole: no image, cut short, pixels without a
    defined range.
    """
    try:
        # Pillow warns of odd metadata, and whether a file is readable must not depend on the warning filter.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            image.load()
            pixels = np.array(_to_rgb(_upright(image), image.format))  # a copy: PIL's own buffer is read-only
    except DataError:
        raise
    # Decoders raise whatever their parser met: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise DataError(_reason(error, data)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, H, W)


def to_tensor(image: Image.Image) -> Tensor:
    """An opened picture as (3, H, W) uint8 RGB, for sources that hand out pictures rather than bytes."""
    return torch.from_numpy(np.array(_to_rgb(image, image.format))).permute(2, 0, 1).contiguous()


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image format known (the file begins with {data[:8]!r})"
    return " ".join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


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
