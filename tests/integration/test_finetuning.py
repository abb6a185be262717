"""What a fine-tuning run promises, on the embedded digits and on folders of pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning import SMALL_FINETUNE, on_folders, paint
from running import one_thread, train

from beit_pretrain.build import make
from beit_pretrain.checkpoint import files
from beit_pretrain.compose import compose
from beit_pretrain.data.sources import Digits
from beit_pretrain.data.transforms import EvalView
from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.heads import ClassHead
from beit_pretrain.run import run

QUIET = "~callbacks.progress"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:The number of training batches"
)


@pytest.fixture(autouse=True)
def _one_thread_in_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


def go(*overrides: str, name: str, base: list[str]) -> dict[str, Any]:
    """What a run in this process, which is faster than one of its own, writes into results.json."""
    every = [*base, *overrides, f"name={name}"]
    cfg = compose(every)
    run(cfg, every)
    return json.loads(Path(cfg.run_dir, "results.json").read_text())


@pytest.fixture(scope="module")
def tuned(pretrain_run: Path) -> Path:
    """A fine-tuning of the digits with a running average."""
    own = ["stage.ema=0.9", "stage.epochs=3", f"runs={pretrain_run.parent}"]
    printed = io.StringIO()
    with one_thread(), redirect_stdout(printed):
        results = go(f"init_from={pretrain_run}", *own, name="tuned", base=[*SMALL_FINETUNE, QUIET])
    report = [f"  {line}" for line in results["init_from"]["report"]]
    assert len(report) == 4 and "\n".join([f"from {pretrain_run}:", *report]) in printed.getvalue()
    return pretrain_run.parent / "tuned"


def test_fine_tuning_beats_chance_and_says_where_it_began(tuned: Path, pretrain_run: Path) -> None:
    results = json.loads((tuned / "results.json").read_text())
    metrics, table = results["metrics"], results["classification"]
    assert metrics["val/images"] == 280 and metrics["test/images"] == 397
    assert metrics["test/top1"] > 2 * table["chance"] and table["chance"] < 0.11
    assert (table["split"], table["classes"]) == ("test", [str(digit) for digit in range(10)])
    prefix = {"raw": "test", "ema": "test_ema"}[table["weights"]]
    assert sum(table["correct"]) / sum(table["support"]) == pytest.approx(metrics[f"{prefix}/top1"])
    assert np.array(table["confusion"]).sum(1).tolist() == table["support"]
    assert results["init_from"]["path"] == str(pretrain_run) and results["train_images"] == 1120
    whole = json.loads((tuned / "init_from.json").read_text())
    assert whole["expanded"] == ["encoder.rel_pos_bias.relative_position_bias_table to 2"]
    assert len(whole["loaded"]) > 20 and "head.head.weight" in whole["fresh"]
    record = files.read(tuned / "checkpoints" / "last.ckpt")["beit_pretrain"]
    origin = record["lineage"]["parents"]["init_from"]
    assert origin["sha256"] == files.sha256(pretrain_run / "checkpoints/last.ckpt")
    assert origin["parents"].keys() == {"tokenizer"}
    with (tuned / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_ema/top1"]) for row in rows if row["val/top1"]][-1] == metrics["val_ema/top1"]
    assert (tuned / "report.html").exists()


def accuracy(checkpoint: Path, split: str, size: int, prefix: str) -> float:
    """Top-1 of the saved weights, put into a model as it was trained and shown images of another size."""
    saved = files.read(checkpoint)
    config = compose([])
    config.model = saved["beit_pretrain"]["config"]["model"]
    encoder = make(config.model)
    head = ClassHead(width=encoder.width, classes=10)
    for name, module in (("encoder", encoder), ("head", head)):
        start = f"{prefix}{name}."
        state = {k.removeprefix(start): v for k, v in saved["state_dict"].items() if k.startswith(start)}
        module.load_state_dict(state)
        module.eval()
    source, view = Digits(), EvalView(image_size=(size, size), crop_pct=1.0)
    chosen = source.splits[split].tolist()
    images = torch.stack([view(source.read(i), 0).image for i in chosen])
    with torch.no_grad():
        found = head(encoder((images / 255 - 0.5) / 0.5)).argmax(-1)
    assert source.labels is not None
    labels = torch.from_numpy(source.labels[source.splits[split]])
    return (found == labels).double().mean().item()


def test_a_finished_run_is_scored_again_at_its_own_and_at_another_resolution(tuned: Path) -> None:
    """Without the recipe: pooling, crop and shape come from the checkpoint."""
    base = ["stage=classify", "data=digits", "mode=evaluate", "batch_size=128", "trainer.accelerator=cpu"]
    quiet = ["logger=csv", QUIET, "~callbacks.knn", "~callbacks.pictures", "~callbacks.throughput"]
    before = json.loads((tuned / "results.json").read_text())["metrics"]
    last = tuned / "checkpoints" / "last.ckpt"
    for which, size in (("raw", 32), ("ema", 48)):
        start = [*quiet, f"init_from={last}", f"init_weights={which}"]
        start += [] if size == 32 else [f"image_size={size}"]
        found = go(*start, name=which, base=base)["metrics"]
        for split in ("val", "test"):
            by_hand = accuracy(last, split, size, {"raw": "", "ema": "ema.module."}[which])
            assert found[f"{split}/top1"] == pytest.approx(by_hand)
            for key in ("loss", "top1", "top5") if size == 32 else ():
                assert found[f"{split}/{key}"] == pytest.approx(before[f"{split}/{key}"], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_score_as_one_device_does(tuned: Path) -> None:
    """Batches of 64 over 280 and 397 images: the ranks' shares are uneven and not filled up."""
    same = [
        *SMALL_FINETUNE,
        f"init_from={tuned}",
        "stage.ema=0.9",
        "model.drop_path=0.0",  # drawn on each rank for itself
    ]
    one = go(name="one", base=[*same, QUIET])
    train([*same, "name=two", "trainer.devices=2"], Path.cwd())
    two = json.loads(Path("runs/two/results.json").read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    assert two["classification"] == one["classification"]
    assert two["metrics"]["val/images"] == 280 and two["metrics"]["val/top1"] > 0.2


def test_five_classes_become_three_by_name(pretrain_run: Path) -> None:
    """From a pre-training on digits to five classes, and from those to three, of which one is new."""
    paint(Path("five"), "a", "bb", "ccc", "dddd", "eeeee")
    paint(Path("three"), "bb", "eeeee", "new")
    five = go(f"init_from={pretrain_run}", "stage.ema=0.9", name="five", base=[*on_folders("five"), QUIET])
    assert five["classification"]["classes"] == ["a", "bb", "ccc", "dddd", "eeeee"]
    assert five["classification"]["split"] == "val" and "test/top1" not in five["metrics"]
    (few,) = five["remarks"]
    assert "of only 15 images" in few and "val part of the data" in few
    start = [*on_folders("three"), QUIET, "init_from=runs/five"]
    still = ["stage.optim.lr=1e-9", "stage.optim.min_lr=0"]  # the weights stay where they begin
    three = go("init_weights=ema", *still, name="three", base=start)
    assert (
        "classes taken over by name: head.head.weight 2 of 3, head.head.bias 2 of 3"
        in three["init_from"]["report"]
    )
    then, now = (
        files.read(Path("runs", n, "checkpoints/last.ckpt"))["state_dict"] for n in ("five", "three")
    )
    rows = then["ema.module.head.head.weight"][[1, 4]]
    torch.testing.assert_close(now["head.head.weight"][:2], rows, atol=1e-6, rtol=0)
    # Scored with the five, three classes are others.
    with pytest.raises(
        CheckpointError, match="5 classes there, 3 here; only there: a, ccc, dddd; only here: new"
    ):
        go("mode=evaluate", name="wrong", base=start)


def test_a_run_goes_on_with_its_own_classes_only(
    pretrain_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(Path("flowers"), "aster", "rose")
    more = ["data.source.val=null", "data.val_share=0.25", "stage.optim.warmup_epochs=7"]
    start = [*on_folders("flowers"), QUIET, f"init_from={pretrain_run}", *more]
    first = go(name="flowers", base=start)
    assert "of only 4 images" in first["remarks"][0] and "data.val_share (now 0.25)" in first["remarks"][0]
    assert "warmup_epochs=7 is a warm-up of 7 updates" in capsys.readouterr().out
    results = Path("runs/flowers/results.json")
    # Killed between the last checkpoint and the results: nothing is left to be trained, and nothing is lost.
    results.unlink()
    again = go(name="flowers", base=start)
    for key in ("metrics", "classification", "init_from", "steps", "parameters"):
        assert again[key] == first[key], key
    results.unlink()
    for split in ("train", "val"):
        Path("flowers", split, "rose").rename(Path("flowers", split, "tulip"))
    says = r"only there: rose; only here: tulip\): bring them back, or start anew with another name="
    with pytest.raises(CheckpointError, match=says):
        go(name="flowers", base=start)
