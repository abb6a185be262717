"""What only a CUDA device can show; run with `pytest -m gpu`."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import SMALL_FINETUNE
from omegaconf import DictConfig
from running import SMALL_PRETRAIN, train
from segmentation import SMALL_SEGMENT, draw_scenes

from beit_pretrain.build import add_token_cache, build_data, build_stage
from beit_pretrain.checkpoint import files
from beit_pretrain.compose import compose
from beit_pretrain.data.jitter import draw_jitter, jitter_batch, mean_grey, row
from beit_pretrain.data.shapes import CLASSES, draw_scene
from beit_pretrain.models.blocks import attend
from beit_pretrain.tools.tokens import build

pytestmark = pytest.mark.gpu


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_the_cuda_kernel_and_its_bias_gradient_agree_with_float64() -> None:
    torch.manual_seed(0)
    wide = [torch.randn(2, 3, 197, 64, dtype=torch.float64, device="cuda") for _ in range(3)]
    bias = torch.randn(3, 197, 200, dtype=torch.float64, device="cuda", requires_grad=True)
    exact = attend(*wide, bias[..., :197], "plain")
    (exact_gradient,) = torch.autograd.grad(exact.sin().sum(), bias)
    narrow = bias.detach().float().requires_grad_()
    out = attend(*(w.float() for w in wide), narrow[..., :197], "sdpa")
    (gradient,) = torch.autograd.grad(out.sin().sum(), narrow)
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_a_gpu_follows_the_cpu(precision: str, tokenizer_run: Path, tmp_path: Path) -> None:
    same = [o for o in SMALL_PRETRAIN if not o.startswith("trainer.accelerator")]
    same += [f"tokenizer.checkpoint={tokenizer_run}", "stage.log_every=1", "model.drop_path=0.0"]
    train([*same, "name=cpu", "trainer.accelerator=cpu"], tmp_path)
    train([*same, "name=gpu", "trainer.accelerator=gpu", f"trainer.precision={precision}"], tmp_path)
    expected, found = losses(tmp_path / "runs" / "cpu"), losses(tmp_path / "runs" / "gpu")
    assert found == pytest.approx(expected, rel=1e-3 if precision == "32" else 0.03)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_fine_tuning_on_a_gpu_follows_the_cpu(precision: str, tmp_path: Path) -> None:
    same = [o for o in SMALL_FINETUNE if not o.startswith("trainer.accelerator")]
    same += [
        "stage.log_every=1",
        "model.drop_path=0.0",
        "stage.ema=0.9",
        "stage.mixup=0.8",
        "stage.cutmix=1.0",
    ]
    train([*same, "name=cpu", "trainer.accelerator=cpu"], tmp_path)
    train([*same, "name=gpu", "trainer.accelerator=gpu", f"trainer.precision={precision}"], tmp_path)
    expected, found = losses(tmp_path / "runs" / "cpu"), losses(tmp_path / "runs" / "gpu")
    assert found == pytest.approx(expected, rel=1e-3 if precision == "32" else 0.03)


def test_a_segmentation_learns_on_a_gpu_and_predicts_there_what_it_does_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_scenes(tmp_path / "scenes")
    same = [o for o in SMALL_SEGMENT if not o.startswith("trainer.accelerator")]
    same += ["model=micro", "model.drop_path=0.0", "stage.log_every=1"]
    train([*same, "name=cpu", "trainer.accelerator=cpu"], tmp_path)
    train([*same, "name=gpu", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed"], tmp_path)
    expected, found = losses(tmp_path / "runs" / "cpu"), losses(tmp_path / "runs" / "gpu")
    assert found == pytest.approx(expected, rel=0.1)  # whole channels are dropped, other ones on each device
    saved = files.read(tmp_path / "runs" / "gpu" / "checkpoints" / "last.ckpt")
    stage: Any = build_stage(DictConfig(saved["beit_pretrain"]["config"]), CLASSES)
    stage.load_state_dict(saved["state_dict"])
    stage.eval()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    image = torch.from_numpy(draw_scene("validation", 3)[0]).permute(2, 0, 1)
    here = stage.predict(image)
    there = stage.cuda().predict(image.cuda())
    assert there.is_cuda and there.shape == image.shape[1:]
    assert (here == there.cpu()).float().mean() > 0.99


def test_jitter_on_a_gpu_is_that_of_the_cpu() -> None:
    whole = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    crops = torch.stack([whole[:, i : i + 40, i : i + 50] for i in range(32)])
    draws = [draw_jitter(random.Random(seed), 0.4) for seed in range(32)]
    rows = torch.stack([row(draw, mean_grey(whole, draw)) for draw in draws])
    assert torch.equal(jitter_batch(crops.cuda(), rows.cuda()).cpu(), jitter_batch(crops, rows))


def test_ids_that_a_gpu_has_stored_are_those_it_gives(tokenizer_run: Path, tmp_path: Path) -> None:
    asked = [o for o in SMALL_PRETRAIN if not o.startswith("trainer.accelerator")]
    asked += [f"tokenizer.checkpoint={tokenizer_run}", "trainer.accelerator=gpu", f"runs={tmp_path}/runs"]
    asked += [f"tokenizer.cache={tmp_path}/ids", "tokenizer.views=1"]
    build(asked)
    cfg = compose(["stage=pretrain", *asked])
    stage: Any = build_stage(cfg).cuda().eval()
    data = build_data(cfg)
    data.views = stage.views
    online = [
        stage.tokens(stage.transfer_batch_to_device(b, stage.device, 0)) for b in data.train_dataloader()
    ]
    add_token_cache(cfg, stage, data)
    stored = [batch.ids for batch in data.train_dataloader()]
    assert all(torch.equal(a.cpu(), b.long()) for a, b in zip(online, stored, strict=True))
