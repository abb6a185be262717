"""Images and label maps in files, and PNG files of any depth written by hand."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit_pretrain.data.label_folders import LabelFolders

NAMES = ("wall", "floor", "tree", "lamp", "pot")


def png(values: Any, depth: int = 8, colour: int = 0, palette: bytes = b"") -> bytes:
    """A PNG file by the book (W3C PNG, 2nd edition): no filter, one stored stream; values (H, W) or (H, W, C)."""
    pixels = np.asarray(values)
    height, width = pixels.shape[:2]
    bits = (pixels.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    chunks += [(b"PLTE", palette)] if palette else []
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_pair(root: Path, name: str, label_map: Any, split: str = "training") -> None:
    """An image of one shade and its label map, such as a/1 for a/1.png in both trees."""
    values = np.asarray(label_map)
    write(root / "annotations" / split / f"{name}.png", png(values))
    path = root / "images" / split / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (values.shape[1], values.shape[0]), (int(values.flat[0]),) * 3).save(path)


def source(root: Path, **changes: Any) -> LabelFolders:
    """What lies below the root, with five classes numbered from 0 unless told otherwise."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "classes.txt").exists():
        (root / "classes.txt").write_text("\n".join(NAMES))
    settings: dict[str, Any] = {"classes": "classes.txt", "reduce_zero_label": False} | changes
    return LabelFolders(root=str(root), **settings)
