"""What a checkpoint says about itself: configuration, preprocessing, where it comes from. Plain containers only."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from beit_pretrain.checkpoint import files, foreign, stored
from beit_pretrain.checkpoint.places import Found, locate
from beit_pretrain.errors import CheckpointError

FORMAT = 1
CODE = ("beit_pretrain", "tokenizers", "configs", "train.py")  # what of a checkout a run's numbers depend on


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("beit-pretrain", "torch", "torchvision", "lightning", "timm", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def checkout() -> dict[str, Any]:
    """Commit of the checkout this package runs from, and whether its code is another (`git_dirty`); None outside."""
    commit = _git("rev-parse", "--verify", "HEAD")
    changes = None if commit is None else _git("status", "--porcelain", "--", *CODE)
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None if there is no checkout, no git or no answer."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def make_record(
    config: Mapping[str, Any], preprocessing: Mapping[str, Any], parents: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The self-description; `parents` (of `parent`) are what this run starts from, by role."""
    return {
        "format": FORMAT,
        "config": dict(config),
        "preprocessing": dict(preprocessing),
        "lineage": {"parents": dict(parents), "versions": versions(), **checkout()},
    }


def parent(source: str | Path, saved: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    """What the records of runs keep of a checkpoint `saved` that they start from, with all its own parents."""
    about = saved["beit_pretrain"]
    config = about["config"]
    digest = files.sha256(file_of(source, key=key)[0])
    if "foreign" in about:
        return {"path": str(source), "sha256": digest, "stage": config["stage"]["name"], **about["foreign"]}
    lineage = about["lineage"]
    return {
        "path": str(source),
        "sha256": digest,
        "stage": config["stage"]["name"],
        "name": config["name"],
        "data_name": config["data"]["name"],
        "data": about["preprocessing"].get("data"),
        "step": saved.get("global_step"),
        "frozen": about.get("frozen", {}),
        **{name: lineage.get(name) for name in ("versions", "git_commit", "git_dirty", "parents")},
    }


def continued(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on from a checkpoint: its parents are those that it was started with.

    What lies at their paths by now may be gone or another file.
    """
    same_resampling(saved, now)
    return {**now, "lineage": {**now["lineage"], "parents": saved["lineage"]["parents"]}}


def same_resampling(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """CheckpointError if a run would go on with pictures made by another Lanczos than the one in its record."""
    made, makes = (record.get("preprocessing", {}) for record in (saved, now))
    if "lanczos" in made and "lanczos" in makes and made["lanczos"] != makes["lanczos"]:
        raise CheckpointError(
            f"the tokenizer's pictures were made by Lanczos of {made['lanczos']} ({made['resize']}), and here it is "
            f"that of {makes['lanczos']} ({makes['resize']}): install the torchvision that the run began with "
            f"({saved['lineage']['versions']['torchvision']}), or start anew with another name="
        )


def read(source: str | Path, *, key: str, heads: int | None = None) -> dict[str, Any]:
    """A checkpoint of ours, or what a file of others is as one of ours (`checkpoint/foreign`).

    `source` is a run folder, a file, or what else `places` knows; `key` is the config key that it came from; `heads`
    the number of heads for a file that does not say it.
    Raises CheckpointError if there is none, none of a BEiT, or one whose record is not plain data (`stored`).
    """
    given = f"{key}={source}"
    file, facts = file_of(source, key=key)
    content = foreign.content(file, key=key)
    if "beit_pretrain" not in content:
        content = foreign.read(content, file, {**facts, "heads": heads}, given=given)
    check(content, given)
    return content


def check(content: Mapping[str, Any], given: str) -> None:
    """CheckpointError if a file that begins like one of ours does not say of itself what ours say; see `stored`."""
    state = content.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{given} holds no weights: give another checkpoint")
    stored.check_record(content["beit_pretrain"], state, given)


def file_of(source: str | Path, *, key: str) -> tuple[Path, dict[str, Any]]:
    """The file of weights behind a source, here on this machine, and what the place it came from says of it.

    Of weights in several files it is the index of these. Raises CheckpointError if there is none.
    """
    path, facts = (
        locate(source, key=key) if Path(source).expanduser().exists() else _fetched(str(source), key)
    )
    if path.is_dir() and not (path / "checkpoints").is_dir():
        path = foreign.weights_file(path) or path
    return files.resolve(path, key=key), facts


@functools.cache
def _fetched(source: str, key: str) -> Found:
    """What is not a path, located once in a process: a run reads its start several times, and the hub may change."""
    return locate(source, key=key)


def part(checkpoint: Mapping[str, Any], name: str, *, key: str) -> dict[str, Tensor]:
    """The weights of one part (`encoder`, `head`, `tokenizer`), without its prefix."""
    prefix = f"{name}."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if not state:
        stage = checkpoint["beit_pretrain"]["config"]["stage"]["name"]
        raise CheckpointError(f"{key}: the checkpoint (of stage {stage}) holds no {name}")
    return state
