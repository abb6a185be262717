"""Files of other programs: what they are is found from what is in them, and what cannot be used is said in one line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from bare_models import SMALL, classifier, masked, segmenter
from pretrained import save_pretrained
from safetensors.torch import save_file
from segmenters import save_segmenter
from torch import Tensor
from transformers import ViTConfig, ViTModel

from beit_pretrain.checkpoint import files, formats, record
from beit_pretrain.checkpoint.adapt import TABLE
from beit_pretrain.compose import compose
from beit_pretrain.errors import BeitError, CheckpointError
from beit_pretrain.models.rel_pos import relative_position_index
from beit_pretrain.tools.load import load

GRID = (4, 6)  # of SMALL
SQUARE = {**SMALL, "image_size": (16, 16)}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}


def original(model: Any) -> dict[str, Tensor]:
    return formats.to_original(model.state_dict())


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def read(path: Path) -> dict[str, Any]:
    return record.read(path, key="init_from")


def equal(found: dict[str, Tensor], model: Any) -> bool:
    state = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def hugging_face(folder: Path, model: Any, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(formats.to_hugging_face(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "beit", "layer_norm_eps": 1e-6, **config}))
    return folder


# --- what lies around the weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "wrappers"),
    [
        (lambda state: state, []),
        (
            lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3, sizes=[1, 2])},
            ["model"],
        ),
        (lambda state: {"module": state}, ["module"]),
        (
            lambda state: {"state_dict": {f"module.{n}": v for n, v in state.items()}, "optimizer": {"a": 1}},
            ["state_dict", "module."],
        ),
        (lambda state: {"model": {f"_orig_mod.{n}": v for n, v in state.items()}}, ["model", "_orig_mod."]),
        (
            lambda state: {n.replace("blocks.0.", "blocks.0._orig_mod."): v for n, v in state.items()},
            ["_orig_mod."],
        ),
        (
            lambda state: {"state_dict": {f"backbone.{n}": v for n, v in state.items()}},
            ["state_dict", "backbone."],
        ),
    ],
    ids=["bare", "model", "module", "data parallel", "compiled", "compiled blocks", "backbone"],
)
def test_the_wrappers_of_training_scripts_are_taken_off(
    wrap: Callable[[Any], Any], wrappers: list[str], tmp_path: Path
) -> None:
    model = masked(SQUARE)
    found = read(saved(tmp_path / "weights.pth", wrap(original(model))))
    assert equal(found["state_dict"], model)
    about = found["beit_pretrain"]
    assert about["foreign"]["wrappers"] == wrappers and about["foreign"]["format"] == "original"
    assert about["config"]["stage"]["name"] == "pretrain"
    node = about["config"]["model"]
    assert [node[k] for k in ("width", "depth", "heads", "patch_size", "mlp_ratio")] == [24, 5, 3, 4, 4.0]
    assert (node["rel_pos"], node["mask_token"], node["abs_pos"]) == ("shared", True, False)
    assert about["config"]["image_size"] == [16, 16]
    assert about["config"]["data"]["normalize"] == {"mean": None, "std": None}


def test_a_running_average_is_kept_apart(tmp_path: Path) -> None:
    model, average = classifier(SQUARE), classifier(SQUARE)
    path = saved(tmp_path / "w.pth", {"model": original(model), "model_ema": original(average)})
    raw, ema = (load(path, weights=which, **HALVES).model for which in ("raw", "ema"))
    assert equal(raw.state_dict(), model) and equal(ema.state_dict(), average)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in original(masked(SQUARE)).items()}
    found = read(saved(tmp_path / "half.pth", {"model": state}))["state_dict"]
    assert {value.dtype for value in found.values()} == {torch.float32}


# --- the grid ------------------------------------------------------------------------------------------------------


def indexed(model: Any, **more: Tensor) -> dict[str, Tensor]:
    return {**original(model), "blocks.0.attn.relative_position_index": relative_position_index(GRID), **more}


@pytest.mark.parametrize("size", [(16, 24), (24, 16)], ids=["wide", "high"])
def test_a_grid_that_is_not_square_is_read_off_the_index(size: tuple[int, int], tmp_path: Path) -> None:
    model = classifier({**SMALL, "image_size": size})
    index = relative_position_index((size[0] // 4, size[1] // 4))
    state = {**original(model), "blocks.0.attn.relative_position_index": index}
    found = read(saved(tmp_path / "w.pth", {"model": state}))
    assert found["beit_pretrain"]["config"]["image_size"] == list(size)
    assert found["beit_pretrain"]["foreign"]["left_out"] == ["blocks.0.attn.relative_position_index"]


def test_a_grid_that_nothing_states_is_not_guessed(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", original(classifier(SMALL)))
    with pytest.raises(
        CheckpointError, match=r"grid that is not square .*tables of 80 rows.*relative_position_index"
    ):
        read(path)
    with pytest.raises(CheckpointError, match="24 positions"):
        record.read(saved(path, original(masked(SMALL, rel_pos="none", abs_pos=True))), key="path", heads=3)


def test_positions_of_a_square_and_none_at_all(tmp_path: Path) -> None:
    for options, size in (({"abs_pos": True}, [16, 16]), ({}, [224, 224])):
        model = masked(SQUARE, rel_pos="none", **options)
        path = saved(tmp_path / "w.pth", original(model))
        about = record.read(path, key="path", heads=3)["beit_pretrain"]
        found = about["config"]
        assert found["image_size"] == size and found["model"]["rel_pos"] == "none"
        assert found["model"]["heads"] == 3 and about["foreign"]["notes"] == []


# --- heads ----------------------------------------------------------------------------------------------------------

BARE: dict[str, Any] = dict(rel_pos="none", abs_pos=True)


def test_heads_that_nobody_states_are_asked_for(tmp_path: Path) -> None:
    model = masked({**SQUARE, "width": 96, "depth": 1}, **BARE)
    path = saved(tmp_path / "w.pth", original(model))
    with pytest.raises(CheckpointError, match=r"w\.pth does not say how many heads .*width 96.*--heads"):
        load(path, **HALVES)
    found = load(path, heads=3, **HALVES)
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(found.model(image), model.eval()(image))
    with pytest.raises(CheckpointError, match=r"heads=5: .* divides the width, 96"):
        load(path, heads=5, **HALVES)
    tables = saved(tmp_path / "tables.pth", original(masked(SQUARE)))
    assert load(tables, heads=3, **HALVES).about["config"]["model"]["heads"] == 3
    with pytest.raises(BeitError, match=r"heads=4, but path=.*tables\.pth has 3: leave heads"):
        load(tables, heads=4, **HALVES)


def test_a_published_width_has_its_heads_and_says_so(tmp_path: Path) -> None:
    model = masked({**SQUARE, "width": 192, "depth": 1}, **BARE)
    path = saved(tmp_path / "w.pth", original(model))
    with pytest.warns(UserWarning, match="does not say how many heads it has: 3, each 64 wide, is taken"):
        found = load(path, **HALVES)
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(found.model(image), model.eval()(image))
    load(path, heads=3, **HALVES)  # without a word


def test_eva_with_beits_names_is_asked_for_its_heads(tmp_path: Path) -> None:
    twin = timm.models.eva.Eva(
        img_size=16,
        patch_size=4,
        embed_dim=88,
        depth=2,
        num_heads=4,
        qkv_fused=True,
        use_rot_pos_emb=False,
        init_values=None,
        num_classes=5,
    ).eval()
    path = saved(tmp_path / "eva.pth", {"model": twin.state_dict()})
    with pytest.raises(CheckpointError, match="does not say how many heads its encoder of width 88"):
        load(path, **HALVES)
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(load(path, heads=4, **HALVES).model(image), twin(image), atol=1e-5, rtol=1e-5)


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_of_transformers_says_how_it_sees_images(tmp_path: Path) -> None:
    model = classifier(SQUARE)
    folder = hugging_face(
        tmp_path / "hf", model, image_size=16, id2label={str(10 - i): f"class {10 - i}" for i in range(4, 11)}
    )
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): f"class {i}" for i in (6, 5, 4, 3, 2, 1, 0)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_mean": [0.1, 0.2, 0.3],
                "image_std": [0.4, 0.5, 0.6],
                "size": {"shortest_edge": 20},
                "do_center_crop": True,
                "crop_size": {"height": 16, "width": 16},
            }
        )
    )
    found = load(folder)
    assert equal(found.model.state_dict(), model)
    assert found.labels == [f"class {i}" for i in range(7)]
    assert found.preprocess.mean == (0.1, 0.2, 0.3) and found.preprocess.std == (0.4, 0.5, 0.6)
    assert found.preprocess.crop_pct == 0.8 and found.about["foreign"]["format"] == "huggingface"
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(7)}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).labels is None


def test_weights_in_several_files_are_read_together(tmp_path: Path) -> None:
    model = classifier(SQUARE)
    folder = hugging_face(tmp_path / "hf", model, image_size=16)
    state = formats.to_hugging_face(model.state_dict())
    names = sorted(state)
    parts = {f"part-{i}.safetensors": names[i::2] for i in (0, 1)}
    for part, inside in parts.items():
        save_file({name: state[name] for name in inside}, folder / part)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: part for part, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(load(folder, **HALVES).model.state_dict(), model)


def test_the_blocks_of_a_segmentation_are_those_that_transformers_looks_at(tmp_path: Path) -> None:
    model = segmenter({**SQUARE, "depth": 12})
    folder = hugging_face(tmp_path / "hf", model, image_size=16, out_indices=[3, 5, 7, 11])
    about = read(folder)["beit_pretrain"]
    assert about["config"]["stage"]["blocks"] == [1, 3, 5, 9]
    assert "trained with blocks [3, 5, 7, 11]" in about["foreign"]["notes"][0]
    path = saved(tmp_path / "w.pth", {"state_dict": original(model), "meta": {"CLASSES": tuple("abcde")}})
    about = read(path)["beit_pretrain"]
    assert about["config"]["stage"]["blocks"] == [3, 5, 7, 11]
    assert about["preprocessing"]["class_names"] == list("abcde") and not about["foreign"]["notes"]


def test_blocks_that_nobody_states_are_said_to_be_taken(tmp_path: Path) -> None:
    about = read(saved(tmp_path / "w.pth", {"state_dict": original(segmenter(SQUARE))}))["beit_pretrain"]
    assert "does not say which blocks its head looks at" in about["foreign"]["notes"][0]


def test_an_encoder_without_a_head_gives_its_tokens(tmp_path: Path) -> None:
    model = classifier(SQUARE)
    found = load(
        saved(tmp_path / "w.pth", {n: v for n, v in original(model).items() if not n.startswith("head.")}),
        **HALVES,
    )
    image = torch.randn(2, 3, 16, 16)
    assert found.stage == "encoder" and found.labels is None
    assert torch.equal(found.model(image), model.eval().encoder(image))


def test_another_eps_is_told(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hf", masked(SQUARE), image_size=16)
    assert read(folder)["beit_pretrain"]["foreign"]["notes"] == []
    hugging_face(folder, masked(SQUARE), image_size=16, layer_norm_eps=1e-12)
    assert "layer_norm_eps=1e-12" in read(folder)["beit_pretrain"]["foreign"]["notes"][0]


# --- what is no BEiT -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('/tmp/beit_pretrain_evil', 'w')",)


def truncated(path: Path) -> None:
    saved(path, {"model": original(masked(SQUARE))})
    path.write_bytes(path.read_bytes()[:20_000])


def tokenizer_v2(path: Path) -> None:
    saved(path, {"model": {"quantize.embedding.weight": torch.ones(4, 4), "encoder.x": torch.ones(1)}})


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, "truncated or damaged; copy it again"),
    "pickle": (lambda path: saved(path, {"model": Evil()}), r"asks for .*exec.*was not loaded"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "is a web page, not weights"),
    "empty": (lambda path: saved(path, {}), "holds no weights"),
    "numbers": (lambda path: saved(path, {"epoch": 3, "model": {}}), "holds no weights"),
    "list": (lambda path: saved(path, [torch.ones(1)]), "holds a list, not a dictionary"),
    "vit": (
        lambda path: saved(
            path, timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=3).state_dict()
        ),
        r"vision transformer but no BEiT \(no q_bias, no gamma_1, no relative positions\)",
    ),
    "transformers vit": (
        lambda path: saved(
            path,
            {
                f"vit.{name}": value
                for name, value in ViTModel(
                    ViTConfig(
                        hidden_size=24,
                        num_hidden_layers=1,
                        num_attention_heads=3,
                        intermediate_size=48,
                        image_size=32,
                    )
                )
                .state_dict()
                .items()
            },
        ),
        "vision transformer but no BEiT",
    ),
    "resnet": (
        lambda path: saved(path, {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}),
        "no vision tr",
    ),
    "vq-kd": (tokenizer_v2, "the tokenizer of BEiT v2, not its encoder"),
    "more": (
        lambda path: saved(path, {**original(masked(SQUARE)), "blocks.0.attn.gate": torch.ones(1)}),
        r"weights that no BEiT has \(1 of .*blocks\.0\.attn\.gate",
    ),
    "less": (
        lambda path: saved(
            path, {n: v for n, v in original(masked(SQUARE)).items() if not n.startswith("patch_embed")}
        ),
        "no vision transformer",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_beit_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    make, said = BAD[what]
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(CheckpointError, match=said) as caught:
        read(path)
    assert "\n" not in str(caught.value) and f"init_from={path}" in str(caught.value)
    assert not Path("/tmp/beit_pretrain_evil").exists()


ODD: dict[str, tuple[str, Any, str]] = {
    "a list": ("config.json", [1], r"config\.json holds a list, not an object"),
    "null": ("preprocessor_config.json", None, r"preprocessor_config\.json holds a NoneType"),
    "labels of words": ("config.json", {"id2label": {"cat": 0}}, "id2label names no numbers of classes"),
    "labels in a list": ("config.json", {"id2label": ["a"]}, "id2label=.* is no value for it"),
    "an image of words": ("config.json", {"image_size": "16"}, "image_size=16 is no value"),
    "an image of one side": ("config.json", {"image_size": [16]}, "image_size=.*: 2 whole numbers"),
    "colours of words": ("preprocessor_config.json", {"image_mean": "grey"}, "image_mean=grey is no value"),
    "timm's colours": ("config.json", {"pretrained_cfg": {"mean": ["a", 0, 0]}}, "mean=.*: set three"),
    "timm's crop": ("config.json", {"pretrained_cfg": {"crop_pct": 1.5}}, "crop_pct=1.5: set a share"),
    "a timm of numbers": ("config.json", {"pretrained_cfg": {"input_size": 3}}, "input_size=3 is no value"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_json_beside_the_weights_is_one_line(name: str, tmp_path: Path) -> None:
    file, content, said = ODD[name]
    folder = hugging_face(tmp_path / "hf", classifier(SQUARE))
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said) as caught:
        read(folder)
    assert "\n" not in str(caught.value) and file in str(caught.value)


def test_odd_json_that_can_be_used_is(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hf", classifier(SQUARE), beit_pretrain=[], pretrained_cfg=3)
    (folder / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": 0.25}')
    assert load(folder).preprocess.std == (0.25,) * 3
    config = {"id2label": {str(i): i for i in range(7)}}
    assert load(hugging_face(folder, classifier(SQUARE), **config)).labels == [str(i) for i in range(7)]
    hugging_face(folder, classifier(SQUARE), id2label={"0": "one", "1": "two"})
    with pytest.warns(UserWarning, match="names 2 classes, and its head has 7"):
        assert load(folder).labels is None


@pytest.mark.parametrize("index", [{"weight_map": {"a": "../x.safetensors"}}, {"weight_map": []}, {}])
def test_an_index_that_leads_elsewhere_is_refused(index: Any, tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hf", masked(SQUARE))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json lists no files of weights beside it"):
        read(folder)


def test_weights_are_found_wherever_they_are(tmp_path: Path) -> None:
    model = masked(SQUARE)
    for content in (
        {"model": {"name": "a configuration"}, "state_dict": original(model)},
        {"epoch": 3, "model_ema": original(model)},
        {**original(model), 7: torch.ones(1)},
    ):
        assert equal(read(saved(tmp_path / "w.pth", content))["state_dict"], model)


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    state = original(masked(SQUARE))
    with pytest.raises(CheckpointError, match=r"sparse or without values \(cls_token\)"):
        read(saved(tmp_path / "w.pth", {**state, "cls_token": state["cls_token"].to("meta")}))


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hf", masked(SQUARE))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON .*copy it again"):
        read(folder)


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_configuration_takes_over_what_a_file_of_others_says(tmp_path: Path) -> None:
    model = load(save_pretrained(tmp_path / "run")).model
    path = saved(tmp_path / "w.pth", {"model": original(model)})
    for stage in ("classify", "probe", "knn"):
        cfg = compose([f"stage={stage}", "data=digits", f"init_from={path}"])
        assert (cfg.model.width, cfg.model.depth, list(cfg.image_size)) == (24, 2, [32, 32])
        assert list(cfg.data.normalize.mean) == [0.5] * 3  # the data's own, as the file says nothing
    cfg = compose(["stage=classify", "data=digits", f"init_from={path}", "data.normalize.mean=[0.1,0.2,0.3]"])
    assert list(cfg.data.normalize.mean) == [0.1, 0.2, 0.3]
    with pytest.raises(BeitError, match=r"leave model\.width out"):
        compose(["stage=classify", "data=digits", f"init_from={path}", "model.width=48"])


def test_a_segmentation_of_others_is_used_like_ours(tmp_path: Path) -> None:
    ours = load(save_segmenter(tmp_path / "run", "stage.channels=24"))
    state = formats.to_original(ours.model.state_dict())
    grid = ours.encoder.grid
    state["backbone.blocks.0.attn.relative_position_index"] = relative_position_index(grid)
    meta = {"CLASSES": ["wall", "floor", "sky"], "out_indices": ours.about["config"]["stage"]["blocks"]}
    path = saved(tmp_path / "w.pth", {"state_dict": state, "meta": meta})
    theirs = load(path, mean=ours.preprocess.mean, std=ours.preprocess.std)
    image = torch.randn(1, 3, *ours.preprocess.image_size)
    assert torch.equal(theirs.model(image), ours.model(image)) and theirs.labels == ours.labels
    assert files.weight_hash(theirs.model.state_dict()) == files.weight_hash(ours.model.state_dict())
    assert any(name.endswith(TABLE) for name in theirs.model.state_dict())


def test_blocks_that_a_file_leaves_open_can_be_set_for_an_evaluation(tmp_path: Path) -> None:
    model = segmenter({**SQUARE, "depth": 12})
    folder = hugging_face(tmp_path / "hf", model, image_size=16, out_indices=[3, 5, 7, 11])
    asked = ["stage=segment", "data=image_masks", "data.root=scenes", "mode=evaluate", f"init_from={folder}"]
    assert list(compose(asked).stage.blocks) == [1, 3, 5, 9]
    assert list(compose([*asked, "stage.blocks=[3,5,7,11]"]).stage.blocks) == [3, 5, 7, 11]
    ours = save_segmenter(tmp_path / "run", "model.depth=4", "stage.blocks=[0,1,2,3]")
    with pytest.raises(BeitError, match=r"leave stage\.blocks out"):
        compose([*asked[:-1], f"init_from={ours}", "stage.blocks=[1,1,2,3]"])
