"""Decoding: every kind of pixel to upright RGB, and whatever is not whole refused."""

from __future__ import annotations

import io
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from beit_pretrain.data import decode as module
from beit_pretrain.data.decode import decode, to_tensor
from beit_pretrain.errors import DataError


def _picture(height: int = 37, width: int = 53) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = 60 * np.sin(x / 5) * np.cos(y / 7)
    return np.clip(np.stack([3 * x + waves, 4 * y, 200 - 2 * x + y], -1), 0, 255).astype(np.uint8)


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
def test_common_formats_give_the_pixels_that_were_saved(kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    image = decode(_bytes(Image.fromarray(_picture()), kind, **options))
    assert image.shape == (3, 37, 53) and image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous()  # pixel by pixel
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - _picture())
    assert difference.mean() <= {"JPEG": 2, "GIF": 8}.get(kind, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_is_turned_upright_by_its_exif_orientation(orientation: int, kind: str) -> None:
    # Where the stored rows and columns go, by EXIF's definition of the eight values.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a[::-1].transpose(1, 0, 2),
    }[orientation](_picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = decode(_bytes(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert image.shape == (3, 37, 53)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - _picture()).mean() < 1.5


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    whole = _bytes(Image.fromarray(_picture()), "JPEG")
    broken = b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x01"
    data = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken + whole[2:]
    assert torch.equal(decode(data), decode(whole))


def test_transparency_lies_over_white_in_every_mode() -> None:
    alpha = np.full((37, 53), 255, np.uint8)
    alpha[:10], alpha[10:20] = 0, 128
    expected = _picture().astype(int)
    expected[:10] = 255
    expected[10:20] = np.round(_picture()[10:20] * (128 / 255) + 255 * (127 / 255))
    image = decode(_bytes(Image.fromarray(np.dstack([_picture(), alpha])), "PNG"))
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1
    grey = Image.merge("LA", [Image.fromarray(_picture()[..., 1]), Image.fromarray(alpha)])
    assert np.abs(decode(_bytes(grey, "PNG"))[0].numpy() - expected[..., 1]).max() <= 1
    palette = Image.fromarray(_picture()).quantize(16)
    clear = decode(_bytes(palette, "PNG", transparency=palette.getpixel((0, 0))))
    assert clear[:, 0, 0].tolist() == [255, 255, 255]


def test_palette_grey_and_one_bit_pictures_become_rgb() -> None:
    palette = Image.fromarray(_picture()).quantize(64)
    assert np.array_equal(decode(_bytes(palette, "PNG")).permute(1, 2, 0), np.array(palette.convert("RGB")))
    grey = decode(_bytes(Image.fromarray(_picture()[..., 0]), "PNG"))
    assert np.array_equal(grey, np.broadcast_to(_picture()[..., 0], (3, 37, 53)))
    bits = Image.fromarray(_picture()[..., 0] > 99)
    assert set(decode(_bytes(bits, "PNG")).unique().tolist()) == {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_high_byte(kind: str) -> None:
    values = (_picture()[..., 0].astype(np.uint16) * 257) + 40
    image = decode(_bytes(Image.fromarray(values), kind))
    assert np.array_equal(image[0], _picture()[..., 0]) and torch.equal(image[0], image[2])


def test_cmyk_is_shown_as_its_own_rgb() -> None:
    cmyk = Image.fromarray(_picture()).convert("CMYK")
    image = decode(_bytes(cmyk, "JPEG", quality=100, subsampling=0))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - _picture()).mean() < 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {}), ("WEBP", {}), ("GIF", {})],
)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_file_cut_short_is_an_error(kind: str, options: dict[str, object], share: float) -> None:
    data = _bytes(Image.fromarray(_picture(120, 160)), kind, **options)
    with pytest.raises(DataError, match=r"\w+"):
        decode(data[: int(len(data) * share)])


def test_the_reason_is_named_in_one_line() -> None:
    with pytest.raises(DataError, match=r"^the file is empty$"):
        decode(b"")
    with pytest.raises(DataError, match=r"^no image format known \(the file begins with b'<html>\\n<'\)$"):
        decode(b"<html>\n<body>not found</body>")
    with pytest.raises(DataError, match=r"^TIFF with pixels of 32 bits: their range is not defined$"):
        decode(_bytes(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(DataError, match="truncated"):
        data = _bytes(Image.fromarray(_picture(120, 160)), "JPEG")
        decode(data[: len(data) // 2])


def test_an_opened_picture_takes_the_same_way() -> None:
    data = _bytes(Image.fromarray(_picture()[..., 0]), "PNG")
    assert torch.equal(to_tensor(Image.open(io.BytesIO(data))), decode(data))


# --- the quick way for JPEG -----------------------------------------------------------------------------------------

JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True, "quality": 60},
    "restart markers": {"restart_marker_blocks": 2},
    "RGB": {"keep_rgb": True},
}


def _torchcodec() -> Callable[..., Any]:
    return pytest.importorskip("torchcodec.decoders").decode_jpeg


@pytest.fixture(params=["torchvision", "torchcodec"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the decoder of that library gave a picture, call by call."""
    decoder: Any = decode_jpeg if request.param == "torchvision" else _torchcodec()
    results: list[bool] = []

    def counted(data: torch.Tensor, mode: str) -> torch.Tensor:
        results.append(False)
        pixels = decoder(data, mode=mode)
        results[-1] = True
        return pixels

    monkeypatch.setattr(module, "_jpeg_decoder", counted)
    return results


def _by_pillow(data: bytes) -> np.ndarray | None:
    """(H, W, 3); None if it refuses."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError):
        return None


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("grey", [False, True], ids=["colours", "grey"])
def test_a_jpeg_has_pillows_pixels_to_the_bit(kind: str, grey: bool, calls: list[bool]) -> None:
    sizes = [(1, 1), (17, 31), (8, 16), (33, 2), (120, 160)]
    for size in sizes:
        picture = Image.fromarray(_picture(*size)[..., 0] if grey else _picture(*size))
        data = _bytes(picture, "JPEG", **JPEGS[kind] if not grey or kind != "RGB" else {})
        assert np.array_equal(decode(data).permute(1, 2, 0), _by_pillow(data))  # pyright: ignore[reportArgumentType]
    assert calls == [True] * len(sizes)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_what_has_to_be_turned_is_left_to_pillow(orientation: int, calls: list[bool]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = decode(_bytes(Image.fromarray(_picture()), "JPEG"))
    calls.clear()
    turned = decode(_bytes(Image.fromarray(_picture()), "JPEG", exif=exif))
    assert calls == []
    assert torch.equal(turned.sum(0).flatten().sort().values, plain.sum(0).flatten().sort().values)
    assert decode(_bytes(Image.fromarray(_picture()).convert("CMYK"), "JPEG")).shape == plain.shape
    assert calls == []


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:0", "progressive", "restart markers"])
def test_a_jpeg_cut_anywhere_is_refused_as_pillow_does(kind: str, calls: list[bool]) -> None:
    data = _bytes(Image.fromarray(_picture(24, 31)), "JPEG", **JPEGS[kind])
    for end in range(1, len(data), 3):
        expected = _by_pillow(data[:end])
        if expected is None:
            with pytest.raises(DataError, match=r"\w+"):
                decode(data[:end])
        else:
            assert np.array_equal(decode(data[:end]).permute(1, 2, 0), expected)
    assert calls and not any(calls)


def test_a_jpeg_with_a_wrong_byte_is_what_pillow_makes_of_it(calls: list[bool]) -> None:
    whole, rng = _bytes(Image.fromarray(_picture(24, 31)), "JPEG"), random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        expected = _by_pillow(bytes(data))
        if expected is None:
            with pytest.raises(DataError):
                decode(bytes(data))
        elif expected.shape == (24, 31, 3):  # else its EXIF or size is what changed
            assert np.array_equal(decode(bytes(data)).permute(1, 2, 0), expected)
    assert True in calls and False in calls


def test_pillow_decides_where_the_decoder_does_not_give_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _bytes(Image.fromarray(_picture()), "JPEG")
    expected = decode(data)

    def refuses(data: torch.Tensor, mode: str) -> torch.Tensor:
        raise RuntimeError("no pictures in this build")

    def turns(data: torch.Tensor, mode: str) -> torch.Tensor:
        return decode_jpeg(data, mode=mode).transpose(1, 2)  # pyright: ignore

    for other in (None, refuses, turns):
        monkeypatch.setattr(module, "_jpeg_decoder", other)
        assert torch.equal(decode(data), expected)


def test_torchcodec_comes_first_then_torchvision_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    codec: Any = type(sys)("torchcodec.decoders")
    monkeypatch.setitem(sys.modules, "torchcodec", type(sys)("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", codec)
    assert module._find_jpeg_decoder() is decode_jpeg  # torchcodec is too old to have one
    codec.decode_jpeg = len
    assert module._find_jpeg_decoder() is len
    del codec.decode_jpeg
    monkeypatch.setitem(sys.modules, "torchvision.io", type(sys)("torchvision.io"))
    assert module._find_jpeg_decoder() is None
