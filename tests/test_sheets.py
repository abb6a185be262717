"""Sheets: every picture in its place, whole, under its caption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from beit_pretrain.sheets import CELL, GAP, LINE, MARGIN, draw_cells, draw_columns, fit_text


def cell(sheet: Image.Image, column: int, row: int, rows: int, size: tuple[int, int]) -> np.ndarray:
    """The pixels of one picture, counted from the sheet's lower left corner."""
    left = MARGIN + column * (size[0] + GAP)
    top = sheet.height - MARGIN - (rows - row) * (size[1] + GAP) + GAP
    return np.asarray(sheet)[top : top + size[1], left : left + size[0]]


@pytest.mark.parametrize(("height", "width", "factor"), [(8, 6, 16), (32, 32, 3), (24, 40, 2), (11, 131, 1)])
def test_small_images_are_magnified_in_whole_pixels(height: int, width: int, factor: int) -> None:
    columns = {"original": torch.rand(3, 3, height, width), "masked": torch.rand(3, 3, height, width)}
    sheet = draw_columns(columns, "step 7")
    size = (width * factor, height * factor)
    assert abs(size[0] - CELL) <= width / 2 or factor == 1
    for column, images in enumerate(columns.values()):
        for row, image in enumerate(images):
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            magnified = np.kron(pixels, np.ones((factor, factor, 1), dtype=np.uint8))
            assert np.array_equal(cell(sheet, column, row, 3, size), magnified)


def test_columns_of_another_size_are_brought_to_the_first_ones() -> None:
    coarse = torch.rand(2, 3, 16, 16)
    sheet = draw_columns({"original": torch.rand(2, 3, 32, 32), "true tokens": coarse}, "")
    pixels = (coarse[1] * 255).round().byte().permute(1, 2, 0).numpy()
    magnified = np.kron(pixels, np.ones((6, 6, 1), dtype=np.uint8))
    assert np.array_equal(cell(sheet, 1, 1, 2, (96, 96)), magnified)


def test_values_outside_the_range_are_cut_off_not_wrapped() -> None:
    sheet = draw_columns({"x": torch.tensor([-0.5, 1.7]).view(2, 1, 1, 1).expand(2, 3, 96, 96)}, "")
    assert (cell(sheet, 0, 0, 2, (96, 96)) == 0).all() and (cell(sheet, 0, 1, 2, (96, 96)) == 255).all()


def test_titles_stay_above_their_columns() -> None:
    columns = {name: torch.ones(1, 3, 96, 96) for name in ("original", "a title of several words", "b")}
    pixels = np.asarray(draw_columns(columns, "step 1")).min(-1)
    head = pixels[: -(MARGIN + 96)]
    for column in range(3):
        left = MARGIN + column * (96 + GAP)
        assert (head[:, left : left + 96] < 160).any()
    assert (head[MARGIN + 24 :, MARGIN + 96 : MARGIN + 96 + GAP] == 255).all()  # between columns: paper


def test_cells_stand_row_by_row_each_under_its_caption_and_the_legend_at_the_foot() -> None:
    pictures = [Image.new("RGB", (50, 30), (30 * number, 0, 0)) for number in range(5)]
    captions = ["a", "b", "several words in more lines", "", "d"]
    legend = Image.new("RGB", (70, 11), (0, 0, 200))
    sheet = draw_cells(list(zip(captions, pictures, strict=True)), "title", columns=3, below=legend)
    pixels = np.asarray(sheet)
    lines = (
        4  # of the longest caption of the first row: 50 pixels hold "several", "words in", "more", "lines"
    )
    tops = [MARGIN + 30 + lines * LINE, MARGIN + 30 + lines * LINE + 30 + 2 * GAP + LINE]
    for number, picture in enumerate(pictures):
        top, left = tops[number // 3], MARGIN + number % 3 * (50 + GAP)
        assert np.array_equal(pixels[top : top + 30, left : left + 50], np.asarray(picture))
        written = (pixels[top - LINE : top, left : left + 50] < 200).any()
        assert written == bool(captions[number])
    foot = tops[1] + 30 + GAP
    assert np.array_equal(pixels[foot : foot + 11, MARGIN : MARGIN + 70], np.asarray(legend))
    assert sheet.size == (2 * MARGIN + 3 * 50 + 2 * GAP, foot + 11 + MARGIN)


def test_a_title_that_is_too_long_keeps_its_end() -> None:
    font = ImageFont.load_default(size=16)
    assert fit_text("short", font, 100) == "short"
    shown = fit_text("a/very/long/path/to/photo.jpg", font, 100)
    assert shown.startswith("\N{HORIZONTAL ELLIPSIS}") and shown.endswith("photo.jpg")
    assert font.getlength(shown) <= 100
