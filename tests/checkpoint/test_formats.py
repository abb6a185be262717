"""Names of weights in the formats of others, against what Transformers and timm write themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracles
import pytest
import safetensors.torch
import torch
from bare_models import SMALL, classifier, masked, segmenter
from torch import Tensor

from beit_pretrain.checkpoint import formats
from beit_pretrain.models.whole import Classifier, MaskedImageModel

BASE = dict(patch_size=16, width=768, depth=12, heads=12)
LARGE = dict(patch_size=16, width=1024, depth=24, heads=16)

KINDS = {
    "pretrain": lambda size: masked(size),
    "pretrain, positions": lambda size: masked(size, abs_pos=True, rel_pos="none", layer_scale=0.0),
    "classify": lambda size: classifier(size),
    "classify, cls": lambda size: classifier(size, pooling="cls", rel_pos="shared"),
    "segment": lambda size: segmenter(size),
}


def numbered(model: torch.nn.Module) -> dict[str, Tensor]:
    """A state in which no two values are alike, so that a piece in the wrong place shows."""
    start, state = 0, {}
    for name, value in model.state_dict().items():
        numbers = torch.arange(start, start + value.numel(), dtype=torch.int32)
        numbers = numbers.view(torch.float32) if value.dtype == torch.float32 else numbers.to(value.dtype)
        state[name] = numbers.view(value.shape)
        start += value.numel()
    return state


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(_bits(one[n]), _bits(other[n])) for n in one
    )


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.int32) if value.dtype == torch.float32 else value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(SMALL, id="small"),
        *(
            pytest.param({**size, "image_size": pixels}, id=f"{name}-{pixels[1]}", marks=pytest.mark.slow)
            for name, size in {"base": BASE, "large": LARGE}.items()
            for pixels in ((224, 224), (224, 320))
        ),
    ],
)
def test_there_and_back_every_bit_is_the_same(kind: str, size: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = KINDS[kind](size)
    state = numbered(model)
    for there, back in (
        (formats.to_original, formats.from_original),
        (formats.to_hugging_face, formats.from_hugging_face),
        (formats.to_timm, formats.from_original),
    ):
        if there is formats.to_timm and not kind.startswith("classify"):
            continue
        again, left, unknown = back(there(state))
        assert same(again, state) and not left and not unknown, there.__name__


def test_two_weights_that_change_places_are_noticed() -> None:
    state = numbered(masked(SMALL))
    theirs = formats.to_hugging_face(state)
    one, other = (f"beit.encoder.layer.{i}.output.dense.weight" for i in (0, 1))
    theirs[one], theirs[other] = theirs[other], theirs[one]
    assert not same(formats.from_hugging_face(theirs)[0], state)


@pytest.mark.parametrize("kind", ["pretrain", "classify", "segment"])
def test_names_are_those_that_transformers_writes_and_holds(kind: str, tmp_path: Path) -> None:
    model: Any = KINDS[kind](SMALL)
    oracles.strengthen(model)
    twin = hugging_face_twin(model)
    twin.save_pretrained(tmp_path)
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    assert same(formats.to_hugging_face(state), written)
    for theirs in (
        written,
        twin.state_dict(),
    ):  # the names of Transformers 4, which it writes, and those of 5
        again, left, unknown = formats.from_hugging_face(theirs)
        assert same(again, state) and not left and not unknown


def hugging_face_twin(model: Any) -> Any:
    size = SMALL["image_size"]
    if isinstance(model, MaskedImageModel):
        return oracles.hugging_face_twin(model.encoder, model.head, size)
    if isinstance(model, Classifier):
        return oracles.hugging_face_classifier(model.encoder, model.head, size)
    return oracles.hugging_face_segmenter(model.encoder, model.head, size, model.blocks)


def test_a_bare_model_of_transformers_is_an_encoder() -> None:
    model = masked(SMALL)
    bare = oracles.hugging_face_twin(model.encoder, model.head, SMALL["image_size"]).beit.state_dict()
    bare |= {"pooler.layernorm.weight": torch.ones(24), "pooler.layernorm.bias": torch.zeros(24)}
    state, left, unknown = formats.from_hugging_face(bare)
    encoder = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    assert formats.stage_of(state) == "encoder" and same(state, encoder)
    assert left == ["beit.pooler.layernorm.weight", "beit.pooler.layernorm.bias"] and not unknown


def test_names_are_those_of_timm() -> None:
    model = classifier(SMALL)
    twin = oracles.timm_twin(model.encoder, SMALL["image_size"], model.head)
    assert same(formats.to_timm(model.state_dict()), twin.state_dict())
    assert (
        not {"mask_token", "lm_head.weight", "lm_head.bias"}
        & formats.to_timm(masked(SMALL).state_dict()).keys()
    )


def test_one_bias_of_query_key_and_value_is_taken_apart() -> None:
    state = classifier(SMALL).state_dict()
    theirs = formats.to_original(state)
    for i in range(SMALL["depth"]):
        q, v = (theirs.pop(f"blocks.{i}.attn.{letter}_bias") for letter in "qv")
        theirs[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.randn(24), v])
        theirs[f"blocks.{i}.attn.k_bias"] = torch.zeros(24)
    again, left, unknown = formats.from_original(theirs)
    assert same(again, state) and not left and not unknown


def test_what_no_model_has_a_place_for_is_listed() -> None:
    theirs = formats.to_original(masked(SMALL).state_dict())
    theirs |= {
        "rel_pos_bias.relative_position_index": torch.zeros(25, 25, dtype=torch.int64),
        "cls_pt_layers.0.norm1.weight": torch.ones(24),
        "blocks.0.attn.k_norm.weight": torch.ones(8),
    }
    _, left, unknown = formats.from_original(theirs)
    assert left == ["rel_pos_bias.relative_position_index", "cls_pt_layers.0.norm1.weight"]
    assert unknown == ["blocks.0.attn.k_norm.weight"]


def test_an_encoder_from_a_file_with_a_norm_leaves_it_out() -> None:
    theirs = formats.to_timm(masked(SMALL).state_dict())
    state, left, unknown = formats.from_original(theirs)
    assert formats.stage_of(state) == "encoder" and left == ["norm.weight", "norm.bias"] and not unknown
