"""Pictures: when a sheet is drawn, of which images, and who gets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from callbacks.toy import KNOWN_WARNINGS, Batch, Data, Images, Toy, collate, fit
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from beit_pretrain.callbacks.pictures import Pictures
from beit_pretrain.callbacks.tensorboard_log import TensorBoardLog

pytestmark = pytest.mark.filterwarnings(*KNOWN_WARNINGS)


class Painter(Toy):
    """Shows what it was given, so that a test sees which images those were."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Batch] = []

    def picture_rows(self, batch: Batch) -> dict[str, Tensor] | None:
        self.shown.append(batch)
        return {"original": batch.image.float() / 255}


class Mute(Toy):
    def picture_rows(self, batch: Batch) -> None:
        return None


def test_the_same_first_held_out_images_each_time(tmp_path: Path) -> None:
    stage = Painter()
    fit(stage, Data(), tmp_path, [Pictures(tmp_path, every_epochs=1, count=7)])
    expected = collate([Images(1000, 20)[i] for i in range(7)])  # more than one batch of validation
    assert len(stage.shown) == 3
    for batch in stage.shown:
        assert torch.equal(batch.image, expected.image) and torch.equal(batch.sample, expected.sample)


def test_sheets_are_drawn_when_due_and_after_the_last_epoch(tmp_path: Path) -> None:
    fit(Painter(), Data(), tmp_path, [Pictures(tmp_path, every_epochs=2, count=2)])
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "step-00000012.png",
        "step-00000018.png",
    ]
    with Image.open(tmp_path / "pictures" / "step-00000018.png") as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")


def test_fewer_images_than_asked_for_are_all_shown(tmp_path: Path) -> None:
    stage = Painter()
    fit(stage, Data(), tmp_path, [Pictures(tmp_path, every_epochs=3, count=99)])
    assert [len(batch.image) for batch in stage.shown] == [20]


def test_a_stage_with_nothing_to_show_is_left_alone(tmp_path: Path) -> None:
    fit(Mute(), Data(), tmp_path, [Pictures(tmp_path, every_epochs=1)])
    assert not (tmp_path / "pictures").exists()


def test_tensorboard_gets_the_sheet_too(tmp_path: Path) -> None:
    logger = TensorBoardLog(tmp_path)
    fit(Painter(), Data(), tmp_path, [Pictures(tmp_path, every_epochs=3, count=2)], logger=logger)
    assert isinstance(logger, TensorBoardLogger)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    (event,) = events.Images("pictures")
    with Image.open(tmp_path / "pictures" / "step-00000018.png") as sheet:
        assert event.step == 18 and (event.width, event.height) == sheet.size
