"""`beit-tools attention`: files hold what the block's heads give from the chosen patch, drawn where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from classifiers import save_classifier
from PIL import Image
from pretrained import save_pretrained
from segmenters import save_segmenter

import beit_pretrain
from beit_pretrain.errors import BeitError, ConfigError, DataError
from beit_pretrain.models.attention_maps import attention_maps
from beit_pretrain.sheets import GAP, LINE, MARGIN
from beit_pretrain.tools.app import app
from beit_pretrain.tools.attention import FAINTEST, STRENGTH, attention_sheet
from beit_pretrain.tools.images import read_image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmentation of 32 x 40 pixels in 8 x 10 patches."""
    return save_segmenter(tmp_path_factory.mktemp("runs") / "wide")


def tool(*arguments: Any) -> int:
    return app(["attention", *map(str, arguments), "--device", "cpu"], standalone_mode=False)


def picture(path: Path, height: int = 45, width: int = 61) -> Path:
    y, x = np.mgrid[:height, :width]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.stack([5 * x, 4 * y, 3 * (x + y)], -1) % 256).astype(np.uint8)).save(path)
    return path


def expected(run: Path, path: Path, block: int, token: int, **options: Any) -> np.ndarray:
    """What each head gives each token (H, 1 + N) from one token."""
    loaded = beit_pretrain.load(run, **options)
    with torch.no_grad():
        return attention_maps(loaded.encoder, loaded.preprocess(path)[None], block)[0, :, token].numpy()


def test_the_numbers_are_the_chosen_patchs_row_on_the_grid(run: Path, tmp_path: Path, capsys) -> None:
    path = picture(tmp_path / "a.b.jpg")
    assert tool(run, path, "--patch", "5,9", "--block", 0, "--out", tmp_path / "out") == 0
    with np.load(tmp_path / "out" / "a.b.attention.npz") as file:
        found = dict(file)
    rows = expected(run, path, 0, 1 + 5 * 10 + 9)
    assert found["attention"].shape == (len(rows), 8, 10) and found["attention"].dtype == np.float32
    np.testing.assert_array_equal(found["attention"], rows[:, 1:].reshape(-1, 8, 10))
    np.testing.assert_allclose(found["attention"].sum((1, 2)) + found["cls"], 1, rtol=1e-5)
    assert found["patch"].tolist() == [5, 9] and found["block"] == 0
    seen = beit_pretrain.load(run).preprocess.crop(read_image(path))
    np.testing.assert_array_equal(found["image"], seen.permute(1, 2, 0).numpy())
    head, row, column = np.unravel_index(found["attention"].argmax(), found["attention"].shape)
    printed = capsys.readouterr().out
    assert f"from head {head} to patch {row},{column}" in printed
    assert "1 image; from patch 5,9 of 8 x 10 patches in block 0" in printed
    with Image.open(tmp_path / "out" / "a.b.attention.png") as file:
        shown = attention_sheet(
            found["image"],
            found["attention"],
            found["cls"],
            query=(5, 9),
            title="block 0, from patch 5,9: a.b.jpg",
        )
        np.testing.assert_array_equal(np.asarray(file), np.asarray(shown))


def test_any_size_and_without_a_patch_the_cls_token_in_the_last_block(run: Path, tmp_path: Path) -> None:
    path = picture(tmp_path / "x.png")
    assert tool(run, path, "--image-size", "[24,48]", "--out", tmp_path) == 0
    with np.load(tmp_path / "x.attention.npz") as file:
        rows = expected(run, path, 1, 0, image_size=[24, 48])
        np.testing.assert_array_equal(file["attention"], rows[:, 1:].reshape(-1, 6, 12))
        np.testing.assert_array_equal(file["cls"], rows[:, 0])
        assert file["patch"].shape == (0,) and file["block"] == 1
    assert tool(run, path, "--block", -2, "--out", tmp_path) == 0
    with np.load(tmp_path / "x.attention.npz") as file:
        np.testing.assert_array_equal(file["cls"], expected(run, path, 0, 0)[:, 0])


@pytest.mark.parametrize("save", [save_classifier, save_pretrained])
def test_every_model_with_an_encoder_can_be_asked(save: Any, tmp_path: Path) -> None:
    made, path = save(tmp_path / "run"), picture(tmp_path / "x.png")
    assert tool(made, path, "--patch", "7,0", "--out", tmp_path / "out") == 0
    with np.load(tmp_path / "out" / "x.attention.npz") as file:
        rows = expected(made, path, 1, 1 + 7 * 8)
        np.testing.assert_array_equal(file["attention"], rows[:, 1:].reshape(-1, 8, 8))


def test_the_sheet_shows_each_map_on_its_own_scale_where_it_lies() -> None:
    """Two heads on 2 x 3 patches of 112 pixels; the first patch of the second row is outlined."""
    pixels = np.full((224, 336, 3), 200, np.uint8)
    maps = np.random.default_rng(0).random((2, 2, 3)).astype(np.float32)
    maps[1] *= 0.01
    sheet = np.asarray(attention_sheet(pixels, maps, np.zeros(2), query=(1, 0), title="x"))
    columns = 2  # of four pictures
    grey = FAINTEST + 200 // 2
    for number, shares in enumerate([*maps, maps.mean(0)], start=1):
        row, column = divmod(number, columns)
        left = MARGIN + column * (336 + GAP)
        top = MARGIN + 30 + LINE * (row + 1) + row * (224 + 2 * GAP)
        colours = matplotlib.colormaps["viridis"](shares / shares.max())[..., :3] * 255
        for y in range(2):
            for x in range(3):
                middle = sheet[top + 112 * y + 56, left + 112 * x + 56]
                np.testing.assert_allclose(middle, STRENGTH * colours[y, x] + (1 - STRENGTH) * grey, atol=2)
        red = (sheet[top : top + 224, left : left + 336] == (255, 60, 40)).all(-1)
        assert red[112:, :112].any() and not red[:112].any() and not red[:, 112:].any()


@pytest.mark.parametrize(
    ("given", "shown"), [((1024, 512), (448, 224)), ((32, 16), (224, 112)), ((336,) * 2,) * 2]
)
def test_large_pictures_are_shrunk_and_small_ones_magnified(
    given: tuple[int, int], shown: tuple[int, int]
) -> None:
    picture, maps = np.zeros((*given, 3), np.uint8), np.ones((1, 8, 4), np.float32)
    sheet = np.asarray(attention_sheet(picture, maps, np.zeros(1), query=None, title="x"))
    black = (sheet == 0).all(-1)
    assert (black.any(1).sum(), black.any(0).sum()) == shown


def test_a_patch_or_block_that_is_not_there_is_said_before_anything_is_written(
    run: Path, tmp_path: Path
) -> None:
    path = picture(tmp_path / "x.png")
    for patch in ("8,0", "0,10", "-1,0"):
        with pytest.raises(
            BeitError,
            match=rf"--patch {patch} is outside of the grid of 8 x 10 patches: set 0,0 to 7,9, row and",
        ):
            tool(run, path, f"--patch={patch}", "--out", tmp_path / "out")
    for patch in ("7", "a,b", "1,2,3", "1.5,2"):
        with pytest.raises(
            BeitError, match=rf"--patch {patch}: give row,column, counted from 0, such as 7,4"
        ):
            tool(run, path, "--patch", patch, "--out", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--block 2: this encoder has 2; set 0 to 1"):
        tool(run, path, "--block", 2, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_listed_and_inputs_are_never_written_over(
    run: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "photos"
    picture(folder / "deep" / "x.png")
    (folder / "broken.jpg").write_bytes(b"x")
    for _ in range(2):  # the second time, results lie beside the images
        assert tool(run, folder, "--out", folder) == 1
        end = capsys.readouterr().out.partition("1 image drawn, written to")[2]
        assert f"1 could not be read:\n  {folder / 'broken.jpg'}: " in end
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert names == {"broken.jpg", *(f"deep/x.{kind}" for kind in ("png", "attention.png", "attention.npz"))}
    with pytest.raises(DataError, match=r"x\.attention\.png is one of the images and would be written over"):
        tool(run, folder / "deep" / "x.png", folder / "deep" / "x.attention.png", "--out", folder / "deep")
    with pytest.raises(DataError, match=r"would both become .*x\.attention\.png"):
        tool(run, folder / "deep" / "x.png", picture(tmp_path / "x.jpg"), "--out", tmp_path / "out")
