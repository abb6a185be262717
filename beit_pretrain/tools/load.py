"""A trained model, ready to be used: `beit_pretrain.load`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.checkpoint import record
from beit_pretrain.checkpoint.adapt import Layout, adapt
from beit_pretrain.checkpoint.stored import ENCODER
from beit_pretrain.data.decode import to_tensor
from beit_pretrain.data.transforms import EvalView
from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.default_blocks import blocks_of_null
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.models.upernet import SegmentationHead
from beit_pretrain.models.whole import Classifier, Headless, MaskedImageModel, Segmenter
from beit_pretrain.origins import check_fit, grid_of, load_strictly, part_weights
from beit_pretrain.tools.images import read_image
from beit_pretrain.wording import bracket, either, pair, printable, show

Picture = Path | str | Image.Image | np.ndarray | Tensor
Model = MaskedImageModel | Classifier | Segmenter | Headless
STAGES = ("pretrain", "classify", "segment")
CROP_PCT = {"pretrain": 1.0, "segment": 1.0, "encoder": 1.0}  # of the stages whose configuration has none


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """A picture as the model's input: resized until it covers `image_size` / `crop_pct`, its centre, normalised.

    The crop begins at a whole pixel as in Transformers; in training, odd margins are rounded as in torchvision, a
    pixel further for some sizes.
    """

    image_size: tuple[int, int]  # (height, width) in pixels
    crop_pct: float  # share of the resized image's sides that the crop keeps
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, picture: Picture) -> Tensor:
        """(3, height, width) float32 of a file, a PIL image, or uint8 pixels: (3, H, W) tensor, (H, W, 3) array.

        DataError for a file that cannot be read, TypeError for other pixels.
        """
        return self.normalize(self.crop(pixels_of(picture)))

    def crop(self, pixels: Tensor) -> Tensor:
        """The part of (3, H, W) uint8 pixels that the model sees, (3, height, width) uint8."""
        view = EvalView(image_size=self.image_size, crop_pct=self.crop_pct, rounding=int)
        return view(pixels, 0).image

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (..., 3, height, width) as float32 in the scale that the model was trained on."""
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in eval mode with trainable weights, what turns pictures into its input, and the names of its classes."""

    model: Model
    stage: str  # pretrain, classify or segment; encoder: of another program, without a head
    preprocess: Preprocess
    labels: list[str] | None  # in the order of the logits; None where the model has no classes
    about: dict[str, Any]  # what the checkpoint says of itself: config, preprocessing, lineage

    @property
    def encoder(self) -> Beit:
        return self.model.encoder


def _warn(note: str) -> None:
    warnings.warn(printable(note), stacklevel=3)  # at the line that calls load


def load(
    path: str | Path,
    *,
    weights: str = "raw",
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    blocks: Sequence[int] | None = None,
    heads: int | None = None,
    device: str | torch.device = "cpu",
    key: str = "path",
    tell: Callable[[str], None] | None = None,
) -> Loaded:
    """The model of a run folder or a checkpoint, of ours or of any published format (docs/weights.md).

    weights: `raw`, or `ema`, the running average that fine-tuning can keep.
    image_size: another one than it was trained with; position tables are resized.
    mean, std, crop_pct: in place of what the checkpoint says.
    blocks: of a segmentation, the four that its head looks at, counted from 0, in place of those that it names.
    heads: of the attention, for a file without position tables that does not say it.
    key: what the messages call the path.
    tell: is called with each line that one should know of a file of another program; a warning if not given.
    Raises CheckpointError if there is no such model, ConfigError if a size does not fit.
    """
    saved = record.read(path, key=key, heads=heads)
    about = saved["beit_pretrain"]
    config = about["config"]
    for note in about.get("foreign", {}).get("notes", ()):
        (tell or _warn)(note)
    stage = config["stage"]["name"]
    if stage not in (*STAGES, "encoder"):
        raise CheckpointError(
            f"{key}={path} is of stage={stage}, which is used by other tools: give a run of stage={either(STAGES)}"
        )
    if heads is not None and heads != config["model"]["heads"]:
        raise ConfigError(
            f"heads={heads}, but {key}={path} has {config['model']['heads']}: leave heads (--heads) out"
        )
    state = part_weights(saved, ("encoder", "head"), weights)
    trained_at = pair(config["image_size"])
    size = trained_at if image_size is None else pair(image_size)
    labels = about["preprocessing"].get("class_names")
    # What the file says is seen to fit its weights before memory is taken for it.
    with torch.device("meta"):
        check_fit(_empty(config, state, trained_at, blocks, f"{key}={path}"), state, f"{key}={path}")
    model = _empty(config, state, size, blocks, f"{key}={path}")
    if size != trained_at:
        source, target = Layout(grid=grid_of(config)), Layout(grid=model.encoder.grid)
        state, _ = adapt(state, model.state_dict(), source=source, target=target)
    load_strictly(model, state, f"{key}={path}")
    normalize = config["data"]["normalize"]
    return Loaded(
        model=model.eval().to(device),
        stage=stage,
        preprocess=Preprocess(
            image_size=(size[0], size[1]),
            crop_pct=crop_pct or CROP_PCT.get(stage) or config["stage"]["eval_views"]["crop_pct"],
            mean=_three(mean, normalize["mean"], "mean", f"{key}={path}"),
            std=_three(std, normalize["std"], "std", f"{key}={path}"),
        ),
        labels=None if stage == "pretrain" or labels is None else list(labels),
        about=about,
    )


def pixels_of(picture: Picture) -> Tensor:
    """(3, H, W) uint8 of a picture in any of the forms that `Preprocess` takes."""
    if isinstance(picture, str | Path):
        return read_image(Path(picture))
    if isinstance(picture, Image.Image):
        return to_tensor(picture)
    # A copy: torch warns of arrays that cannot be written to, such as Pillow's.
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1) if isinstance(picture, np.ndarray) else picture
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
        raise TypeError(
            f"a picture of {pixels.dtype} {tuple(picture.shape)}: give uint8, a tensor (3, H, W) or an array (H, W, 3)"
        )
    return pixels


def _empty(
    config: dict[str, Any],
    state: dict[str, Tensor],
    size: Sequence[int],
    blocks: Sequence[int] | None,
    given: str,
) -> Model:
    """The model of a configuration without its weights; how many classes or ids there are is in the weights."""
    stage = config["stage"]
    encoder = _encoder(config["model"], size, given)
    if stage["name"] == "encoder":
        return Headless(encoder)
    if stage["name"] == "pretrain":
        vocabulary = len(state["head.lm_head.weight"])
        return MaskedImageModel(encoder, MIMHead(width=encoder.width, vocab_size=vocabulary))
    if stage["name"] == "classify":
        classes = len(state["head.head.weight"])
        return Classifier(encoder, ClassHead(width=encoder.width, classes=classes, pooling=stage["pooling"]))
    channels, *_ = state["head.decode_head.bottleneck.bn.weight"].shape
    classes = len(state["head.decode_head.conv_seg.weight"])
    head = SegmentationHead(width=encoder.width, channels=channels, classes=classes)
    looked_at = list(blocks or stage["blocks"] or blocks_of_null(encoder.depth))
    if len(looked_at) != 4 or not all(0 <= block < encoder.depth for block in looked_at):
        raise ConfigError(f"blocks={bracket(looked_at)}: give four numbers from 0 to {encoder.depth - 1}")
    return Segmenter(encoder, head, looked_at)


def _encoder(node: Mapping[str, Any], size: Sequence[int], given: str) -> Beit:
    """The encoder that a checkpoint's options describe, whatever class they name."""
    if node.get("_target_") != ENCODER:
        raise CheckpointError(
            f"{given} has an encoder of the class {node.get('_target_')}, and {ENCODER} is the one known here: give "
            "another checkpoint"
        )
    options = {name: value for name, value in node.items() if name not in ("_target_", "name", "image_size")}
    try:
        return Beit(image_size=(size[0], size[1]), **options)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{given} has an encoder that cannot be built ({error}): give another checkpoint"
        ) from error


def _three(given: Sequence[float] | None, known: Any, name: str, source: str) -> tuple[float, float, float]:
    """A value for each colour; ConfigError where nobody says it, or not three."""
    values = given if given is not None else known
    if values is None:
        raise ConfigError(
            f"{source} does not say how its images were normalised: give mean and std (--mean, --std), such as "
            "0.5,0.5,0.5 for both, as models of ImageNet-22k were trained"
        )
    if not isinstance(values, Sequence) or len(values) != 3:
        raise ConfigError(f"{name}={show(values)}: give three numbers, for red, green and blue")
    red, green, blue = (float(value) for value in values)
    return red, green, blue
