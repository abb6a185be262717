"""What a checkpoint says about itself: configuration, preprocessing, where it comes from. Plain containers only."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import CheckpointError

FORMAT = 1


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("beit-pretrain", "torch", "torchvision", "lightning", "timm", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from; None outside of one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def make_record(
    config: Mapping[str, Any], preprocessing: Mapping[str, Any], parents: Mapping[str, str]
) -> dict[str, Any]:
    """The self-description; `parents` are file hashes of what this run starts from, by role."""
    return {
        "format": FORMAT,
        "config": dict(config),
        "preprocessing": dict(preprocessing),
        "lineage": {"parents": dict(parents), "versions": versions(), "git_commit": git_commit()},
    }


def same_resampling(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """CheckpointError if a run would go on with pictures made by another Lanczos than the one in its record."""
    made, makes = (record.get("preprocessing", {}) for record in (saved, now))
    if "lanczos" in made and "lanczos" in makes and made["lanczos"] != makes["lanczos"]:
        raise CheckpointError(
            f"the tokenizer's pictures were made by Lanczos of {made['lanczos']} ({made['resize']}), and here it is "
            f"that of {makes['lanczos']} ({makes['resize']}): install the torchvision that the run began with "
            f"({saved['lineage']['versions']['torchvision']}), or start anew with another name="
        )


def read(path: Path, *, key: str) -> dict[str, Any]:
    """A checkpoint of ours: a run folder or a file.

    Raises CheckpointError if there is none, or if it was written by something else.
    """
    found = files.resolve(path, key=key)
    checkpoint = files.read(found, key=key)
    if not isinstance(checkpoint, dict) or "beit_pretrain" not in checkpoint:
        raise CheckpointError(f"{key}={path}: {found} is a checkpoint, but none that beit-train wrote")
    return checkpoint


def part(checkpoint: Mapping[str, Any], name: str, *, key: str) -> dict[str, Tensor]:
    """The weights of one part (`encoder`, `head`, `tokenizer`), without its prefix."""
    prefix = f"{name}."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if not state:
        stage = checkpoint["beit_pretrain"]["config"]["stage"]["name"]
        raise CheckpointError(f"{key}: the checkpoint (of stage {stage}) holds no {name}")
    return state
