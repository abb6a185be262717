"""A fine-tuning takes the encoder's shape from the checkpoint that it starts from or scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from classifiers import save_classifier
from runs import DIGITS_TOKENIZER, pretrain, save_run
from segmenters import save_segmenter

from beit_pretrain.build import build_stage
from beit_pretrain.compose import compose
from beit_pretrain.errors import ConfigError
from beit_pretrain.tools.load import load

CLASSIFY = ["stage=classify", "data=digits"]
SEGMENT = ["stage=segment", "data=image_masks", "data.root=scenes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Path:
    tokenizer = save_run(folder / "tok", DIGITS_TOKENIZER)
    shape = ["model.width=24", "model.depth=2", "model.mlp_ratio=2.0", "model.drop_path=0.3"]
    return save_run(folder / "pre", [*pretrain(tokenizer), *shape])


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    grey = ["data.normalize.mean=[0.1,0.1,0.1]", "stage.eval_views.crop_pct=0.95", "stage.pooling=cls"]
    return save_classifier(folder / "tuned", *grey, "image_size=[32,40]")


def test_fine_tuning_takes_over_the_shape_and_the_size_but_nothing_of_pre_training(pretrained: Path) -> None:
    cfg = compose([*CLASSIFY, f"init_from={pretrained}"])
    shape = {key: cfg.model[key] for key in ("name", "patch_size", "width", "depth", "heads", "mlp_ratio")}
    assert shape == {
        "name": "micro",
        "patch_size": 4,
        "width": 24,
        "depth": 2,
        "heads": 3,
        "mlp_ratio": 2.0,
    }
    assert (cfg.model.layer_scale, cfg.model.abs_pos, cfg.model.init_std) == (0.0, True, 0.1)
    assert cfg.image_size == [32, 32] and cfg.stage.views.image_size == [32, 32]
    # How it is trained is the fine-tuning's own affair.
    assert (cfg.model.drop_path, cfg.model.rel_pos, cfg.model.mask_token) == (0.1, "per_layer", False)


def test_another_resolution_may_be_asked_for(pretrained: Path) -> None:
    cfg = compose([*CLASSIFY, f"init_from={pretrained}", "image_size=48", "model.width=24", "model=micro"])
    assert cfg.image_size == 48 and cfg.model.image_size == [48, 48]


def test_an_encoder_without_tables_gets_none(folder: Path, pretrained: Path) -> None:
    plain = save_run(folder / "plain", [*pretrain(folder / "tok"), "model.rel_pos=none"])
    assert compose([*CLASSIFY, f"init_from={plain}"]).model.rel_pos == "none"
    chosen = compose([*CLASSIFY, f"init_from={plain}", "model.rel_pos=per_layer"])
    assert chosen.model.rel_pos == "per_layer"  # the checks name it


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model=base", "model=base, but init_from was made with micro: leave model= out"),
        (
            "model.depth=4",
            "model.depth=4, but init_from was made with 2: leave model.depth out",
        ),
    ],
)
def test_another_shape_is_refused(pretrained: Path, override: str, says: str) -> None:
    for mode in ("fit", "evaluate"):
        with pytest.raises(ConfigError, match=f"^{re.escape(says)}$"):
            compose([*CLASSIFY, f"init_from={pretrained}", override, f"mode={mode}"])


def test_a_recipe_says_for_itself_what_it_is_for(pretrained: Path) -> None:
    cfg = compose(["stage=classify", "experiment=digits_finetune", f"init_from={pretrained}"])
    assert (cfg.model.width, cfg.model.depth, cfg.image_size) == (96, 4, 32)


def test_what_is_scored_is_scored_as_it_was_trained(tuned: Path) -> None:
    """Pooling, tables, pixels and crop too, with a recipe and without one."""
    for more in ([], ["experiment=digits_finetune"]):
        cfg = compose(["stage=classify", "data=digits", f"init_from={tuned}", "mode=evaluate", *more])
        assert (cfg.model.width, cfg.model.rel_pos, cfg.stage.pooling) == (24, "per_layer", "cls")
        assert cfg.image_size == [32, 40] and cfg.stage.eval_views.crop_pct == 0.95
        assert cfg.data.normalize.mean == [0.1, 0.1, 0.1] and cfg.stage.normalize.mean == [0.1, 0.1, 0.1]


def test_a_score_at_another_size_and_crop_and_of_other_pixels_may_be_asked_for(tuned: Path) -> None:
    own = ["image_size=48", "stage.eval_views.crop_pct=0.5", "data.normalize.std=[0.2,0.2,0.2]"]
    cfg = compose([*CLASSIFY, f"init_from={tuned}", "mode=evaluate", *own])
    assert cfg.stage.eval_views.image_size == [48, 48] and cfg.stage.eval_views.crop_pct == 0.5
    assert cfg.data.normalize == {"mean": [0.1, 0.1, 0.1], "std": [0.2, 0.2, 0.2]}


def test_a_score_is_of_the_head_and_the_tables_that_are_there(tuned: Path) -> None:
    for key, other, own in (("stage.pooling", "mean", "cls"), ("model.rel_pos", "shared", "per_layer")):
        says = f"^{key}={other}, but init_from was made with {own}: leave {key} out$"
        with pytest.raises(ConfigError, match=says):
            compose([*CLASSIFY, f"init_from={tuned}", "mode=evaluate", f"{key}={other}"])
    # Trained on, the pooling may change: the norm is then left as initialised.
    assert compose([*CLASSIFY, f"init_from={tuned}", "stage.pooling=mean"]).stage.pooling == "mean"


# --- segmentation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmented(folder: Path) -> Path:
    own = ["stage.blocks=[0,0,1,1]", "data.normalize.mean=[0.1,0.1,0.1]", "stage.auxiliary_weight=0.2"]
    return save_segmenter(folder / "segmented", *own)


def test_a_segmentation_takes_over_the_shape_of_what_it_starts_from(pretrained: Path, tuned: Path) -> None:
    for start, size in ((pretrained, [32, 32]), (tuned, [32, 40])):
        cfg = compose([*SEGMENT, f"init_from={start}"])
        assert (cfg.model.name, cfg.model.width, cfg.model.depth) == ("micro", 24, 2)
        assert cfg.image_size == cfg.stage.views.image_size == cfg.stage.predict.crop == size
        assert (cfg.stage.predict.patch_size, cfg.stage.channels) == (4, 24)
        assert (cfg.model.rel_pos, cfg.model.mask_token, cfg.data.normalize.mean[0]) == (
            "per_layer",
            False,
            0.5,
        )
        larger = compose([*SEGMENT, f"init_from={start}", "image_size=[64,48]"])
        assert larger.stage.predict.crop == [64, 48]


def test_a_segmentation_that_stored_no_blocks_is_scored_on_those_of_then(folder: Path) -> None:
    run = save_segmenter(folder / "shallow", "model.depth=4", "stage.blocks=null")
    cfg = compose([*SEGMENT, f"init_from={run}", "mode=evaluate"])
    stage: Any = build_stage(cfg, ["wall", "floor", "sky"])
    model: Any = load(run).model
    assert stage.blocks == model.blocks == [1, 1, 2, 3]
    assert list(compose([*SEGMENT, f"init_from={run}"]).stage.blocks) == [
        0,
        1,
        2,
        3,
    ]  # trained on: a new head


def test_a_segmentation_that_goes_on_to_other_scenes_chooses_its_own_head(segmented: Path) -> None:
    cfg = compose([*SEGMENT, f"init_from={segmented}"])
    assert (cfg.stage.blocks, cfg.stage.channels, cfg.image_size) == ([0, 0, 1, 1], 24, [32, 40])


@pytest.mark.parametrize("more", [[], ["experiment=segment_multi_scale"]], ids=["plain", "multi-scale"])
def test_a_segmentation_is_scored_as_it_was_trained(segmented: Path, more: list[str]) -> None:
    """Blocks, channels, tables, crop and pixels; the recipe of several scales asks for nothing else."""
    cfg = compose([*SEGMENT, f"init_from={segmented}", "mode=evaluate", *more])
    assert (cfg.model.width, cfg.model.depth, cfg.model.rel_pos) == (24, 2, "per_layer")
    assert (cfg.stage.blocks, cfg.stage.channels) == ([0, 0, 1, 1], 8)
    assert cfg.image_size == cfg.stage.predict.crop == [32, 40] and cfg.stage.predict.patch_size == 4
    assert cfg.data.normalize.mean == cfg.stage.normalize.mean == [0.1, 0.1, 0.1]
    assert len(cfg.stage.predict.scales) == (6 if more else 1) and cfg.stage.predict.flip is bool(more)


def test_a_score_is_of_the_blocks_and_channels_that_are_there(segmented: Path) -> None:
    for key, other, own in (("stage.channels", "9", "8"), ("stage.blocks", "[0,1,1,1]", "[0, 0, 1, 1]")):
        says = f"^{re.escape(f'{key}={other}, but init_from was made with {own}: leave {key} out')}$"
        with pytest.raises(ConfigError, match=says):
            compose([*SEGMENT, f"init_from={segmented}", "mode=evaluate", f"{key}={other}"])


def test_a_score_at_another_crop_and_of_other_pixels_may_be_asked_for(segmented: Path) -> None:
    own = ["image_size=48", "data.normalize.std=[0.2,0.2,0.2]", "stage.predict.mode=whole"]
    cfg = compose([*SEGMENT, f"init_from={segmented}", "mode=evaluate", *own])
    assert cfg.stage.predict.crop == [48, 48] and cfg.stage.predict.mode == "whole"
    assert cfg.data.normalize == {"mean": [0.1, 0.1, 0.1], "std": [0.2, 0.2, 0.2]}
