"""Pre-training: what is left to the device, and what a run must not go on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from runs import pretrain, save_tokenizer
from torch import Tensor

from beit_pretrain.build import build_stage
from beit_pretrain.compose import compose
from beit_pretrain.data.transforms import Item
from beit_pretrain.devices import defers_jitter
from beit_pretrain.errors import CheckpointError
from beit_pretrain.stages.pretrain import Pretrain


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("runs") / "tok")


def _cfg(tokenizer: Path, *more: str) -> DictConfig:
    return compose([*pretrain(tokenizer), "stage.views.jitter=0.4", *more])


def _stage(tokenizer: Path, *more: str) -> Pretrain:
    stage = build_stage(_cfg(tokenizer, *more))
    assert isinstance(stage, Pretrain)
    return stage


def _batch(stage: Pretrain) -> Any:
    noise = torch.randint(0, 256, (4, 3, 60, 50), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return stage.views.collate([Item(stage.views(image, key), key, 0, -1) for key, image in enumerate(noise)])


def test_encoder_and_tokenizer_see_the_same_jitter(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _stage(tokenizer, "stage.views.defer_jitter=true")
    batch = _batch(stage)
    coloured = [stage.views.coloured(part, batch.jitter) for part in (batch.image, batch.token_image)]
    assert batch.jitter is not None and not torch.equal(coloured[0], batch.image)
    applied = batch._replace(image=coloured[0], token_image=coloured[1], jitter=None)
    seen: list[Tensor] = []
    encode = stage.tokenizer.encode
    monkeypatch.setattr(stage.tokenizer, "encode", lambda image: seen.append(image) or encode(image))
    torch.manual_seed(0)
    deferred = stage.compute(batch, 0)
    torch.manual_seed(0)
    expected = stage.compute(applied, 0)
    assert torch.equal(deferred.loss, expected.loss)
    assert torch.equal(seen[0], coloured[1].float() / 255) and torch.equal(seen[0], seen[1])
    stage.eval()
    rows, whole = stage.picture_rows(batch), stage.picture_rows(applied)
    assert rows is not None and whole is not None
    assert all(torch.equal(rows[name], whole[name]) for name in rows)


def test_jitter_is_left_to_a_gpu_unless_asked_otherwise(tokenizer: Path) -> None:
    for more, expected in (
        (["trainer.accelerator=cpu"], False),
        (["trainer.accelerator=cuda"], True),
        (["trainer.accelerator=cuda", "stage.views.defer_jitter=false"], False),
        (["trainer.accelerator=cpu", "stage.views.defer_jitter=true"], True),
    ):
        cfg = _cfg(tokenizer, *more)
        assert defers_jitter(cfg) is expected
    stage = _stage(tokenizer, "trainer.accelerator=cpu")
    assert stage.views.defer_jitter is False and _batch(stage).jitter is None


def test_a_run_does_not_go_on_with_another_lanczos(tokenizer: Path) -> None:
    def record(lanczos: str | None, version: str) -> dict[str, Any]:
        made = {"resize": f"torchvision {version}", **({"lanczos": lanczos} if lanczos else {})}
        return {"preprocessing": made, "lineage": {"versions": {"torchvision": version}, "parents": {}}}

    stage = _stage(tokenizer)
    stage.record = record("torchvision", "0.29.2")
    message = (
        r"^the tokenizer's pictures were made by Lanczos of pillow \(torchvision 0\.26\.0\), and here it is that of "
        r"torchvision \(torchvision 0\.29\.2\): install the torchvision that the run began with \(0\.26\.0\), or start "
        r"anew with another name=$"
    )
    with pytest.raises(CheckpointError, match=message):
        stage.on_load_checkpoint({"beit_pretrain": record("pillow", "0.26.0")})
    for saved in (record("torchvision", "0.30.0"), record(None, "0.26.0")):
        with pytest.raises(KeyError, match="held_out"):  # the next thing it looks at
            stage.on_load_checkpoint({"beit_pretrain": saved})
