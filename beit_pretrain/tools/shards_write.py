"""`beit-tools shards write`: any source as shards, which go on where an interruption left them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from beit_pretrain.cluster.ending import end_pool
from beit_pretrain.data.shard_index import Shard, ShardIndex, write_index
from beit_pretrain.data.sources import Source
from beit_pretrain.errors import BeitError, ConfigError, DataError
from beit_pretrain.tools.shards_pack import Part, begin, forget, pack_number, recorded
from beit_pretrain.tools.shards_plan import Plan, alone, check_space, make_plan, open_source, settle, tidy
from beit_pretrain.wording import printable

SAMPLES = 10_000  # in a shard, where nothing else is asked for
QUALITY = 90  # of a resized image's JPEG
MOST_LEFT_OUT = 0.01  # share of images that cannot be read
NAMED = 100  # images that a list names at most
IDENTICAL = 100.0  # dB, for a JPEG without any error
REFRESH = 0.5  # seconds


def write(
    src: str,
    out: Path,
    overrides: Sequence[str],
    *,
    samples: int | None,
    size_mb: float | None,
    workers: int,
    seed: int | None,
    resize: int | None,
    quality: int | None,
    overwrite: bool,
) -> int:
    """Write the shards that are missing and then the index; `seed` None: in the source's order.

    Returns the exit code: 0, 1 if too many images cannot be read, 130 after Ctrl-C. BeitError for options that make
    no sense, an `out` that cannot be used or holds shards of another plan, and a disk that is full.
    """
    if samples is not None and size_mb is not None:
        raise ConfigError("--samples and --size-mb both say how large a shard is: leave one of them out")
    if quality is not None and resize is None:
        raise ConfigError("--quality is that of resized images: set --resize too, or leave it out")
    source, words = open_source(src, overrides, out)
    asked = {
        "fingerprint": source.fingerprint(),
        "samples": SAMPLES if samples is None and size_mb is None else samples,
        "size_mb": size_mb,
        "shuffle_seed": seed,
        "resize": resize,
        "quality": None if resize is None else quality or QUALITY,
    }
    try:
        with alone(out):
            return _write(source, words, asked, out, workers, overwrite)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on with what is missing in {out}")
        return 130


def _write(
    source: Source, words: str, asked: dict[str, Any], out: Path, workers: int, overwrite: bool
) -> int:
    finished = settle(out, asked, overwrite)
    plan = make_plan(source, words, asked, out, finished)
    todo = _missing(plan, out, finished)
    if finished is not None and not todo:
        print(f"{out} is finished: {_sum(finished)}; {_next(out)}")
        return 0
    check_space(out, plan, todo)
    if len(todo) < len(plan.shards):
        print(f"{len(plan.shards) - len(todo)} of {len(plan.shards)} shards are there, the others follow")
    try:
        left_out = _pack(plan, out, todo, workers)
    finally:
        tidy(out)
    if len(left_out) > MOST_LEFT_OUT * len(plan.order):
        return _refuse(plan, out, left_out)
    if finished is None:
        finished = _index(plan, out)
        write_index(out, finished)
    _report(finished, out)
    return 0


def _missing(plan: Plan, out: Path, finished: ShardIndex | None) -> list[int]:
    """Numbers of the shards whose file has not the size that its record, or the index of them all, says."""
    if finished is None:
        return [n for n, shard in enumerate(plan.shards) if recorded(out, shard.name) is None]
    paths = (out / shard.name for shard in finished.shards)
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    return [n for n, shard in enumerate(finished.shards) if shard.bytes != sizes[n]]


def _pack(plan: Plan, out: Path, todo: Sequence[int], workers: int) -> list[list[Any]]:
    """Write these shards, or some of them if too much cannot be read. Returns what had to be left out."""
    there = [recorded(out, shard.name) for shard in plan.shards]
    left_out = [entry for part in there if part is not None for entry in part.left_out]
    shared = multiprocessing.RawArray("q", 2 * len(plan.shards))
    stop = multiprocessing.RawValue("b", 0)
    job = (plan.source, plan.order, plan.shards, out, plan.resize, shared, stop)
    processes = max(1, min(workers, len(todo)))
    with (
        ProcessPoolExecutor(processes, initializer=begin, initargs=job) as pool,
        _Line(plan, todo, shared) as line,
    ):
        try:
            waiting = {pool.submit(pack_number, number): number for number in todo}
            while waiting and len(left_out) <= MOST_LEFT_OUT * len(plan.order):
                for future in wait(waiting, REFRESH, FIRST_COMPLETED).done:
                    part = future.result()
                    line.finished(waiting.pop(future), part)
                    left_out += part.left_out
                line.show()
        except BrokenProcessPool as error:
            raise BeitError(
                "a process was killed while it wrote a shard (out of memory?): the same command goes on, with fewer "
                "--workers if it was the memory"
            ) from error
        finally:
            stop.value = 1
            end_pool(pool)
    return left_out


class _Line:
    """How far it is: a line that changes on a terminal, a line for each shard elsewhere."""

    def __init__(self, plan: Plan, todo: Sequence[int], shared: Any) -> None:
        self.plan = plan
        self.todo = todo
        self.shared = np.frombuffer(shared, np.int64).reshape(-1, 2)  # images and bytes of each shard
        self.done = np.zeros(3, np.int64)  # shards, images and bytes
        self.began = time.monotonic()
        console = Console()
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> _Line:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def finished(self, number: int, part: Part) -> None:
        self.shared[number] = len(part.rows) + len(part.left_out), part.bytes
        self.done += 1, *self.shared[number]
        if self.live is None:
            name = self.plan.shards[number].name
            print(f"{name}, {len(part.rows):,} images; {self._state(*self.done[1:])}", flush=True)

    def show(self) -> None:
        if self.live is not None:
            self.live.update(Text(self._state(*self.shared.sum(0))), refresh=True)

    def _state(self, images: int, written: int) -> str:
        rate = images / (time.monotonic() - self.began)
        counts = f"{self.done[0]} of {len(self.todo)} shards, {images:,} images"
        return f"{counts}, {written / 1e9:.2f} GB; {rate:.0f} images/s"


# --- the end ------------------------------------------------------------------------------------------------


def _refuse(plan: Plan, out: Path, left_out: list[list[Any]]) -> int:
    """Say what could not be read; shards that lack something are written again by the next command."""
    for shard in plan.shards:
        part = recorded(out, shard.name)
        if part is not None and part.left_out:
            forget(out, shard.name)
    _list(left_out)
    print(
        f"stopped: more than {MOST_LEFT_OUT:.0%} of the {len(plan.order):,} images cannot be read; mend or remove "
        "them, then the same command goes on"
    )
    return 1


def _list(left_out: list[list[Any]]) -> None:
    print(f"left out, because they cannot be read: {len(left_out)}")
    for _, name, reason in left_out[:NAMED]:
        print(f"  {printable(f'{name}: {reason}')}")
    if len(left_out) > NAMED:
        print(f"  and {len(left_out) - NAMED} more")


def _index(plan: Plan, out: Path) -> ShardIndex:
    parts: list[Part] = []
    for shard in plan.shards:
        part = recorded(out, shard.name)
        if part is None:
            raise DataError(
                f"{out / shard.name} was changed while the others were written: start the command again"
            )
        parts.append(part)
    written = {
        "by": "beit-tools shards write",
        "source": plan.words,
        **plan.asked,
        "samples_per_shard": plan.per_shard,
        "left_out": [entry for part in parts for entry in part.left_out],
    }
    errors = np.array([error for part in parts for error in part.errors])
    if len(errors):
        # Peak signal-to-noise ratio of the JPEG against the resized pixels, over the three colours.
        psnr = np.minimum(10 * np.log10(255**2 / np.maximum(errors, 1e-12)), IDENTICAL)
        written["psnr"] = {"images": len(psnr), "mean": float(psnr.mean()), "worst": float(psnr.min())}
    return ShardIndex(
        shards=[
            Shard(shard.name, shard.split, len(part.rows), part.bytes, part.sha256)
            for shard, part in zip(plan.shards, parts, strict=True)
        ],
        entries=np.concatenate([part.rows for part in parts]),
        class_names=plan.source.class_names,
        written=written,
    )


def _report(index: ShardIndex, out: Path) -> None:
    if left_out := index.written["left_out"]:
        _list(left_out)
    if loss := index.written.get("psnr"):
        print(
            f"larger images have a shorter side of {index.written['resize']} and are JPEG of quality "
            f"{index.written['quality']}, which is a loss: PSNR {loss['mean']:.1f} dB, at worst {loss['worst']:.1f} "
            f"dB, against the resized pixels of {loss['images']} images"
        )
    print(f"{out}: {_sum(index)}; {_next(out)}")


def _sum(index: ShardIndex) -> str:
    size = sum(shard.bytes for shard in index.shards)
    return f"{len(index.entries):,} images in {len(index.shards):,} shards, {size / 1e9:.2f} GB"


def _next(out: Path) -> str:
    return f"to train on them: beit-train stage=pretrain data=shards data.root={out}"
