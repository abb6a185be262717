"""One shard: images from a source into a tar that is read back before it counts as written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.cluster.ending import die_with_parent
from beit_pretrain.data.decode import FORMATS, decode
from beit_pretrain.data.shard_tar import INDEX, scan
from beit_pretrain.data.sources import Source
from beit_pretrain.errors import DataError

PARTS = ".parts"  # folder beside the shards with what is known of each, until there is an index
# What Pillow tells from a file's first bytes, and the suffix that `shard_index.scan` knows it by.
SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",  # several pictures as cameras write them, of which every reader takes the first
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
}


class Stopped(Exception):
    """The shard was given up because the whole command ends."""


class Resize(NamedTuple):
    """What becomes of larger images: the length of their shorter side, and the quality of the JPEG."""

    side: int
    quality: int


class Shrunk(NamedTuple):
    """An image as it goes into a shard."""

    suffix: str
    data: bytes
    pixels: Tensor | None  # (3, H, W) uint8 before compression, where it loses something


class Planned(NamedTuple):
    """A shard to be: samples start up to end of the order. Its first `measured` resized images are compared."""

    name: str
    split: str
    start: int
    end: int
    measured: int
    sha256: str | None  # where it was written before and must come out the same


@dataclass
class Part:
    """What is known of a shard that is written."""

    bytes: int
    sha256: str
    left_out: list[list[Any]]  # number in the source, name and reason
    errors: list[float]  # mean squared errors of JPEGs against the resized pixels
    rows: np.ndarray  # (samples,) INDEX


def prepare(content: bytes | Tensor, resize: Resize | None) -> Shrunk:
    """A file's bytes as they are, or a JPEG of the resized picture where its shorter side is longer.

    Pixels become PNG, and so do files of formats that shards do not hold. Every file is decoded: DataError, in the
    words of the training, for what that could not read.
    """
    pixels = content if isinstance(content, Tensor) else decode(content)
    if resize is not None and min(pixels.shape[1:]) > resize.side:
        return _smaller(pixels, resize)
    if isinstance(content, bytes) and (suffix := SUFFIXES.get(_format(content))):
        return Shrunk(suffix, content, None)
    return Shrunk("png", _file(pixels, "PNG"), None)


def _format(data: bytes) -> str:
    """The format of an image file that can be read."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return str(image.format)


def _smaller(pixels: Tensor, resize: Resize) -> Shrunk:
    height, width = pixels.shape[1:]
    scale = resize.side / min(height, width)
    size = (max(resize.side, round(width * scale)), max(resize.side, round(height * scale)))
    # Pillow's filters widen with the scale: what torchvision calls antialias.
    small = _picture(pixels).resize(size, Image.Resampling.BICUBIC)
    kept = torch.from_numpy(np.array(small)).permute(2, 0, 1)  # (3, H, W)
    return Shrunk("jpg", _file(kept, "JPEG", quality=resize.quality), kept)


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _file(pixels: Tensor, kind: str, **how: Any) -> bytes:
    content = io.BytesIO()
    _picture(pixels).save(content, kind, **how)
    return content.getvalue()


# --- a shard ------------------------------------------------------------------------------------------------


def pack(
    planned: Planned,
    samples: np.ndarray,
    *,
    source: Source,
    out: Path,
    resize: Resize | None,
    note: Callable[[int, int], None],
) -> Part:
    """Write a shard of these samples, read it back, give it its name and put its record into PARTS.

    `note` is called with the images and bytes so far; what it raises leaves nothing behind. DataError if the
    shard cannot be written, or is not what was written.
    """
    path, temporary = out / planned.name, out / hidden(planned.name)
    try:
        with temporary.open("wb") as file:
            rows, left_out, errors = _fill(file, planned, samples, source, resize, note)
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "linux":  # so that it comes from the disk when it is read back
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        total = hashlib.sha256()
        found, flaws, _ = scan(temporary, total)
        if flaws or not np.array_equal(found, rows):
            raise DataError(
                f"{path}: what was read back is not what was written: look for a faulty disk or memory, then the "
                "same command goes on"
            )
        if planned.sha256 not in (None, total.hexdigest()):
            raise DataError(
                f"{path} would not be what it was when the others were written: SRC has changed since, or holds "
                "images that cannot be read, which an earlier version put in; to write all of them again remove "
                "index.json there and give --overwrite"
            )
        part = Part(temporary.stat().st_size, total.hexdigest(), left_out, errors, rows)
        # A record without its shard is none; a shard without a record would be nobody's.
        record(out, planned.name, part)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path} was not written: {error.strerror}; mend that, then the same command goes on"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return part


def _fill(
    file: io.BufferedWriter,
    planned: Planned,
    samples: np.ndarray,
    source: Source,
    resize: Resize | None,
    note: Callable[[int, int], None],
) -> tuple[np.ndarray, list[list[Any]], list[float]]:
    rows: list[tuple[int, int, int, int]] = []
    left_out: list[list[Any]] = []
    errors: list[float] = []
    for begun, sample in enumerate(samples.tolist(), 1):
        note(begun, file.tell())
        try:
            suffix, data, pixels = prepare(source.read(sample), resize)
        except (DataError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            left_out.append([sample, source.name(sample), reason])
            continue
        label = -1 if source.labels is None else int(source.labels[sample])
        rows.append((file.tell() + tarfile.BLOCKSIZE, len(data), zlib.crc32(data), label))
        _add(file, f"{sample:09d}.{suffix}", data)
        if label >= 0:
            _add(file, f"{sample:09d}.cls", str(label).encode())
        if pixels is not None and len(errors) < planned.measured:
            errors.append(float((decode(data).double() - pixels.double()).square().mean()))
    # Two empty blocks end a tar, which is filled up to whole records.
    end = file.tell() + 2 * tarfile.BLOCKSIZE
    file.write(bytes(2 * tarfile.BLOCKSIZE - end % -tarfile.RECORDSIZE))
    return np.array(rows, INDEX), left_out, errors


def _add(file: io.BufferedWriter, name: str, data: bytes) -> None:
    """A member of one header block, without owner and time: the same images give the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    file.write(data)
    file.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def hidden(name: str) -> str:
    """The name of a shard while it is written."""
    return f".{name}.tmp"


# --- its record ---------------------------------------------------------------------------------------------


def record(out: Path, name: str, part: Part) -> None:
    """Write down what is known of a shard."""
    about = {key: value for key, value in vars(part).items() if key != "rows"}
    content = io.BytesIO()
    np.savez(content, rows=part.rows, about=json.dumps(about))
    files.write_bytes(_record(out, name), content.getvalue())


def recorded(out: Path, name: str) -> Part | None:
    """What is known of a shard, if its file is there in its full size; nothing if the record is damaged."""
    path, shard = _record(out, name), out / name
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as content:
            part = Part(rows=content["rows"], **json.loads(str(content["about"])))
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None
    return part if shard.is_file() and shard.stat().st_size == part.bytes else None


def forget(out: Path, name: str) -> None:
    """Remove a shard, so that it is written again."""
    (out / name).unlink()
    _record(out, name).unlink()


def _record(out: Path, name: str) -> Path:
    return out / PARTS / f"{name}.npz"


# --- in a process of its own --------------------------------------------------------------------------------

_work: dict[str, Any] = {}  # what `begin` was given, for the shards of this process


def begin(
    source: Source,
    order: np.ndarray,
    shards: list[Planned],
    out: Path,
    resize: Resize | None,
    shared: Any,
    stop: Any,
) -> None:
    """Make this process ready. `shared` (2 * shards,) takes the images and bytes so far, `stop` ends the work."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everyone: the parent says when to stop
    torch.set_num_threads(1)
    _work.update(source=source, order=order, shards=shards, out=out, resize=resize, shared=shared, stop=stop)


def pack_number(number: int) -> Part:
    """The shard of this number of those that `begin` was given."""
    planned, shared = _work["shards"][number], _work["shared"]

    def note(images: int, written: int) -> None:
        shared[2 * number], shared[2 * number + 1] = images, written
        if _work["stop"].value:
            raise Stopped

    return pack(
        planned,
        _work["order"][planned.start : planned.end],
        source=_work["source"],
        out=_work["out"],
        resize=_work["resize"],
        note=note,
    )
