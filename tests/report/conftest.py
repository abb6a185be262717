"""A run folder as a run leaves it, with invented curves and painted digits."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from beit_pretrain.label_maps import panels

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(name, stage, ...)` writes a run folder below the test's own and returns it."""

    def make(name: str = "pretrain-digits-micro", **options: Any) -> Path:
        return fake_run(tmp_path / "runs" / options.pop("folder", name), name=name, **options)

    return make


@pytest.fixture
def words() -> Callable[[Path], str]:
    """What a reader sees of a page, in one line."""

    def read(page: Path) -> str:
        body = page.read_text().partition("<body>")[2]
        return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())

    return read


def fake_run(
    folder: Path,
    *,
    name: str,
    stage: str = "pretrain",
    steps: int = 1000,
    every: int = 5,
    sheets: int = 6,
    side: int = 32,
    results: Mapping[str, Any] | None = None,
) -> Path:
    """Writes all files of a finished run; `results` replaces keys of `results.json`."""
    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    (folder / "config.yaml").write_text(
        f"name: {json.dumps(name)}\nstage:\n  name: {stage}\nbatch_size: 64\nimage_size: 32\nseed: 0\n"
        "model:\n  depth: 4\n  width: 96\n  heads: 3\ntokenizer:\n  checkpoint: runs/quickstart/tokenizer\n"
    )
    curves = {"pretrain": _pretrain, "tokenizer": _tokenizer, "classify": _classify, "probe": _probe}
    curves["segment"] = _segment
    _write_csv(folder / "metrics.csv", curves[stage](rng, steps, every) if stage in curves else [])
    _write_csv(folder / "timing.csv", _timing(rng, steps, every))
    for step in np.linspace(0, steps, sheets).astype(int) if stage in ("tokenizer", "pretrain") else ():
        _sheet(rng, step / steps, stage, side).save(folder / "pictures" / f"step-{step:08d}.png")
    if stage == "segment":
        (folder / "pictures" / "worst").mkdir()
        for number in range(3):
            _worst(rng, number).save(folder / "pictures" / "worst" / f"{number}.png")
    if stage == "pretrain":
        _masks(rng).save(folder / "pictures" / "masks.png")
    (folder / "results.json").write_text(json.dumps({**_results(name, stage, steps), **(results or {})}))
    return folder


def _pretrain(rng: np.random.Generator, steps: int, every: int) -> list[dict[str, float]]:
    found = []
    for step in range(every, steps + 1, every):
        done = step / steps
        loss = 2.6 + 2.9 * np.exp(-8 * done) - 0.2 * done
        ramp = min(done / 0.05, 1.0)
        lr = 2e-3 * ramp * (0.5 + 0.5 * np.cos(np.pi * max(done - 0.05, 0) / 0.95))
        row = {"step": step, "epoch": 40 * done, "train/loss": loss + rng.normal(0, 0.06)}
        row["train/accuracy"] = max(0.0, 0.38 - 0.34 * np.exp(-6 * done) + rng.normal(0, 0.015))
        row |= {"train/baseline_loss": 4.02 - 0.3 * np.exp(-30 * done), "train/baseline_accuracy": 0.16}
        row |= {"train/perplexity": 120 + rng.normal(0, 3), "train/lr": lr, "train/lr_min": lr}
        row |= {"train/weight_decay": 0.05, "train/grad_norm": float(np.exp(rng.normal(-0.3, 0.25)))}
        found.append(row)
        if step % (steps // 20) < every:
            found.append(
                {"step": step, "val/loss": loss + 0.05, "val/accuracy": 0.37 - 0.34 * np.exp(-6 * done)}
            )
            knn = {
                f"knn/block_{block}": 0.93 - 0.06 * abs(block - 2) - 0.3 * np.exp(-5 * done)
                for block in range(4)
            }
            found.append({"step": step, **knn})
    return found


def _tokenizer(rng: np.random.Generator, steps: int, every: int) -> list[dict[str, float]]:
    found = []
    for step in range(every, steps + 1, every):
        done = step / steps
        row = {"step": step, "train/loss": 0.02 + 0.2 * np.exp(-9 * done) + rng.normal(0, 0.002)}
        row |= {
            "train/recon": row["train/loss"] - 0.005,
            "train/kl": 1.2 * done,
            "train/lr": 1e-3 * (1 - done),
        }
        row |= {"train/temperature": 0.9 - 0.8 * done, "train/codebook_use": 1 - np.exp(-4 * done) * 0.8}
        found.append(row | {"train/perplexity": 40 + 90 * done, "train/grad_norm": 0.3 + rng.random() * 0.1})
    return found


def _classify(rng: np.random.Generator, steps: int, every: int) -> list[dict[str, float]]:
    found = []
    for step in range(every, steps + 1, every):
        done = step / steps
        loss, right = 0.4 + 1.9 * np.exp(-6 * done), 0.9 - 0.75 * np.exp(-5 * done)
        row = {"step": step, "train/loss": loss + 0.3 + rng.normal(0, 0.08), "train/accuracy": right - 0.05}
        found.append(row | {"train/lr": 4e-3 * (1 - done), "train/lr_min": 1e-4 * (1 - done)})
        if step % (steps // 10) < every:
            found.append({"step": step, "val/loss": loss, "val/top1": right, "val/top5": 1 - (1 - right) / 5})
            found[-1] |= {"val_ema/loss": loss - 0.02, "val_ema/top1": right + 0.01}
    return found


def _probe(rng: np.random.Generator, steps: int, every: int) -> list[dict[str, float]]:
    found = []
    for step in range(every, steps + 1, every):
        done = step / steps
        found.append({"step": step, "train/loss": 0.5 + 1.8 * np.exp(-4 * done) + rng.normal(0, 0.03)})
        if step % (steps // 10) < every:
            blocks = {f"val/block_{b}": 0.9 - 0.05 * abs(b - 2) - 0.6 * np.exp(-5 * done) for b in range(4)}
            found.append({"step": step, "val/best": max(blocks.values()), **blocks})
    return found


def _segment(rng: np.random.Generator, steps: int, every: int) -> list[dict[str, float]]:
    found = []
    for step in range(every, steps + 1, every):
        done = step / steps
        main, second = 0.4 + 1.9 * np.exp(-6 * done), 0.6 + 1.6 * np.exp(-5 * done)
        row = {
            "step": step,
            "train/loss": main + 0.4 * second,
            "train/decode": main,
            "train/auxiliary": second,
        }
        row |= {key: value + rng.normal(0, 0.05) for key, value in row.items() if key != "step"}
        row |= {"train/accuracy": 0.85 - 0.6 * np.exp(-5 * done), "train/lr": 1e-3 * (1 - done)}
        found.append(row | {"train/lr_min": 1e-5 * (1 - done), "train/grad_norm": 1 + rng.random()})
        if step % (steps // 10) < every:
            miou = 0.512 - 0.45 * np.exp(-5 * done)
            found.append({"step": step, "val/miou": miou, "val/macc": miou + 0.1, "val/aacc": miou + 0.3})
    return found


def _timing(rng: np.random.Generator, steps: int, every: int) -> list[dict[str, float]]:
    at = range(every, steps + 1, every)
    share = rng.uniform(0.01, 0.04, len(at))
    speed = rng.normal(1450, 60, len(at))
    return [
        {"step": step, "images_per_second": a, "data_wait_share": b, "seconds": step / 20}
        for step, a, b in zip(at, speed, share, strict=True)
    ]


def _results(name: str, stage: str, steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name,
        "stage": stage,
        "status": "finished",
        "command": f"beit-train stage={stage}",
    }
    found |= {
        "seconds": 132.4,
        "environment": {"python": "3.11.9", "torch": "2.11.0", "git_commit": "0f3c2a1"},
    }
    if stage == "knn":
        return found | {"knn": _knn_section()}
    if stage == "probe":
        return found | {"probe": _probe_section(), "knn": _knn_section(), "steps": steps}
    if stage == "classify":
        return found | _classify_results(steps)
    if stage == "segment":
        return found | _segment_results(steps)
    found |= {"steps": steps, "epochs": 40, "parameters": 512_384}
    if stage == "pretrain":
        found["metrics"] = {
            "val/loss": 2.451,
            "val/accuracy": 0.369,
            "val/loss_se": 0.0313,
            "val/accuracy_se": 0.00984,
        }
        baseline = {
            "loss_position": 4.02,
            "accuracy_position": 0.16,
            "loss_global": 4.78,
            "accuracy_global": 0.071,
        }
        found["baseline"] = {**baseline, "loss_z": 50.6, "accuracy_z": 21.2}
        found["recipe_diff"] = [
            ["model", "base", "micro"],
            ["batch_size", 2048, 64],
            ["model.drop_path", 0.1, 0.0],
        ]
    return found


def _knn_section() -> dict[str, Any]:
    blocks = [
        {"block": b, "val": 0.92 - 0.05 * abs(b - 2), "test": 0.91 - 0.05 * abs(b - 2)} for b in range(4)
    ]
    remark = "Raw pixels do well here because the digits are tiny, centred and clean."
    knn = {"blocks": blocks, "best_block": 2, "accuracy": 0.91, "untrained": 0.62, "pixels": 0.97}
    return {**knn, "remark": remark}


def _probe_section() -> dict[str, Any]:
    poolings = {"cls": 0.02, "mean": 0.05, "both": 0.06}
    rows = [
        {
            "block": b,
            "pooling": p,
            "lr": 3e-3,
            "val": v - 0.04 * abs(b - 2),
            "test": v - 0.01 - 0.05 * abs(b - 2),
        }
        for b in range(4)
        for p, v in {name: 0.87 + more for name, more in poolings.items()}.items()
    ]
    best = max(rows, key=lambda row: row["val"])
    pixels = {"block": -1, "pooling": "pixels", "lr": 0.01, "val": 0.9, "test": 0.89}
    attentive = [{"block": b, "lr": 1e-3, "val": 0.9 + 0.01 * b, "test": 0.895 + 0.01 * b} for b in (2, 3)]
    found = {"rows": rows, "best": best, "accuracy": best["test"], "attentive": attentive, "pixels": pixels}
    return {**found, "images": 397}


def _classify_results(steps: int) -> dict[str, Any]:
    """397 test digits of ten classes, 351 of them right; the most frequent class has 41."""
    confusion = np.diag([39, 38, 35, 40, 28, 35, 39, 36, 30, 31])
    wrong = {
        (4, 9): 12,
        (9, 4): 7,
        (8, 1): 6,
        (5, 6): 4,
        (7, 9): 3,
        (2, 8): 3,
        (1, 8): 2,
        (8, 3): 2,
        (9, 3): 2,
    }
    wrong |= {(2, 3): 1, (3, 5): 1, (5, 9): 1, (0, 6): 1, (6, 0): 1}
    for (true, taken), count in wrong.items():
        confusion[true, taken] = count
    support, correct = confusion.sum(1), confusion.diagonal()
    top1, images = float(correct.sum() / support.sum()), int(support.sum())
    metrics = {"val/loss": 0.41, "val/top1": 0.89, "val/top5": 0.985, "val/images": 120}
    metrics |= {"val_ema/loss": 0.4, "val_ema/top1": 0.9, "test/loss": 0.44, "test/top1": top1}
    metrics |= {"test/top5": 0.982, "test/images": images, "test_ema/top1": 0.88}
    classification = {
        "split": "test",
        "weights": "raw",
        "classes": [str(digit) for digit in range(10)],
        "support": support.tolist(),
        "correct": correct.tolist(),
        "confusion": confusion.tolist(),
        "chance": support.max() / images,
    }
    lines = [
        "loaded: 48 keys",
        "copied into each block: rel_pos_bias",
        "left as initialised: head.head.weight",
    ]
    start = {"path": "runs/quickstart/pretrain", "report": lines}
    sizes = {"train_images": 200, "steps": steps, "epochs": 40, "parameters": 512_384}
    return {"metrics": metrics, "classification": classification, "init_from": start, **sizes}


SCENE = ["sky", "ground", "disc", "net", "pole", "ring"]


def _segment_results(steps: int) -> dict[str, Any]:
    """Six classes on 200 held-out images; the net is neither labelled nor predicted, the ring predicted only."""
    section: dict[str, Any] = {
        "split": "val",
        "classes": SCENE,
        "iou": [0.91, 0.88, 0.402, None, 0.114, 0.0],
        "accuracy": [0.95, 0.93, 0.61, None, 0.2, None],
        "pixels": [60_000, 30_000, 9_950, 0, 50, 0],
        "mistakes": [[2, 0, 3000], [0, 1, 1500], [2, 5, 880], [4, 0, 40]],
        "ignored": 0.048,
        "how": "sliding windows of 64 x 64, stride 42 x 42; one scale",
        "worst": [
            {
                "name": f"val/{n}.png",
                "miou": 0.1 + n / 10,
                "accuracy": 0.4,
                "picture": f"pictures/worst/{n}.png",
            }
            for n in range(3)
        ],
    }
    section["look"] = {"label_maps": 160, "share": [0.6, 0.3, 0.09, 0.00995, 0.00005, 0.0], "ignored": 0.051}
    section["look"]["remarks"] = ["1 class never occurs: ring"]
    metrics = {"val/miou": 0.4612, "val/macc": 0.6725, "val/aacc": 0.9401, "val/images": 200}
    start = {"path": "runs/shapes/pretrain", "report": ["loaded: 48 keys"]}
    sizes = {"train_images": 1600, "steps": steps, "epochs": 40, "parameters": 512_384}
    return {"metrics": metrics, "segmentation": section, "init_from": start, **sizes}


def _worst(rng: np.random.Generator, number: int) -> Image.Image:
    """A scene of 64 x 80 whose prediction is a little to the right of the truth."""
    y, x = np.mgrid[:64, :80]
    truth = (y > 40).astype(np.uint8)
    truth[(y - 30) ** 2 + (x - 20 - 9 * number) ** 2 < 150] = 2
    truth[:, 70:72] = 4
    truth[60:] = 255
    image = np.array([[90, 140, 220], [90, 110, 60], [200, 60, 40], [0, 0, 0], [250, 240, 90]])[truth % 5]
    noisy = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    predicted = np.roll(np.where(truth == 255, 1, truth).astype(np.uint8), 5, axis=1)
    return panels(noisy, truth, predicted, SCENE, f"{number}.png: mIoU {10 + 10 * number}.0%")


def _write_csv(path: Path, found: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in found for name in row))
    if not names:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def _sheet(rng: np.random.Generator, done: float, stage: str, side: int) -> Image.Image:
    """Columns of one row for each digit; what is decoded is noisier the earlier it is."""
    titles = ["original", "masked", "decoded true ids", "decoded predicted ids"]
    if stage == "tokenizer":
        titles = ["original", "reconstruction"]
    cell, gap = max(96, side), 8
    sheet = Image.new("RGB", (len(titles) * (cell + gap) + gap, 5 * (cell + gap) + 28), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((gap + column * (cell + gap), 8), title, fill="black")
        for row in range(5):
            noise = 12 if column == 0 else 25 if column < 3 else 40 + 150 * (1 - done)
            small = Image.new("L", (32, 32), 20)
            ImageDraw.Draw(small).text((9, 1), str(row + 2), fill=230, font_size=26)
            pixels = np.asarray(small, dtype=float) + rng.normal(0, noise / 3, (32, 32))
            if column == 1 and stage == "pretrain":
                hidden = rng.random((8, 8)) < 0.4
                pixels = np.where(np.kron(hidden, np.ones((4, 4))) > 0, 128, pixels)
            tile = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize((cell, cell), 0)
            sheet.paste(tile, (gap + column * (cell + gap), 28 + row * (cell + gap)))
    return sheet


def _masks(rng: np.random.Generator) -> Image.Image:
    cells = np.full((4 * 72, 8 * 72), 255, dtype=np.uint8)
    for row in range(4):
        for column in range(8):
            mask = np.kron(rng.random((8, 8)) < 0.4, np.ones((8, 8)))
            cells[row * 72 + 4 : row * 72 + 68, column * 72 + 4 : column * 72 + 68] = np.where(
                mask > 0, 60, 215
            )
    return Image.fromarray(cells)
