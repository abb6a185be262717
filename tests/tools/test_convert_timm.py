"""Folders for timm: `create_model("local-dir:...")`, or where grids are not square the card's code, has our logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from classifiers import save_classifier
from conversions import TABLES, converted, converted_once, photograph, saved, snippet
from pretrained import save_pretrained
from torch import Tensor, nn
from whole_models import whole_run

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import CheckpointError
from beit_pretrain.tools.load import Loaded, load

SQUARE = ["classify", "classify, cls", "classify, absolute positions"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders, and what they became."""
    return tmp_path_factory.mktemp("runs")


def folder_of(name: str, made: Path) -> Path:
    return converted_once(name, made, "timm")


def pretrained(folder: Path) -> nn.Module:
    """The folder through timm's own loader."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def around(folder: Path) -> nn.Module:
    """The folder without timm's own loader."""
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval()


def both(ours: Loaded, theirs: Any) -> tuple[Tensor, Tensor]:
    """Logits of random images; of an encoder its tokens after the norm."""
    image = torch.randn(2, 3, *ours.preprocess.image_size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        if ours.stage == "pretrain":
            return ours.model.head.norm(ours.encoder(image)), theirs.forward_features(image)
        return ours.model(image), theirs(image)


def agree(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and bool(
        (mine - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    )


@pytest.mark.parametrize("name", SQUARE)
def test_logits_are_ours_and_weights_come_back_bit_by_bit(made: Path, name: str) -> None:
    ours, folder = load(saved(name, made)), folder_of(name, made)
    mine, theirs = both(ours, pretrained(folder))
    assert agree(mine, theirs) and theirs.std() > 0.05
    again = load(folder)
    state, other = ours.model.state_dict(), again.model.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert (again.stage, again.labels, again.preprocess) == (ours.stage, ours.labels, ours.preprocess)
    assert torch.equal(again.model(torch.ones(1, 3, 32, 32)), ours.model(torch.ones(1, 3, 32, 32)))


def test_the_configuration_is_that_of_the_hub(made: Path) -> None:
    model: Any = pretrained(folder_of("classify", made))
    said = model.pretrained_cfg
    assert said["architecture"] == "beit_base_patch16_224"
    assert said["label_names"] == [str(digit) for digit in range(10)]
    data = timm.data.resolve_model_data_config(model)
    ours = load(saved("classify", made)).preprocess
    assert data["input_size"] == (3, *ours.image_size) and data["interpolation"] == "bicubic"
    assert (data["crop_pct"], tuple(data["mean"]), tuple(data["std"])) == (ours.crop_pct, ours.mean, ours.std)
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_pre_training_becomes_an_encoder_with_the_final_norm(made: Path) -> None:
    source, folder = saved("pretrain", made), folder_of("pretrain", made)
    mine, theirs = both(load(source), pretrained(folder))
    assert agree(mine, theirs) and theirs.std() > 0.05
    model: Any = pretrained(folder)
    assert model.num_classes == 0 and model(torch.randn(1, 3, 32, 32)).shape == (1, 24)
    written = files.read(folder / "model.safetensors")
    assert "norm.weight" in written and not {"mask_token", "lm_head.weight"} & written.keys()
    certificate = json.loads((folder / "certificate.json").read_text())
    left_out = [
        "encoder.mask_token",
        "head.lm_head.bias",
        "head.lm_head.weight",
        "head.norm.bias",
        "head.norm.weight",
    ]
    assert certificate["left_out"] == left_out


def test_what_is_left_out_of_pre_training_is_said(tmp_path: Path, made: Path) -> None:
    said = converted(saved("pretrain", made), tmp_path / "out", "timm")
    assert "timm has no place for lm_head and the mask token, which were left out" in said


@pytest.mark.parametrize("name", ["pretrain, not square", "classify, not square"])
def test_grids_that_are_not_square_go_around_timms_loader(made: Path, name: str) -> None:
    ours, folder = load(saved(name, made)), folder_of(name, made)
    assert agree(*both(ours, around(folder)))
    assert "not square: timm's pretrained=True may resize" in (folder / "README.md").read_text().replace(
        "Not", "not"
    )
    assert "pretrained=True)" not in snippet(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about what timm does there
def test_timms_loader_resizes_tables_of_such_grids(made: Path) -> None:
    """5 x 13 patches: 9 x 25 offsets could be 15 x 15 ones."""
    mine, theirs = both(
        load(saved("classify, not square", made)), pretrained(folder_of("classify, not square", made))
    )
    assert (mine - theirs).abs().max() > 1e-3


def test_without_tables_any_shape_goes_through_timms_loader(tmp_path: Path) -> None:
    source = save_classifier(tmp_path / "run", "model.heads=3", "image_size=[20,52]", "model.rel_pos=none")
    converted(source, tmp_path / "out", "timm")
    assert agree(*both(load(source), pretrained(tmp_path / "out")))


def test_layers_without_scale_get_none_of_the_entry_point(made: Path) -> None:
    assert (
        json.loads((folder_of("classify", made) / "config.json").read_text())["model_args"]["init_values"]
        == 0
    )
    model: Any = pretrained(folder_of("classify", made))
    assert model.blocks[0].gamma_1 is None
    model = pretrained(folder_of("classify, cls", made))
    assert model.blocks[0].gamma_1 is not None


def test_a_segmentation_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="timm has no UPerNet for a segmentation: set --to original or hugg"
    ):
        converted(saved("segment", made), tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["classify", "classify, not square", "pretrain", "pretrain, not square"])
def test_the_cards_code_runs_as_it_stands(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ours, photo = load(saved(name, made)), photograph(tmp_path)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(snippet(folder_of(name, made)), scope)
    result = scope["scores" if ours.stage == "classify" else "tokens"]
    image = scope["image"]
    assert (
        image.shape == (1, 3, *ours.preprocess.image_size) and ours.preprocess(photo).shape == image[0].shape
    )
    with torch.inference_mode():
        expected = (
            ours.model(image).softmax(-1)
            if ours.stage == "classify"
            else ours.model.head.norm(ours.encoder(image))
        )
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_the_large_model_is_named_so(tmp_path: Path) -> None:
    wide = ["model.width=912", "model.depth=1", "model.heads=3", "model.mlp_ratio=0.1", "image_size=8"]
    source = save_pretrained(
        tmp_path / "run", *TABLES[:1], *wide, "model.rel_pos=shared", "masking.count=2", "masking.min_block=1"
    )
    converted(source, tmp_path / "out", "timm")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "beit_large_patch16_224"
    assert agree(*both(load(source), pretrained(tmp_path / "out")))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("base", "[224,224]"), ("large", "[224,320]")])
@pytest.mark.parametrize("stage", ["pretrain", "classify"])
def test_full_size(tmp_path: Path, stage: str, model: str, size: str) -> None:
    with whole_run(tmp_path, stage, model, size) as source:
        converted(source, tmp_path / "out", "timm")
        ours = load(source)
        mine, theirs = both(ours, (pretrained if size == "[224,224]" else around)(tmp_path / "out"))
        assert (mine - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())
