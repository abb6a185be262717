"""Label maps as pictures: every pixel has the colour of its class, every legend says what is there and fits."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw

from beit_pretrain.label_maps import (
    GREYS,
    IGNORED,
    LARGEST,
    PANEL,
    PAPER,
    WRONG,
    label_png,
    overlay,
    paint,
    palette,
    panels,
)

NAMES = [f"kind {index}" for index in range(150)]


class Words(NamedTuple):
    """A piece of text as it was drawn."""

    text: str
    left: float
    right: float
    at: float  # its baseline or middle, from above
    size: float
    sheet: Image.Image


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Words]:
    """All texts that are drawn, in order."""
    found: list[Words] = []
    original = ImageDraw.ImageDraw.text

    def text(self: Any, xy: Any, said: str, fill: Any, font: Any, anchor: str | None = None) -> None:
        right = self.textbbox(xy, said, font, anchor)[2]
        found.append(Words(said, xy[0], right, xy[1], font.size, self._image))
        original(self, xy, said, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


def scene(height: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image and a label map of rectangles, some of them ignored."""
    rng = np.random.default_rng(seed)
    label_map = np.zeros((height, width), np.uint8)
    for label in [*range(classes), IGNORED]:
        top, left = rng.integers(0, height), rng.integers(0, width)
        label_map[top : top + 1 + height // 5, left : left + 1 + width // 7] = label
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), label_map


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of (N, 3) sRGB (D65), to judge the palette by another measure than the one it was made with."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = (
        linear
        @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
        / [0.9505, 1.0, 1.089]
    )
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


# --- colours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "least"), [(10, 25), (50, 12), (150, 7), (255, 5)])
def test_colours_are_told_apart_from_each_other_and_from_grey(classes: int, least: float) -> None:
    found = palette(classes)
    assert found.shape == (classes, 3) and found.dtype == np.uint8
    lab = _lab(np.concatenate([found, GREYS]))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[:classes]
    distance[np.arange(classes), np.arange(classes)] = np.inf
    assert distance.min() > least  # 2.3 can just be noticed


def test_a_class_keeps_its_colour_whatever_the_number_of_classes() -> None:
    np.testing.assert_array_equal(palette(255)[:7], palette(7))
    assert palette(1).tolist() == [[30, 105, 180]]
    assert palette(4).tolist() == [[30, 105, 180], [225, 240, 0], [255, 75, 60], [0, 165, 0]]


@pytest.mark.parametrize("classes", [3, 255])
def test_every_pixel_is_painted_in_its_class(classes: int) -> None:
    label_map = np.random.default_rng(1).integers(0, classes + 1, (13, 21)).astype(np.uint8)
    label_map[label_map == classes] = IGNORED
    painted = paint(label_map, classes)
    for place in np.ndindex(13, 21):
        if label_map[place] == IGNORED:
            assert tuple(painted[place]) in GREYS
        else:
            assert painted[place].tolist() == palette(classes)[label_map[place]].tolist()
    stripes = paint(np.full((12, 12), IGNORED, np.uint8), classes)
    assert {tuple(colour) for colour in stripes.reshape(-1, 3).tolist()} == set(GREYS)


def test_a_label_that_is_no_class_has_no_colour() -> None:
    with pytest.raises(IndexError):
        paint(np.full((2, 2), 5, np.uint8), 3)


@pytest.mark.parametrize("classes", [2, 10, 255])
@pytest.mark.parametrize("shift", [False, True])
def test_the_file_holds_the_numbers_of_the_data_set_and_our_colours(classes: int, shift: bool) -> None:
    label_map = np.arange(15 * 17, dtype=np.int64).reshape(15, 17)
    label_map = np.where(label_map < classes, label_map, IGNORED).astype(np.uint8)
    with Image.open(io.BytesIO(label_png(label_map, classes, shift=shift))) as picture:
        assert picture.mode == "P" and picture.format == "PNG"
        numbers = np.asarray(picture)
        colours = np.asarray(picture.convert("RGB"))
    expected = np.where(label_map == IGNORED, 0 if shift else 255, label_map.astype(int) + shift)
    np.testing.assert_array_equal(numbers, expected)
    classed = label_map != IGNORED
    np.testing.assert_array_equal(colours[classed], palette(classes)[label_map[classed]])
    assert (colours[~classed] == GREYS[0]).all()


# --- over the image -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(301, 507), (507, 301)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_overlay_mixes_image_and_colours_and_draws_lines_between(
    size: tuple[int, int], alpha: float
) -> None:
    image, label_map = scene(*size, classes=6)
    shown = np.asarray(overlay(image, label_map, NAMES[:6], alpha))[: size[0], : size[1]].astype(float)
    mixed = (1 - alpha) * image + alpha * paint(label_map, 6)
    inner = np.ones(size, bool)
    for row, column in np.ndindex(*size):
        left, above = label_map[row, max(column - 1, 0)], label_map[max(row - 1, 0), column]
        inner[row, column] = label_map[row, column] == left == above
    assert np.abs(shown - mixed)[inner].max() <= 1
    nearer = np.abs(shown - PAPER).sum(-1) < np.abs(mixed - PAPER).sum(-1)
    assert nearer[~inner].mean() > 0.99 and not inner.all()


@pytest.mark.parametrize(("size", "factor"), [((64, 80), 3), ((9, 5), 27), ((240, 100), 1), ((1000, 1), 1)])
def test_a_small_image_is_magnified_without_smoothing(size: tuple[int, int], factor: int) -> None:
    image, label_map = scene(*size, classes=1)
    label_map[:] = 0
    shown = np.asarray(overlay(image, label_map, ["all"], 0.0))
    expected = np.kron(image, np.ones((factor, factor, 1), np.uint8))
    np.testing.assert_array_equal(shown[: size[0] * factor, : size[1] * factor], expected)


def test_the_legend_names_what_is_there_the_largest_first(drawn: list[Words]) -> None:
    label_map = np.full((20, 50), 7, np.uint8)
    label_map[:, 30:] = 0
    label_map[:5, :4] = 149
    label_map[19, 49] = IGNORED
    sheet = np.asarray(overlay(np.zeros((20, 50, 3), np.uint8), label_map, NAMES))
    assert [words.text for words in drawn] == [
        "kind 7", "58.0%", "kind 0", "39.9%", "kind 149", "2.0%", "no class", "0.1%",
    ]  # fmt: skip
    for words, colour in zip(
        [words for words in drawn if words.text.startswith(("kind", "no"))],
        [*palette(150)[[7, 0, 149]], GREYS[0]],
        strict=True,
    ):
        below = len(sheet) - words.sheet.height
        assert tuple(sheet[below + round(words.at), round(words.left) - 15]) == tuple(colour), words.text


def test_a_legend_of_many_classes_says_how_many_are_left_out(drawn: list[Words]) -> None:
    label_map = np.repeat(np.arange(50, dtype=np.uint8), 50 - np.arange(50))[None]
    overlay(np.zeros((*label_map.shape, 3), np.uint8), label_map, NAMES)
    said = [words.text for words in drawn]
    assert [f"kind {index}" in said for index in range(50)] == [True] * LARGEST + [False] * (50 - LARGEST)
    assert "and 26 more" in said


@pytest.mark.parametrize(
    ("size", "classes"), [((64, 80), 10), ((80, 64), 150), ((17, 640), 3), ((2000, 1500), 150), ((1, 1), 1),
                          ((900, 4000), 150), ((3000, 400), 40)],
)  # fmt: skip
def test_words_can_be_read_and_lie_on_the_sheet(
    drawn: list[Words], size: tuple[int, int], classes: int
) -> None:
    image, label_map = scene(*size, classes=classes)
    names = [
        f"{name} of a long name, as some have" if i % 3 else name for i, name in enumerate(NAMES[:classes])
    ]
    sheets = [overlay(image, label_map, names)]
    assert min(words.size for words in drawn) >= max(13, max(size) // 90)
    truth = label_map * (label_map != IGNORED)
    sheets.append(panels(image, truth, label_map, names, "a/long/path/" * 9 + "x.jpg"))
    rows: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for words in drawn:
        assert words.left >= 0 and words.right <= words.sheet.width and 0 <= words.at <= words.sheet.height
        rows.setdefault((id(words.sheet), words.at), []).append((words.left, words.right))
    for spans in rows.values():  # nothing is written over something else
        assert all(one[1] <= other[0] for one, other in pairwise(sorted(spans)))
    assert all(max(sheet.size) <= 1.25 * max(size) + 1700 for sheet in sheets)


# --- side by side -------------------------------------------------------------------------------------------


def _parts(sheet: Image.Image, drawn: list[Words], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The four pictures, found by their headings."""
    pixels = np.asarray(sheet)
    found = {}
    for words in drawn:
        if words.text in ("image", "truth", "prediction", "mistakes (red)"):
            below = next(
                y for y in range(round(words.at), 999) if _is_picture(pixels[y], words.left, size[1])
            )
            left = round(words.left)
            found[words.text] = pixels[below : below + size[0], left : left + size[1]]
    return found


def _is_picture(line: np.ndarray, left: float, width: int) -> bool:
    return not (line[round(left) : round(left) + width] == PAPER).all(-1).any()


@pytest.mark.parametrize(("size", "factor"), [((64, 80), 3), ((90, 55), 3), ((240, 130), 1)])
def test_the_four_pictures_show_truth_prediction_and_where_they_differ(
    drawn: list[Words], size: tuple[int, int], factor: int
) -> None:
    image, truth = scene(*size, classes=5)
    image = np.minimum(image, 250)
    predicted = np.roll(np.where(truth == IGNORED, 0, truth), 4, 1).astype(np.uint8)
    sheet = panels(image, truth, predicted, NAMES[:5], "x.jpg")
    big = (size[0] * factor, size[1] * factor)
    parts = _parts(sheet, drawn, big)
    grow = np.ones((factor, factor), np.uint8)
    np.testing.assert_array_equal(parts["image"], np.kron(image, grow[..., None]))
    np.testing.assert_array_equal(parts["truth"], paint(np.kron(truth, grow), 5))
    np.testing.assert_array_equal(parts["prediction"], paint(np.kron(predicted, grow), 5))
    red = (parts["mistakes (red)"] == WRONG).all(-1)
    np.testing.assert_array_equal(red, np.kron((predicted != truth) & (truth != IGNORED), grow) > 0)
    calm = parts["mistakes (red)"][np.kron((predicted == truth), grow) > 0]
    assert (calm == calm[:, :1]).all() and calm.min() >= 190  # faint and grey


def test_large_pictures_are_shrunk_and_their_labels_are_not_mixed(drawn: list[Words]) -> None:
    image, truth = scene(1203, 1604, classes=9)
    sheet = panels(image, truth, truth % 9, NAMES[:9], "x.jpg")
    parts = _parts(sheet, drawn, (360, PANEL))
    assert {part.shape for part in parts.values()} == {(360, PANEL, 3)} and len(parts) == 4
    rows, columns = (np.arange(360) + 0.5) * 1203 / 360, (np.arange(PANEL) + 0.5) * 1604 / PANEL
    nearest = truth[rows.astype(int)][:, columns.astype(int)]
    classed = nearest != IGNORED
    np.testing.assert_array_equal(parts["truth"][classed], palette(9)[nearest[classed]])
    words = [words.text for words in drawn]
    share = 100 * (truth == 0).mean()
    at = words.index("kind 0")
    assert words[at + 1].startswith(f"{share:.1f} | ") and "share of truth | prediction" in words
