"""Shards as they lie there: whether they are whole, and what is in them."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from beit_pretrain.cluster.ending import die_with_parent, end_pool
from beit_pretrain.data.shard_index import SPLITS, Shard, ShardIndex, read_index
from beit_pretrain.data.shard_tar import key_at, scan
from beit_pretrain.errors import BeitError, DataError
from beit_pretrain.wording import printable

NAMED = 3  # samples of a shard that are named, and flaws of a set


def verify(root: str, workers: int) -> int:
    """Compare every shard with its index: size, SHA-256, and of each sample place, label and CRC-32.

    Returns the exit code: 1 with a line for each fault, 0 if there is none. DataError if there is no whole index.
    """
    folder = Path(root).expanduser()
    index = read_index(folder)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    pool = ProcessPoolExecutor(max(1, min(workers, len(index.shards))), initializer=_leave_interrupts)
    faults: dict[int, list[str]] = {}
    try:
        parts = zip(index.shards, index.bounds[:-1], index.bounds[1:], strict=True)
        jobs = {
            pool.submit(look, folder, shard, np.array(index.entries[start:end])): number
            for number, (shard, start, end) in enumerate(parts)
        }
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=sum(shard.bytes for shard in index.shards))
            for job in as_completed(jobs):
                faults[jobs[job]] = job.result()
                progress.advance(task, index.shards[jobs[job]].bytes)
    except BrokenProcessPool as error:
        raise BeitError(
            "a process was killed while it read a shard (out of memory?): give fewer --workers"
        ) from error
    finally:
        end_pool(pool)
    bad = [number for number in sorted(faults) if faults[number]]
    for number in bad:
        print(*map(printable, faults[number]), sep="\n")
    size = sum(shard.bytes for shard in index.shards) / 1e9
    if not bad:
        whole = f"{len(index.shards)} shards, {len(index.entries):,} images, {size:.2f} GB"
        print(
            f"{root} is as it was written (size, SHA-256, each place, label and CRC-32; not decoded): {whole}"
        )
        return 0
    print(
        f"{root}: {len(bad)} of {len(index.shards)} shards are not as they were written; copy these again, or remove "
        "them and give the command of beit-tools shards write again, which writes what is missing"
    )
    return 1


def _leave_interrupts() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits


def look(folder: Path, shard: Shard, rows: np.ndarray) -> list[str]:
    """What is wrong with a shard, whose entries in the index are `rows`: a line each."""
    path = folder / shard.name
    try:
        size = path.stat().st_size
    except OSError as error:
        return [f"{shard.name}: {error.strerror}"]
    if size != shard.bytes:
        return [f"{shard.name}: it has {size} bytes instead of {shard.bytes}"]
    total = hashlib.sha256()
    try:
        found = scan(path, total).rows
    except DataError as error:
        return [str(error)]
    if len(found) != len(rows):
        return [f"{shard.name}: it holds {len(found)} samples instead of {len(rows)}"]
    if faults := list(_differences(path, found, rows)):
        return faults
    if shard.sha256 not in (None, total.hexdigest()):
        return [f"{shard.name}: its SHA-256 is another, though every image and label is as it was written"]
    return []


def _differences(path: Path, found: np.ndarray, rows: np.ndarray) -> Iterator[str]:
    """The samples whose entries differ, the first ones by name."""
    moved = (found["offset"] != rows["offset"]) | (found["size"] != rows["size"])
    kinds = {
        "its image lies elsewhere or has another size": moved,
        "its bytes are not those that were written (CRC)": ~moved & (found["crc"] != rows["crc"]),
        "its label is not the one that was written": found["label"] != rows["label"],
    }
    with path.open("rb") as file:
        for words, differ in kinds.items():
            places = np.flatnonzero(differ)
            for row in places[:NAMED].tolist():
                offset = int(found[row]["offset"])
                key = key_at(file.fileno(), offset) if offset else None
                yield f"{path.name}, sample {row if key is None else key}: {words}"
            if len(places) > NAMED:
                yield f"{path.name}, {len(places) - NAMED} more samples: {words}"


def show(root: str) -> None:
    """Print what is in a set and how it was written."""
    folder = Path(root).expanduser()
    index = read_index(folder)
    console = Console()
    console.print(_table(index))
    for line in _lines(index):
        console.print(printable(line), soft_wrap=True, highlight=False, markup=False)


def _table(index: ShardIndex) -> Table:
    table = Table("split")
    for head in ("images", "shards", "GB", "bytes an image"):
        table.add_column(head, justify="right")
    for split in SPLITS:
        shards = [shard for shard in index.shards if shard.split == split]
        if shards:
            _row(table, split, index.entries["size"][index.split(split)], shards)
    _row(table, "all", index.entries["size"], index.shards)
    return table


def _row(table: Table, name: str, sizes: np.ndarray, shards: list[Shard]) -> None:
    total = sum(shard.bytes for shard in shards) / 1e9
    mean = sizes.mean() if len(sizes) else 0
    table.add_row(name, f"{len(sizes):,}", f"{len(shards):,}", f"{total:.2f}", f"{mean:,.0f}")


def _lines(index: ShardIndex) -> Iterator[str]:
    labels = index.labels
    if not (labels >= 0).any():
        yield "no labels"
    else:
        counts = np.bincount(labels[labels >= 0], minlength=len(index.class_names or []))
        names = "" if index.class_names is None else f" ({_some(index.class_names)})"
        yield f"{len(counts)} classes{names}, {counts.min():,} to {counts.max():,} images each"
        if unknown := int((labels < 0).sum()):
            yield f"{unknown:,} images without a label"
    for key, value in index.written.items():
        if value not in (None, []):
            yield f"{key.replace('_', ' ')}: {_say(value)}"
    if index.passed_over is not None:
        example = f", such as {index.passed_over.example}" if index.passed_over.images else ""
        yield f"images passed over: {index.passed_over.images:,}{example}"
    flaws = index.impossible | index.flaws
    for sample, reason in sorted(flaws.items())[:NAMED]:
        yield f"unusable: {sample} ({reason})"
    if len(flaws) > NAMED:
        yield f"unusable: {len(flaws) - NAMED} more"


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _say(value: Any) -> str:
    if isinstance(value, dict):
        plain = {key: len(entry) if isinstance(entry, dict) else entry for key, entry in value.items()}
        return ", ".join(f"{key} {_say(entry)}" for key, entry in plain.items())
    if isinstance(value, list):
        return f"{len(value):,}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
