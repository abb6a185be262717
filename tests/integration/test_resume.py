"""Runs killed with SIGKILL and started again end with the bits of a run that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetuning import SMALL_FINETUNE
from running import SMALL_PRETRAIN, SMALL_TOKENIZER, assert_same_run, record, train_here, train_with_kills
from segmentation import SMALL_SEGMENT, draw_scenes

# With all that draws or remembers.
FINETUNE = [
    *SMALL_FINETUNE,
    "stage.ema=0.9",
    "stage.mixup=0.8",
    "stage.cutmix=1.0",
    "stage.erasing=0.5",
    "stage.views.rand_augment=rand-m9-mstd0.5-inc1",
    "data.repeats=2",
    "data.workers=2",
    "micro_batch_size=32",
]

# Dropout, running statistics, crops and colours by chance.
SEGMENT = [
    *SMALL_SEGMENT,
    "model=micro",
    "model.width=32",
    "model.heads=2",
    "model.depth=2",
    "model.drop_path=0.2",
    "image_size=[32,48]",
    "data.workers=2",
    "micro_batch_size=4",
]


def _compare(base: list[str], folder: Path, *, kills: int, seed: int) -> None:
    whole, killed = folder / "runs" / "whole", folder / "runs" / "killed"
    often = [*base, "checkpoint.every_steps=3", "stage.log_every=5"]
    train_here([*often, *record(whole), "name=whole"], folder)
    train_with_kills([*often, *record(killed), "name=killed"], folder, killed, kills=kills, seed=seed)
    assert_same_run(whole, killed)


def test_pretraining_killed_three_times_ends_bit_identical(tokenizer_run: Path, tmp_path: Path) -> None:
    _compare(
        [
            *SMALL_PRETRAIN,
            f"tokenizer.checkpoint={tokenizer_run}",
            "stage.epochs=5",
            "micro_batch_size=32",
            "masking.exact=false",
            "data.workers=2",
        ],
        tmp_path,
        kills=3,
        seed=1,
    )


@pytest.mark.slow
def test_fine_tuning_killed_three_times_ends_bit_identical(pretrain_run: Path, tmp_path: Path) -> None:
    _compare([*FINETUNE, f"init_from={pretrain_run}", "stage.epochs=3"], tmp_path, kills=3, seed=4)


@pytest.mark.slow
def test_a_tokenizer_killed_three_times_ends_bit_identical(tmp_path: Path) -> None:
    _compare([*SMALL_TOKENIZER, "stage.epochs=5", "data.workers=0"], tmp_path, kills=3, seed=2)


@pytest.mark.slow
def test_a_segmentation_killed_three_times_ends_bit_identical(tmp_path: Path) -> None:
    draw_scenes(tmp_path / "scenes", val=3)
    _compare([*SEGMENT, "stage.epochs=8", "trainer.evaluate_every=4"], tmp_path, kills=3, seed=5)
    one, other = (tmp_path / "runs" / name for name in ("whole", "killed"))
    pictures = [{p.name: p.read_bytes() for p in (run / "pictures/worst").iterdir()} for run in (one, other)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "workers"), [("tokenizer", 2), ("pretrain", 0), ("classify", 0), ("segment", 0)]
)
def test_a_run_killed_ten_times_ends_bit_identical(
    stage: str, workers: int, tokenizer_run: Path, pretrain_run: Path, tmp_path: Path
) -> None:
    draw_scenes(tmp_path / "scenes", train=80, val=3)
    base = {
        "tokenizer": [*SMALL_TOKENIZER, "micro_batch_size=32"],
        "pretrain": [*SMALL_PRETRAIN, f"tokenizer.checkpoint={tokenizer_run}", "micro_batch_size=32"],
        "classify": [*FINETUNE, f"init_from={pretrain_run}"],
        "segment": SEGMENT,
    }[stage]
    extra = ["stage.epochs=12", f"data.workers={workers}"]
    _compare([*base, *extra], tmp_path, kills=10, seed=3 + workers)
