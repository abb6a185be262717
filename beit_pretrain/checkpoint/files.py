"""Weights on disk: read without running what is in them, written so that a crash leaves the old file."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import pickle
import re
import socket
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from beit_pretrain.errors import CheckpointError

STALE_AFTER = 3600  # seconds without a change after which a temporary file counts as abandoned
STRETCH = 4  # bytes of tensors for each byte of their file: some share their memory
ROOM = 2**20  # bytes that those of a small file may have beyond that
VALUES = 2_000_000  # values in a file; an optimiser's state has some thousand


def resolve(path: Path, key: str = "") -> Path:
    """The file behind a path that may be a run folder: its best checkpoint, else its last one.

    `key` is the config key the path came from; the messages name it.
    """
    path = Path(path).expanduser()
    given = f"{key}={path}" if key else str(path)
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"{given}: there is no such file or folder; {_set(key)} to a checkpoint or run folder"
        )
    for name in ("best.ckpt", "last.ckpt"):
        if (found := path / "checkpoints" / name).is_file():
            return found
    raise CheckpointError(
        f"{given}: a folder without checkpoints/best.ckpt or checkpoints/last.ckpt;"
        f" {_set(key)} to the folder of a run that has saved something, or to a file"
    )


def read(path: Path, key: str = "") -> dict[str, Any]:
    """What a PyTorch or safetensors file (or a run folder's checkpoint) holds, on the CPU.

    The format is told from the content. Only tensors and plain containers are accepted; anything else in a
    pickle is refused before it can run. Tensors of zip and safetensors files are mapped, not copied. Zip files, as
    torch.save and therefore `write` make them, hold checksums of all their content, which are compared.
    """
    path = resolve(path, key)
    given = f"{key}={path}" if key else str(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{given}: cannot be read: {error.strerror}") from error
    if fault := _not_weights(head):
        raise CheckpointError(f"{given}: {fault}")
    try:
        if head[8:9] == b"{":  # safetensors: eight bytes of header length, then JSON
            return dict(safetensors.torch.load_file(path))
        zipped = head.startswith(b"PK\x03\x04")
        if zipped and _packed(path):
            raise CheckpointError(
                f"{given}: holds compressed entries, which torch.save does not write: give the file that it wrote"
            )
        if zipped and (altered := _altered(path)):
            raise CheckpointError(
                f"{given}: is damaged: {altered} is not what was written (CRC-32); copy it again"
            )
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{given}: {refusal(error)}") from error
    except Exception as error:  # a damaged file can make the readers raise nearly anything
        raise CheckpointError(f"{given}: {_damage(head)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{given}: holds a {type(content).__name__}, not a dictionary of weights")
    if (name := _stretched(content, path.stat().st_size)) is not None:
        raise CheckpointError(
            f"{given}: {name} is larger than the file, which is damaged or made to fill memory"
        )
    return content


def _packed(path: Path) -> bool:
    """Whether a zip file unpacks to more than it is; torch writes every entry as it is."""
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    return compressed or sum(entry.file_size for entry in entries) > path.stat().st_size


def _stretched(content: Any, size: int) -> str | None:
    """The name of a tensor that a file of `size` bytes does not hold: one number can stand for a billion.

    Copies of it, and a model of its shape, would take memory that nobody expects of such a file.
    """
    values, room, todo = VALUES, STRETCH * size + ROOM, [("content", content)]
    while todo:
        name, value = todo.pop()
        values -= 1
        if isinstance(value, Tensor):
            room -= value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            values -= len(value)
            todo += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            values -= len(value)
            todo += [(name, inner) for inner in value]
        if values < 0 or room < 0:
            return name
    return None


def _altered(path: Path) -> str:
    """The first part of a zip file that does not have its checksum, or nothing."""
    about = path.stat()
    return _compared(path, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _compared(path: Path, *_: int) -> str:
    """`_altered` of a file in this state, once in a process: a run reads its start several times."""
    with zipfile.ZipFile(path) as archive:
        if not any(entry.CRC for entry in archive.infolist()):
            return ""  # torch can be told to write none
        return archive.testzip() or ""


def write(path: Path, content: dict[str, Any]) -> None:
    """Save a dictionary of tensors and plain containers: readers see the old file or the new, never parts."""
    with atomic(Path(path)) as file:
        torch.save(content, file)


def write_bytes(path: Path, content: bytes) -> None:
    """Save bytes; readers see the old file or the new, never a part."""
    with atomic(Path(path)) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Save text as UTF-8; readers see the old file or the new, never a part."""
    write_bytes(path, text.encode())


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_hash(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 over names, types, shapes and values in name order.

    The same on every device and for every memory layout.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refusal(error: pickle.UnpicklingError) -> str:
    """Why a pickle was refused, with the name of what it asked for."""
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"asks for {match[1]}, which is not a weight or a plain container; it was not loaded"
    return "is damaged or holds more than weights and plain containers; it was not loaded"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` that takes its place if the block ends well, and vanishes if not."""
    path = path.expanduser()
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
        _remove(temporary)
        raise CheckpointError(
            f"{path} was not written: {_reason(error)}; what was there before is unchanged"
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def _remove_stale(path: Path) -> None:
    """Remove what killed writers of `path` left behind."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(?P<host>.+)-(?P<pid>\d+)\.tmp")
    for entry in list(path.parent.iterdir()):
        if not (match := pattern.fullmatch(entry.name)):
            continue
        with contextlib.suppress(FileNotFoundError):  # its writer may just have finished
            old = time.time() - entry.stat().st_mtime > STALE_AFTER
            if old or (match["host"] == socket.gethostname() and not _alive(int(match["pid"]))):
                _remove(entry)


def _alive(pid: int) -> bool:
    """Whether a process with this number runs here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: Path) -> None:
    """Remove a file that may be gone already, on a disk that may be broken."""
    with contextlib.suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a renamed entry survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """Why a write failed, in the operating system's words where it has any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return "no space left on device" if cause.errno == errno.ENOSPC else cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def _not_weights(head: bytes) -> str:
    """What a file is that starts like no file of weights, or nothing."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights (a log-in page, or an address that moved?); download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights themselves; run `git lfs pull`"
    if not (head.startswith((b"PK\x03\x04", b"\x80")) or head[8:9] == b"{"):
        return "is not a checkpoint (neither a PyTorch nor a safetensors file)"
    return ""


def _damage(head: bytes) -> str:
    """What probably happened to a file that starts well and cannot be read."""
    kind = "a PyTorch" if head.startswith((b"PK", b"\x80")) else "a safetensors"
    return f"starts like {kind} file but cannot be read to its end: truncated or damaged; copy it again"


def _set(key: str) -> str:
    return f"set {key}" if key else "set the path"
