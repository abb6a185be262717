"""What a conversion is judged by: the logits of both libraries on real pictures, and the record of it.

Letters: B pictures, N patches, (H, W) the model's image size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.checkpoint import files, record
from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.whole import MaskedImageModel
from beit_pretrain.tools.load import Loaded

FILE = "certificate.json"
LIMIT = 1e-4  # of the largest difference, in units of the largest logit, or of 1 if that is more
PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # come with scikit-learn
TURN = Image.Transpose.ROTATE_90
SEED = 0  # of the masks


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Real pictures as a model takes them."""

    names: list[str]
    image: Tensor  # (B, 3, H, W), normalised
    mask: Tensor | None  # (B, N) bool, half of the patches hidden; None for models without masks


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the other library's logits are from ours; without numbers, why there are none."""

    library: str | None  # and its version; None: not compared
    difference: float | None = None  # max |ours - theirs|
    scale: float | None = None  # max |theirs|
    why: str | None = None

    def line(self) -> str:
        """The result as a person reads it."""
        if self.library is None:
            return f"not compared with another library: {self.why}"
        return (
            f"largest difference of the logits {self.difference:.1e}, where the largest logit is {self.scale:.1f}: "
            f"compared with {self.library}"
        )


def inputs(loaded: Loaded) -> Inputs:
    """Two photographs, upright and turned, in the model's preprocessing; the same masks every time."""
    from sklearn.datasets import load_sample_image

    pictures = {name: Image.fromarray(load_sample_image(name)) for name in PHOTOGRAPHS}
    pictures |= {f"{name}, turned": picture.transpose(TURN) for name, picture in pictures.items()}
    image = torch.stack([loaded.preprocess(picture) for picture in pictures.values()])
    mask = None
    if isinstance(loaded.model, MaskedImageModel):
        rows, columns = loaded.encoder.grid
        order = torch.rand(len(image), rows * columns, generator=torch.Generator().manual_seed(SEED))
        mask = order.argsort(1) < rows * columns // 2
    return Inputs(names=list(pictures), image=image, mask=mask)


def logits(loaded: Loaded, given: Inputs) -> Tensor:
    """Those of our model."""
    if isinstance(loaded.model, MaskedImageModel):
        return loaded.model(given.image, given.mask)
    return loaded.model(given.image)


def compare(ours: Tensor, theirs: Tensor, library: str, what: str = "logits") -> Comparison:
    """CheckpointError if they differ by more than LIMIT, or in shape, or are no numbers."""
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"{what} of {library} have shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}: nothing was written"
        )
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    allowed = LIMIT * max(1.0, scale)
    if not (math.isfinite(difference) and difference <= allowed):
        raise CheckpointError(
            f"{what} of {library} differ from ours by {difference:.2g}, where the largest is {scale:.2g} and "
            f"{allowed:.2g} is allowed: nothing was written"
        )
    return Comparison(library=library, difference=difference, scale=scale)


def certificate(
    loaded: Loaded,
    folder: Path,
    comparison: Comparison,
    read_again: Comparison,
    *,
    to: str,
    pictures: list[str],
    left_out: list[str],
) -> dict[str, Any]:
    """What certificate.json holds: numbers, versions and hashes; `folder` is as it will be, but for this file."""
    name, _, version = (comparison.library or "").partition(" ")
    return {
        "format": to,
        "stage": loaded.stage,
        "checked_with": {name: version} if name else None,
        "why": comparison.why,
        "largest_difference": comparison.difference,
        "scale": comparison.scale,
        "limit": LIMIT,
        "pictures": pictures,
        "read_back": "bit-equal",
        "read_back_difference": read_again.difference,
        "left_out": left_out,
        "weights": files.weight_hash(loaded.model.state_dict()),
        "files": {path.name: files.sha256(path) for path in sorted(folder.iterdir())},
        "versions": record.versions(),
    }


def check_read_back(ours: Mapping[str, Tensor], read: Mapping[str, Tensor], left_out: list[str]) -> None:
    """CheckpointError unless the written weights, as this project reads them, are ours bit by bit."""
    expected = ours.keys() - set(left_out)
    wrong = sorted(expected ^ read.keys())
    wrong += [name for name in sorted(expected & read.keys()) if not _same(ours[name], read[name])]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} weights are others when read again ({', '.join(wrong[:3])}): nothing was written"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit: equal zeros of unlike sign are two things, equal NaN are one."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(value.contiguous().flatten().view(torch.uint8) for value in (one, other)))
