"""Features computed once train as features computed anew, and the data module stays what it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from stages.probing import KNOWN_WARNINGS, Slopes, data_of, fit, probe, weights
from torch import Tensor

from beit_pretrain.errors import ConfigError
from beit_pretrain.stages.feature_cache import choose_place

pytestmark = pytest.mark.filterwarnings(*KNOWN_WARNINGS)


def test_features_from_memory_from_disk_and_made_anew_train_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, seen = {}, {}
    for cache in ("memory", "disk", "none"):
        stage = probe(tmp_path / cache, cache=cache)
        fit(stage, data_of(stage, Slopes(bad=(3, 31))))
        found[cache], seen[cache] = weights(stage), stage.encoder.seen  # pyright: ignore
        assert [p.name for p in (tmp_path / cache).glob("*")] == []
    assert seen["memory"] == seen["disk"] == 45  # each image of train and val once
    assert seen["none"] == 30 + 4 * (24 + 15)
    for name, value in found["memory"].items():
        torch.testing.assert_close(found["disk"][name], value, rtol=0, atol=0)
        torch.testing.assert_close(found["none"][name], value, rtol=1e-4, atol=1e-5)
    size = f"{45 * (4 * 12 + 288) * 4e-9:.3g} GB"
    lines = [line for line in capsys.readouterr().out.splitlines() if "Features" in line]
    assert lines == [
        f"Features of 45 images ({size}): computed once, kept in memory.",
        f"Features of 45 images ({size}): computed once, kept in {tmp_path}/disk/features.f32.",
    ]


def test_the_data_module_gives_images_meanwhile_and_afterwards(tmp_path: Path) -> None:
    stage = probe(tmp_path)
    data = data_of(stage)

    class Look(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            loader = data.labelled("train", image_size=(12, 8), limit=None)
            assert loader is not None and next(iter(loader)).image.dtype == torch.uint8

    batches: list[Tensor] = []
    stage.on_train_batch_start = lambda batch, index: batches.append(batch.image)  # type: ignore[method-assign]
    fit(stage, data, callbacks=[Look()])
    assert {batch.dtype for batch in batches} == {torch.float32}
    assert next(iter(data.train_dataloader())).image.dtype == torch.uint8
    assert next(iter(data.val_dataloader())).image.shape == (8, 3, 12, 8)


def test_with_augmentation_every_epoch_has_crops_of_its_own(tmp_path: Path) -> None:
    stage = probe(tmp_path, augment=True, epochs=2)
    images: dict[int, list[Tensor]] = {}

    def look(batch: Any, index: int) -> None:
        for sample, image in zip(batch.sample.tolist(), batch.image, strict=True):
            images.setdefault(sample, []).append(image)

    stage.on_train_batch_start = look  # type: ignore[method-assign]
    fit(stage, data_of(stage))
    twice = [pair for pair in images.values() if len(pair) == 2]
    assert twice and all(not torch.equal(*pair) for pair in twice)
    assert stage.encoder.seen == 30 + 2 * (24 + 15)  # pyright: ignore


@pytest.mark.parametrize(
    ("asked", "memory", "disk", "place"),
    [
        ("auto", 2.0, 0.0, "memory"),
        ("auto", 1.0, 2.0, "disk"),
        ("auto", 1.0, 1.0, "none"),
        ("memory", 1.5, 0.0, "memory"),
        ("disk", 9.0, 1.5, "disk"),
    ],
)
def test_features_go_where_there_is_room(asked: str, memory: float, disk: float, place: str) -> None:
    assert choose_place(asked, 1.5, memory=memory, disk=disk) == place


def test_without_room_features_are_made_anew_which_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    stage = probe(tmp_path, cache_gb=0.0)
    fit(stage, data_of(stage))
    assert "(6.05e-05 GB): computed anew in every epoch." in capsys.readouterr().out
    assert stage.encoder.seen == 30 + 4 * (24 + 15)  # pyright: ignore


def test_a_trial_of_two_steps_computes_no_more_than_it_uses(tmp_path: Path) -> None:
    stage = probe(tmp_path, epochs=1)
    data = data_of(stage)
    data.limit_steps = 2
    fit(stage, data, limit_val_batches=1)
    assert stage.encoder.seen == 15 + 2 * 8 + 8  # pyright: ignore


def test_a_place_that_is_too_small_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"stage.cache=memory: .* 1.5 GB, more than stage.cache_gb=1: raise"
    ):
        choose_place("memory", 1.5, memory=1.0, disk=9.0)
    with pytest.raises(
        ConfigError, match=r"stage.cache=disk: .* 1.5 GB, more than 1.2 GB .* set stage.cache=none"
    ):
        choose_place("disk", 1.5, memory=9.0, disk=1.2)
