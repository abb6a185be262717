"""Folders for Transformers: what `from_pretrained` makes of them alone gives our logits, whatever the shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import save_classifier
from conversions import MODELS, SEGMENT, TABLES, converted, converted_once, photograph, saved, snippet
from PIL import Image
from segmenters import save_segmenter
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitImageProcessor,
    BitImageProcessor,
)
from whole_models import whole_run

from beit_pretrain.errors import CheckpointError
from beit_pretrain.tools.load import Loaded, load
from beit_pretrain.tools.show import show

AUTO: dict[str, Any] = {
    "pretrain": BeitForMaskedImageModeling,  # Transformers has no Auto class for BEiT here
    "classify": AutoModelForImageClassification,
    "segment": AutoModelForSemanticSegmentation,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders, and what they became."""
    return tmp_path_factory.mktemp("runs")


def folder_of(name: str, made: Path) -> Path:
    return converted_once(name, made, "huggingface")


def both(ours: Loaded, folder: Path, images: int = 2) -> tuple[Tensor, Tensor]:
    """Logits of random images with random masks: ours, and those of the folder in Transformers."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(images, 3, *ours.preprocess.image_size, generator=generator)
    masks = ()
    if ours.stage == "pretrain":
        rows, columns = ours.encoder.grid
        masks = (torch.rand(images, rows * columns, generator=generator) < 0.4,)
    theirs = AUTO[ours.stage].from_pretrained(folder).eval()
    with torch.inference_mode():
        return ours.model(image, *masks), theirs(image, *masks).logits


def rewrite(folder: Path, to: Path, **changes: Any) -> Path:
    """The folder again with another config.json."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours_and_weights_come_back_bit_by_bit(made: Path, name: str) -> None:
    ours, folder = load(saved(name, made)), folder_of(name, made)
    mine, theirs = both(ours, folder)
    assert mine.shape == theirs.shape and theirs.std() > 0.05
    assert (mine - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    again = load(folder)
    state, other = ours.model.state_dict(), again.model.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert (again.stage, again.labels) == (ours.stage, ours.labels)
    assert again.preprocess == ours.preprocess
    for option in ("heads", "depth", "rel_pos", "abs_pos", "mask_token"):
        assert again.about["config"]["model"][option] == ours.about["config"]["model"][option]


# --- traps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain, not square", "classify, not square", "segment, not square"])
def test_only_with_sides_exchanged_are_tables_read_as_they_lie(made: Path, tmp_path: Path, name: str) -> None:
    ours, folder = load(saved(name, made)), folder_of(name, made)
    height, width = ours.preprocess.image_size
    assert json.loads((folder / "config.json").read_text())["image_size"] == [width, height]
    upright = rewrite(folder, tmp_path / "upright", image_size=[height, width])
    mine, theirs = both(ours, upright)
    assert (mine - theirs).abs().max() > 1e-3


def test_absolute_positions_that_are_not_square_are_refused(tmp_path: Path) -> None:
    source = save_classifier(tmp_path / "run", "image_size=[20,32]")
    with pytest.raises(
        CheckpointError, match="positions for those of a square, and here they are of 5 x 8 patches"
    ):
        converted(source, tmp_path / "out", "huggingface")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["segment", "segment, not square"])  # without layer scale and with it
def test_a_layer_that_changes_nothing_lets_the_head_look_at_the_last_block(
    made: Path, tmp_path: Path, name: str
) -> None:
    ours, folder = load(saved(name, made)), folder_of(name, made)
    config = json.loads((folder / "config.json").read_text())
    assert config["out_indices"] == [2, 3, 4, 5] and config["num_hidden_layers"] == 5
    assert config["beit_pretrain"]["idle_layers"] == 1
    with pytest.raises(ValueError, match="out_indices must be valid indices"):
        BeitConfig(num_hidden_layers=4, out_indices=[2, 3, 4, 5])
    copied = rewrite(
        folder, tmp_path / "copied", out_indices=[1, 2, 3, 4]
    )  # the list of blocks, counted from 1
    mine, theirs = both(ours, copied)
    assert (mine - theirs).abs().max() > 1e-3
    image = torch.randn(2, 3, *ours.preprocess.image_size)
    with torch.inference_mode():
        tokens = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()(image).last_hidden_state
        torch.testing.assert_close(tokens, ours.encoder(image), atol=1e-5, rtol=1e-5)


def test_blocks_below_the_last_need_no_further_layer(made: Path, tmp_path: Path) -> None:
    """As in files of others; our own heads look at the last block always."""
    ours = load(folder_of("segment", made))
    source = rewrite(folder_of("segment", made), tmp_path / "source")
    marked = json.loads((source / "config.json").read_text())["beit_pretrain"] | {"blocks": [0, 1, 2, 3]}
    del marked["weights"]  # with one layer more they are others
    deeper = rewrite(source, tmp_path / "deeper", beit_pretrain=marked | {"idle_layers": 0})
    assert load(deeper).encoder.depth == 5 and ours.encoder.depth == 4
    converted(deeper, tmp_path / "out", "huggingface")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5 and config["beit_pretrain"]["idle_layers"] == 0


@pytest.mark.parametrize("name", ["pretrain", "segment"])
def test_heads_with_a_norm_of_their_own_get_no_second_one(made: Path, tmp_path: Path, name: str) -> None:
    folder = rewrite(folder_of(name, made), tmp_path / "pooled", use_mean_pooling=False)
    _, info = AUTO[name].from_pretrained(folder, output_loading_info=True)
    assert {key.removeprefix("beit.") for key in info["missing_keys"]} == {
        "layernorm.weight",
        "layernorm.bias",
    }


def test_the_eps_is_said(made: Path, tmp_path: Path) -> None:
    ours, folder = load(saved("classify", made)), folder_of("classify", made)
    assert json.loads((folder / "config.json").read_text())["layer_norm_eps"] == 1e-6
    mine, theirs = both(ours, rewrite(folder, tmp_path / "eps", layer_norm_eps=1e-12))
    assert (mine - theirs).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stage.channels=8"],
            r"has stage\.channels=8, .*: set --to original, or train with stage\.channels=24$",
        ),
        (
            ["stage.blocks=[0,0,1,3]", "stage.channels=8"],
            r"channels=8.* and looks at blocks \[0,0,1,3\].* stage\.channels=24 stage\.blocks=\[0,1,2,3\]$",
        ),
        (["model.depth=3", "stage.blocks=[0,0,1,2]"], r"each only once: .* or train with model\.depth=4$"),
        (
            ["stage.blocks=[0,0,1,3]"],
            r"looks at blocks \[0,0,1,3\], .* only once: .* or train with stage\.blocks=\[0,1,2,3\]$",
        ),
        (["image_size=[4,32]"], "1 x 8 patches cannot be halved: set --to original"),
    ],
)
def test_heads_that_transformers_does_not_have_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    source = save_segmenter(tmp_path / "run", *SEGMENT, *overrides)
    with pytest.raises(CheckpointError, match=message):
        converted(source, tmp_path / "out", "huggingface")
    assert not (tmp_path / "out").exists()


# --- what lies beside the weights ------------------------------------------------------------------------------


def test_classes_keep_their_names_two_of_one_name_too(tmp_path: Path) -> None:
    names = ["crane", "crane", "maillot", "mañana"]
    converted(save_classifier(tmp_path / "run", *TABLES, classes=names), tmp_path / "out", "huggingface")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert [model.config.id2label[i] for i in range(4)] == names
    assert load(tmp_path / "out").labels == names


def test_the_image_processor_makes_the_same_input_of_any_picture(made: Path, tmp_path: Path) -> None:
    picture = Image.open(photograph(tmp_path))
    for name in ("pretrain", "classify"):
        ours, processor = load(saved(name, made)), AutoImageProcessor.from_pretrained(folder_of(name, made))
        for image in (picture, picture.transpose(Image.Transpose.ROTATE_90)):
            theirs = processor(image, return_tensors="pt").pixel_values[0]
            torch.testing.assert_close(theirs, ours.preprocess(image), atol=1e-5, rtol=0)


def test_processors_of_any_name_keep_the_shape(made: Path, tmp_path: Path) -> None:
    """Before 5, `BeitImageProcessor` takes one number for both sides, and a shortest_edge not at all."""
    picture = Image.open(photograph(tmp_path))
    folder = folder_of("classify", made)
    written = json.loads((folder / "preprocessor_config.json").read_text())
    assert (written["image_processor_type"], written["size"]) == ("BitImageProcessor", 36)
    ours = load(folder).preprocess(picture)
    for kind in (AutoImageProcessor, BeitImageProcessor, BitImageProcessor):
        theirs = kind.from_pretrained(folder)(images=picture, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    kind = json.loads((folder_of("segment", made) / "preprocessor_config.json").read_text())
    assert kind["image_processor_type"] == "BeitImageProcessor"
    text = (folder / "README.md").read_text()
    assert "`BeitImageProcessor`, called by its name, does too since Transformers 5" in text
    assert "resample=0" in (folder_of("segment", made) / "README.md").read_text()


# --- trained elsewhere since -----------------------------------------------------------------------------------


def trained(folder: Path, to: Path, kind: Any, **options: Any) -> Path:
    """What Transformers saves after an update of every weight."""
    model = kind.from_pretrained(folder, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(to)
    AutoImageProcessor.from_pretrained(folder).save_pretrained(to)
    return to


def test_what_was_trained_elsewhere_says_so_and_its_own_entries_win(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("pretrain", made)
    tuned = trained(folder, tmp_path / "tuned", AutoModelForImageClassification, num_labels=3)
    assert json.loads((tuned / "config.json").read_text())["beit_pretrain"]["crop_pct"] == 1.0
    processor = json.loads((tuned / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    (tuned / "preprocessor_config.json").write_text(json.dumps(processor))
    notes: list[str] = []
    found = load(tuned, tell=notes.append)
    assert found.stage == "classify" and found.preprocess.crop_pct == 32 / 36
    picture = Image.open(photograph(tmp_path))
    theirs = AutoImageProcessor.from_pretrained(tuned)(picture, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(found.preprocess(picture), theirs, atol=1e-5, rtol=0)
    assert len(notes) == 1 and "trained or changed elsewhere since; converted from pretrain" in notes[0]
    assert list(found.about["lineage"]["parents"]) == ["trained_elsewhere_from"]
    show(str(tuned))
    said = capsys.readouterr().out
    assert (
        "trained or changed elsewhere since; converted from pretrain" in said
        and "converted_from pretrain" not in said
    )


def test_what_was_only_saved_again_is_still_what_was_converted(made: Path, tmp_path: Path) -> None:
    folder = folder_of("classify, not square", made)
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    found = load(tmp_path)  # without a word
    assert list(found.about["lineage"]["parents"]) == ["converted_from"]
    assert found.preprocess == load(folder).preprocess


def test_a_shape_that_is_not_square_survives_training_elsewhere(made: Path, tmp_path: Path) -> None:
    folder = folder_of("classify, not square", made)
    found = load(trained(folder, tmp_path / "out", AutoModelForImageClassification), tell=lambda note: None)
    assert found.preprocess == load(folder).preprocess


def test_an_added_layer_that_was_trained_is_no_longer_idle(made: Path, tmp_path: Path) -> None:
    tuned = trained(folder_of("segment", made), tmp_path / "out", AutoModelForSemanticSegmentation)
    ours = load(tuned, tell=lambda note: None)
    assert ours.encoder.depth == 5 and ours.model.blocks == [0, 1, 2, 3]  # pyright: ignore
    mine, theirs = both(ours, tuned)
    assert (mine - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


@pytest.mark.parametrize("changes", [{}, {"size": {"height": 32, "width": 32}, "do_center_crop": False}])
def test_a_mark_without_a_hash_holds_where_the_file_still_agrees(
    made: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """As in folders of earlier versions."""
    folder = folder_of("classify", made)
    mark = json.loads((folder / "config.json").read_text())["beit_pretrain"]
    del mark["weights"]
    older = rewrite(folder, tmp_path / "older", beit_pretrain=mark | {"crop_pct": 0.88})
    file = older / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    notes: list[str] = []
    found = load(older, tell=notes.append)
    assert found.preprocess.crop_pct == (1.0 if changes else 0.88) and len(notes) == len(changes) // 2
    assert list(found.about["lineage"]["parents"]) == ["converted_from"]


def test_models_that_no_crop_covers_get_the_whole_picture(made: Path, tmp_path: Path) -> None:
    picture = Image.open(photograph(tmp_path))
    for name, size in (
        ("classify, not square", (20, 52)),
        ("segment, not square", (32, 40)),
        ("segment", (32, 32)),
    ):
        folder = folder_of(name, made)
        processor = AutoImageProcessor.from_pretrained(folder)
        assert processor(picture, return_tensors="pt").pixel_values.shape == (1, 3, *size)
        assert (
            f"brings every picture to {size[0]} x {size[1]} as a whole" in (folder / "README.md").read_text()
        )


def test_label_maps_that_count_from_one_are_said_to(made: Path, tmp_path: Path) -> None:
    folder = rewrite(folder_of("segment", made), tmp_path / "again")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["do_reduce_labels"] is False
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"do_reduce_labels": True}))
    converted(folder, tmp_path / "out", "huggingface")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").do_reduce_labels is True


@pytest.mark.parametrize("name", ["pretrain", "classify", "segment"])
def test_the_cards_code_runs_as_it_stands(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    photograph(tmp_path)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(snippet(folder_of(name, made)), scope)
    if name == "pretrain":
        assert scope["tokens"].shape == (1, 65, 24) and scope["ids"].shape == (1, 64)
    elif name == "classify":
        assert {said["label"] for said in scope["classify"]("photo.jpg")} < {
            str(digit) for digit in range(10)
        }
    else:
        assert scope["label_map"].shape == (301, 453)


def test_the_card_says_what_is_known(made: Path) -> None:
    text = (folder_of("classify", made) / "README.md").read_text()
    head, _, rest = text.removeprefix("---\n").partition("\n---\n")
    assert head.splitlines() == [
        "library_name: transformers",
        "pipeline_tag: image-classification",
        "tags:",
        "- beit",
    ]
    ours = load(saved("classify", made))
    count = sum(parameter.numel() for parameter in ours.model.parameters())
    for said in (
        "over 10 classes",
        "2 blocks of width 24 with 3 heads",
        f"{count:,} parameters",
        "| learning rate |",
    ):
        assert said in rest
    assert "None" not in text and "transformers 5" in text and "Largest difference of the logits" in text


def test_the_card_names_scores_and_ancestors(tmp_path: Path) -> None:
    from beit_pretrain.checkpoint import files

    source = save_classifier(tmp_path / "run", *TABLES)
    file = source / "checkpoints" / "last.ckpt"
    content = files.read(file)
    tokenizer = {"stage": "tokenizer", "name": "codes", "sha256": "b" * 64, "parents": {}}
    encoder = {
        "stage": "pretrain",
        "name": "long",
        "sha256": "a" * 64,
        "step": 7,
        "parents": {"tokenizer": tokenizer},
    }
    content["beit_pretrain"]["lineage"]["parents"] = {"init_from": encoder}
    content["beit_pretrain"]["held_out"] = {"val/top1": 0.8125}
    content["beit_pretrain"]["preprocessing"]["data"] = "f00d"
    files.write(file, content)
    converted(source, tmp_path / "out", "huggingface")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| val/top1 | 0.8125 |" in text and "| data's fingerprint | `f00d` |" in text
    assert f"- init_from: stage pretrain, run long, step 7, sha256 {'a' * 64}\n" in text
    assert f"  - tokenizer: stage tokenizer, run codes, sha256 {'b' * 64}\n" in text


def test_a_card_of_a_file_that_says_little_invents_nothing(made: Path, tmp_path: Path) -> None:
    converted(saved("classify", made), tmp_path / "pth", "original")
    source = tmp_path / "pth" / "checkpoint.pth"
    converted(source, tmp_path / "out", "huggingface", mean=[0.5] * 3, std=[0.5] * 3)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# BEiT, stage classify\n" in text and "- read from checkpoint.pth, format original" in text
    for unknown in ("learning rate", "stochastic depth", "Held-out", "fingerprint", "None", "LABEL_"):
        assert unknown not in text


# --- full size -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("base", "[224,224]"), ("large", "[224,320]")])
@pytest.mark.parametrize("stage", ["pretrain", "classify"])
def test_full_size(tmp_path: Path, stage: str, model: str, size: str) -> None:
    with whole_run(tmp_path, stage, model, size) as source:
        converted(source, tmp_path / "out", "huggingface")
        mine, theirs = both(load(source), tmp_path / "out")
        assert (mine - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("base", "[128,128]"), ("large", "[96,128]")])
def test_full_size_segmentation(tmp_path: Path, model: str, size: str) -> None:
    with whole_run(tmp_path, "segment", model, size) as source:
        converted(source, tmp_path / "out", "huggingface")
        mine, theirs = both(load(source), tmp_path / "out")
        assert (mine - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())
