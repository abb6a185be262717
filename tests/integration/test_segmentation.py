"""What a segmentation promises, on a few of the embedded scenes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import save_classifier
from PIL import Image
from running import one_thread, train
from segmentation import SMALL_SEGMENT, draw_scenes, name_classes

from beit_pretrain.checkpoint import files
from beit_pretrain.cli import main
from beit_pretrain.compose import compose
from beit_pretrain.data.shapes import CLASSES
from beit_pretrain.errors import TrainingError
from beit_pretrain.run import run
from beit_pretrain.tools.replay import replay

QUIET = "~callbacks.progress"
EVALUATE = ["stage=segment", "mode=evaluate", "data=image_masks", "data.source.reduce_zero_label=true"]
EVALUATE += ["data.workers=0", "trainer.accelerator=cpu", "logger=csv", QUIET]
STILL = ["stage.optim.lr=1e-12", "stage.epochs=1"]  # the weights stay where they begin

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:The number of training batches"
)


@pytest.fixture(autouse=True)
def _one_thread_in_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    draw_scenes(root, test=3)
    return root


def go(*overrides: str, name: str, base: list[str] = SMALL_SEGMENT) -> dict[str, Any]:
    """What a run in this process, which is faster than one of its own, writes into results.json."""
    every = [*base, *overrides, QUIET, f"name={name}"]
    every = list(dict.fromkeys(every))
    cfg = compose(every)
    run(cfg, every)
    return json.loads(Path(cfg.run_dir, "results.json").read_text())


@pytest.fixture(scope="module")
def segmented(scenes: Path, pretrain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmentation of scenes on the encoder that saw digits of 32 x 32 pixels."""
    runs = tmp_path_factory.mktemp("runs")
    with one_thread():
        go(f"data.root={scenes}", f"init_from={pretrain_run}", f"runs={runs}", name="segmented")
    return runs / "segmented"


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return files.read(folder / "checkpoints" / "last.ckpt")["state_dict"]


def names(lines: list[str]) -> set[str]:
    """What the lines of an account begin with."""
    return {line.split(" ")[0] for line in lines}


def account(folder: Path, source: Path) -> dict[str, list[str]]:
    """What became of every weight, after a look at whether each key of both sides is in one place."""
    told = json.loads((folder / "init_from.json").read_text())
    theirs = {k for k in saved(source) if k.startswith(("encoder.", "head."))}
    ours = {k for k in saved(folder) if k.startswith(("encoder.", "head."))}
    gone = [*told["loaded"], *names(told["expanded"]), *names(told["mapped"]), *names(told["dropped"])]
    gone += names(told["resized"]) & theirs
    assert sorted(gone) == sorted(theirs)
    came = names(told["loaded"]) | names(told["resized"]) | names(told["mapped"]) | set(told["fresh"])
    assert came == ours
    assert not any(name.startswith("encoder.") for name in told["fresh"])
    return told


# --- where it starts from -----------------------------------------------------------------------------------


def test_from_digits_of_32_pixels_to_crops_of_48_by_64(segmented: Path, pretrain_run: Path) -> None:
    told = account(segmented, pretrain_run)
    assert told["expanded"] == ["encoder.rel_pos_bias.relative_position_bias_table to 2"]
    table = "encoder.blocks.{}.attn.relative_position_bias_table 8 x 8 to 12 x 16"
    assert sorted(told["resized"]) == [
        table.format(0),
        table.format(1),
        "encoder.pos_embed 8 x 8 to 12 x 16",
    ]
    assert names(told["dropped"]) == {
        "encoder.mask_token",
        "head.norm.weight",
        "head.norm.bias",
        "head.lm_head.weight",
        "head.lm_head.bias",
    }
    assert len(told["loaded"]) > 20 and all(name.startswith("encoder.") for name in told["loaded"])
    assert {name.split(".")[1] for name in told["fresh"]} == {"neck", "decode_head", "auxiliary_head"}


def test_from_a_classifier_its_head_is_left_out(scenes: Path, tmp_path: Path) -> None:
    source = save_classifier(tmp_path / "classifier")
    go(f"data.root={scenes}", f"init_from={source}", *STILL, name="tuned")
    told = account(Path("runs/tuned"), source)
    assert names(told["dropped"]) == {
        "head.fc_norm.weight",
        "head.fc_norm.bias",
        "head.head.weight",
        "head.head.bias",
    }
    assert not told["expanded"] and len(told["resized"]) == 3
    key = "encoder.blocks.1.mlp.fc1.weight"
    torch.testing.assert_close(saved(Path("runs/tuned"))[key], saved(source)[key], atol=1e-6, rtol=0)


def test_from_a_segmentation_classes_are_taken_over_by_name(segmented: Path) -> None:
    draw_scenes(Path("scenes"), train=8, val=1)
    other = ("ground", "sky", "moon", *CLASSES[3:])  # two changed places, one is new
    name_classes(Path("scenes"), other)
    results = go(f"init_from={segmented}", *STILL, name="again")
    told = account(Path("runs/again"), segmented)
    layers = ("head.decode_head.conv_seg", "head.auxiliary_head.conv_seg")
    assert sorted(told["mapped"]) == sorted(
        f"{layer}.{kind} 9 of 10" for layer in layers for kind in ("weight", "bias")
    )
    assert not told["fresh"] and not told["dropped"] and "head.neck.fpn1.1.running_mean" in told["loaded"]
    assert results["segmentation"]["classes"] == list(other)
    for layer in layers:
        then, now = (saved(folder)[f"{layer}.weight"] for folder in (segmented, Path("runs/again")))
        torch.testing.assert_close(now[[0, 1]], then[[1, 0]], atol=1e-6, rtol=0)
        torch.testing.assert_close(now[3:], then[3:], atol=1e-6, rtol=0)
        assert not torch.allclose(now[2], then[2], atol=1e-3)


# --- what it leaves -----------------------------------------------------------------------------------------


def test_a_run_leaves_its_scores_its_worst_images_and_a_report(segmented: Path, pretrain_run: Path) -> None:
    results = json.loads((segmented / "results.json").read_text())
    metrics, told = results["metrics"], results["segmentation"]
    scores = {f"{split}/{kind}" for split in ("val", "test") for kind in ("miou", "macc", "aacc", "images")}
    assert set(metrics) == scores
    assert (metrics["val/images"], metrics["test/images"]) == (7, 3) and metrics["val/aacc"] > 0.2
    assert (results["stage"], results["steps"], results["epochs"], results["train_images"]) == (
        "segment",
        6,
        2,
        24,
    )
    assert results["init_from"]["path"] == str(pretrain_run)
    assert (told["split"], told["classes"]) == ("test", list(CLASSES))
    known = [value for value in told["iou"] if value is not None]
    assert sum(known) / len(known) == pytest.approx(metrics["test/miou"])
    assert told["how"] == "sliding windows of 48 x 64, stride 32 x 42; one scale"
    # Counted by hand over the label maps of the test.
    data = Path(compose_root(segmented))
    pixels = np.zeros(256, np.int64)
    for path in (data / "annotations" / "test").iterdir():
        pixels += np.bincount(np.asarray(Image.open(path)).ravel(), minlength=256)
    assert told["pixels"] == pixels[1:11].tolist()
    assert told["ignored"] == pytest.approx(pixels[0] / pixels.sum())
    assert told["look"]["label_maps"] == 24 and sum(told["look"]["share"]) == pytest.approx(1)
    assert [entry["picture"] for entry in told["worst"]] == [f"pictures/worst/{i}.png" for i in range(3)]
    assert all("/images/test/" in entry["name"] for entry in told["worst"])
    assert len(list((segmented / "pictures" / "worst").iterdir())) == 3
    with (segmented / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = {"train/loss", "train/decode", "train/auxiliary", "train/accuracy", "train/lr", "train/lr_min"}
    assert columns | {"train/grad_norm", "val/miou", "val/macc", "val/aacc"} <= rows[0].keys()
    (last,) = [row for row in rows if row["val/miou"]]
    assert float(last["val/miou"]) == metrics["val/miou"]
    logged = next(row for row in rows if row["train/loss"])
    loss = float(logged["train/decode"]) + 0.4 * float(logged["train/auxiliary"])
    assert float(logged["train/loss"]) == pytest.approx(loss, rel=1e-5)
    page = (segmented / "report.html").read_text()
    assert "mIoU" in page and all(name in page for name in CLASSES)


def compose_root(folder: Path) -> str:
    return files.read(folder / "checkpoints" / "last.ckpt")["beit_pretrain"]["config"]["data"]["root"]


def test_a_finished_run_is_scored_again_to_the_same_numbers(segmented: Path, scenes: Path) -> None:
    """Without the crop, blocks and channels that it was trained with: the checkpoint knows them."""
    before = json.loads((segmented / "results.json").read_text())
    same = [*EVALUATE, f"data.root={scenes}", f"init_from={segmented}"]
    again = go(name="again", base=same)
    assert again["metrics"] == before["metrics"]
    keys = ("split", "classes", "iou", "accuracy", "pixels", "mistakes", "ignored", "how", "worst", "look")
    assert all(again["segmentation"][key] == before["segmentation"][key] for key in keys)
    assert set(again["segmentation"]) == set(keys)
    more = go("experiment=segment_multi_scale", name="more", base=same)
    assert more["metrics"]["val/images"] == 7
    assert more["metrics"]["val/miou"] != before["metrics"]["val/miou"]
    assert more["segmentation"]["how"] == (
        "sliding windows of 48 x 64, stride 32 x 42; scales 0.5, 0.75, 1, 1.25, 1.5, 1.75, flipped too"
    )
    whole = go("stage.predict.mode=whole", name="whole", base=same)
    assert whole["segmentation"]["how"] == "whole images, short side 48; one scale"


@pytest.mark.slow
def test_two_ranks_train_and_score_as_one_device_does(scenes: Path, pretrain_run: Path) -> None:
    """Seven held-out images fall to them four and three; statistics of the norms are those of both."""
    train(
        [
            *SMALL_SEGMENT,
            f"data.root={scenes}",
            f"init_from={pretrain_run}",
            "stage.epochs=1",
            "trainer.devices=2",
            "trainer.precision=bf16-mixed",
            "name=two",
        ],
        Path.cwd(),
    )
    two = json.loads(Path("runs/two/results.json").read_text())
    same = [*EVALUATE, f"data.root={scenes}", "init_from=runs/two", "trainer.precision=bf16-mixed"]
    one = go(name="one", base=same)
    for key in ("iou", "accuracy", "pixels", "mistakes", "worst"):
        assert two["segmentation"][key] == one["segmentation"][key], key
    assert two["metrics"] == one["metrics"] and two["metrics"]["val/images"] == 7
    assert int(saved(Path("runs/two"))["head.neck.fpn1.1.num_batches_tracked"]) == 3


def test_a_run_goes_on_with_its_own_classes_only(
    pretrain_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_scenes(Path("scenes"), train=8, val=2)
    start = [f"init_from={pretrain_run}", "stage.epochs=1"]
    first = go(*start, name="own")
    results = Path("runs/own/results.json")
    # Killed between the last checkpoint and the results: nothing is left to be trained, and nothing is lost.
    results.unlink()
    again = go(*start, name="own")
    for key in ("metrics", "segmentation", "init_from", "steps", "parameters"):
        assert again[key] == first[key], key
    results.unlink()
    name_classes(Path("scenes"), ("air", *CLASSES[1:]))
    fault = refused(capsys, *SMALL_SEGMENT, *start, QUIET, "name=own")
    assert "only there: sky; only here: air): bring them back, or start anew with another name=" in fault


def test_a_step_that_was_refused_can_be_replayed(
    scenes: Path, pretrain_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exploding = ["stage.optim.lr=1e30", "stage.optim.warmup_steps=0", "stage.max_bad_steps=2"]
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(TrainingError, match="2 steps in a row"),
    ):
        go(f"data.root={scenes}", f"init_from={pretrain_run}", *exploding, name="exploding")
    kept = sorted(Path("runs/exploding/bad_steps").glob("*.pt"))
    assert len(kept) == 2 and replay(kept[0]) == 0
    assert "first output that is not finite: " in capsys.readouterr().out


# --- what is refused ----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line of a command that ends with exit code 2 before it has trained anything."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(overrides))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_images_without_label_maps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["model=micro", "image_size=32", "batch_size=8", "trainer.accelerator=cpu"]
    assert refused(capsys, "stage=segment", "data=digits", *tiny) == (
        "error: stage=segment needs images with label maps: set data=ade20k, data=image_masks or data=shapes"
    )
    assert not list(Path("runs").rglob("*.ckpt"))


def test_only_a_segmentation_can_be_scored_as_one(
    scenes: Path, pretrain_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = refused(capsys, *EVALUATE, f"data.root={scenes}", f"init_from={pretrain_run}")
    assert fault == (
        f"error: init_from={pretrain_run}: the checkpoint (of stage pretrain) holds no head.decode_head: set init_from "
        "to a run of stage=segment"
    )


def test_a_score_is_over_the_classes_that_were_trained(
    segmented: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_scenes(Path("scenes"), train=1, val=1)
    name_classes(Path("scenes"), ("air", *CLASSES[1:]))
    fault = refused(capsys, *EVALUATE, "data.root=scenes", f"init_from={segmented}")
    assert (
        "data=image_masks has (10 classes there, 10 here; only there: sky; only here: air): evaluate on"
        in fault
    )


def test_a_label_that_is_no_class_is_named_with_its_file_before_anything_is_trained(
    pretrain_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_scenes(Path("scenes"), train=8, val=1)
    path = Path("scenes/annotations/training/5.png")
    values = np.array(Image.open(path))
    values[3, 4] = 77
    Image.fromarray(values).save(path)
    fault = refused(capsys, *SMALL_SEGMENT, f"init_from={pretrain_run}", QUIET, "name=wrong")
    assert f"label map {path.absolute()} has the value 77, which is none of the 10 classes" in fault
    assert not list(Path("runs").rglob("*.ckpt"))


def test_a_crop_that_is_no_whole_number_of_patches_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SMALL_SEGMENT, "model=micro", "image_size=[50,64]"])
    faults = capsys.readouterr().err.splitlines()
    says = (
        "error: image_size=[50,64] cannot be divided by model.patch_size=4: set image_size=[48,64] or [52,64]"
    )
    assert faults[0] == says


def test_a_dry_run_says_what_would_be_trained(
    scenes: Path, pretrain_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main([*SMALL_SEGMENT, f"data.root={scenes}", f"init_from={pretrain_run}", "dry_run=true"])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]
    rows = {row[0]: row[1] for row in cells if len(row) == 2}
    assert rows["training images"] == "24, and 7 held out"
    assert rows["updates"] == "3 an epoch x 2 epochs = 6"
    assert rows["patches"] == "12 x 16 = 192, from 48 x 64 pixels"
    assert rows["classes"] == "10"
    assert not Path("runs").exists()
