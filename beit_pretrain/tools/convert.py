"""`beit-tools convert`: weights in another format, as a folder that is there whole, and compared, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit_pretrain.checkpoint import files, formats, record
from beit_pretrain.checkpoint.adapt import INDEX, TABLE
from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.rel_pos import relative_position_index
from beit_pretrain.models.whole import Segmenter
from beit_pretrain.tools import convert_huggingface, convert_timm, model_card
from beit_pretrain.tools.certificate import (
    FILE,
    Comparison,
    Inputs,
    certificate,
    check_read_back,
    compare,
    inputs,
    logits,
)
from beit_pretrain.tools.load import Loaded, load
from beit_pretrain.wording import either

KEY = "SOURCE"
ORIGINAL = "checkpoint.pth"
NECK = 16  # pixels of the patches for which the authors' neck is the one of `models/upernet`


class Target(NamedTuple):
    """A format: what writes it, and who else reads it."""

    # Files into a folder, with what our reader is told beside the format's own; remarks for the user.
    write: Callable[[Loaded, Path, dict[str, Any]], list[str]]
    library: str  # that the folder is for, or that has its names
    outputs: Callable[[Loaded, Path, Inputs], tuple[Tensor, Tensor]]  # ours, the library's
    left_out: Callable[[Loaded], list[str]]  # weights that the format has no place for
    card: Callable[[Loaded], model_card.Use] | None = None


def convert(
    source: str,
    out: Path,
    *,
    to: str,
    weights: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    heads: int | None = None,
) -> str:
    """Write the model as a folder of the format `to`, compare it there; returns what to print.

    weights: raw or ema; mean, std, heads: where the source does not say them.
    Raises CheckpointError or ConfigError in one line, and nothing is left, if the folder is not free, the model
    cannot be had or has no form there, its logits differ, or what is read again is another model.
    """
    if to not in TARGETS:
        raise CheckpointError(f"--to {to} is unknown: set {either(list(TARGETS))}")
    target = TARGETS[to]
    with _new_folder(out) as folder:
        notes: list[str] = []
        loaded = load(source, weights=weights, mean=mean, std=std, heads=heads, key=KEY, tell=notes.append)
        if loaded.stage == "encoder" and target.card is not None:
            raise CheckpointError(f"{KEY}={source} is an encoder without a head: set --to original")
        left_out = target.left_out(loaded)
        remarks = target.write(loaded, folder, _mark(source, loaded, left_out))
        given = inputs(loaded)
        comparison = _compare(target, loaded, folder, given)
        read_again = _read_again(loaded, folder, given, left_out)
        if target.card is not None:
            card = model_card.model_card(loaded, target.card(loaded), comparison, given.names, remarks)
            files.write_text(folder / "README.md", card)
        content = certificate(
            loaded, folder, comparison, read_again, to=to, pictures=given.names, left_out=sorted(left_out)
        )
        files.write_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    lines = [
        f"{out}: stage={loaded.stage} as {to}",
        comparison.line(),
        "read again, every weight is bit-equal, with the same logits",
    ]
    return "\n".join([*lines, *remarks, *notes])


def _mark(source: str, loaded: Loaded, left_out: Sequence[str]) -> dict[str, Any]:
    """What the format has no place for: this project reads it off the files again.

    With the hash of the weights that are written, which tells whether they were trained elsewhere since.
    """
    state = loaded.model.state_dict()
    origin = record.parent(source, {"beit_pretrain": loaded.about}, key=KEY)
    return {
        "version": record.versions().get("beit-pretrain"),
        "stage": loaded.stage,
        "image_size": list(loaded.preprocess.image_size),
        "crop_pct": loaded.preprocess.crop_pct,
        "heads": loaded.about["config"]["model"]["heads"],
        "weights": files.weight_hash({name: state[name] for name in state.keys() - set(left_out)}),
        **({"blocks": loaded.model.blocks} if isinstance(loaded.model, Segmenter) else {}),
        "lineage": {"converted_from": _without_folders(origin)},
    }


def _without_folders(entry: dict[str, Any]) -> dict[str, Any]:
    """An ancestor for files that are given away: where it lay on this machine is nobody's business."""
    place = entry.get("path", "")
    named = {"path": place if ":" in place else Path(place).name} if place else {}
    if "source" in entry:
        named["source"] = entry["source"] if ":" in entry["source"] else Path(entry["source"]).name
    above = {
        role: _without_folders(parent) if isinstance(parent, dict) else parent
        for role, parent in (entry.get("parents") or {}).items()
    }
    return {**entry, **named, "parents": above}


def _read_again(loaded: Loaded, folder: Path, given: Inputs, left_out: list[str]) -> Comparison:
    """The written folder as a user of this project reads it: weights bit by bit, pixels and logits."""
    again = load(folder, key="OUT", tell=lambda note: None)  # the notes are of the source, and were told
    check_read_back(loaded.model.state_dict(), again.model.state_dict(), left_out)
    who = "the folder, read again,"
    compare(given.image, inputs(again).image, who, what="pixels")
    with torch.inference_mode():
        if again.stage == "encoder":  # without the head that the format has no place for
            return compare(loaded.encoder(given.image), again.encoder(given.image), who)
        return compare(logits(loaded, given), logits(again, given), who)


def _compare(target: Target, loaded: Loaded, folder: Path, given: Inputs) -> Comparison:
    """The written folder in the library that it is for."""
    try:
        with torch.inference_mode():
            ours, theirs = target.outputs(loaded, folder, given)
    except _Nobody as nobody:
        return Comparison(library=None, why=str(nobody))
    except ImportError as error:
        return Comparison(
            library=None,
            why=f"{error}; pip install 'beit-pretrain[huggingface]' and convert again to have it compared",
        )
    except CheckpointError:
        raise
    except Exception as error:  # another library may raise anything
        said = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{target.library} {version(target.library)} cannot use what would be written ({type(error).__name__}: "
            f"{said}): nothing was written"
        ) from error
    return compare(ours, theirs, f"{target.library} {version(target.library)}")


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place if the block ends well, and vanishes if not.

    CheckpointError if `out` is there and not empty, or cannot be written.
    """
    # In a folder that exists already, so that nothing is left of those above `out` either.
    place = out.resolve()
    above = next(parent for parent in place.parents if parent.is_dir())
    folder = above / f".{place.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        if place.exists() and (place.is_file() or any(place.iterdir())):
            raise CheckpointError(f"OUT={out} is there already: give another folder, or remove it")
        folder.mkdir()
        yield folder
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, place)
    except OSError as error:
        raise CheckpointError(f"OUT={out} was not written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- the authors' files ------------------------------------------------------------------------------------------


class _Nobody(Exception):
    """Why no library can be asked."""


def _write_original(loaded: Loaded, folder: Path, mark: dict[str, Any]) -> list[str]:
    """`checkpoint.pth`, with the tables' indices, which the authors' files hold and their scripts expect.

    Beside the weights lies, for our reader, what their files do not say.
    """
    state: dict[str, Any] = formats.to_original(loaded.model.state_dict())
    index = relative_position_index(loaded.encoder.grid)  # (L, L)
    state |= {name.replace(TABLE, INDEX): index for name in state if name.endswith(TABLE)}
    content: dict[str, Any] = {"model": state}
    if isinstance(loaded.model, Segmenter):
        content = {"meta": {"CLASSES": loaded.labels} if loaded.labels else {}, "state_dict": state}
    content["preprocessing"] = {
        **mark,
        "mean": list(loaded.preprocess.mean),
        "std": list(loaded.preprocess.std),
        "class_names": loaded.labels,
        "reduce_zero_label": bool(loaded.about["preprocessing"].get("reduce_zero_label")),
    }
    files.write(folder / ORIGINAL, content)
    patch_size = loaded.encoder.patch_size
    if not isinstance(loaded.model, Segmenter) or patch_size == NECK:
        return []
    return [
        f"patches of {patch_size} pixels: the authors' segmentation builds this neck for patches of {NECK} only, and "
        "does not take the file; this project reads it"
    ]


def _original_outputs(loaded: Loaded, folder: Path, given: Inputs) -> tuple[Tensor, Tensor]:
    """timm's BEiT has the authors' names; the index it makes for itself."""
    if loaded.stage != "classify":
        raise _Nobody(
            f"no library reads the authors' files of stage={loaded.stage}, only their own scripts do"
        )
    state = files.read(folder / ORIGINAL)["model"]
    state = {name: value for name, value in state.items() if not name.endswith(INDEX)}
    return logits(loaded, given), convert_timm.built(loaded, state)(given.image)


TARGETS = {
    "original": Target(_write_original, "timm", _original_outputs, lambda loaded: []),
    "huggingface": Target(
        convert_huggingface.write,
        "transformers",
        convert_huggingface.outputs,
        lambda loaded: [],
        convert_huggingface.use,
    ),
    "timm": Target(convert_timm.write, "timm", convert_timm.outputs, convert_timm.left_out, convert_timm.use),
}
