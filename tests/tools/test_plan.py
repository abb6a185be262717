"""`beit-tools plan`: the numbers of a run, and which part of the loader is named as its limit."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from runs import DIGITS_TOKENIZER, pretrain, save_pretrained, save_tokenizer

from beit_pretrain.build import build_data
from beit_pretrain.compose import compose
from beit_pretrain.data.sources import Digits
from beit_pretrain.data.transforms import OneView
from beit_pretrain.errors import BeitError, ConfigError, DataError
from beit_pretrain.tools import plan as plans
from beit_pretrain.tools.app import app
from beit_pretrain.tools.plan import Cost, Speed, findings

SLOW = 0.01  # seconds; all else of a digit takes a tenth of a millisecond
CPU = "trainer.accelerator=cpu"
Rows = dict[str, str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("runs") / "tok")


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., Rows]:
    """What a plan prints, by its first cell."""

    def rows(*arguments: str) -> Rows:
        capsys.readouterr()
        app(["plan", CPU, *arguments], standalone_mode=False)
        cells = [
            [c.strip() for c in line.strip("│┃ ").split("│")] for line in capsys.readouterr().out.splitlines()
        ]
        return {row[0]: " | ".join(row[1:]) for row in cells if len(row) > 1}

    return rows


def slowed(function: Any) -> Any:
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(SLOW)
        return function(*arguments, **options)

    return slow


# --- numbers ------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_run_and_no_trace_of_it(shown: Callable[..., Rows], place: Path) -> None:
    rows = shown(
        *DIGITS_TOKENIZER,
        "batch_size=96",
        "micro_batch_size=16",
        "trainer.devices=2",
        "stage.epochs=7",
        "--seconds=0",
    )
    assert rows["images"] == "train 1,120, val 280, test 397"
    assert rows["classes"] == "10"
    assert rows["batch"].startswith("96 = 2 x 16 x 3 ")
    assert rows["updates"] == "11 an epoch x 7 epochs = 77"
    assert "speed" not in rows
    assert list(place.iterdir()) == []


def test_shards_are_counted_over_the_training_images(
    shown: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "bounds", np.array([0, 300, 900, 1797]))
    train = Digits().splits["train"]
    counts = [
        int(((train >= low) & (train < high)).sum()) for low, high in ((0, 300), (300, 900), (900, 1797))
    ]
    rows = shown(*DIGITS_TOKENIZER, "trainer.devices=2", "data.workers=3", "--seconds=0")
    assert rows["shards"] == (
        f"3 to train on, {min(counts):,} to {max(counts):,} images each; all mixed at a time; 0.5 for each of 6 workers"
    )


def test_caches_are_sized(tokenizer: Path) -> None:
    cfg = compose(pretrain(tokenizer))
    OmegaConf.set_struct(cfg, False)
    cfg.tokenizer.update({"cache": "/nowhere/tokens", "views": 5})
    cfg.data.source.update({"cache": "tars", "cache_gb": 50})
    data = build_data(compose(pretrain(tokenizer)))
    data.views = plans._views(cfg)
    rows = dict(plans.facts(cfg, data))
    size = (1120 * 5 + 280) * (2 * 64 + 12)
    assert rows["token cache"].startswith(
        f"{size / 1e3:.0f} kB for 5 views of each image, in /nowhere/tokens ("
    )
    assert re.fullmatch(r"up to 50 GB of fetched shards, in tars \([\d,.]+ GB free\)", rows["shard cache"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data=digits"], "a plan is for one stage that trains"),
        (["stage=knn"], "a plan is for one stage that trains"),
        (["stage=tokenizer", "data=digits", "image_size=32", "batch_size=5000"], "1120 training images"),
        (["stage=tokenizer", "data=folder", "data.root=gone"], "data.root=gone does not exist"),
    ],
    ids=["no stage", "knn", "a batch that is too large", "a folder that is not there"],
)
def test_what_cannot_be_trained_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        app(["plan", CPU, *arguments], standalone_mode=False)


# --- the test of the loader ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "method", "part"),
    [(Digits, "read", "read"), (OneView, "__call__", "views"), (OneView, "collate", "collate")],
    ids=["read", "views", "collate"],
)
def test_the_slow_part_is_named(
    shown: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, owner: type, method: str, part: str
) -> None:
    monkeypatch.setattr(owner, method, slowed(getattr(owner, method)))
    rows = shown(*DIGITS_TOKENIZER, "--seconds=0.6")
    ms, cpu, share = rows[part].split(" | ")
    each = 1e3 * SLOW / (plans.BATCH if part == "collate" else 1)
    assert each <= float(ms) + 0.005  # rounded
    assert float(cpu) < float(ms) / 2  # waiting is no work
    assert rows["limit"].startswith(f"{part}, {share} of ")
    speed = float(rows["speed"].split(" images/s")[0].replace(",", ""))
    assert speed <= 1e3 / each
    needed, alone = re.findall(r"data.workers=(\d+), of ([\d,]+) images/s each", rows["needed"])[0]
    rate = int(alone.replace(",", ""))  # rounded
    assert math.ceil(1000 / (rate + 0.5)) <= int(needed) <= math.ceil(1000 / (rate - 0.5))


def test_slow_decoding_is_named_and_workers_add_up(
    shown: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    for number in range(64):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(place / f"{number}.png")
    from beit_pretrain.data import dataset

    monkeypatch.setattr(plans, "decode", slowed(plans.decode))
    monkeypatch.setattr(dataset, "decode", slowed(dataset.decode))
    rows = shown(
        "stage=tokenizer",
        "tokenizer.image_size=32",
        "data=folder",
        f"data.root={place}",
        "data.val_share=0",
        "data.workers=2",
        "batch_size=4",
        "--rate=3000",
        "--seconds=0.9",
    )
    assert rows["limit"].startswith("decode, ")
    speed = float(rows["speed"].split(" images/s")[0])
    assert 1 / SLOW < speed < 2.2 / SLOW  # more than one worker could, no more than two can
    assert "data.workers=2" in rows["speed"]
    assert rows["needed"].endswith("for a device of 3,000 images/s")


def test_needed_workers_come_from_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "usable_cores", lambda: 4)
    data = build_data(compose(DIGITS_TOKENIZER))
    parts = {"read": Cost(2.0, 0.1), "decode": Cost(6.0, 6.0), "views": Cost(2.0, 2.0)}

    def said(workers: int, rate: float | None, speed: float) -> Rows:
        data.workers = workers
        return dict(findings(data, parts, Speed(speed, 0.5), rate))

    assert said(0, None, 90.0)["needed"].startswith("data.workers=10, of 100 images/s each")  # 1000 / 10 ms
    assert said(4, 1700.0, 800.0)["needed"].startswith("data.workers=9, of 200 images/s each")
    more = said(16, 1000.0, 800.0)  # sixteen on four cores give what four would
    assert more["needed"].startswith(f"data.workers={math.ceil(1000 / 200)}, of 200 images/s each")
    assert more["cores"] == "16 workers share the 4 here"
    assert more["limit"].startswith("decode, 60% of 10.00 ms an image")


def test_unreadable_images_do_not_count(place: Path) -> None:
    for number in range(8):
        Image.new("RGB", (40, 40)).save(place / f"{number}.png")
        (place / f"{number}-bad.png").write_bytes(b"no picture")
    arguments = ["stage=tokenizer", "data=folder", f"data.root={place}", "data.val_share=0", "batch_size=8"]
    data = build_data(compose(arguments))
    data.views = OneView(image_size=(32, 32))
    whole = plans.measure_parts(data, 0.2)
    assert whole["views"].wall > 0
    for number in range(8):
        (place / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the images looked at .* look at data\.root"):
        plans.measure_parts(data, 0.1)
    assert not (place / "runs").exists()


def test_the_plan_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    data = build_data(compose(DIGITS_TOKENIZER))
    data.views = OneView(image_size=(32, 32))
    plans.measure_parts(data, 0.05)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("stage", ["pretrain", "classify", "probe", "segment"])
def test_each_stage_that_trains_has_a_plan(
    shown: Callable[..., Rows], tokenizer: Path, place: Path, stage: str
) -> None:
    arguments = {
        "pretrain": lambda: pretrain(tokenizer),
        "classify": lambda: ["stage=classify", "experiment=digits_finetune"],
        "probe": lambda: [
            "stage=probe",
            "experiment=digits_probe",
            f"init_from={save_pretrained(place / 'pre', tokenizer)}",
        ],
        "segment": lambda: ["stage=segment", "experiment=shapes_segment"],
    }[stage]()
    rows = shown(*arguments, "--seconds=0.3", "data.workers=0")
    assert {"read", "views", "collate", "limit", "needed"} <= rows.keys()
    assert ("label map" in rows) == (stage == "segment")
    shares = [int(row.split(" | ")[2].rstrip("%")) for row in rows.values() if row.count(" | ") == 2]
    assert sum(s for s in shares) == pytest.approx(100, abs=3)


def test_an_error_is_one_line() -> None:
    with pytest.raises(BeitError) as caught:
        app(["plan", CPU, "stage=pretrain", "data=folder"], standalone_mode=False)
    assert "data.root is not given" in str(caught.value)
