"""A trained model as a folder of timm: config.json and model.safetensors, for `timm.create_model("local-dir:...")`.

timm's loader reads a table of a grid that is not square as if it came from a square one: older releases always, newer
ones where the number of its rows allows that. Such models go around the loader, with `load_state_dict`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.checkpoint.adapt import MASK_TOKEN, SHARED, TABLE
from beit_pretrain.checkpoint.formats import to_timm
from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.whole import Classifier, MaskedImageModel
from beit_pretrain.tools.certificate import Inputs, logits
from beit_pretrain.tools.load import Loaded
from beit_pretrain.tools.model_card import Use

LARGE = 896  # width from which the large model is the nearer one
WEIGHTS = "model.safetensors"


def write(loaded: Loaded, folder: Path, mark: dict[str, Any]) -> list[str]:
    """Both files; returns what a user should know. CheckpointError for a segmentation, which timm does not have."""
    if loaded.stage == "segment":
        raise CheckpointError("timm has no UPerNet for a segmentation: set --to original or huggingface")
    state = to_timm(loaded.model.state_dict())
    # Not save_file, which lets nobody else read the file.
    files.write_bytes(folder / WEIGHTS, safetensors.torch.save(state, {"format": "pt"}))
    text = json.dumps({**_config(loaded), "beit_pretrain": mark}, indent=2, ensure_ascii=False)
    files.write_text(folder / "config.json", text + "\n")
    return _remarks(loaded)


def outputs(loaded: Loaded, folder: Path, given: Inputs) -> tuple[Tensor, Tensor]:
    """Our logits and timm's; of pre-training, which timm has no head for, the encoder's tokens after the norm."""
    if _through_loader(loaded):
        import timm

        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    else:
        model = built(loaded, files.read(folder / WEIGHTS))
    if isinstance(loaded.model, MaskedImageModel):
        ours = loaded.model.head.norm(loaded.encoder(given.image))
        return ours, model.forward_features(given.image)
    return logits(loaded, given), model(given.image)


def built(loaded: Loaded, state: dict[str, Tensor]) -> Any:
    """timm's model with weights of its names, which must be all of them, around its loader."""
    import timm

    model: Any = timm.create_model(_architecture(loaded), num_classes=_classes(loaded), **_arguments(loaded))
    model.load_state_dict(state)
    return model.eval()


def left_out(loaded: Loaded) -> list[str]:
    """Weights that only pre-training has a use for. The norm is in the file, but no head here would look through it."""
    if not isinstance(loaded.model, MaskedImageModel):
        return []
    return [name for name in loaded.model.state_dict() if name.startswith("head.") or name == MASK_TOKEN]


def _config(loaded: Loaded) -> dict[str, Any]:
    height, width = loaded.preprocess.image_size
    arguments = _arguments(loaded)
    return {
        "architecture": _architecture(loaded),
        "num_classes": _classes(loaded),
        "num_features": loaded.encoder.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": loaded.preprocess.crop_pct,
            "crop_mode": "center",
            "mean": list(loaded.preprocess.mean),
            "std": list(loaded.preprocess.std),
            "num_classes": _classes(loaded),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"label_names": loaded.labels} if loaded.labels else {}),
        },
    }


def _architecture(loaded: Loaded) -> str:
    """timm's entry point nearest in size; every measure is given beside it."""
    return f"beit_{'large' if loaded.encoder.width >= LARGE else 'base'}_patch16_224"


def _arguments(loaded: Loaded) -> dict[str, Any]:
    """What timm's Beit is built with; numbers in place of None, which older releases of it drop."""
    encoder, state = loaded.encoder, loaded.model.state_dict()
    mean = isinstance(loaded.model, Classifier) and loaded.model.head.pooling == "mean"
    node = loaded.about["config"]["model"]
    return {
        "img_size": list(loaded.preprocess.image_size),
        "patch_size": encoder.patch_size,
        "embed_dim": encoder.width,
        "depth": encoder.depth,
        "num_heads": node["heads"],
        "mlp_ratio": node["mlp_ratio"],
        "init_values": node["layer_scale"],
        "use_abs_pos_emb": encoder.pos_embed is not None,
        "use_rel_pos_bias": f"encoder.blocks.0.attn.{TABLE}" in state,
        "use_shared_rel_pos_bias": SHARED in state,
        "global_pool": "avg" if mean else "token",
    }


def _classes(loaded: Loaded) -> int:
    return loaded.model.head.head.out_features if isinstance(loaded.model, Classifier) else 0


def _through_loader(loaded: Loaded) -> bool:
    height, width = loaded.preprocess.image_size
    arguments = _arguments(loaded)
    return height == width or not (arguments["use_rel_pos_bias"] or arguments["use_shared_rel_pos_bias"])


def _remarks(loaded: Loaded) -> list[str]:
    remarks = []
    if isinstance(loaded.model, MaskedImageModel):
        remarks.append(
            "an encoder with the final norm: timm has no place for lm_head and the mask token, which were left out"
        )
    if not _through_loader(loaded):
        remarks.append(
            "not square: timm's pretrained=True may resize the position tables as if they were; load the weights as "
            "README.md shows"
        )
    return remarks


# --- the model card ----------------------------------------------------------------------------------------------

_LOADER = """\
import timm
import torch
from PIL import Image

model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
"""
_AROUND = """\
import json
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file

config = json.loads(Path(FOLDER, "config.json").read_text())
model = timm.create_model(
    config["architecture"],
    num_classes=config["num_classes"],
    pretrained_cfg=config["pretrained_cfg"],
    **config["model_args"],
).eval()
model.load_state_dict(load_file(Path(FOLDER, "model.safetensors")))
"""
_TRANSFORM = """\
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("photo.jpg").convert("RGB"))[None]
with torch.inference_mode():
"""


def use(loaded: Loaded) -> Use:
    """What the card says of timm."""
    snippet = (_LOADER if _through_loader(loaded) else _AROUND) + _TRANSFORM
    if loaded.stage == "classify":
        return Use(
            library="timm",
            task="image-classification",
            snippet=f"{snippet}    scores = model(image).softmax(-1)  # (1, classes)\n",
        )
    return Use(
        library="timm",
        task="image-feature-extraction",
        snippet=f"{snippet}    tokens = model.forward_features(image)  # (1, 1 + patches, width), CLS first\n",
    )
