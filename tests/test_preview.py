"""A dry run says what a run would be, truly, and leaves no trace."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data.label_pairs import write_pair
from omegaconf import DictConfig
from runs import DIGITS_TOKENIZER, pretrain, save_pretrained, save_tokenizer
from torch import Tensor

from beit_pretrain import optim
from beit_pretrain.build import build_stage
from beit_pretrain.cli import main
from beit_pretrain.compose import compose
from beit_pretrain.folder import plain
from beit_pretrain.models.beit import Beit
from beit_pretrain.preview import (
    encoder_activations,
    preview,
    saved_for_backward,
    segmentation_activations,
)
from beit_pretrain.run import run

CPU = "trainer.accelerator=cpu"


def fixed(tokenizer: Path) -> list[str]:
    """A pre-training whose numbers are those of these tests, however its recipe is tuned."""
    own = ["batch_size=64", "masking.count=26", "stage.optim.warmup_epochs=4", "stage.epochs=60"]
    return [*pretrain(tokenizer), *own]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("runs") / "tok")


def shown(capsys: pytest.CaptureFixture[str], cfg: DictConfig) -> tuple[str, dict[str, str]]:
    """What a preview prints: the configuration, and the rest by its first cell."""
    assert preview(cfg) == {}
    out = capsys.readouterr().out
    config, _, tables = out.partition("\n\n")
    cells = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in tables.splitlines()]
    return config, {row[0]: " ".join(row[1:]) for row in cells if len(row) > 1}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_the_resolved_configuration_can_be_read_back(
    capsys: pytest.CaptureFixture[str], tokenizer: Path
) -> None:
    cfg = compose([*fixed(tokenizer), CPU])
    config, _ = shown(capsys, cfg)
    assert yaml.safe_load(config) == plain(cfg)


def test_a_pretraining_is_described(capsys: pytest.CaptureFixture[str], tokenizer: Path) -> None:
    cfg = compose([*fixed(tokenizer), CPU, "micro_batch_size=16", "stage.epochs=10", "batch_size=128"])
    _, rows = shown(capsys, cfg)
    stage = build_stage(compose([*fixed(tokenizer), CPU]))
    for part in ("encoder", "head"):
        count = sum(p.numel() for p in stage.get_submodule(part).parameters())
        assert rows[f"parameters, {part}"] == f"{count:,}"
    assert rows["parameters, tokenizer"].endswith(" frozen")
    assert rows["training images"] == "1,120, and 280 held out"
    assert rows["updates"] == "8 an epoch x 10 epochs = 80"
    assert (
        rows["batch"]
        == "128 images an update: 1 CPU process, 16 images at a time on each, 8 passes summed up"
    )
    assert rows["patches"] == "8 x 8 = 64, from 32 x 32 pixels"
    assert rows["tokens"] == "8 x 8 of 16 kinds, from 32 x 32 pixels"
    assert rows["hidden patches"] == "always 26 (41%)"
    assert "an estimate" in rows["memory per device"]


def test_the_published_model_has_the_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = compose(["stage=pretrain", "tokenizer=dalle", "model=base", "batch_size=64", CPU])
    _, rows = shown(capsys, cfg)
    counts = [int(rows[f"parameters, {part}"].replace(",", "")) for part in ("encoder", "head")]
    assert sum(counts) == 91_965_776
    assert "published weights" in rows["parameters, tokenizer"]
    assert rows["tokens"] == "14 x 14 of 8,192 kinds, from 112 x 112 pixels"
    total = sum(int(v.split()[1].replace(",", "")) for k, v in rows.items() if k.startswith("all_"))
    assert total == 91_965_776


def test_a_name_with_brackets_is_no_markup(capsys: pytest.CaptureFixture[str], tokenizer: Path) -> None:
    preview(compose([*fixed(tokenizer), CPU, 'name="a[/b][red]"']))
    assert "pretrain in runs/a[/b][red]" in capsys.readouterr().out


def test_masks_that_may_fall_short_are_called_so(capsys: pytest.CaptureFixture[str], tokenizer: Path) -> None:
    _, rows = shown(capsys, compose([*fixed(tokenizer), CPU, "masking.exact=false"]))
    assert rows["hidden patches"] == "at most 26 (41%)"


def test_the_schedule_and_the_groups_are_those_of_the_optimiser(
    capsys: pytest.CaptureFixture[str], tokenizer: Path
) -> None:
    cfg = compose([*fixed(tokenizer), CPU, "stage.optim.layer_decay=0.8", "stage.epochs=20"])
    _, rows = shown(capsys, cfg)
    recipe = optim.Recipe(lr=2e-3, warmup_epochs=4, layer_decay=0.8)
    points = {int(k): v for k, v in rows.items() if k.isdigit()}
    assert set(points) == {0, 68, 158, 249, 339}  # warm-up 4 x 17, end 20 x 17
    for step, row in points.items():
        epoch, lr, decay = row.split()
        assert epoch == f"{step / 17:.1f}"
        assert float(lr) == pytest.approx(optim.learning_rate(recipe, step, 17, 340), rel=5e-3)
        assert float(decay) == 0.05
    groups = {k: v.split() for k, v in rows.items() if k.startswith("layer_")}
    assert len(groups) == 12  # stem, four blocks, top; decayed or not
    assert groups["layer_5_decay"][2:] == ["1", "2.00e-03", "0.05"]
    assert groups["layer_0_no_decay"][2:] == ["0.3277", "6.55e-04", "0"]


def test_a_warm_up_that_the_training_does_not_outlast_is_said(
    capsys: pytest.CaptureFixture[str], tokenizer: Path
) -> None:
    says = "stage.optim.warmup_epochs=4 is a warm-up of 68 updates, and stage.epochs=3 are 51: "
    for more, said in (([], True), (["debug=true"], False), (["stage.epochs=5"], False)):
        preview(compose([*fixed(tokenizer), CPU, "stage.epochs=3", *more]))
        assert (f"\n{says}" in capsys.readouterr().out) == said, more


def test_a_tokenizer_training_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = compose([*DIGITS_TOKENIZER, CPU, "batch_size=100"])
    _, rows = shown(capsys, cfg)
    count = sum(p.numel() for p in build_stage(cfg).parameters())
    assert rows["parameters, tokenizer"] == f"{count:,}"
    assert rows["updates"].startswith("11 an epoch")
    assert "hidden patches" not in rows and "patches" not in rows
    assert "counted on one image" in rows["of each pass"]


def test_a_segmentation_is_described(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number in range(11):
        write_pair(tmp_path, f"a/{number}", [[0, 1, 2]])
    (tmp_path / "classes.txt").write_text("wall\nfloor\nsky\n")
    own = ["stage=segment", "data=image_masks", f"data.root={tmp_path}", "model=micro", "image_size=[32,48]"]
    cfg = compose([*own, CPU, "batch_size=4", "stage.epochs=5", "data.val_share=0.1", "stage.channels=16"])
    _, rows = shown(capsys, cfg)
    stage = build_stage(cfg, ["wall", "floor", "sky"])
    for part in ("encoder", "head"):
        count = sum(p.numel() for p in stage.get_submodule(part).parameters())
        assert rows[f"parameters, {part}"] == f"{count:,}"
    assert rows["training images"] == "9, and 2 held out"
    assert rows["updates"] == "2 an epoch x 5 epochs = 10"
    assert rows["patches"] == "8 x 12 = 96, from 32 x 48 pixels" and rows["classes"] == "3"
    groups = {k: v.split() for k, v in rows.items() if k.startswith("layer_")}
    assert groups["layer_5_decay"][2:] == ["1", "7.00e-04", "0.05"]  # neck and heads, above four blocks


def test_knn_shows_the_encoder_alone(
    capsys: pytest.CaptureFixture[str], tokenizer: Path, tmp_path: Path
) -> None:
    pretrained = save_pretrained(tmp_path / "pre", tokenizer)
    _, rows = shown(capsys, compose(["stage=knn", f"init_from={pretrained}", CPU]))
    assert set(rows) == {"parameters, encoder"}


def test_data_that_are_not_here_are_not_fetched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = ["stage=pretrain", "tokenizer=dalle", "model=tiny", CPU]
    cifar = [*tiny, "data=torchvision", f"data.root={tmp_path}/data"]
    _, rows = shown(capsys, compose(cifar))
    assert rows["training images"] == "known when CIFAR10 has been fetched"
    assert "updates" not in rows and "all_decay" in rows
    assert list(tmp_path.iterdir()) == []
    _, rows = shown(capsys, compose([*tiny, "data=huggingface", "data.dataset=some/set"]))
    assert rows["training images"] == "known when some/set has been fetched"


def test_a_dry_run_writes_nothing_and_ends_well(
    capsys: pytest.CaptureFixture[str],
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*fixed(tokenizer), CPU, "dry_run=true"])
    assert "hidden patches" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_checked_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "stage=pretrain",
                "tokenizer=dalle",
                "dry_run=true",
                "batch_size=64",
                "image_size=230",
                "mode=x",
                CPU,
            ]
        )
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition("=")[0] for line in captured.err.splitlines()] == [
        "error: mode",
        "error: image_size",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_preview_leaves_the_configuration_as_it_was(tokenizer: Path) -> None:
    cfg = compose([*fixed(tokenizer), CPU, "dry_run=true"])
    before = deepcopy(cfg)
    assert run(cfg) == {}
    assert cfg == before


# --- memory -------------------------------------------------------------------------------------------------


def kept_by_autograd(encoder: Beit, image: Tensor) -> int:
    """Bytes of distinct storages that autograd holds after a forward pass, without the weights."""
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoder(image)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize(
    "more", [[], ["model.layer_scale=0"], ["image_size=[96,160]"], ["model.mlp_ratio=2.0"]]
)
def test_the_estimate_of_activations_is_near_what_autograd_keeps(more: list[str]) -> None:
    overrides = [
        "stage=pretrain",
        "tokenizer=dalle",
        "model=tiny",
        "image_size=128",
        "masking.count=20",
        *more,
    ]
    cfg = compose(overrides)
    size = [side // 2 for side in cfg.model.image_size]
    stand_in = {"vocab_size": 9, "stride": 8, "image_size": size}
    cfg.tokenizer = {"_target_": "beit_pretrain.preview.Described", **stand_in}
    with torch.device("meta"):
        stage = build_stage(cfg)
    images = 4  # what is there once, such as the bias, counts for little
    options = {k: v for k, v in plain(cfg)["model"].items() if k not in ("_target_", "name")}
    measured = kept_by_autograd(Beit(**options), torch.randn(images, 3, *cfg.model.image_size))
    estimate = images * encoder_activations(cfg, stage, plain=True)
    assert estimate == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("size", ["32", "[64,48]"])
def test_the_heads_of_a_segmentation_are_counted_as_autograd_keeps_them(size: str) -> None:
    own = ["stage=segment", "model=micro", f"image_size={size}", "stage.channels=16", "data.root=scenes"]
    cfg = compose([*own, "data=image_masks"])
    stage: Any = build_stage(cfg, [str(i) for i in range(20)])
    images, grid = 6, stage.encoder.grid
    maps = [torch.randn(images, cfg.model.width, *grid, requires_grad=True) for _ in range(4)]
    target = torch.randint(20, (images, *cfg.model.image_size))
    kept: dict[int, torch.UntypedStorage] = {}
    own_places = {p.untyped_storage().data_ptr() for p in stage.head.parameters()}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stage.losses(maps, target)
    measured = sum(storage.nbytes() for place, storage in kept.items() if place not in own_places)
    with torch.device("meta"):
        described = build_stage(cfg, stage.classes)
    assert images * segmentation_activations(cfg, described) == pytest.approx(measured, rel=0.03)


def test_checkpointing_shows_in_the_estimate(tokenizer: Path) -> None:
    cfg = compose([*fixed(tokenizer), "model.depth=8"])
    stage = build_stage(cfg)
    usual = encoder_activations(cfg, stage, plain=True)
    cfg.model.checkpointing = True
    assert encoder_activations(cfg, stage, plain=True) < usual / 4
    cfg.model.checkpointing = False
    assert encoder_activations(cfg, stage, plain=False) == usual - 4 * 8 * 3 * 65**2


def test_half_precision_halves_what_a_pass_takes(capsys: pytest.CaptureFixture[str], tokenizer: Path) -> None:
    def of_each_pass(*more: str) -> tuple[float, str]:
        _, rows = shown(capsys, compose([*fixed(tokenizer), CPU, "batch_size=1024", *more]))
        text = rows["of each pass"]
        found = re.match(r"([\d.]+) (MiB|GiB)", text)
        assert found
        return float(found[1]) * {"MiB": 1, "GiB": 1024}[found[2]], text

    full, _ = of_each_pass()
    half, text = of_each_pass("trainer.precision=bf16-mixed")
    assert half == pytest.approx(full / 2, rel=0.03)  # printed to two digits
    assert text.endswith("in 16 bit")


def test_a_tokenizers_activations_are_counted_by_running_one_image() -> None:
    small, large = (compose([*DIGITS_TOKENIZER, f"tokenizer.image_size={side}"]) for side in (32, 64))
    assert saved_for_backward(large) == pytest.approx(4 * saved_for_backward(small), rel=0.05)
