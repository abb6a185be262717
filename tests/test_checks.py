"""Each fault of a configuration is one line that says what was given, under which key, and what to set."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from runs import pretrain, save_pretrained, save_run, save_tokenizer
from segmenters import save_segmenter

from beit_pretrain.checkpoint import files
from beit_pretrain.checks import check
from beit_pretrain.compose import compose
from beit_pretrain.errors import ConfigError

CPU = "trainer.accelerator=cpu"
DALLE = ["stage=pretrain", "model=small", "tokenizer=dalle", "batch_size=64", CPU]
KNN = ["stage=knn", "data=digits"]
SEGMENT = ["stage=segment", "data=image_masks", "data.root=scenes", "model=micro", "image_size=[32,48]"]
SEGMENT += ["batch_size=8", CPU]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("runs") / "tok")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return save_pretrained(tmp_path_factory.mktemp("runs") / "pre", tokenizer)


@pytest.fixture(scope="module")
def published() -> DictConfig:
    return compose(DALLE)


def faults(*overrides: str) -> list[str]:
    """The lines that `check` ends with; none if it is content."""
    try:
        check(compose(overrides))
    except ConfigError as error:
        assert all("\n" not in fault for fault in error.faults)
        return error.faults
    return []


def set_to(cfg: DictConfig, override: str) -> list[str]:
    """The faults with one more override, without composing anew."""
    cfg = deepcopy(cfg)
    parsed = OverridesParser.create().parse_override(override)
    OmegaConf.update(cfg, parsed.key_or_group, parsed.value())
    try:
        check(cfg)
    except ConfigError as error:
        return error.faults
    return []


def the_fault(*overrides: str) -> str:
    found = faults(*overrides)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "knn"])
def test_a_sound_configuration_passes(stage: str, tokenizer: Path, pretrained: Path) -> None:
    sound = {
        "tokenizer": ["stage=tokenizer", "experiment=digits_tokenizer"],
        "pretrain": pretrain(tokenizer),
        "knn": [*KNN, f"init_from={pretrained}"],
    }
    assert faults(*sound[stage], CPU) == []
    assert faults(*sound[stage], CPU, "debug=true") == []


def test_the_published_recipe_passes() -> None:
    assert faults(*DALLE) == []


def test_all_faults_come_at_once() -> None:
    found = faults(*DALLE, "image_size=230", "mode=eval", "stage.epochs=0", "trainer.precision=16-mixed")
    assert len(found) == 4
    assert {fault.split("=")[0] for fault in found} == {
        "image_size",
        "mode",
        "stage.epochs",
        "trainer.precision",
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "image_size=230",
            "image_size=230 cannot be divided by model.patch_size=16: set image_size=224 or 240",
        ),
        (
            "image_size=[192,150]",
            "image_size=[192,150] cannot be  ... : set image_size=[192,144] or [192,160]",
        ),
        ("image_size=9", "image_size=9 cannot be divided by model.patch_size=16: set image_size=16"),
        ("image_size=abc", "image_size=abc is no size in pixels: set image_size=224 or [192,160]"),
        ("image_size=[1,2,3]", "image_size=[1,2,3] is no size in pixels"),
        ("model.patch_size=0", "model.patch_size=0: set a whole number from 1"),
        (
            "tokenizer.image_size=100",
            "tokenizer.image_size=100 cannot be ... stride=8: set tokenizer.image_size=96",
        ),
        ("masking.count=196", "masking.count is 196, ... 14 x 14 = 196 patches ... between 1 and 195"),
        ("masking.count=0", "masking.count is 0"),
        ("masking.count=0.4", "masking.count is 0.4, ... masking.count=78"),
        ("masking.min_block=80", "masking.min_block is 80, ... between 1 and 75"),
        ("masking.min_block=a", "masking: an option is of a wrong kind ... ; see masking.*"),
        ("model.width=100", "model.width=100 cannot be shared by model.heads=6"),
        ("model.heads=0", "model.heads=0: set a whole number from 1"),
        ("model.depth=twelve", "model.depth=twelve: set a whole number from 1"),
        ("model.drop_path=1.5", "model.drop_path=1.5 is no rate"),
        (
            "model.rel_pos=none",
            "model.rel_pos=none with model.abs_pos=false ... set model.rel_pos=shared or model.abs",
        ),
        ("model.rel_pos=sharde", "model.rel_pos=sharde is unknown: set one of shared, per_layer, none"),
        ("model.abs_pos=maybe", "model.abs_pos=maybe: set true or false"),
        ("model.checkpointing=3", "model.checkpointing=3: set true or false"),
        ("model.mlp_ratio=wide", "model: an option is of a wrong kind"),
        (
            "mode=evalute",
            "mode=evalute: there is no such choice; did you mean evaluate? (known: fit, evaluate)",
        ),
        ("mode=evaluate", "mode=evaluate needs weights to score: set init_from"),
        ("stage.epochs=0", "stage.epochs=0: set a whole number from 1"),
        ("stage.epochs=1.5", "stage.epochs=1.5: set a whole number from 1"),
        ("stage.epochs=", "stage.epochs=: set a whole number from 1"),
        ("stage.optim.lr=abc", "stage.optim.lr=abc: must be a number above 0"),
        ("stage.optim.betas=3", "stage.optim.betas=3: must be two numbers"),
        (
            "trainer.precision=bf16",
            "trainer.precision=bf16: there is no such choice ... known: auto, 32, ... 16-mixed)",
        ),
        (
            "trainer.precision=16-mixed",
            "trainer.precision=16-mixed needs a GPU: set trainer.precision=32, bf16",
        ),
        ("trainer.devices=[0,0]", "trainer.devices=[0,0]: set a number from 1, or auto"),
        ("trainer.devices=many", "trainer.devices=many: set a number from 1, or auto"),
        ("trainer.devices=-1", "trainer.devices=-1: set a number from 1, or auto"),
        ("trainer.num_nodes=0", "trainer.num_nodes=0: set a whole number from 1"),
        ("trainer.num_nodes=many", "trainer.num_nodes=many: set a whole number from 1, or auto"),
        ("trainer.signals=USR1", "trainer.signals=USR1: set a list of USR1, USR2 or TERM"),
        ("trainer.signals=null", "trainer.signals=null: set a list of USR1, USR2 or TERM"),
        ("trainer.signals=[HUP]", "trainer.signals=[HUP]: set a list of USR1, USR2 or TERM"),
        ("trainer.signal_grace=0", "trainer.signal_grace=0: set seconds above 0"),
        ("trainer.max_requeues=0", "trainer.max_requeues=0: set a whole number from 1"),
        ("trainer.requeue=maybe", "trainer.requeue=maybe: set true or false"),
        ("trainer.allocation=pbs", "trainer.allocation=pbs: set slurm, or null"),
        ("batch_size=0", "batch_size=0: set a whole number from 1"),
        ("micro_batch_size=none", "micro_batch_size=none: set a whole number from 1, or null"),
        ("data.workers=-1", "data.workers=-1: set a whole number from 0"),
        ("data.val_share=1.0", "data.val_share=1.0 is no share"),
        ("data.normalize.mean=[0.5]", "data.normalize.mean=[0.5]: set three numbers"),
        ("data.normalize.std=[0.5,0,1]", "data.normalize.std=[0.5,0,1]: set three numbers above 0"),
        ("seed=x", "seed=x: set a whole number from 0"),
        ("trainer.devices=3", "batch_size=64 ... no multiple of 3 devices ... = 3: set batch_size=63 or 66"),
        (
            "micro_batch_size=24",
            "micro_batch_size=24 = 24: set batch_size=48 or 72, or micro_batch_size=16 or 32",
        ),
        ("batch_size=2048", "batch_size=2048 is more than the 1120 training images of data=digits"),
        ("init_from=nowhere", "init_from=nowhere: there is no such file or folder"),
        ("runs=${nope}", "run_dir: Interpolation key 'nope' not found"),
    ],
)
def test_a_fault_is_one_line_that_says_what_to_set(published: DictConfig, override: str, says: str) -> None:
    (fault,) = set_to(published, override)
    assert "\n" not in fault
    assert re.search(".*".join(re.escape(part) for part in says.split(" ... ")), fault)


def test_a_graphics_card_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "trainer.accelerator=gpu, but there is no GPU here" in the_fault(*DALLE, "trainer.accelerator=gpu")


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ("auto", None),
        ("-1", None),
        ("2", None),
        ("[1,3]", None),
        ("5", "trainer.devices=5, but there are 4 here"),
        ("[0,4]", "trainer.devices=[0,4], but there are 4 here"),
        ("[1,1]", "trainer.devices=[1,1]: set a number from 1, a list of different ones"),
    ],
)
def test_devices_are_compared_with_what_is_there(
    monkeypatch: pytest.MonkeyPatch, devices: str, says: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = faults(*DALLE, "batch_size=80", "trainer.accelerator=cuda", f"trainer.devices={devices}")
    assert (says is None and not found) or (says is not None and says in found[0])


@pytest.mark.parametrize(("nodes", "micro", "fine"), [(2, 8, True), (3, 8, False), (2, 16, False)])
def test_the_batch_falls_evenly_to_nodes_devices_and_passes(nodes: int, micro: int, fine: bool) -> None:
    split = [f"trainer.num_nodes={nodes}", "trainer.devices=4", f"micro_batch_size={micro}", "dry_run=true"]
    assert (faults(*DALLE, *split) == []) == fine


def test_knn_is_one_process_whatever_the_batch(pretrained: Path) -> None:
    assert faults(*KNN, CPU, f"init_from={pretrained}", "trainer.devices=3", "batch_size=2048") == []


# --- tokenizer and grid -----------------------------------------------------------------------------------


def test_grids_that_differ_are_named_with_the_sizes_that_fit() -> None:
    fault = the_fault(*DALLE, "image_size=[224,192]")
    assert re.search(r"14 x 14 tokens .*14 x 12 patches .* set image_size=224, or tokenizer", fault)
    assert fault.endswith("tokenizer.image_size=[112,96]")
    assert faults(*DALLE, "image_size=[224,192]", "tokenizer.image_size=[112,96]") == []


def test_a_trained_tokenizer_with_another_grid_asks_for_another_image_size(tokenizer: Path) -> None:
    fault = the_fault(*pretrain(tokenizer), "image_size=48", CPU)
    assert re.search("8 x 8 tokens .*12 x 12 patches.*: set image_size=32, or train a tokenizer with", fault)


def test_pretraining_needs_a_trained_tokenizer() -> None:
    fault = the_fault(
        "stage=pretrain", "batch_size=64", "image_size=32", "masking.count=1", CPU, "masking=random"
    )
    assert re.search("tokenizer.checkpoint is not given.* stage=tokenizer .* tokenizer=dalle", fault)


def test_a_pretraining_run_is_no_tokenizer(tokenizer: Path, pretrained: Path) -> None:
    fault = the_fault(*pretrain(pretrained), CPU)
    assert re.search(
        "tokenizer.checkpoint=.*pre.*holds no tokenizer: set tokenizer.checkpoint to a run", fault
    )


def test_published_weights_are_not_trained() -> None:
    found = faults("stage=tokenizer", "tokenizer=dalle", "batch_size=64", CPU)
    assert found == ["stage=tokenizer cannot train a DalleTokenizer: set tokenizer=dvae"]


def test_a_tokenizer_says_for_itself_what_it_cannot_be() -> None:
    digits = ["stage=tokenizer", "experiment=digits_tokenizer", CPU]
    assert "tokenizer.image_size" in the_fault(*digits, "tokenizer.image_size=30")
    assert "tokenizer: an option is of a wrong kind" in the_fault(*digits, "tokenizer.layers=x")
    assert "tokenizer._target_=no.such" in the_fault(*digits, "tokenizer._target_=no.such")


# --- where it starts from ---------------------------------------------------------------------------------


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "weights.pth"
    page.write_text("<html>404</html>")
    fault = the_fault(*DALLE, f"init_from={page}")
    assert fault.startswith(f"init_from={page}")
    files.write(tmp_path / "other.pth", {"model": {"w": torch.zeros(1)}})
    assert "is no vision transformer (w): give a file of a BEiT" in the_fault(
        *DALLE, f"init_from={tmp_path / 'other.pth'}"
    )


def test_knn_needs_an_encoder(tokenizer: Path) -> None:
    assert the_fault(*KNN, CPU).startswith("stage=knn needs weights to score: set init_from")
    assert re.search(
        "holds no encoder: set init_from to a run of", the_fault(*KNN, CPU, f"init_from={tokenizer}")
    )


def test_normalisation_must_be_that_of_the_weights(tokenizer: Path, tmp_path: Path) -> None:
    start = save_run(tmp_path / "pre", pretrain(tokenizer), mean=[0.485, 0.456, 0.406])
    fault = the_fault(*pretrain(tokenizer), CPU, f"init_from={start}")
    assert re.search(r"saw images normalised with mean \[0.485,0.456,0.406\]", fault)
    assert fault.endswith("set 'data.normalize.mean=[0.485,0.456,0.406]'")
    mended = fault.rpartition("set ")[2].strip("'")
    assert faults(*pretrain(tokenizer), CPU, f"init_from={start}", mended) == []


def test_an_encoder_of_another_shape_is_named(tokenizer: Path, pretrained: Path) -> None:
    fault = the_fault(*pretrain(tokenizer), CPU, f"init_from={pretrained}")
    assert re.search(r"model.width=96 \(24\), model.depth=4 \(1\): set model=micro and what else", fault)


# --- images -----------------------------------------------------------------------------------------------


def test_images_must_be_named() -> None:
    assert the_fault(*DALLE, "data=folder") == "data.root is not given: set data.root=..."
    assert the_fault(*DALLE, "data=huggingface") == "data.dataset is not given: set data.dataset=..."


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").touch()
    (tmp_path / "empty" / ".hidden.png").touch()
    (tmp_path / "empty" / "deep" / "circle").symlink_to(tmp_path / "empty")
    (tmp_path / "full" / "deep").mkdir(parents=True)
    (tmp_path / "full" / "deep" / "a.JPEG").touch()
    images = compose([*DALLE, "data=folder", "data.root=x"])

    def root(given: object) -> str:
        return "; ".join(set_to(images, f"data.root={given}"))

    assert root(tmp_path) == root(tmp_path / "f*") == root(f"{tmp_path}/**") == ""
    assert "data.root=/no/where does not exist: set data.root" in root("/no/where")
    assert f"data.root={tmp_path}/empty holds no image" in root(tmp_path / "empty")
    assert "matches nothing: set data.root" in root(tmp_path / "x*")
    assert "is a file: set data.root" in root(tmp_path / "full" / "deep" / "a.JPEG")
    assert "data.root is an empty list" in root("[]")
    assert "data.root=null: set a folder" in root("null")
    assert root(f"[{tmp_path}/full,{tmp_path}/empty,/no/where]").count("set data.root") == 2


# --- segmentation -----------------------------------------------------------------------------------------


def test_a_sound_segmentation_passes(pretrained: Path) -> None:
    assert faults(*SEGMENT) == []
    assert faults(*SEGMENT[:3], "batch_size=8", CPU, f"init_from={pretrained}", "image_size=[48,64]") == []


def test_a_prediction_says_for_itself_what_it_cannot_do() -> None:
    wrong = ["stage.predict.scales=[]", "stage.predict.stride=[40,40]", "stage.predict.windows=0"]
    assert [fault.partition("=")[0] for fault in faults(*SEGMENT, *wrong)] == [
        "stage.predict.stride",
        "stage.predict.scales",
        "stage.predict.windows",
    ]
    stride = ["stage.predict.mode=whole", "stage.predict.stride=[8,8]"]
    assert the_fault(*SEGMENT, *stride).endswith(": set stage.predict.stride=null")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.check_label_maps=0", "data.check_label_maps=0: set a whole number from 1, or null for all"),
        ("image_size=[50,64]", "image_size=[50,64] cannot be divided by model.patch_size=4"),
        ("stage.predict.scales=[0]", "stage.predict.scales=[0]: set a list of one or more numbers above 0"),
        ("stage.views.scale=2", "stage.views: an option is of a wrong kind"),
    ],
)
def test_an_option_of_a_segmentation_is_refused_once(override: str, says: str) -> None:
    found = faults(*SEGMENT, "batch_size=8", CPU, override)
    assert len(found) == 1 and found[0].startswith(says), found


def test_the_schedule_of_a_segmentation_is_checked() -> None:
    fault = the_fault(*SEGMENT, "stage.optim.schedule=linear")
    assert fault == "stage.optim.schedule=linear: must be one of cosine, poly"
    assert "stage.optim.power=0: must be a number above 0" in the_fault(*SEGMENT, "stage.optim.power=0")


def test_batch_norm_needs_two_images_at_a_time(tmp_path: Path) -> None:
    says = "stage=segment normalises over the images that are seen at a time, of which there is one: set micro_batch"
    assert the_fault(*SEGMENT, "micro_batch_size=1").startswith(says)
    assert the_fault(*SEGMENT, "batch_size=1").startswith(says)
    assert faults(*SEGMENT, "micro_batch_size=1", "trainer.devices=2") == []
    # To be scored an image may come alone.
    scored = [*SEGMENT[:3], "mode=evaluate", "micro_batch_size=1", CPU]
    assert faults(*scored, f"init_from={save_segmenter(tmp_path / 'run')}") == []


def test_published_recipes_normalise_as_imagenet_whatever_the_encoder_saw(tmp_path: Path) -> None:
    """Their encoders saw pixels with mean and spread 0.5; others have to be told."""
    start = save_segmenter(tmp_path / "run", "data.normalize.mean=[0.1,0.1,0.1]")
    plain = [*SEGMENT[:3], "batch_size=8", CPU, f"init_from={start}"]
    assert the_fault(*plain).endswith("set 'data.normalize.mean=[0.1,0.1,0.1]'")
    assert all_faults(*plain, "data.normalize.mean=[0.2,0.2,0.2]") == []
    recipe = ["stage=segment", "experiment=segment_base_512", "data.root=scenes", CPU, f"init_from={start}"]
    small = ["model=micro", "model.width=24", "model.depth=2", "image_size=32"]
    assert all_faults(*recipe, *small) == []


def all_faults(*overrides: str) -> list[str]:
    """As the command has it, which knows what was set by hand."""
    try:
        check(compose(overrides), overrides)
    except ConfigError as error:
        return error.faults
    return []


# --- the stage itself -------------------------------------------------------------------------------------


def test_a_stage_must_be_chosen() -> None:
    assert the_fault() == (
        "no stage is given: set stage=tokenizer, stage=pretrain, stage=classify, stage=probe, stage=segment or "
        "stage=knn"
    )
    assert the_fault("chain=quickstart").startswith("chain=quickstart cannot be one job of a sweep")
