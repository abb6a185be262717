"""Decoding against the pixels that were saved, over formats, modes, depths, orientations, transparency and damage."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from beit_pretrain.data.decode import FORMATS, decode, to_tensor
from beit_pretrain.errors import DataError

HEIGHT, WIDTH = 11, 7
# How a picture has to lie in the file, so that this orientation brings it upright (EXIF 2.3, tag 274).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[::-1].swapaxes(0, 1),
}


class Case(NamedTuple):
    label: str
    data: bytes
    expected: np.ndarray | None  # (H, W, 3) uint8; None: what Pillow makes of a lossy file


def _samples(channels: int, depth: int) -> np.ndarray:
    """(H, W, channels) integers of all levels, black and white among them."""
    values = np.random.default_rng(channels).integers(0, 1 << depth, (HEIGHT, WIDTH, channels))
    values[0, 0], values[-1, -1] = 0, (1 << depth) - 1
    return values


def _over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(np.dstack([rgb, alpha]).astype(np.uint8))
    return np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def _orientation_block(orientation: int) -> bytes:
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, orientation) + b"\0\0\0\0"


# --- PNG, written by hand: Pillow writes few of its kinds ---------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(samples: np.ndarray, colour: int, depth: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """`before` and `after`: chunks around those of the pixels, which are three."""
    height, width = samples.shape[:2]
    bits = (samples.reshape(height, -1, 1) >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.astype(np.uint8).reshape(height, -1), axis=1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    third = len(packed) // 3
    parts = packed[:third], packed[third : 2 * third], packed[2 * third :]
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = b"".join(_chunk(b"IDAT", part) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + before + pixels + after + _chunk(b"IEND", b"")


def _png_cases() -> Iterator[Case]:
    for colour, depths in (
        (0, (1, 2, 4, 8, 16)),
        (2, (8, 16)),
        (3, (1, 2, 4, 8)),
        (4, (8, 16)),
        (6, (8, 16)),
    ):
        for depth in depths:
            samples = _samples({0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour], depth)
            for clear in (False, True) if colour in (0, 2, 3) else (False,):
                chunks, expected = _png_meaning(samples, colour, depth, clear)
                label = f"PNG {colour} {depth} {'transparent' if clear else ''}"
                for orientation in (0, *STORED) if depth == 8 else (0, 6):
                    if not orientation:
                        yield Case(label, _png(samples, colour, depth, chunks), expected)
                        continue
                    lying = np.ascontiguousarray(STORED[orientation](samples))
                    exif = _chunk(b"eXIf", _orientation_block(orientation))
                    both = {"before": chunks + exif}, {"before": chunks, "after": exif}
                    for place, around in zip(("first", "last"), both, strict=True):
                        data = _png(lying, colour, depth, **around)
                        yield Case(f"{label} orientation {orientation} {place}", data, expected)


def _png_meaning(samples: np.ndarray, colour: int, depth: int, clear: bool) -> tuple[bytes, np.ndarray]:
    """The chunks that go with the samples, and the picture, after the format's specification."""
    if colour == 3:
        table = np.random.default_rng(3).integers(0, 256, (1 << depth, 3)).astype(np.uint8)
        alphas = np.arange(1 << depth) * 83 % 256 if clear else np.full(1 << depth, 255)
        chunks = _chunk(b"PLTE", table.tobytes())
        chunks += _chunk(b"tRNS", alphas.astype(np.uint8).tobytes()) if clear else b""
        return chunks, _over_white(table[samples[..., 0]], alphas[samples[..., 0]])
    if depth < 16:
        levels = samples * (255 // ((1 << depth) - 1))
    else:  # grey is rounded, of colours the high byte is taken
        levels = (samples + 128) // 257 if colour == 0 else samples >> 8
    rgb = levels[..., : 3 if colour in (2, 6) else 1].repeat(1 if colour in (2, 6) else 3, -1)
    if colour in (4, 6):
        return b"", _over_white(rgb, levels[..., -1])
    if not clear:
        return b"", rgb.astype(np.uint8)
    nothing = samples[3, 2]
    alpha = np.where((samples == nothing).all(-1), 0, 255)
    return _chunk(b"tRNS", struct.pack(f">{len(nothing)}H", *nothing)), _over_white(rgb, alpha)


# --- what Pillow writes -------------------------------------------------------------------------------------


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _pictures() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """By mode, a picture and what it shows."""
    grey, two, three, four = (_samples(channels, 8).astype(np.uint8) for channels in (1, 2, 3, 4))
    palette = Image.fromarray(three).quantize(16)
    bits, deep = grey[..., 0] > 127, _samples(1, 16)[..., 0].astype(np.uint16)
    cmyk = Image.frombytes("CMYK", (WIDTH, HEIGHT), four.tobytes())
    return {
        "1": (Image.fromarray(bits), np.repeat(255 * bits[..., None], 3, -1)),
        "L": (Image.fromarray(grey[..., 0]), grey.repeat(3, -1)),
        "LA": (Image.fromarray(two), _over_white(two[..., :1].repeat(3, -1), two[..., 1])),
        "P": (palette, np.array(palette.convert("RGB"))),
        "RGB": (Image.fromarray(three), three),
        "RGBA": (Image.fromarray(four), _over_white(four[..., :3], four[..., 3])),
        "CMYK": (cmyk, np.array(cmyk.convert("RGB"))),
        "I;16": (Image.fromarray(deep), ((deep.astype(int) + 128) // 257)[..., None].repeat(3, -1)),
    }


LOSSLESS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "BMP": ({}, ("1", "L", "P", "RGB")),
    "GIF": ({}, ("L", "P")),
    "PPM": ({}, ("1", "L", "RGB")),
    "TIFF": ({}, ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")),
    "TIFF deflate": ({"compression": "tiff_adobe_deflate"}, ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "WEBP": ({"lossless": True, "exact": True}, ("RGB", "RGBA")),
    "JPEG2000": ({"irreversible": False}, ("L", "LA", "RGB", "RGBA", "I;16")),
}
LOSSY = {"JPEG": ("L", "RGB", "CMYK"), "AVIF": ("RGB", "RGBA")}
TURNED = ("TIFF", "TIFF deflate", "WEBP", "JPEG", "AVIF")


def _oriented(kind: str, orientation: int) -> dict[str, Any]:
    if kind.startswith("TIFF"):
        return {"tiffinfo": {274: orientation}}
    exif = Image.Exif()
    exif[274] = orientation
    # libavif turns by itself what has a mark of its own, which Pillow writes in place of EXIF's.
    return {"exif": exif}


def _turn(picture: Image.Image, orientation: int) -> Image.Image:
    """How it lies in the file."""
    turns = (None, None, 0, 3, 1, 5, 2, 6, 4)  # Pillow's numbers of transpositions
    turn = turns[orientation]
    return picture if turn is None else picture.transpose(Image.Transpose(turn))


def _pillow_cases() -> Iterator[Case]:
    pictures = _pictures()
    kinds = {kind: modes for kind, (_, modes) in LOSSLESS.items()} | LOSSY
    for kind, modes in kinds.items():
        if kind.split()[0] not in FORMATS:  # AVIF in an old Pillow
            continue
        for mode in modes:
            picture, shown = pictures[mode]
            for orientation in (0, *STORED) if kind in TURNED and mode in ("L", "RGB") else (0, 6):
                if orientation and kind not in TURNED:
                    continue
                options = LOSSLESS[kind][0] if kind in LOSSLESS else {"quality": 95}
                lying = _turn(picture, orientation)
                options = options | (_oriented(kind, orientation) if orientation else {})
                data = _saved(lying, kind.split()[0], **options)
                yield Case(
                    f"{kind} {mode} orientation {orientation}", data, shown if kind in LOSSLESS else None
                )


def _other_cases() -> Iterator[Case]:
    palette, shown = _pictures()["P"]
    clear = palette.getpixel((3, 2))
    alpha = np.where(np.array(palette) == clear, 0, 255)
    yield Case("GIF transparent", _saved(palette, "GIF", transparency=clear), _over_white(shown, alpha))
    for bits, white in ((12, False), (16, False), (16, True)):
        values = _samples(1, bits)[..., 0]
        levels = np.rint(values * 255 / ((1 << bits) - 1)).astype(np.uint8)
        expected = (255 - levels if white else levels)[..., None].repeat(3, -1)
        yield Case(f"TIFF grey {bits} {white}", _tiff(values, bits, 0 if white else 1), expected)
    deep = _samples(1, 16)
    graymap = f"P5\n{WIDTH} {HEIGHT}\n65535\n".encode() + deep.astype(">u2").tobytes()
    yield Case("PGM of 16 bits", graymap, ((deep + 128) // 257).astype(np.uint8).repeat(3, -1))
    several = [Image.fromarray(_samples(3, 8).astype(np.uint8)) for _ in range(2)]
    several[1] = several[1].transpose(Image.Transpose.ROTATE_180)
    for kind in ("PNG", "GIF", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = _saved(several[0], kind, save_all=True, append_images=several[1:], **options)
        yield Case(f"{kind} of two pictures", data, None if kind == "GIF" else np.array(several[0]))


def _tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """One strip of grey, little-endian; two values of 12 bits share three bytes, a row begins with a byte."""
    height, width = values.shape
    if bits == 16:
        strip = values.astype("<u2").tobytes()
    else:
        binary = (values[..., None] >> np.arange(bits)[::-1]) & 1
        strip = np.packbits(binary.reshape(height, -1).astype(np.uint8), axis=1).tobytes()
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8 + 2 + 12 * 9 + 4), (277, 3, 1), (278, 4, height), (279, 4, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + strip


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [*_png_cases(), *_pillow_cases(), *_other_cases()]


# --- comparisons --------------------------------------------------------------------------------------------


def _by_pillow(data: bytes) -> np.ndarray | None:
    """What Pillow gives if it loads the file whole, upright and over white; None where it complains."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=FORMATS) as image,
        ):
            image.load()
            try:
                orientation = image.getexif().get(274)
            except Exception:
                orientation = None
            if image.mode.startswith("I") and (image.format != "TIFF" or image.mode != "I"):
                levels = np.rint(np.asarray(image).astype(float).clip(0, 65535) * 255 / _most(image)).astype(
                    np.uint8
                )
                return _upright((levels ^ _inverted(image))[..., None].repeat(3, -1), orientation)
            if image.mode in ("I", "F"):
                return None
            picture = image.convert("RGBA")
    except Exception:
        return None
    pixels = np.array(picture)
    return _upright(_over_white(pixels[..., :3], pixels[..., 3]), orientation)


def _most(image: Any) -> int:
    """The value that is white."""
    return (1 << image.tag_v2[258][0]) - 1 if image.format == "TIFF" else 65535


def _inverted(image: Any) -> np.uint8:
    return np.uint8(255 * (image.format == "TIFF" and image.tag_v2[262] == 0))


def _upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """All turns but two are their own inverse."""
    back = {6: 8, 8: 6}.get(orientation, orientation)
    return STORED[back](pixels) if back in STORED else pixels


def _decoded(data: bytes) -> np.ndarray | None:
    try:
        return decode(data).permute(1, 2, 0).numpy()
    except DataError:
        return None


def test_every_kind_of_file_gives_the_pixels_that_were_saved(cases: list[Case]) -> None:
    wrong = []
    for label, data, expected in cases:
        wanted = _by_pillow(data) if expected is None else expected
        assert wanted is not None and wanted.shape == (HEIGHT, WIDTH, 3), label
        found = _decoded(data)
        if found is None or not np.array_equal(found, wanted):
            wrong.append(label)
    assert len(cases) > 200 and not wrong


def test_a_damaged_file_is_refused_or_whole(cases: list[Case]) -> None:
    wrong, refused, read = [], 0, 0
    for label, data, expected in cases:
        if " orientation " in label and " orientation 6" not in label:
            continue
        for place in range(0, len(data), 20):
            flipped = bytearray(data)
            flipped[place] ^= 1 << (place // 20 % 8)
            for how, damaged in (("cut", data[:place]), ("flipped", bytes(flipped))):
                found = _decoded(damaged)
                refused, read = refused + (found is None), read + (found is not None)
                # A PNG has checksums: it is right or refused. Of the others nobody can know more than Pillow.
                wanted = expected if data.startswith(b"\x89PNG") else _by_pillow(damaged)
                if found is not None and not np.array_equal(found, wanted):  # pyright: ignore[reportArgumentType]
                    wrong.append(f"{label} {how} at {place}")
    assert not wrong
    assert refused > 2000 and read > 300


# --- one by one ---------------------------------------------------------------------------------------------


def test_the_rows_that_a_decoder_did_not_reach_are_never_black() -> None:
    picture = np.random.default_rng(0).integers(1, 256, (200, 31, 3)).astype(np.uint8)
    data = _saved(Image.fromarray(picture), "PNG")
    pixels = data.index(b"IDAT") + 4
    middle = (pixels + len(data)) // 2
    broken = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    kind, end = pixels - 4, len(data) - 16
    mended = broken[:end] + struct.pack(">I", zlib.crc32(broken[kind:end])) + broken[end + 4 :]
    for damaged in (broken, mended):  # without and with a checksum that fits the wrong pixels
        with pytest.raises(DataError, match=r"checksum of b'IDAT' is wrong|broken data stream"):
            decode(damaged)
    with pytest.raises(DataError, match="cut short"):
        decode(data[:-12])  # nobody knows what else followed the pixels
    assert np.array_equal(decode(data + b"more").permute(1, 2, 0), picture)


def test_the_frames_of_an_animated_png_are_looked_at_too() -> None:
    frames = [Image.fromarray(_samples(3, 8).astype(np.uint8)) for _ in range(2)]
    data = _saved(frames[0], "PNG", save_all=True, append_images=[frames[1].rotate(180)])
    start = data.index(b"fdAT") - 4
    length = struct.unpack_from(">I", data, start)[0]
    second = (
        struct.pack(">I", 7) + data[start + 12 : start + 8 + length]
    )  # a sequence number that is not the next
    wrong = data[:start] + _chunk(b"fdAT", second) + data[start + 12 + length :]
    assert np.array_equal(decode(data).permute(1, 2, 0), np.array(frames[0]))
    found = _decoded(wrong)
    assert found is None or np.array_equal(found, np.array(frames[0]))


@pytest.mark.parametrize("entry", [(0x0100, 9, 1, 0xFFFFFFFB), (0x010E, 1, 4, 0x41424344), (0x0112, 3, 1, 6)])
def test_odd_entries_beside_the_orientation_cost_nothing(entry: tuple[int, int, int, int]) -> None:
    """A negative width, bytes for a text, an orientation given twice: readable, but not writable."""
    plain = _saved(Image.fromarray(_samples(3, 8).astype(np.uint8)), "JPEG", quality=95)
    entries = [(0x0112, 3, 1, 6), entry]
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    block += b"".join(struct.pack("<HHII", *one) for one in entries) + b"\0\0\0\0"
    exif = b"Exif\0\0" + block
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    upright = _upright(decode(plain).permute(1, 2, 0).numpy(), 6)
    assert np.array_equal(decode(data).permute(1, 2, 0), upright)


def test_an_orientation_of_a_strange_kind_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(_samples(3, 8).astype(np.uint8))
    data = _saved(picture, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert np.array_equal(decode(data).permute(1, 2, 0), np.array(picture))
    for odd in (b"\x06", "6", (6, 6), 9, 0, None):
        monkeypatch.setattr(Image.Image, "getexif", lambda image, odd=odd: {0x0112: odd})
        assert np.array_equal(decode(data).permute(1, 2, 0), np.array(picture)), odd


def test_contents_of_other_formats_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match=r"no image format known .*%!PS"):
        decode(postscript)
    picture = Image.fromarray(_samples(3, 8).astype(np.uint8))
    for kind in ("EPS", "ICO", "TGA", "PCX", "SGI", "DDS"):
        with pytest.raises(DataError, match="no image format known"):
            decode(_saved(picture, kind))
    assert not mark.exists()


def test_a_picture_that_would_fill_the_memory_is_refused_by_its_head() -> None:
    rows = zlib.compress(bytes(1000))
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    with pytest.raises(DataError, match="exceeds limit of"):
        decode(data)


def test_an_opened_picture_is_shown_like_its_file() -> None:
    samples = _samples(1, 2)
    chunks, expected = _png_meaning(samples, 0, 2, True)
    data = _png(samples, 0, 2, chunks)
    loaded = Image.open(io.BytesIO(data))
    assert np.array_equal(to_tensor(loaded).permute(1, 2, 0), expected)
    assert torch.equal(to_tensor(loaded), decode(data))
