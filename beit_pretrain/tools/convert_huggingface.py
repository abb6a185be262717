"""A trained model as a folder of Transformers: config.json, preprocessor_config.json and model.safetensors.

What Transformers' BEiT does otherwise than ours, and how its files are written so that the logits are the same:

- A table is resized on every call, to its own grid too, and is read with rows and columns exchanged for that. On square
  grids nothing happens. Elsewhere `image_size` is written as [width, height]: the table is then read as it lies, and
  its resizing changes nothing.
- Segmentation looks at hidden state i - 1 for i in `out_indices`, where 0 is the embedding: block b, counted from 0, is
  b + 2. Its check refuses an index above the number of layers, which the last block would need: one more layer is
  written, of zeros, which adds nothing to the tokens.
- Before 5 its image processors of BEiT squeeze every picture: the one that keeps its shape and cuts out the centre is
  named after another model (see `_preprocessor`).
- With `use_mean_pooling` false the encoder ends in a norm: heads that bring their own norm need it true.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.checkpoint import files
from beit_pretrain.checkpoint.adapt import SHARED, TABLE
from beit_pretrain.checkpoint.formats import to_hugging_face
from beit_pretrain.checkpoint.processor import as_a_whole, cover
from beit_pretrain.errors import CheckpointError
from beit_pretrain.label_maps import IGNORED
from beit_pretrain.models.blocks import NORM_EPS
from beit_pretrain.models.default_blocks import default_blocks
from beit_pretrain.models.upernet import AUXILIARY_CHANNELS, POOL_SCALES
from beit_pretrain.models.whole import Classifier, Segmenter
from beit_pretrain.tools.certificate import Inputs, logits
from beit_pretrain.tools.load import Loaded
from beit_pretrain.tools.model_card import Use
from beit_pretrain.wording import bracket, times

CLASSES = {
    "pretrain": "BeitForMaskedImageModeling",
    "classify": "BeitForImageClassification",
    "segment": "BeitForSemanticSegmentation",
}
LAYER = "beit.encoder.layer."


def write(loaded: Loaded, folder: Path, mark: dict[str, Any]) -> list[str]:
    """The three files; returns what a user should know. CheckpointError if Transformers has no such model."""
    _refuse(loaded)
    state = to_hugging_face(loaded.model.state_dict())
    for i in range(_idle_layers(loaded)):
        place = f"{LAYER}{loaded.encoder.depth + i}."
        state |= {
            name.replace(f"{LAYER}0.", place): torch.zeros_like(value)
            for name, value in state.items()
            if name.startswith(f"{LAYER}0.")
        }
    # Not save_file, which lets nobody else read the file.
    files.write_bytes(folder / "model.safetensors", safetensors.torch.save(state, {"format": "pt"}))
    _write_json(
        folder / "config.json",
        {**_config(loaded), "beit_pretrain": {**mark, "idle_layers": _idle_layers(loaded)}},
    )
    _write_json(folder / "preprocessor_config.json", _preprocessor(loaded))
    return _remarks(loaded)


def outputs(loaded: Loaded, folder: Path, given: Inputs) -> tuple[Tensor, Tensor]:
    """Our logits, and those of the folder in Transformers. ImportError without it, CheckpointError for keys."""
    import transformers

    with _quiet():
        model, info = getattr(transformers, CLASSES[loaded.stage]).from_pretrained(
            folder, output_loading_info=True
        )
    if faults := {kind: names for kind, names in info.items() if names}:
        raise CheckpointError(
            f"Transformers {transformers.__version__} does not take the weights as they are: {faults}"
        )
    mask = {} if given.mask is None else {"bool_masked_pos": given.mask}
    return logits(loaded, given), model.eval()(given.image, **mask).logits


def _refuse(loaded: Loaded) -> None:
    """CheckpointError, in one line, for a model that no configuration of Transformers describes."""
    encoder, model = loaded.encoder, loaded.model
    rows, columns = encoder.grid
    if encoder.pos_embed is not None and rows != columns:
        raise CheckpointError(
            f"Transformers takes absolute positions for those of a square, and here they are of {times(encoder.grid)} "
            "patches: set --to original or timm"
        )
    if not isinstance(model, Segmenter):
        return
    faults, mends = [], []
    channels, width = model.head.decode_head.conv_seg.in_channels, encoder.width
    if channels != width:
        faults.append(f"has stage.channels={channels}, and Transformers' has the encoder's width")
        mends.append(f"stage.channels={width}")
    if not all(a < b for a, b in pairwise(model.blocks)):
        faults.append(f"looks at blocks {bracket(model.blocks)}, and Transformers takes each only once")
        shallow = encoder.depth < len(model.blocks)
        mends.append("model.depth=4" if shallow else f"stage.blocks={bracket(default_blocks(encoder.depth))}")
    if faults:
        raise CheckpointError(
            f"the segmentation head {' and '.join(faults)}: set --to original, or train with {' '.join(mends)}"
        )
    if min(rows, columns) < 2:
        raise CheckpointError(
            f"Transformers halves the grid for its segmentation head, and {times(encoder.grid)} patches cannot be "
            "halved: set --to original"
        )


def _idle_layers(loaded: Loaded) -> int:
    """Layers of zeros after the true ones, so that the last true one may be looked at."""
    if not isinstance(loaded.model, Segmenter):
        return 0
    return max(max(loaded.model.blocks) + 2 - loaded.encoder.depth, 0)


def _config(loaded: Loaded) -> dict[str, Any]:
    """Transformers' own options of config.json."""
    encoder, model, node = loaded.encoder, loaded.model, loaded.about["config"]["model"]
    state = model.state_dict()
    height, width = loaded.preprocess.image_size
    config: dict[str, Any] = {
        "architectures": [CLASSES[loaded.stage]],
        "model_type": "beit",
        "dtype": "float32",
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth + _idle_layers(loaded),
        "num_attention_heads": node["heads"],
        "intermediate_size": len(state["encoder.blocks.0.mlp.fc1.weight"]),
        "hidden_act": "gelu",
        "image_size": height if height == width else [width, height],  # see above
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "layer_norm_eps": NORM_EPS,
        "initializer_range": 0.02,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": node["drop_path"],
        "layer_scale_init_value": node["layer_scale"],
        "use_mask_token": encoder.mask_token is not None,
        "use_absolute_position_embeddings": encoder.pos_embed is not None,
        "use_relative_position_bias": f"encoder.blocks.0.attn.{TABLE}" in state,
        "use_shared_relative_position_bias": SHARED in state,
        "use_mean_pooling": not (isinstance(model, Classifier) and model.head.pooling == "cls"),
    }
    if loaded.stage == "pretrain":
        config["vocab_size"] = len(state["head.lm_head.weight"])
    else:
        config |= _labels(loaded)
    if isinstance(model, Segmenter):
        config |= {
            "out_indices": [block + 2 for block in model.blocks],
            "pool_scales": list(POOL_SCALES),
            "use_auxiliary_head": True,
            "auxiliary_channels": AUXILIARY_CHANNELS,
            "auxiliary_num_convs": 1,
            "auxiliary_concat_input": False,
            "auxiliary_loss_weight": loaded.about["config"]["stage"].get("auxiliary_weight", 0.4),
            "semantic_loss_ignore_index": IGNORED,
        }
    return config


def _labels(loaded: Loaded) -> dict[str, Any]:
    """Names of the classes; without any, those that Transformers would make up."""
    head = "head.head.weight" if loaded.stage == "classify" else "head.decode_head.conv_seg.weight"
    names = loaded.labels or [f"LABEL_{i}" for i in range(len(loaded.model.state_dict()[head]))]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _preprocessor(loaded: Loaded) -> dict[str, Any]:
    """preprocessor_config.json."""
    height, width = loaded.preprocess.image_size
    whole = as_a_whole(loaded.stage, loaded.preprocess.image_size)
    reduced = loaded.about["preprocessing"].get("reduce_zero_label", False)
    sizes: dict[str, Any] = {
        "image_processor_type": "BeitImageProcessor",
        "size": {"height": height, "width": width},
    }
    if not whole:
        # Bit's processor is the same one with one number for the shorter side, in every version: Auto classes and
        # pipelines take it. BEiT's own, by its name, takes the number for the shorter side since 5, as
        # default_to_square says, and for both sides before, where it refuses a shortest_edge.
        sizes = {
            "image_processor_type": "BitImageProcessor",
            "size": cover(height, loaded.preprocess.crop_pct),
            "default_to_square": False,
        }
    return {
        **sizes,
        "do_resize": True,
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": not whole,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(loaded.preprocess.mean),
        "image_std": list(loaded.preprocess.std),
        "do_reduce_labels": loaded.stage == "segment" and reduced,
    }


def _remarks(loaded: Loaded) -> list[str]:
    height, width = loaded.preprocess.image_size
    remarks = []
    if height != width:
        remarks.append(
            f"config.json has image_size [{width}, {height}], width first: only so does Transformers read position "
            f"tables that are not square; pictures are {height} high and {width} wide"
        )
    if as_a_whole(loaded.stage, loaded.preprocess.image_size):
        scored = "sliding windows" if loaded.stage == "segment" else "the centre of each picture"
        remarks.append(
            f"the image processor of Transformers brings every picture to {height} x {width} as a whole; here the "
            f"model is scored on {scored}"
        )
    if idle := _idle_layers(loaded):
        remarks.append(
            f"config.json counts {loaded.encoder.depth + idle} layers: the last is of zeros and changes nothing; "
            "without it Transformers would not let the head look at the true last one"
        )
    return remarks


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers without its bars and advice; what it has to say of the weights is asked for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- the model card ----------------------------------------------------------------------------------------------

_CLASSIFY = """\
from transformers import pipeline

classify = pipeline("image-classification", model=FOLDER)
print(classify("photo.jpg"))
"""
_SEGMENT = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained(FOLDER)
model = AutoModelForSemanticSegmentation.from_pretrained(FOLDER).eval()
image = Image.open("photo.jpg").convert("RGB")
with torch.inference_mode():
    outputs = model(**processor(image, return_tensors="pt"))
(label_map,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
"""
_PRETRAIN = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, BeitForMaskedImageModeling

processor = AutoImageProcessor.from_pretrained(FOLDER)
pixels = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt").pixel_values

encoder = AutoModel.from_pretrained(FOLDER, add_pooling_layer=False).eval()
with torch.inference_mode():
    tokens = encoder(pixels).last_hidden_state  # (1, 1 + patches, width), CLS first, no final norm

model = BeitForMaskedImageModeling.from_pretrained(FOLDER).eval()
mask = torch.rand(1, tokens.shape[1] - 1) < 0.4  # True: hidden
with torch.inference_mode():
    ids = model(pixels, bool_masked_pos=mask).logits.argmax(-1)  # visual tokens (1, patches)
"""


_PROCESSORS = (
    "`AutoImageProcessor` and `pipeline` give the pixels that the model was scored on. `BeitImageProcessor`, called by "
    "its name, does too since Transformers 5; before, it and `BeitFeatureExtractor` squeeze the whole picture to a "
    "square, and scores are a little others"
)
_LABEL_MAPS = (
    "To train on label maps, give the image processor `resample=0`, and resize the images yourself if they are to be "
    "bicubic: it resizes label maps like images, and anything but the nearest pixel makes classes up"
)


def use(loaded: Loaded) -> Use:
    """What the card says of Transformers."""
    task, snippet = {
        "pretrain": ("image-feature-extraction", _PRETRAIN),
        "classify": ("image-classification", _CLASSIFY),
        "segment": ("image-segmentation", _SEGMENT),
    }[loaded.stage]
    notes = [] if as_a_whole(loaded.stage, loaded.preprocess.image_size) else [_PROCESSORS]
    notes += [_LABEL_MAPS] if loaded.stage == "segment" else []
    return Use(library="transformers", task=task, snippet=snippet, notes=notes)
