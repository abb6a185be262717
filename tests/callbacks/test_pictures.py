"""Pictures: what is on a sheet, when it is drawn, and who gets it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from callbacks.toy import KNOWN_WARNINGS, Batch, Data, Images, Toy, collate, fit
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from beit_pretrain.callbacks.pictures import CELL, GAP, MARGIN, Pictures, draw_sheet
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


def cell(sheet: Image.Image, column: int, row: int, rows: int, size: tuple[int, int]) -> np.ndarray:
    """The pixels of one picture, counted from the sheet's lower left corner."""
    left = MARGIN + column * (size[0] + GAP)
    top = sheet.height - MARGIN - (rows - row) * (size[1] + GAP) + GAP
    return np.asarray(sheet)[top : top + size[1], left : left + size[0]]


@pytest.mark.parametrize(("height", "width", "factor"), [(8, 6, 16), (32, 32, 3), (24, 40, 2), (11, 131, 1)])
def test_small_images_are_magnified_in_whole_pixels(height: int, width: int, factor: int) -> None:
    columns = {"original": torch.rand(3, 3, height, width), "masked": torch.rand(3, 3, height, width)}
    sheet = draw_sheet(columns, "step 7")
    size = (width * factor, height * factor)
    assert abs(size[0] - CELL) <= width / 2 or factor == 1
    for column, images in enumerate(columns.values()):
        for row, image in enumerate(images):
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            magnified = np.kron(pixels, np.ones((factor, factor, 1), dtype=np.uint8))
            assert np.array_equal(cell(sheet, column, row, 3, size), magnified)


def test_columns_of_another_size_are_brought_to_the_first_ones() -> None:
    coarse = torch.rand(2, 3, 16, 16)
    sheet = draw_sheet({"original": torch.rand(2, 3, 32, 32), "true tokens": coarse}, "")
    pixels = (coarse[1] * 255).round().byte().permute(1, 2, 0).numpy()
    magnified = np.kron(pixels, np.ones((6, 6, 1), dtype=np.uint8))
    assert np.array_equal(cell(sheet, 1, 1, 2, (96, 96)), magnified)


def test_values_outside_the_range_are_cut_off_not_wrapped() -> None:
    sheet = draw_sheet({"x": torch.tensor([-0.5, 1.7]).view(2, 1, 1, 1).expand(2, 3, 96, 96)}, "")
    assert (cell(sheet, 0, 0, 2, (96, 96)) == 0).all() and (cell(sheet, 0, 1, 2, (96, 96)) == 255).all()


def test_titles_stay_above_their_columns() -> None:
    columns = {name: torch.ones(1, 3, 96, 96) for name in ("original", "a title of several words", "b")}
    pixels = np.asarray(draw_sheet(columns, "step 1")).min(-1)
    head = pixels[: -(MARGIN + 96)]
    for column in range(3):
        left = MARGIN + column * (96 + GAP)
        assert (head[:, left : left + 96] < 160).any()
    assert (head[MARGIN + 24 :, MARGIN + 96 : MARGIN + 96 + GAP] == 255).all()  # between columns: paper


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
