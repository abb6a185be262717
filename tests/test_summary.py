"""What the terminal says of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from beit_pretrain.summary import show, show_chain

PRETRAIN: dict[str, Any] = {
    "name": "pre",
    "stage": "pretrain",
    "seconds": 132.4,
    "metrics": {
        "val/loss": 2.451,
        "val/accuracy": 0.369,
        "val/loss_se": 0.0313,
        "val/accuracy_se": 0.00984,
        "val/images": 178,
    },
    "baseline": {"loss_position": 4.02, "accuracy_position": 0.16, "loss_z": 50.6},
}
KNN = {"best_block": 2, "accuracy": 0.9125, "untrained": 0.62, "pixels": 0.97}
PROBE: dict[str, Any] = {
    "name": "probe",
    "seconds": 61,
    "metrics": {"probe/accuracy": 0.92},
    "probe": {
        "accuracy": 0.92,
        "best": {"block": 3, "pooling": "both", "lr": 0.003, "val": 0.93, "test": 0.92},
        "pixels": {"lr": 0.1, "val": 0.9, "test": 0.89},
    },
    "knn": KNN,
}
CLASSIFY: dict[str, Any] = {
    "name": "fine",
    "seconds": 61,
    "metrics": {
        "val/loss": 0.41,
        "val/top1": 0.89,
        "val/top5": 0.985,
        "val/images": 120,
        "val_ema/top1": 0.9,
        "test/top1": 0.884,
        "test/images": 397,
    },
    "classification": {"classes": list("0123456789"), "chance": 0.103},
    "init_from": {"path": "runs/[pre]", "report": ["loaded: 1 key"]},
    "train_images": 1200,
}

SEGMENT: dict[str, Any] = {
    "name": "seg",
    "seconds": 61,
    "metrics": {"val/miou": 0.512, "val/macc": 0.633, "val/aacc": 0.81, "val/images": 2000, "test/miou": 0.5},
    "segmentation": {
        "classes": ["sky", "net", "pole", "ring", "disc"],
        "iou": [0.91, 0.4, 0.125, 0.0, None],
        "pixels": [900, 40, 7, 0, 0],
        "how": "whole images, short side 64; one scale",
    },
    "init_from": None,
    "train_images": 1600,
}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The rows that `show` prints of some results, cells apart by a bar."""
    monkeypatch.setenv("COLUMNS", "200")

    def printed(results: dict[str, Any]) -> list[str]:
        show(results, OmegaConf.create({"run_dir": "runs/[x]"}))
        return _rows(capsys.readouterr().out)

    return printed


def _rows(out: str) -> list[str]:
    lines = [line for line in out.splitlines() if line.startswith(("│", "report:", "Few."))]
    return ["|".join(cell.strip() for cell in line.strip("│").split("│")) for line in lines]


def test_shares_are_in_percent_and_losses_in_decimals(say) -> None:
    assert say(PRETRAIN) == [
        "held-out loss|2.4510 ± 0.0313",
        "without pictures|4.0200 (50.6 standard errors)",
        "held-out accuracy|36.9 ± 1.0%",
        "without pictures|16.0%",
        "time|2 min 12 s",
        "report: runs/[x]/report.html",
    ]
    tokenizer = {"name": "tok", "metrics": {"val/recon": 0.25, "val/codebook_use": 0.875, "val/kl": None}}
    assert say(tokenizer)[:4] == [
        "held-out recon|0.2500",
        "held-out codebook use|87.5%",
        "held-out kl|-",
        "time|0 min 00 s",
    ]


def test_a_classifier_says_its_parts_its_chance_and_its_start(say) -> None:
    assert say(CLASSIFY)[:-1] == [
        "test top-1|88.4% of 397 images",
        "held-out top-1|89.0% of 120 images",
        "held-out top-5|98.5%",
        "held-out loss|0.4100",
        "held-out top-1, EMA|90.0% of 120 images",
        "classes|10, chance 10.3%",
        "training images|1,200",
        "started|from runs/[pre]",
        "time|1 min 01 s",
    ]
    assert "started|from scratch" in say({**CLASSIFY, "init_from": None})
    assert not any(row.startswith("started") for row in say({"name": "x", "classification": {}}))


def test_a_probe_says_where_its_best_classifier_sits(say) -> None:
    assert say(PROBE)[:-1] == [
        "linear probe, pre-trained (block 3, both, lr 0.003)|92.0%",
        "linear probe, raw pixels|89.0%",
        "kNN accuracy, pre-trained (block 2)|91.2%",
        "kNN accuracy, untrained|62.0%",
        "kNN accuracy, raw pixels|97.0%",
        "time|1 min 01 s",
    ]
    pixels = {"val": 0.9, "test": None}
    shorter = say({**PROBE, "probe": {"accuracy": 0.8, "pixels": pixels}, "knn": None})
    assert shorter[:2] == ["linear probe|80.0%", "linear probe, raw pixels|90.0%"]


def test_scores_say_of_how_many_images_they_are(say) -> None:
    rows = say(
        {
            **PROBE,
            "probe": {**PROBE["probe"], "images": 6},
            "knn": {**KNN, "images": 1234},
            "remarks": ["Few."],
        }
    )
    assert [row.rpartition("|")[2] for row in rows[:5]] == [
        "92.0% of 6 images",
        "89.0% of 6 images",
        "91.2% of 1,234 images",
        "62.0% of 1,234 images",
        "97.0% of 1,234 images",
    ]
    assert rows[-2:] == ["Few.", "report: runs/[x]/report.html"]


def test_top_five_of_five_classes_is_not_shown(say) -> None:
    few = {**CLASSIFY, "classification": {"classes": list("01234"), "chance": 0.2}}
    assert not any("top-5" in row for row in say(few)) and any("top-1" in row for row in say(few))


def test_a_segmentation_says_how_it_was_scored_and_its_worst_classes(say) -> None:
    assert say(SEGMENT)[:-1] == [
        "test mIoU|50.0%",
        "held-out mIoU|51.2% of 2,000 images",
        "held-out mAcc|63.3%",
        "held-out aAcc|81.0%",
        "predicted by|whole images, short side 64; one scale",
        "worst classes, IoU|pole 12.5%, net 40.0%, sky 91.0%",
        "training images|1,600",
        "started|from scratch",
        "time|1 min 01 s",
    ]
    assert "started|from runs/pre" in say({**SEGMENT, "init_from": {"path": "runs/pre"}})
    assert say({"name": "x", "segmentation": {}})[:-1] == ["time|0 min 00 s"]


def test_a_dry_run_says_nothing(say) -> None:
    assert say({}) == []


def test_a_chain_has_one_table_of_all_links(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    links = {
        "pretrain": {**PRETRAIN, "remarks": ["The [tokenizer] has collapsed."]},
        "probe": PROBE,
        "finetune": CLASSIFY,
        "scratch": {**CLASSIFY, "init_from": None},
        "segment": SEGMENT,
    }
    show_chain(links, Path("runs/all/report.html"))
    out = capsys.readouterr().out
    assert "\npretrain: The [tokenizer] has collapsed.\nreport:" in out
    rows = _rows(out)
    assert len(rows) == 5 + 6 + 9 + 9 + 9 + 1
    assert [row.partition("|")[0] for row in rows if row[0] != "|"] == [
        *links,
        "report: runs/all/report.html",
    ]
    assert "finetune|test top-1|88.4% of 397 images" in rows and "|started|from scratch" in rows


def test_names_from_files_do_not_command_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    evil = "a\x1b[2J\x9b\u202e\nb"
    section = {**SEGMENT["segmentation"], "classes": [evil] * 5, "how": evil}
    show_chain({evil: {**SEGMENT, "segmentation": section, "init_from": {"path": evil}}}, Path("report.html"))
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n")) and out.count(r"a\x1b[2J\x9b\u202e\nb") >= 5
