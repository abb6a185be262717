"""From the bytes of an image file to RGB pixels."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin
from torch import Tensor

from beit_pretrain.errors import DataError

# The formats that are read, by Pillow's names. Its other plugins stay shut: one of them starts Ghostscript.
# AVIF is there since Pillow 11.3, if its build has the library.
_PROMISED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = tuple(name for name in _PROMISED if name in Image.registered_extensions().values())
_TURNS = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRETCHED = {"L;2": 85, "L;4": 17}  # PNG greys of few bits: Pillow stretches the pixels to 0..255
_WHITE = 255


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

    It lies pixel by pixel in memory. Raises DataError with the reason for whatever cannot be shown whole: no image of
    FORMATS, cut short, damaged, pixels without a defined range.
    """
    try:
        # Pillow warns of odd metadata and torchvision of its own end, and whether a file is readable must not depend
        # on the warning filter.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=FORMATS) as image,
        ):
            if image.format == "PNG":
                check_png(data)
            is_plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
            if is_plain and _orientation(image) == 1:
                pixels = _decode_jpeg(data, image.size)
                if pixels is not None:
                    return pixels
            rgb = _to_rgb(image)
            # After the pixels: to look for it, Pillow decodes the whole of a PNG, and its errors are not those of
            # metadata.
            turn = _TURNS.get(_orientation(image) or 1)
            return _tensor(rgb if turn is None else rgb.transpose(turn))
    except DataError:
        raise
    # Decoders raise whatever their parser met: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise DataError(_reason(error, data)) from error


def to_tensor(image: Image.Image) -> Tensor:
    """An opened picture as (3, H, W) uint8 RGB, pixel by pixel in memory."""
    return _tensor(_to_rgb(image))


def check_png(data: bytes) -> None:
    """DataError for a PNG file of which a part is missing or has changed, down to its end mark.

    Pillow does not look at the checksums of the pixels, nor whether anything follows them, such as the orientation.
    """
    view, start, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        end = start + 8 + int.from_bytes(view[start : start + 4])
        if end + 4 > len(data):
            raise DataError("PNG file that is cut short")
        kind = bytes(view[start + 4 : start + 8])
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise DataError(f"PNG file with a damaged part: the checksum of {kind!r} is wrong")
        start = end + 4


def _tensor(rgb: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)  # a copy: PIL's own buffer is read-only


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


def _to_rgb(image: Image.Image) -> Image.Image:
    _scale_transparency(image)
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        return Image.fromarray(_grey_levels(image)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{image.format or 'image'} with pixels of 32 bits: their range is not defined")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _scale_transparency(image: Image.Image) -> None:
    """Brings the transparent colour of a PNG, which the file has in its own depth, to the levels of the pixels.

    Of 16-bit colours Pillow gives the high bytes: colours that share them count as one.
    """
    colour = image.info.get("transparency")
    if not isinstance(image, PngImagePlugin.PngImageFile) or colour is None or not image.tile:
        return
    layout = image.tile[0][3]  # the pixels as the file has them
    if layout in _STRETCHED:
        image.info["transparency"] = colour * _STRETCHED[layout]
    elif layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _grey_levels(image: Image.Image) -> np.ndarray:
    """Grey of 16 bits, or of the depth that a TIFF file states, as (H, W) uint8 levels.

    Portable graymaps arrive in a 32-bit mode, scaled to 16 bits.
    """
    values = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
    most, zero_is_white = 65535, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        most = (1 << image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0]) - 1
        zero_is_white = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    levels = ((values * 255 + most // 2) // most).astype(np.uint8)
    if zero_is_white:
        levels = 255 - levels
    if "transparency" in image.info:
        levels[values == image.info["transparency"]] = _WHITE
    return levels
