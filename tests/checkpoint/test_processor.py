"""preprocessor_config.json: pixels are those of Transformers' own processor, or somebody is told that they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from beit_pretrain.checkpoint.processor import FILE, facts_of, fits
from beit_pretrain.errors import CheckpointError
from beit_pretrain.tools.load import Preprocess

SIZE = 32
PLAIN: dict[str, Any] = {
    "image_processor_type": "BeitImageProcessor",
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
)  # 81 x 117

SAME: dict[str, dict[str, Any]] = {
    "as it is written": {},
    "no rescaling": {
        "do_rescale": False,
        "image_mean": [127.5, 120.0, 110.0],
        "image_std": [127.5, 60.0, 50.0],
    },
    "another factor": {
        "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 0.9, 0.8],
        "image_std": [0.5, 0.6, 0.7],
    },
    "not normalised": {"do_normalize": False},
    "neither": {"do_normalize": False, "do_rescale": False},
    "one number": {"image_mean": 0.25, "image_std": 0.75},
    "BEiT's own colours": {"image_mean": None, "image_std": None},
    "a number for the shorter side": {"image_processor_type": "BitImageProcessor", "size": 36},
    "... said": {"size": 36, "default_to_square": False},
    "... of another kind": {"image_processor_type": "CLIPImageProcessor", "size": 40, "crop_size": SIZE},
}
OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "squeezed": (
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        "pictures are squeezed to 32 x 32",
    ),
    "squeezed and cut": ({"size": 36}, "pictures are squeezed to 36 x 36"),
    "two numbers": ({"size": {"height": 36, "width": 40}}, "pictures are squeezed to 36 x 40"),
    "bilinear": ({"resample": 2}, "resample=2, bilinear"),
    "not cut": ({"do_center_crop": False, "size": {"shortest_edge": 32}}, "do_center_crop=false"),
    "not resized": ({"do_resize": False}, "do_resize=false: pictures keep their size"),
}


def theirs(processor: dict[str, Any], folder: Path) -> Tensor:
    (folder / FILE).write_text(json.dumps({k: v for k, v in processor.items() if v is not None}))
    (folder / "config.json").write_text('{"model_type": "beit"}')
    return AutoImageProcessor.from_pretrained(folder)(PICTURE, return_tensors="pt").pixel_values[0]


def ours(processor: dict[str, Any]) -> tuple[Tensor, list[str]]:
    facts, notes = facts_of(processor, "path=x")
    view = Preprocess(image_size=(SIZE, SIZE), **{"crop_pct": 1.0, **facts})
    return view(PICTURE), notes


@pytest.mark.parametrize("name", SAME)
def test_pixels_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    processor = {**PLAIN, **SAME[name]}
    mine, notes = ours(processor)
    expected = theirs(processor, tmp_path)
    assert not notes and mine.shape == expected.shape
    assert (mine - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", OTHER)
def test_pixels_that_are_others_are_said_to_be(name: str, tmp_path: Path) -> None:
    changes, said = OTHER[name]
    processor = {**PLAIN, **changes}
    mine, notes = ours(processor)
    expected = theirs(processor, tmp_path)
    assert mine.shape != expected.shape or (mine - expected).abs().max() > 0.1
    assert len(notes) == 1 and said in notes[0] and FILE in notes[0]


def test_what_the_file_does_not_state_stays_unknown() -> None:
    assert facts_of({}, "path=x") == ({}, [])
    assert facts_of({"do_reduce_labels": True}, "path=x") == ({"reduce_zero_label": True}, [])
    assert facts_of({"image_mean": [0.1, 0.2, 0.3]}, "path=x")[0] == {"mean": [0.1, 0.2, 0.3]}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "crop larger than the picture": ({"crop_size": 40}, r"crop_size 40 x 40 is larger than size 36 x 36"),
    "mean of two": ({"image_mean": [0.5, 0.5]}, r"image_mean=\[0\.5, 0\.5\]: set three numbers"),
    "mean of words": ({"image_mean": ["a", "b", "c"]}, "image_mean=.*: set three numbers"),
    "a word": ({"image_std": "half"}, "image_std=half is no value for it"),
    "not a number": ({"image_mean": [float("nan"), 0, 0]}, "image_mean=.*: set three numbers"),
    "no deviation": ({"image_std": [0.5, 0, 0.5]}, r"image_std=.*: set numbers other than 0"),
    "factor of nothing": ({"rescale_factor": 0}, "rescale_factor=0: set a number above 0"),
    "a factor in words": ({"rescale_factor": "1/255"}, "rescale_factor=1/255 is no value"),
    "a size in words": ({"size": "224"}, "size=224 is no value"),
    "no size": ({"size": {"longest_edge": 5}}, "size=None: set pixels"),
    "half a pixel": ({"size": {"shortest_edge": 36.5}}, "size=36.5: set pixels"),
    "three sides": ({"crop_size": [1, 2, 3]}, "crop_size=.*: set height and width"),
    "a kernel in words": ({"resample": "bicubic"}, "resample=bicubic is no value"),
}


@pytest.mark.parametrize("name", BAD)
def test_entries_that_cannot_be_are_refused_with_the_name_of_the_file(name: str) -> None:
    changes, said = BAD[name]
    with pytest.raises(CheckpointError, match=rf"^path=x: {FILE}: {said}") as caught:
        facts_of({**PLAIN, **changes}, "path=x")
    assert "\n" not in str(caught.value)


def test_a_file_fits_what_this_project_wrote_until_it_is_changed() -> None:
    cut = 32 / 36
    assert fits(PLAIN, "classify", (32, 32), cut, "")
    assert fits({**PLAIN, "size": 36, "default_to_square": False}, "classify", (32, 32), 0.88, "")
    assert not fits({**PLAIN, "resample": 2}, "classify", (32, 32), cut, "")
    assert not fits(PLAIN, "classify", (32, 32), 1.0, "") and not fits(PLAIN, "classify", (36, 36), 1.0, "")
    whole = {"size": {"height": 20, "width": 52}, "do_center_crop": False}
    assert fits(whole, "classify", (20, 52), 0.875, "") and not fits(whole, "classify", (52, 20), 0.875, "")
    square = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    assert fits(square, "segment", (32, 32), 1.0, "") and not fits(square, "pretrain", (32, 32), 1.0, "")
