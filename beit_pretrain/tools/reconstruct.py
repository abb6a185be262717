"""What a pre-trained model sees behind a mask: its predicted visual tokens, painted beside the true ones.

Letters: B images, N patches, M hidden ones.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from omegaconf import DictConfig
from torch import Tensor

from beit_pretrain.build import UNBUILT, build_tokenizer, flat, make
from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import compose
from beit_pretrain.data.sampler import mix
from beit_pretrain.data.transforms import Interpolation, resize
from beit_pretrain.errors import CheckpointError, DataError
from beit_pretrain.masking import BlockwiseMask, MaskGenerator
from beit_pretrain.models.whole import MaskedImageModel
from beit_pretrain.sheets import draw_columns
from beit_pretrain.stages.pretrain import painted
from beit_pretrain.tokenizer import Tokenizer
from beit_pretrain.tools.images import count, device_of, list_unreadable, outputs, read_image
from beit_pretrain.tools.known import known_masking, known_tokenizer
from beit_pretrain.tools.load import Loaded, load
from beit_pretrain.wording import printable, times

KEY, OPTION = "CHECKPOINT", "--tokenizer"
ENDING = ".reconstruction.png"
DALLE, DALLE_STRIDE = "dalle", 8  # the published tokenizer, and its pixels per token
SHARE, MIN_BLOCK = 0.4, 16  # of the paper's masks (Sec. 2.3), for files that do not say theirs
CELL = 224  # pixels that small pictures are magnified to


def reconstruct(
    checkpoint: str,
    images: Sequence[Path],
    *,
    out: Path,
    tokenizer: str | None,
    seed: int,
    options: dict[str, Any],
    device: str,
) -> int:
    """Write the sheet of each image below `out`; 1 if an image could not be read, else 0.

    `tokenizer` is a run of stage=tokenizer, `dalle`, or None for the one of the checkpoint's configuration; the masks
    follow from `seed` and the place among the images; `options` are those of `load`. Raises BeitError if one of them,
    the device or the images as a whole cannot be used, before anything is written, and if a file cannot be written.
    """
    where = device_of(device)
    todo = outputs(images, out, (ENDING,))
    loaded = load(checkpoint, device=where, **options)
    if not isinstance(loaded.model, MaskedImageModel):
        raise CheckpointError(
            f"{KEY}={checkpoint} is of stage={loaded.stage}, which predicts no visual tokens: give a run of "
            "stage=pretrain"
        )
    painter = _tokenizer(checkpoint, loaded, tokenizer).eval().to(where)
    mask = _mask(loaded, f"{KEY}={checkpoint}")
    print(f"{count(len(todo))}, {_hidden(mask)}", flush=True)
    unreadable, hidden, right = [], 0, 0
    for position, (target, path) in enumerate(todo.items()):
        try:
            pixels = loaded.preprocess.crop(read_image(path))  # (3, H, W) uint8
        except DataError as error:
            unreadable.append(str(error))
            continue
        seen = _look(loaded, painter, pixels.to(where), torch.from_numpy(mask(mix(seed, position))).to(where))
        said = f"{seen.right} of {seen.hidden} hidden patches right ({seen.right / max(seen.hidden, 1):.1%})"
        buffer = io.BytesIO()
        draw_columns(seen.columns, f"{printable(path.name)}: {said}", cell=CELL).save(buffer, "PNG")
        files.write_bytes(Path(f"{target}{ENDING}"), buffer.getvalue())
        print(f"{printable(path)}: {said}", flush=True)
        hidden, right = hidden + seen.hidden, right + seen.right
    done = count(len(todo) - len(unreadable))
    print(
        f"{done} written to {out}; {right:,} of {hidden:,} hidden patches right ({right / max(hidden, 1):.1%})"
    )
    return list_unreadable(unreadable)


class _Seen(NamedTuple):
    """An image's columns of pictures, how many patches were hidden, and how many of their tokens were predicted."""

    columns: dict[str, Tensor]
    hidden: int
    right: int


@torch.inference_mode()
def _look(loaded: Loaded, tokenizer: Tokenizer, pixels: Tensor, mask: Tensor) -> _Seen:
    """Predict what `mask` (rows, cols) hides of pixels (3, H, W) uint8."""
    views = loaded.about["config"]["stage"].get("views", {})
    interpolation: Interpolation = views.get("token_interpolation", "lanczos")
    token_image = resize(pixels.cpu(), tokenizer.image_size, interpolation).to(pixels.device)  # (3, T, T')
    ids = tokenizer.encode(token_image[None].float() / 255)  # (1, N)
    hidden = mask.flatten()[None]  # (1, N)
    model = cast(MaskedImageModel, loaded.model)
    tokens = model.encoder(loaded.preprocess.normalize(pixels)[None], hidden)  # (1, 1 + N, D)
    predicted = model.head(tokens, hidden).argmax(-1)  # (M,)
    columns = painted(tokenizer, pixels[None].float() / 255, hidden, ids, predicted)
    assert columns is not None  # it was asked before the first image
    return _Seen(columns, len(predicted), int((predicted == ids[hidden]).sum()))


def _mask(loaded: Loaded, given: str) -> MaskGenerator:
    """The masks that the model was trained with; the paper's where it does not say."""
    rows, columns = loaded.encoder.grid
    if node := loaded.about["config"].get("masking"):
        try:
            return make(DictConfig({**known_masking(node, given), "grid": [rows, columns]}))
        except UNBUILT as error:
            raise CheckpointError(
                f"{given} has masks that cannot be made ({flat(error)}): give another"
            ) from error
    hidden = max(1, round(SHARE * rows * columns))
    return BlockwiseMask(grid=(rows, columns), count=hidden, min_block=min(MIN_BLOCK, hidden))


def _hidden(mask: MaskGenerator) -> str:
    rows, columns = mask.grid
    return f"{'' if mask.exact else 'up to '}{mask.count} of {rows} x {columns} patches hidden in each"


# --- the tokenizer ------------------------------------------------------------------------------------------


def _tokenizer(checkpoint: str, loaded: Loaded, given: str | None) -> Tokenizer:
    """The tokenizer that the model was trained with; CheckpointError if it is not there, is another or cannot paint."""
    node = _node(checkpoint, loaded, given)
    key = "tokenizer.checkpoint" if given is None else OPTION
    tokenizer: Any = build_tokenizer(DictConfig({"stage": {"name": "pretrain"}, "tokenizer": node}), key)
    assert isinstance(tokenizer, Tokenizer)
    what = f"{key}={node.get('checkpoint') or node['name']}"
    if tokenizer.grid != loaded.encoder.grid:
        raise CheckpointError(
            f"{what} gives {times(tokenizer.grid)} tokens, and {KEY}={checkpoint} has {times(loaded.encoder.grid)} "
            f"patches: give the tokenizer that it was trained with ({OPTION})"
        )
    vocabulary = cast(MaskedImageModel, loaded.model).head.lm_head.out_features
    if tokenizer.vocab_size != vocabulary:
        raise CheckpointError(
            f"{what} has {tokenizer.vocab_size:,} visual tokens, and {KEY}={checkpoint} tells {vocabulary:,} apart: "
            f"give the tokenizer that it was trained with ({OPTION})"
        )
    _same_weights(checkpoint, loaded, tokenizer, what)
    if tokenizer.decode(torch.zeros(1, tokenizer.grid[0] * tokenizer.grid[1], dtype=torch.int64)) is None:
        raise CheckpointError(f"{what} cannot paint its tokens: give one with a decoder ({OPTION})")
    return tokenizer


def _node(checkpoint: str, loaded: Loaded, given: str | None) -> dict[str, Any]:
    """The tokenizer's part of a configuration."""
    if given == DALLE:
        size = [DALLE_STRIDE * side for side in loaded.encoder.grid]
        cfg = compose(["stage=pretrain", "tokenizer=dalle", f"tokenizer.image_size={size}"])
        return cast(dict[str, Any], cfg.tokenizer)
    if given is not None:
        config = record.read(given, key=OPTION)["beit_pretrain"]["config"]
        if config["stage"]["name"] != "tokenizer":
            raise CheckpointError(
                f"{OPTION}={given} is of stage={config['stage']['name']}: give a run of stage=tokenizer, or {DALLE}"
            )
        return {**known_tokenizer(config["tokenizer"], f"{OPTION}={given}"), "checkpoint": given}
    node = loaded.about["config"].get("tokenizer")
    if node is None:
        raise CheckpointError(
            f"{KEY}={checkpoint} does not say which tokenizer it was trained with: set {OPTION} to a run of "
            f"stage=tokenizer, or to {DALLE}, that of the published BEiT"
        )
    path = node.get("checkpoint")
    if path and not Path(str(path)).expanduser().exists():
        raise CheckpointError(
            f"{KEY}={checkpoint} was trained with the tokenizer of {path}, which is not there: set {OPTION} to where "
            "it is now"
        )
    return known_tokenizer(node, f"{KEY}={checkpoint}")


def _same_weights(checkpoint: str, loaded: Loaded, tokenizer: Tokenizer, what: str) -> None:
    trained = loaded.about.get("frozen", {}).get("tokenizer")
    if trained is None:
        return
    state = tokenizer.state_dict()
    # Training can do without the decoder, and then the hash is of the rest.
    rest = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    now = files.weight_hash(state)
    if trained not in (now, files.weight_hash(rest)):
        raise CheckpointError(
            f"{what}: its weights (hash {now[:12]}) are not those that {KEY}={checkpoint} was trained with "
            f"({trained[:12]}): give the original with {OPTION}"
        )
