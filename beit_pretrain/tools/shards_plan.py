"""What `beit-tools shards write` is to write: which samples go into which shard, and whether the folder is free."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from hydra.utils import get_object
from omegaconf import OmegaConf

from beit_pretrain.build import make
from beit_pretrain.checkpoint import files
from beit_pretrain.compose import choices, compose, explicit_keys
from beit_pretrain.data.sampler import hashes
from beit_pretrain.data.shard_index import INDEX_JSON, INDEX_NPY, SPLITS, ShardIndex, read_index
from beit_pretrain.data.sources import SceneSource, Source
from beit_pretrain.data.splits import make_splits
from beit_pretrain.errors import ConfigError, DataError
from beit_pretrain.tools.shards_pack import PARTS, Planned, Resize, prepare
from beit_pretrain.wording import is_whole

PLAN = "plan.json"  # in PARTS: what the shards there are written by
LOCK = "lock"  # in PARTS: held while somebody writes
LOOKED_AT = 200  # images of which the mean size is taken, and as many that are compared with their JPEG
HEADERS = 512 + 256  # bytes of an image in a tar beside its own, on average
LABEL = 512 + 512  # bytes of its class number
TAKEN_OVER = 5.0  # seconds that a killed writer's processes may take to end

_SHARD = rf"({'|'.join(SPLITS)})-\d{{6,}}\.tar"
_OURS = re.compile(rf"{_SHARD}|{INDEX_JSON}|{INDEX_NPY}")
_UNFINISHED = re.compile(rf"\.({_SHARD}|({INDEX_JSON}|{INDEX_NPY})\..+)\.tmp")
_SALT = 0x7368617264  # of the order in which samples are written


@dataclass
class Plan:
    """What is to be written. `asked` tells it from another plan; samples go in `order`, (n,) numbers of the source."""

    source: Source
    words: str  # the source as it was asked for
    asked: dict[str, Any]
    resize: Resize | None
    per_shard: int
    mean: float  # bytes of an image in a shard, from some of them
    order: np.ndarray
    shards: list[Planned]


def open_source(src: str, overrides: Sequence[str], out: Path) -> tuple[Source, str]:
    """The source that SRC names, and its name in words."""
    given = explicit_keys(overrides)
    if "data" in given:
        raise ConfigError(f"data={given['data']}: SRC={src} says which images, leave it out")
    known = choices("data")
    if src in known:
        cfg = compose([f"data={src}", *overrides])
    else:
        folder = Path(src).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"SRC={src} is no folder and no choice of data ({', '.join(known)}): give one of them"
            )
        if "data.root" in given:
            raise ConfigError(f"data.root={given['data.root']}: SRC={src} is the root, leave it out")
        layout = "class_folders" if (folder / "train").is_dir() else "folder"
        cfg = compose([f"data={layout}", *overrides])
        cfg.data.root = str(folder)
    if missing := [key for key in cfg.data if OmegaConf.is_missing(cfg.data, key)]:
        raise ConfigError([f"data.{key} is needed: set data.{key}=..." for key in missing])
    roots = cfg.data.get("root") or []
    for root in [roots] if isinstance(roots, str) else roots:
        place = Path(root).expanduser().resolve()
        if out.resolve() == (place.parent if place.suffix == ".tar" else place):
            raise ConfigError(f"OUT={out} is where the images come from: give another folder")
    kind = get_object(cfg.data.source._target_)
    if isinstance(kind, type) and issubclass(kind, SceneSource):
        raise ConfigError(
            f"SRC={src} has a label map for each image, which shards do not hold: give its images' folder"
        )
    source = make(cfg.data.source)
    if source.streamed:
        raise ConfigError(
            f"SRC={src} is a stream, whose images have no numbers: set data.source.cache to a folder"
        )
    if len(source) == 0:
        raise DataError(f"SRC={src} holds no images: give a folder that does")
    return source, " ".join([src, *overrides])


def make_plan(
    source: Source, words: str, asked: dict[str, Any], out: Path, finished: ShardIndex | None
) -> Plan:
    """As it was begun, else a new one, which is written down."""
    path = out / PARTS / PLAN
    resize = None if asked["resize"] is None else Resize(asked["resize"], asked["quality"])
    hashed: dict[str, str | None] = {}
    if finished is not None:
        per_shard = finished.written["samples_per_shard"]
        mean = sum(shard.bytes for shard in finished.shards) / max(1, len(finished.entries))
        hashed = {shard.name: shard.sha256 for shard in finished.shards}
    elif path.exists():
        begun = _plan(path)
        per_shard, mean = begun["samples_per_shard"], begun["mean"]
    else:
        mean = _mean_size(source, resize)
        per_shard = asked["samples"] or max(1, round(asked["size_mb"] * 1e6 / mean))
        files.write_text(
            path, json.dumps({"asked": asked, "samples_per_shard": per_shard, "mean": mean}) + "\n"
        )
    parts = make_splits(source, val_share=0)
    parts = {split: parts[split] for split in SPLITS if len(parts.get(split, ()))}
    if asked["shuffle_seed"] is not None:
        parts = {s: part[np.argsort(hashes(part, asked["shuffle_seed"], _SALT))] for s, part in parts.items()}
    order = np.concatenate(list(parts.values()))
    return Plan(source, words, asked, resize, per_shard, mean, order, _shards(parts, per_shard, hashed))


def _shards(parts: dict[str, np.ndarray], per_shard: int, hashed: dict[str, str | None]) -> list[Planned]:
    """Shards of a split differ by one sample at most; the images to compare are spread over all of them."""
    counts = {split: math.ceil(len(part) / per_shard) for split, part in parts.items()}
    total, shards, start = sum(counts.values()), [], 0
    for split, count in counts.items():
        for number in range(count):
            end = start + len(parts[split]) * (number + 1) // count - len(parts[split]) * number // count
            n = len(shards)
            measured = LOOKED_AT * (n + 1) // total - LOOKED_AT * n // total
            name = f"{split}-{number:06d}.tar"
            shards.append(Planned(name, split, start, end, measured, hashed.get(name)))
            start = end
    return shards


def _mean_size(source: Source, resize: Resize | None) -> float:
    """Bytes that an image takes in a shard, from some of them spread evenly."""
    sizes, fault = [], ""
    beside = HEADERS if source.labels is None else HEADERS + LABEL
    for sample in sorted({i * len(source) // LOOKED_AT for i in range(LOOKED_AT)}):
        try:
            sizes.append(len(prepare(source.read(sample), resize).data) + beside)
        except (DataError, OSError) as error:
            fault = f"{source.name(sample)}: {error}"
    if not sizes:
        raise DataError(f"none of the images that were looked at can be read, the last was {fault}")
    return sum(sizes) / len(sizes)


# --- what is there ------------------------------------------------------------------------------------------


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Nobody else writes to this folder; PARTS is gone afterwards unless there is something to go on with."""
    parts = out / PARTS
    try:
        parts.mkdir(parents=True, exist_ok=True)
        lock = FileLock(parts / LOCK)
        lock.acquire(timeout=TAKEN_OVER)
    except Timeout as error:
        raise ConfigError(f"OUT={out} is being written by another process: wait for it, or end it") from error
    except OSError as error:
        raise ConfigError(
            f"OUT={out} cannot be written to ({error.strerror}): give another folder"
        ) from error
    try:
        yield
    finally:
        if (out / INDEX_JSON).exists() or not any(parts.glob("*.npz")):
            shutil.rmtree(parts)
        lock.release()


def settle(out: Path, asked: dict[str, Any], overwrite: bool) -> ShardIndex | None:
    """The index, if this plan is finished here; None where it may begin or go on. ConfigError where it may not.

    What stands in its way is removed if `overwrite`; what belongs to it never is.
    """
    tidy(out)
    try:
        index = read_index(out) if (out / INDEX_JSON).exists() else None
        begun = index.written if index is not None else _begun(out)
    except DataError as error:
        if not overwrite:
            raise
        if not (out / PARTS / PLAN).exists() and not any(
            re.fullmatch(_SHARD, path.name) for path in out.iterdir()
        ):
            raise ConfigError(
                f"OUT={out} holds an {INDEX_JSON} and no shards, so it may be another program's: give another folder, "
                "or remove it yourself"
            ) from error
        index, begun = None, {}
    if begun is not None:
        other = [key for key in asked if begun.get(key) != asked[key]]
        if index is not None and not is_whole(index.written.get("samples_per_shard"), 1):
            other.append("samples_per_shard")
        if not other:
            return index
        differences = (_difference(key, begun.get(key), asked.get(key)) for key in other)
        fault = f"shards of another plan: {', '.join(differences)}"
    else:
        fault = "shards that this command has not begun"
    ours = [entry for entry in out.iterdir() if _OURS.fullmatch(entry.name)]
    if ours and not overwrite:
        raise ConfigError(f"OUT={out} holds {fault}; give another folder, or --overwrite to throw them away")
    # The index first: shards without one are no set, an index without its shards is a broken one.
    for entry in [*sorted(ours, key=lambda entry: entry.name != INDEX_JSON), *_records(out)]:
        entry.unlink()
    return None


def _begun(out: Path) -> dict[str, Any] | None:
    path = out / PARTS / PLAN
    return _plan(path)["asked"] if path.exists() else None


def _plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_text())
        if is_whole(plan["samples_per_shard"], 1) and plan["mean"] > 0 and isinstance(plan["asked"], dict):
            return plan
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise DataError(f"{path} is damaged: give --overwrite to throw away what was begun there")


def _difference(key: str, there: Any, asked: Any) -> str:
    if key == "fingerprint":
        return "other images than those of SRC"
    values = ("none" if value is None else str(value) for value in (there, asked))
    return f"--{key.replace('_', '-')} {', not '.join(values)}"


def _records(out: Path) -> list[Path]:
    return [entry for entry in (out / PARTS).iterdir() if entry.name != LOCK]


def tidy(out: Path) -> None:
    """Remove what killed processes left of files that they had not finished."""
    for entry in out.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(entry.name):
            entry.unlink()


def check_space(out: Path, plan: Plan, todo: Sequence[int]) -> None:
    """ConfigError if these shards would not fit on the disk."""
    need = plan.mean * sum(plan.shards[n].end - plan.shards[n].start for n in todo)
    free = shutil.disk_usage(out).free
    if need > free:
        raise ConfigError(
            f"OUT={out}: about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free there: free some, or "
            "give a folder on another disk"
        )
