"""Memory and time to begin with a million samples in a hundred shards:  python benchmarks/shard_index.py

Small pictures are written with their index; then every figure is taken in a fresh process: growth of its memory as the
shards are opened, seconds until the first batch of a run and of one that goes on at a random step, import of torch
and the project apart.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SAMPLES, SHARDS, ROUNDS = 1_000_000, 100, 3
KINDS, SIDE, CLASSES, BATCH = 1000, 12, 1000, 256  # different pictures, their side in pixels
WORKERS = (0, 2)
WINDOWS = (32, None)  # data.shuffle_shards


def pictures() -> list[bytes]:
    """PNGs of a few hundred bytes."""
    from PIL import Image

    rng, found = np.random.default_rng(0), []
    for _ in range(KINDS):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(out, "PNG")
        found.append(out.getvalue())
    return found


def probe(folder: Path, workers: int, window: int | None, seed: int | None) -> dict[str, float]:
    """What one process needs; with a seed it goes on at a random step."""
    began = time.perf_counter()
    import torch  # noqa: F401

    from beit_pretrain.data.module import DataModule
    from beit_pretrain.data.shards import ShardSource
    from beit_pretrain.data.transforms import TwoViews
    from beit_pretrain.masking import BlockwiseMask

    view = TwoViews(
        image_size=(32, 32), token_image_size=(16, 16), mask=BlockwiseMask(grid=(8, 8), count=26, min_block=4)
    )
    imported, cores, before = time.perf_counter(), time.process_time(), memory()
    source = ShardSource(root=str(folder))
    opened, after = time.perf_counter(), memory()
    data = DataModule(
        source=source,
        views=view,
        eval_views=view,
        batch_size=BATCH,
        micro_batch_size=None,
        workers=workers,
        seed=0,
        shuffle_shards=window,
        bad_log=None,
    )
    loader = data.train_dataloader()
    if seed is not None:
        at = random.Random(seed).randrange(10 * data.steps_per_epoch)
        loader.batch_sampler.position = lambda: at  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    batch = next(iter(loader))
    assert len(batch.image) == BATCH
    return {
        "import": imported - began,
        "open": opened - imported,
        "open_mb": after - before,
        "begin": time.perf_counter() - imported,
        "begin_cpu": time.process_time() - cores,
        "begin_mb": memory() - before,
    }


def memory() -> float:
    """Megabytes of this process that are in main memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def fresh(folder: Path, workers: int, window: int | None, seed: int | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--probe", json.dumps([str(folder), workers, window, seed])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        folder, *settings = json.loads(given.probe)
        print(json.dumps(probe(Path(folder), *settings)))
        return
    from measuring import machine, table
    from small_shards import write_shards

    with tempfile.TemporaryDirectory() as temporary:
        folder, files = Path(temporary), pictures()
        began = time.perf_counter()
        write_shards(
            folder,
            samples=given.samples,
            shards=SHARDS,
            ext="png",
            read=lambda number: files[number % KINDS],
            classes=CLASSES,
        )
        print(machine("torch", "numpy"))
        print(
            f"{given.samples:,} samples in {SHARDS} shards, written in {time.perf_counter() - began:.0f} s\n"
        )
        rows = []
        for workers in WORKERS:
            for window in WINDOWS:
                for what, again in (("start", False), ("restart at a random step", True)):
                    found = [
                        fresh(folder, workers, window, turn if again else None)
                        for turn in range(given.rounds)
                    ]
                    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
                    rows.append(
                        [
                            what,
                            str(workers),
                            "null" if window is None else str(window),
                            f"{middle['open']:.2f}",
                            f"{middle['begin']:.2f}",
                            f"{max(one['begin'] for one in found):.2f}",
                            f"{middle['begin_cpu']:.2f}",
                            f"{middle['open_mb']:.0f}",
                            f"{middle['begin_mb']:.0f}",
                            f"{middle['import']:.1f}",
                        ]
                    )
    header = ["", "workers", "shuffle_shards", "s to open", "s to the first batch", "at most", "of a core"]
    print(table([*header, "MB to open", "MB to the first batch", "s to import"], rows))


if __name__ == "__main__":
    main()
