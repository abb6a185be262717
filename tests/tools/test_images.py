"""The images that a tool is given: folders are walked as in training, and long thin pictures stay small."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifiers import save_classifier
from PIL import Image
from segmenters import save_segmenter

from beit_pretrain.data.folder import Folder
from beit_pretrain.errors import DataError
from beit_pretrain.tools.app import app
from beit_pretrain.tools.images import find_images, outputs


def _fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def _found(*given: Path, **how: Any) -> list[tuple[str, str]]:
    return [(str(path), str(below)) for path, below in find_images(given, **how)]


def test_tools_find_what_training_finds(tmp_path: Path) -> None:
    root = _fill(tmp_path / "d", "a.jpg", ".h/a.jpg", ".b.png", "e/f/g.TIFF", "notes.txt", "e/x.labels.png")
    _fill(tmp_path / "r", "a.jpg", "deep/b.png")
    (root / "r").symlink_to("../r")
    (tmp_path / "r/back").symlink_to("../d")  # a circle
    (root / "e/gone.webp").symlink_to("nowhere")
    os.mkfifo(root / "pipe.png")
    below = ["a.jpg", "e/f/g.TIFF", "e/gone.webp", "e/x.labels.png", "r/a.jpg", "r/deep/b.png"]
    assert _found(root) == [(f"{root}/{name}", name) for name in below]
    training = Folder(root=str(root))
    assert sorted(training.name(index) for index in range(len(training))) == [
        f"{root}/{name}" for name in below
    ]
    assert [name for _, name in _found(root, without=(".labels.png",))] == [*below[:3], *below[4:]]


def test_a_relative_folder_and_odd_bytes_keep_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_fill(tmp_path, "d/a.jpg", "d-e/b.jpg"))
    odd = b"d/\xff\xfe.png"
    with open(odd, "wb"):
        pass
    assert _found(Path("d")) == [("d/a.jpg", "a.jpg"), (os.fsdecode(odd), os.fsdecode(odd)[2:])]
    assert [path for path, _ in _found(Path("."))] == ["d/a.jpg", os.fsdecode(odd), "d-e/b.jpg"]


def test_folders_that_cannot_be_walked_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path, "d/a.jpg")
    (tmp_path / "d/more").symlink_to("/gone/more")
    with pytest.raises(DataError, match=r"^IMAGES: .*/d/more is a link to /gone/more, which is not there"):
        _found(tmp_path / "d")
    (tmp_path / "d/more").unlink()
    with pytest.raises(DataError, match="holds no images"):
        _found(_fill(tmp_path / "empty", ".hidden/a.jpg"))

    def refuses(path: bytes) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(DataError, match=r"^IMAGES: .*/d cannot be listed: .*Permission denied"):
        _found(tmp_path / "d")


def test_shards_are_not_written_without_what_a_dead_link_was(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "src").mkdir()
    Image.new("RGB", (5, 7)).save(tmp_path / "src/a.png")
    (tmp_path / "src/gone.png").symlink_to("nowhere")
    given = ["shards", "write", str(tmp_path / "src"), str(tmp_path / "out")]
    assert app(given, standalone_mode=False) == 1
    printed = capsys.readouterr().out
    assert f"{tmp_path}/src/gone.png: No such file" in printed and "of the 2 images cannot be read" in printed


def test_a_circle_of_links_has_results_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    found = outputs([tmp_path], tmp_path / "out", (".labels.png",))
    assert found == {tmp_path / "out/a": tmp_path / "a.png"}


# --- long thin pictures -------------------------------------------------------------------------------------


def _peak(command: list[str]) -> int:
    """The most memory that this process held while the command ran, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the most of before
    except OSError:
        pytest.skip("no count of memory on this machine")
    assert app(command, standalone_mode=False) == 0
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("command", ["predict", "embed"])
def test_a_picture_of_one_row_or_column_takes_no_more_memory(command: str, run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 10_000, 3), np.uint8)
    peaks = []
    for name, shapes in (("ordinary", [(250, 40), (40, 250)]), ("thin", [(1, 10_000), (10_000, 1)])):
        (tmp_path / name).mkdir()
        for shape in shapes:
            Image.fromarray(pixels.reshape(*shape, 3)).save(tmp_path / name / f"{shape[0]}.png")
        out = tmp_path / f"{name}{'.csv' if command == 'predict' else '.npz'}"
        given = [command, str(run), str(tmp_path / name), "--out", str(out), "--image-size", "224"]
        peaks.append(_peak([*given, "--device", "cpu"]))
    assert peaks[1] - peaks[0] < 300e6


def test_a_segmentation_names_what_it_cannot_cut_into_windows(tmp_path: Path, capsys: Any) -> None:
    run = save_segmenter(tmp_path / "run")
    (tmp_path / "photos").mkdir()
    for name, size in (("a", (40, 30)), ("b", (10_000, 1)), ("c", (50, 20))):
        Image.new("RGB", size).save(tmp_path / "photos" / f"{name}.png")
    given = ["segment", str(run), str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert app(given, standalone_mode=False) == 1
    printed = capsys.readouterr().out
    assert "2 images segmented" in printed
    assert f"{tmp_path}/photos/b.png: 10000 x 1 pixels: " in printed
    assert len(list((tmp_path / "out").iterdir())) == 4
