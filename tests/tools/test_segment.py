"""`beit-tools segment`: the files hold what the trained stage says of each image, and nothing is written over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import save_classifier
from PIL import Image

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files, formats, record
from beit_pretrain.compose import compose
from beit_pretrain.data.decode import decode
from beit_pretrain.dense import Sliding
from beit_pretrain.errors import BeitError, CheckpointError, ConfigError, DataError
from beit_pretrain.folder import plain
from beit_pretrain.label_maps import overlay, palette
from beit_pretrain.models.rel_pos import relative_position_index
from beit_pretrain.tools.app import app
from beit_pretrain.tools.load import load

NAMES = ["sky", "ground", "disc", "net", "pole"]
SMALL = [
    "stage=segment",
    "data=shapes",
    "model=micro",
    "model.width=24",
    "model.heads=2",
    "model.patch_size=8",
]
SMALL += ["image_size=[32,24]", "stage.channels=8"]


@pytest.fixture(scope="module")
def stage() -> Any:
    """A segmentation of 32 x 24 crops whose head tells pixels apart."""
    made: Any = build_stage(compose(SMALL), NAMES)
    generator = torch.Generator().manual_seed(1)
    for p in made.head.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5
    return made.eval()


@pytest.fixture
def run(tmp_path: Path, stage: Any) -> Path:
    return save(tmp_path / "run", stage)


def save(folder: Path, stage: Any, *, from_one: bool = True, without: str = "") -> Path:
    """A run folder with the stage's weights, whose files count classes from one or from zero."""
    config = plain(compose(SMALL))
    state = {name: value for name, value in stage.state_dict().items() if name != without}
    about = record.make_record(config, {"class_names": NAMES, "reduce_zero_label": from_one}, {})
    files.write(folder / "checkpoints" / "last.ckpt", {"state_dict": state, "beit_pretrain": about})
    return folder


def tool(*arguments: Any) -> int:
    return app(["segment", *map(str, arguments)], standalone_mode=False)


def picture(path: Path, height: int, width: int, mode: str = "RGB", **how: Any) -> Path:
    """Smooth colours, of which the stage makes several regions."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([5 * x, 4 * y, 3 * (x + y)], -1) % 256
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path, **how)
    return path


def numbers(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        assert file.mode == "P"
        return np.asarray(file)


def upright() -> Image.Exif:
    """Says that the file lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_every_image_gets_its_label_map_and_its_overlay(
    run: Path, tmp_path: Path, stage: Any, capsys
) -> None:
    given = [picture(tmp_path / "rgb.png", 50, 37), picture(tmp_path / "a.b.JPG", 24, 90, exif=upright())]
    given += [picture(tmp_path / "clear.png", 33, 70, "RGBA"), picture(tmp_path / "grey.tif", 7, 9, "L")]
    assert tool(run, *given, "--out", tmp_path / "out", "--alpha", 0.25, "--device", "cpu") == 0
    assert len(list((tmp_path / "out").iterdir())) == 8
    printed = capsys.readouterr().out
    kinds = set()
    for path in given:
        image = decode(path.read_bytes())
        expected = stage.predict(image).numpy()
        kinds |= set(np.unique(expected).tolist())
        found = numbers(tmp_path / "out" / f"{path.stem}.labels.png")
        np.testing.assert_array_equal(found, expected + 1)  # in the files of this data set 0 is no class
        shown = overlay(image.permute(1, 2, 0).numpy(), expected, NAMES, 0.25)
        with Image.open(tmp_path / "out" / f"{path.stem}.overlay.png") as file:
            np.testing.assert_array_equal(np.asarray(file), np.asarray(shown))
        share, most = max(((expected == i).mean(), name) for i, name in enumerate(NAMES))
        assert f"{path}: {expected.shape[0]} x {expected.shape[1]}, " in printed
        assert f" s; {most} {share:.1%}" in printed
    assert len(kinds) > 2  # otherwise a wrong map could pass
    assert "4 images segmented" in printed and "sliding windows of 32 x 24, stride 21 x 16" in printed


def test_numbers_begin_where_those_of_the_data_set_do(tmp_path: Path, stage: Any) -> None:
    run = save(tmp_path / "run", stage, from_one=False)
    path = picture(tmp_path / "x.png", 40, 41)
    assert tool(run, path, "--out", tmp_path / "out") == 0
    expected = stage.predict(decode(path.read_bytes())).numpy()
    np.testing.assert_array_equal(numbers(tmp_path / "out" / "x.labels.png"), expected)
    with Image.open(tmp_path / "out" / "x.labels.png") as file:
        np.testing.assert_array_equal(np.asarray(file.convert("RGB")), palette(len(NAMES))[expected])


@pytest.mark.parametrize(
    ("options", "mode", "scales"),
    [
        (["--multi-scale"], "slide", (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)),
        (["--whole"], "whole", (1.0,)),
        (["--whole", "--multi-scale"], "whole", (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)),
    ],
)
def test_scales_and_windows_can_be_asked_for(
    run: Path, tmp_path: Path, stage: Any, options: list[str], mode: Any, scales: tuple[float, ...], capsys
) -> None:
    path = picture(tmp_path / "x.png", 45, 61)
    assert tool(run, path, *options, "--out", tmp_path / "out") == 0
    way = Sliding(crop=(32, 24), patch_size=8, mode=mode, scales=scales, flip=len(scales) > 1)
    with torch.no_grad():
        expected = way.predict(stage.logits, decode(path.read_bytes())).numpy()
    np.testing.assert_array_equal(numbers(tmp_path / "out" / "x.labels.png"), expected + 1)
    assert way.describe() in capsys.readouterr().out
    assert (expected != stage.predict(decode(path.read_bytes())).numpy()).any()


def test_a_folder_keeps_its_shape_and_earlier_results_are_passed_over(
    run: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "photos"
    first = picture(folder / "x.png", 30, 20)
    picture(folder / "deep" / "er" / "x.jpg", 20, 30)
    (folder / "notes.txt").write_text("no image")
    assert tool(run, folder, first, "--out", folder) == 0
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*.png")}
    assert names == {f"{stem}.{kind}.png" for stem in ("x", "deep/er/x") for kind in ("labels", "overlay")}
    assert "2 images segmented" in capsys.readouterr().out
    assert tool(run, folder, "--out", folder) == 0
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*.png")} == names


def test_images_of_the_same_name_are_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = picture(tmp_path / "a" / "x.png", 20, 20), picture(tmp_path / "b" / "x.jpg", 20, 20)
    with pytest.raises(
        DataError,
        match=r"a/x\.png and .*b/x\.jpg would both become .*out/x\.overlay\.png: let one of them go",
    ):
        tool(run, *given, "--out", out)
    picture(tmp_path / "x.overlay.png", 20, 20)
    with pytest.raises(
        DataError, match=r"x\.overlay\.png is one of the images and would be written over: set"
    ):
        tool(run, given[0], tmp_path / "x.overlay.png", "--out", tmp_path)
    assert not out.exists() and not (tmp_path / "x.labels.png").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no images: give a folder that does"):
        tool(run, given[0], tmp_path / "empty", "--out", out)


def test_what_cannot_be_read_is_named_at_the_end_and_the_rest_is_done(
    run: Path, tmp_path: Path, capsys
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture(tmp_path / "whole.png", 60, 60).read_bytes()[:-60])
    given = [broken, tmp_path / "gone.png", picture(tmp_path / "x.png", 20, 20)]
    assert tool(run, *given, "--out", tmp_path / "out") == 1
    end = capsys.readouterr().out.partition("1 image segmented")[2]
    assert "2 could not be read:" in end and f"{broken}: " in end
    assert f"{tmp_path / 'gone.png'}: No such file or directory" in end
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"x.labels.png", "x.overlay.png"}


def test_a_checkpoint_of_something_else_is_said_in_one_line(tmp_path: Path, stage: Any) -> None:
    path = picture(tmp_path / "x.png", 20, 20)
    config = plain(compose(["stage=tokenizer", "data=digits"]))
    other = {"state_dict": {}, "beit_pretrain": record.make_record(config, {}, {})}
    files.write(tmp_path / "tok.ckpt", other)
    with pytest.raises(CheckpointError, match=r"tok\.ckpt is of stage=tokenizer, .*: give a run of stage="):
        tool(tmp_path / "tok.ckpt", path)
    with pytest.raises(
        CheckpointError, match=r"c is of stage=classify, which gives no class.*: give a run of stage=segment$"
    ):
        tool(save_classifier(tmp_path / "c"), path)
    with pytest.raises(CheckpointError, match=r"CHECKPOINT=.*gone: there is no such file or folder"):
        tool(tmp_path / "gone", path)
    damaged = save(tmp_path / "damaged", stage, without="encoder.cls_token")
    with pytest.raises(
        CheckpointError, match=r"CHECKPOINT=.*the weights do not fit: encoder\.cls_token is missing"
    ):
        tool(damaged, path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_authors_is_segmented_like_the_run_it_came_from(
    run: Path, tmp_path: Path, stage: Any
) -> None:
    path = picture(tmp_path / "x.png", 50, 41)
    state = formats.to_original(load(run).model.state_dict())
    index = relative_position_index(stage.encoder.grid)
    state["backbone.blocks.0.attn.relative_position_index"] = index
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "meta": {"CLASSES": NAMES}}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="does not say how its images were normalised"):
        tool(tmp_path / "w.pth", path, "--out", tmp_path / "b")
    scale = ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"]
    blocks = ",".join(str(block) for block in stage.blocks)
    assert tool(run, path, "--out", tmp_path / "a") == 0
    assert tool(tmp_path / "w.pth", path, "--out", tmp_path / "b", "--blocks", blocks, *scale) == 0
    shifted = numbers(tmp_path / "a" / "x.labels.png")  # the run's files count classes from 1
    assert np.array_equal(numbers(tmp_path / "b" / "x.labels.png") + 1, shifted)


def test_a_device_that_is_not_there_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        BeitError, match="--device cuda, but there is no such GPU here: set it to auto or cpu"
    ):
        tool(run, tmp_path / "x.png", "--device", "cuda")
    with pytest.raises(BeitError, match="--device tpu: set one of auto, cpu, gpu, cuda, mps"):
        tool(run, tmp_path / "x.png", "--device", "tpu")


def test_a_result_that_cannot_be_written_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BeitError, match=r"out/x\.labels\.png was not written"):
        tool(run, picture(tmp_path / "x.png", 20, 20), "--out", tmp_path / "out")
