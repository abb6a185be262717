"""Image and label map under one view: aligned, cropped by the rule, recoloured."""

from __future__ import annotations

import colorsys
import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit_pretrain.data.scenes import SceneView, distort
from beit_pretrain.data.transforms import Crops
from beit_pretrain.errors import ConfigError

FILL = (0.485, 0.456, 0.406)
COLOURS = np.random.default_rng(5).integers(0, 256, (256, 3), dtype=np.uint8)  # of each label


def _view(size: tuple[int, int], **changes: Any) -> SceneView:
    return SceneView(**({"image_size": size, "distortion": False, "fill": FILL} | changes))


def _labels(height: int, width: int, cell: int, count: int, seed: int = 0) -> Tensor:
    """Rectangles of `cell` pixels with any of `count` classes or 255."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(-1, count, (-(-height // cell), -(-width // cell))).astype(np.uint8)
    return torch.from_numpy(np.kron(cells, np.ones((cell, cell), np.uint8))[:height, :width].copy())


def _painted(label_map: Tensor) -> Tensor:
    """An image whose colours say the labels."""
    return torch.from_numpy(COLOURS[label_map.numpy()]).permute(2, 0, 1).contiguous()


def _crops(crops: Crops) -> tuple[np.ndarray, np.ndarray]:
    assert crops.label_map is not None and crops.image.dtype == crops.label_map.dtype == torch.uint8
    return crops.image.permute(1, 2, 0).numpy(), crops.label_map.numpy()


def _resized(label_map: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Nearest in exact fractions: the pixel in whose place the centre lies."""
    rows, cols = (
        [math.floor(Fraction(2 * i + 1, 2) * before / after) for i in range(after)]
        for before, after in zip(label_map.shape, size, strict=True)
    )
    return np.array([[int(label_map[row, col]) for col in cols] for row in rows])


# --- geometry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "image_size", "resize", "ratio", "expected"),
    [
        ((512, 683), (512, 512), None, 1.0, (512, 683)),
        ((512, 683), (512, 512), None, 0.5, (256, 342)),
        ((1000, 1500), (640, 640), None, 2.0, (1280, 1920)),
        ((300, 2000), (512, 512), None, 1.0, (307, 2048)),  # the long side binds
        ((2000, 300), (512, 512), (512, 2048), 1.0, (2048, 307)),
        ((61, 75), (48, 80), None, 1.0, (48, 59)),  # the shorter side of the crop
        ((3, 999), (8, 8), (1, 30), 1.0, (1, 30)),
    ],
)
def test_the_size_is_mmsegmentations(
    size: Any, image_size: Any, resize: Any, ratio: float, expected: Any
) -> None:
    assert _view(image_size, resize=resize, scale=(ratio, ratio))._size(size, random.Random(0)) == expected


@pytest.mark.parametrize("size", [(40, 66), (97, 53), (32, 48)])
@pytest.mark.parametrize("image_size", [(32, 48), (56, 40)])
def test_the_label_map_is_a_window_of_the_nearest_one_padded_below_and_beside(
    size: tuple[int, int], image_size: tuple[int, int]
) -> None:
    label_map = _labels(*size, cell=3, count=9)
    kinds = set()
    for key in range(40):
        view = _view(image_size)
        rows, cols = view._size(size, random.Random(key))
        whole = _resized(label_map, (rows, cols))
        inside = min(rows, image_size[0]), min(cols, image_size[1])
        image, found = _crops(view(_painted(label_map), label_map, key))
        assert image.shape == (*image_size, 3) and found.shape == image_size
        assert (found[inside[0] :] == 255).all() and (found[:, inside[1] :] == 255).all()
        mean = np.array([124, 116, 104])
        assert (image[inside[0] :] == mean).all() and (image[:, inside[1] :] == mean).all()
        windows = np.lib.stride_tricks.sliding_window_view(whole, inside)
        crop = found[: inside[0], : inside[1]]
        same = [bool((windows == one).all((2, 3)).any()) for one in (crop, crop[:, ::-1])]
        assert any(same) and set(np.unique(crop)) <= set(np.unique(label_map))
        kinds.add((inside == image_size, same[0]))
    assert len(kinds) == 4 or min(size) * 0.5 > max(
        image_size
    )  # larger and smaller than the crop, flipped or not


@pytest.mark.parametrize("size", [(120, 90), (75, 140)])
def test_image_and_label_map_stay_aligned(size: tuple[int, int]) -> None:
    label_map = _labels(*size, cell=15, count=20, seed=2)
    compared = 0
    for key in range(30):
        image, found = _crops(_view((64, 96), resize=(80, 200))(_painted(label_map), label_map, key))
        # Where the 7 x 7 labels around a pixel are one, bilinear weights cannot reach another colour.
        around = np.lib.stride_tricks.sliding_window_view(found, (7, 7)).reshape(64 - 6, 96 - 6, 49)
        plain = (around == around[..., :1]).all(-1)
        ours, labels = image[3:-3, 3:-3][plain], found[3:-3, 3:-3][plain]
        padded = (ours == [124, 116, 104]).all(-1) & (labels == 255)
        assert (COLOURS[labels] == ours)[~padded].all()
        compared += int((~padded).sum())
    assert compared > 30 * 500


@pytest.mark.parametrize("scale", [0.55, 1.0, 1.9])
def test_edges_lie_at_the_same_place_in_both(scale: float) -> None:
    label_map = _labels(90, 130, cell=13, count=2, seed=4).clamp(max=1)
    image = label_map.expand(3, -1, -1) * 255
    view = _view((64, 96), resize=(90, 130), scale=(scale, scale))
    wrong = []
    for key in range(10):
        crop, found = _crops(view(image, label_map, key))
        inside = found != 255
        wrong.append(((crop[..., 0] > 127) != (found == 1))[inside].mean())
    assert np.mean(wrong) < 0.012  # a shift by one pixel: 0.04 and more


def test_flips_come_as_often_as_asked() -> None:
    label_map = torch.arange(24, dtype=torch.uint8).repeat(16, 1)
    for flip in (0.0, 0.3, 1.0):
        view = _view((16, 24), flip=flip, scale=(1, 1), cat_max_ratio=1)
        maps = [_crops(view(_painted(label_map), label_map, key))[1] for key in range(400)]
        assert np.mean([found[0, 0] == 23 for found in maps]) == pytest.approx(flip, abs=0.07)


# --- the rule of the crop -----------------------------------------------------------------------------------


def _mixed(label_map: np.ndarray, most: float) -> bool:
    labels = [int(label) for label in label_map.ravel() if label != 255]
    shares = [labels.count(label) / len(labels) for label in set(labels)]
    return len(shares) > 1 and max(shares) < most


@pytest.mark.parametrize("most", [0.6, 0.75, 0.9])
def test_a_crop_is_drawn_up_to_eleven_times_until_no_class_has_too_much(most: float) -> None:
    # A sea with few islands, half of it unlabelled: of one draw most are refused.
    label_map = torch.zeros(60, 90, dtype=torch.uint8)
    label_map[::2] = 255
    for row, col in ((5, 10), (35, 60), (48, 20)):
        label_map[row : row + 9, col : col + 11] = 1 + row % 3
    image = _painted(label_map)
    rates = {}
    for ratio in (1, most):
        view = _view((16, 16), resize=(60, 90), scale=(1, 1), cat_max_ratio=ratio, flip=0.0)
        maps = [_crops(view(image, label_map, key))[1] for key in range(1500)]
        rates[ratio] = np.mean([_mixed(found, most) for found in maps])
    expected = 1 - (1 - rates[1]) ** 11
    assert 0.02 < rates[1] < 0.6
    assert rates[most] == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 1500) ** 0.5 + 0.05)


def test_of_crops_without_two_classes_the_last_is_taken_as_it_is() -> None:
    for label_map in (
        torch.full((40, 50), 7, dtype=torch.uint8),
        torch.full((40, 50), 255, dtype=torch.uint8),
    ):
        found = _crops(_view((24, 32), resize=(40, 50), scale=(1, 1))(_painted(label_map), label_map, 3))[1]
        assert (found == label_map[0, 0].item()).all()


# --- colours ------------------------------------------------------------------------------------------------


class Scripted(random.Random):
    """Gives the numbers it was told, in order."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


NO, YES, HALF = 0.9, 0.1, 0.5  # drawn numbers: chances that miss and hit, and the middle of a range


def _distorted(image: np.ndarray, *draws: float) -> np.ndarray:
    """Draws: whether brightness, contrast, saturation, hue; their strengths; whether contrast comes early."""
    rng = Scripted(*draws)
    found = distort(torch.from_numpy(image).permute(2, 0, 1), rng)
    assert not rng.values and found.is_contiguous()
    return found.permute(1, 2, 0).numpy()


def test_brightness_and_contrast_are_sums_and_products_of_levels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    for draw in (0.0, 0.31, 0.99):
        bright = np.clip(image.astype(float) + 64 * draw - 32, 0, 255).astype(np.uint8)
        assert np.array_equal(_distorted(image, YES, NO, NO, NO, draw, HALF, HALF, HALF, YES), bright)
        factor = 0.5 + draw
        product = np.clip(image * factor, 0, 255).astype(np.uint8)
        for early in (YES, NO):
            assert np.array_equal(_distorted(image, NO, YES, NO, NO, HALF, draw, HALF, HALF, early), product)
        both = np.clip(bright * factor, 0, 255).astype(np.uint8)
        assert np.array_equal(_distorted(image, YES, YES, NO, NO, draw, draw, HALF, HALF, YES), both)


def test_saturation_and_hue_are_those_of_the_standard_library() -> None:
    image = np.random.default_rng(1).integers(0, 256, (6, 50, 3), dtype=np.uint8)
    for saturation, turn in ((1.0, 0.1), (1.0, -0.1), (0.5, 0.0), (1.5, 0.0), (0.6, 0.05)):
        draws = (saturation - 0.5, (turn / 0.1 + 1) / 2)  # of 36 degrees, a tenth of the circle
        found = _distorted(image, NO, NO, YES, YES, HALF, HALF, *draws, YES)
        expected = np.zeros(image.shape)
        for place in np.ndindex(image.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*(image[place] / 255))
            expected[place] = colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * saturation), v)
        off = abs(found - 255 * expected)
        assert off.max() < 10 and off.mean() < 1.5  # whole levels of hue, saturation and value in between


def test_contrast_comes_before_or_after_the_change_of_saturation() -> None:
    image = np.full((2, 2, 3), (200, 100, 60), np.uint8)
    early = _distorted(image, NO, YES, YES, NO, HALF, 0.999, 0.0, HALF, YES)
    late = _distorted(image, NO, YES, YES, NO, HALF, 0.999, 0.0, HALF, NO)
    assert abs(early[0, 0].astype(int) - [255, 202, 172]).max() <= 2  # 300, 150, 90 is cut first
    assert abs(late[0, 0].astype(int) - [255, 225, 195]).max() <= 2


def test_each_change_happens_half_of_the_time() -> None:
    pixels = torch.tensor([200, 100, 60], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    same = sum(torch.equal(distort(pixels, random.Random(key)), pixels) for key in range(2000))
    assert same / 2000 == pytest.approx(1 / 16, abs=0.02)


def test_without_distortion_the_geometry_is_the_same() -> None:
    label_map = _labels(70, 110, cell=4, count=9)
    changed = 0
    for key in range(20):
        plain = _view((48, 64))(_painted(label_map), label_map, key)
        coloured = _view((48, 64), distortion=True)(_painted(label_map), label_map, key)
        assert np.array_equal(_crops(plain)[1], _crops(coloured)[1])
        changed += not torch.equal(plain.image, coloured.image)
    assert changed > 12


def test_a_view_is_pure_in_its_key_and_draws_nothing_global() -> None:
    label_map = _labels(50, 80, cell=4, count=9)
    image, kept = _painted(label_map), _painted(label_map)
    before = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
    )
    view = _view((48, 64), distortion=True)
    first, second, again = (view(image, label_map, key) for key in (1, 2, 1))
    assert torch.equal(first.image, again.image) and not torch.equal(first.image, second.image)
    assert np.array_equal(_crops(first)[1], _crops(again)[1])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[2]
    assert torch.equal(image, kept)


def test_impossible_settings_are_refused_together() -> None:
    wrong: dict[str, Any] = {"resize": (9, 3), "scale": (2.0, 1.0), "cat_max_ratio": 0.0, "flip": 1.5}
    with pytest.raises(ConfigError) as caught:
        _view((8, 8), **wrong)
    assert [fault.split("=")[0] for fault in caught.value.faults] == [f"stage.views.{key}" for key in wrong]
    assert "resize=[9, 3]: set two numbers of pixels, the short side first" in caught.value.faults[0]
