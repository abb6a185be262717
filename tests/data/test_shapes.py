"""The drawn scenes: the same pixels everywhere, every class in them, and a folder that is whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_pretrain.data import shapes
from beit_pretrain.data.shapes import CLASSES, Shapes, draw_scene
from beit_pretrain.errors import DataError

# Beginning of the SHA-256 of size, picture and map. Experiments compare across versions: pixels must not change.
PIXELS = {
    ("training", 0): "93e018625090cfbe",
    ("training", 1599): "5d329574e4abee77",
    ("validation", 0): "262141557844629e",
    ("validation", 7): "262f4a23cca5991f",
}
Scenes = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return [draw_scene(split, index) for index in range(100) for split in ("training", "validation")]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """A set of seven scenes; and which were drawn."""
    drawn: list[tuple[str, int]] = []

    def draw(split: str, index: int) -> Any:
        drawn.append((split, index))
        return draw_scene(split, index)

    monkeypatch.setattr(shapes, "SCENES", {"training": 5, "validation": 2})
    monkeypatch.setattr(shapes, "draw_scene", draw)
    yield drawn


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "index"), PIXELS)
def test_a_scene_is_the_same_pixels_for_ever(split: str, index: int) -> None:
    image, label_map = draw_scene(split, index)
    text = str(image.shape).encode() + image.tobytes() + label_map.tobytes()
    assert hashlib.sha256(text).hexdigest()[:16] == PIXELS[split, index]


def test_scenes_differ_in_size_and_are_not_all_square(scenes: Scenes) -> None:
    sizes = {label_map.shape for _, label_map in scenes}
    assert sizes == {(height, width) for height in (64, 80, 96, 112) for width in (64, 80, 96, 112)}
    assert all(image.shape == (*label_map.shape, 3) for image, label_map in scenes)
    assert {array.dtype for scene in scenes for array in scene} == {np.dtype(np.uint8)}
    assert len({image.tobytes() for image, _ in scenes}) == len(scenes)


def test_every_class_occurs_often_and_a_little_is_ignored(scenes: Scenes) -> None:
    for part in (scenes[::2], scenes[1::2]):
        pixels = np.sum([np.bincount(label_map.ravel(), minlength=11) for _, label_map in part], axis=0)
        assert len(pixels) == 1 + len(CLASSES) == 11
        share = pixels / pixels.sum()
        assert share.min() > 0.005 and share.max() < 0.5 and 0.01 < share[0] < 0.08
        assert all(sum((label_map == c).any() for _, label_map in part) > 25 for c in range(11))


def test_poles_are_thin(scenes: Scenes) -> None:
    widths = []
    for _, label_map in scenes:
        for row in label_map == 1 + CLASSES.index("pole"):
            ends = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
            widths += (ends[1::2] - ends[::2]).tolist()
    assert np.quantile(widths, 0.9) <= 3 and np.median(widths) >= 2


def test_colours_do_not_tell_the_class(scenes: Scenes) -> None:
    colours = np.concatenate([image.reshape(-1, 3) for image, _ in scenes]).astype(float)
    labels = np.concatenate([label_map.ravel() for _, label_map in scenes])
    half = len(labels) // 2
    means = np.array([colours[:half][labels[:half] == c].mean(0) for c in range(11)])
    objects = np.flatnonzero(labels[half:] > 2)[::50] + half
    nearest = 3 + np.argmin(((colours[objects, None] - means[3:]) ** 2).sum(-1), axis=1)
    assert (nearest == labels[objects]).mean() < 0.25  # of eight kinds


def test_objects_stand_out_from_what_is_around_them(scenes: Scenes) -> None:
    steps = []
    for image, label_map in scenes:
        change = np.abs(image[:, 2:].astype(float) - image[:, :-2]).sum(-1)
        labels = np.stack([label_map[:, :-2], label_map[:, 2:]])
        solid = (labels == 1 + CLASSES.index("disc")).any(0) & (labels == 1 + CLASSES.index("sky")).any(0)
        steps += change[solid].tolist()
    assert len(steps) > 100 and np.quantile(steps, 0.2) > 60


# --- the folder ---------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_drawn(few: list[tuple[str, int]], tmp_path: Path) -> None:
    source = Shapes(root=str(tmp_path / "deep/shapes"))
    assert source.class_names == list(CLASSES) and len(source) == 7
    assert {name: part.tolist() for name, part in source.splits.items()} == {
        "train": [0, 1, 2, 3, 4],
        "val": [5, 6],
    }
    places = [("training", i) for i in range(5)] + [("validation", i) for i in range(2)]
    assert few == places
    for index, place in enumerate(places):
        image, drawn = draw_scene(*place)
        assert np.array_equal(np.asarray(Image.open(source.name(index))), image)
        expected = np.where(drawn == 0, 255, drawn.astype(int) - 1)
        assert np.array_equal(source.label_map(index).numpy(), expected)
    assert source.look(np.arange(7), None)["label_maps"] == 7


def test_scenes_are_drawn_once(few: list[tuple[str, int]], tmp_path: Path) -> None:
    root = tmp_path / "shapes"
    root.mkdir()  # an empty folder is no obstacle
    first = Shapes(root=str(root)).fingerprint()
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    few.clear()
    assert Shapes(root=str(root)).fingerprint() == first and not few
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == files
    assert {path.name for path in tmp_path.iterdir()} <= {"shapes", ".shapes.lock"}


def test_what_was_left_half_drawn_is_never_used(
    few: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def die(split: str, index: int) -> Any:
        if index == 3:
            raise KeyboardInterrupt
        return draw_scene(split, index)

    root = tmp_path / "shapes"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shapes, "draw_scene", die)
        Shapes(root=str(root))
    assert not root.exists() and len(list(tmp_path.rglob("*.png"))) == 6
    assert len(Shapes(root=str(root))) == 7 == len(few)
    assert len(list(tmp_path.rglob("*.png"))) == 14


def test_several_processes_draw_once_between_them(few: list[tuple[str, int]], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:  # each opens the lock for itself, as a process would
        sources = list(pool.map(lambda _: Shapes(root=str(tmp_path / "shapes")), range(4)))
    assert [len(source) for source in sources] == [7] * 4 and len(few) == 7


def test_a_folder_of_something_else_is_left_alone(few: list[tuple[str, int]], tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / "1.jpg").write_bytes(b"mine")
    with pytest.raises(
        DataError, match=r"data\.root=.*photos exists and holds no drawn scenes .*; set data\.root"
    ):
        Shapes(root=str(root))
    with pytest.raises(DataError, match=r"1\.jpg exists and holds no drawn scenes"):
        Shapes(root=str(root / "1.jpg"))
    assert (root / "1.jpg").read_bytes() == b"mine" and not few


def test_scenes_of_another_version_and_missing_ones_are_not_taken(
    few: list[tuple[str, int]], tmp_path: Path
) -> None:
    root = tmp_path / "shapes"
    Shapes(root=str(root))
    made = (root / "made.json").read_text()
    assert json.loads(made) == {"version": 1, "training": 5, "validation": 2}
    (root / "made.json").write_text(made.replace('"version": 1', '"version": 0'))
    with pytest.raises(
        DataError, match=r"holds other scenes than this version draws; remove it, or set data\.root"
    ):
        Shapes(root=str(root))
    (root / "made.json").write_text(made)
    for kind in ("images", "annotations"):
        (root / kind / "training/00002.png").unlink()
    with pytest.raises(
        DataError, match=r"scenes are missing, \{'train': 4, 'val': 2\} are left; remove the folder"
    ):
        Shapes(root=str(root))
    shutil.rmtree(root)
    assert len(Shapes(root=str(root))) == 7
