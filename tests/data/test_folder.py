"""Folders: flat, nested, patterns, several roots; labels only where class folders are there."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from beit_pretrain.data.dataset import BadImages, ViewDataset
from beit_pretrain.data.decode import decode
from beit_pretrain.data.folder import Folder
from beit_pretrain.data.sampler import Failure, Key
from beit_pretrain.data.transforms import OneView
from beit_pretrain.errors import DataError


def _fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def _names(folder: Folder, root: Path) -> list[str]:
    return [os.path.relpath(folder.name(index), root) for index in range(len(folder))]


def test_a_flat_folder_is_sorted_and_has_no_labels(tmp_path: Path) -> None:
    folder = Folder(
        root=str(_fill(tmp_path, "b.JPG", "a.png", "c.webp", "notes.txt", ".hidden.png", "._a.png"))
    )
    assert _names(folder, tmp_path) == ["a.png", "b.JPG", "c.webp"]
    assert folder.labels is None and folder.class_names is None and not folder.splits
    assert folder.read(1) == b"b.JPG"


def test_class_folders_give_labels_sorted_by_name(tmp_path: Path) -> None:
    _fill(tmp_path, "dog/1.png", "dog/deep/er/2.png", "cat/1.png", "empty/notes.txt", ".cache/1.png")
    folder = Folder(root=str(tmp_path))
    assert _names(folder, tmp_path) == ["cat/1.png", "dog/1.png", "dog/deep/er/2.png"]
    assert folder.class_names == ["cat", "dog"]
    assert (
        folder.labels is not None and folder.labels.tolist() == [0, 1, 1] and folder.labels.dtype == np.int64
    )


@pytest.mark.parametrize("names", [("a/1.png", "b/1.png", "loose.png"), ("only/1.png", "only/sub/2.png")])
def test_one_loose_image_or_a_single_folder_means_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = Folder(root=str(_fill(tmp_path, *names)))
    assert len(folder) == len(names) and folder.labels is None


def test_several_roots_come_in_their_order_and_share_class_names(tmp_path: Path) -> None:
    _fill(tmp_path, "z/cat/1.png", "z/dog/1.png", "a/dog/1.png", "a/eel/1.png")
    folder = Folder(root=[str(tmp_path / "z"), str(tmp_path / "a")])
    assert _names(folder, tmp_path) == ["z/cat/1.png", "z/dog/1.png", "a/dog/1.png", "a/eel/1.png"]
    assert folder.class_names == ["cat", "dog", "eel"]
    assert folder.labels is not None and folder.labels.tolist() == [0, 1, 1, 2]


def test_patterns_match_files_and_folders_below_their_fixed_part(tmp_path: Path) -> None:
    _fill(tmp_path, "x1/p/a.png", "x1/b.png", "x2/c.png", "y/d.png", "x3.png")
    folder = Folder(root=f"{tmp_path}/x*")
    assert _names(folder, tmp_path) == ["x1/b.png", "x1/p/a.png", "x2/c.png", "x3.png"]
    assert folder.labels is None  # x3.png lies in no class folder
    assert _names(Folder(root=f"{tmp_path}/*/*.png"), tmp_path) == ["x1/b.png", "x2/c.png", "y/d.png"]
    assert Folder(root=f"{tmp_path}/*/*.png").class_names == ["x1", "x2", "y"]
    assert len(Folder(root=f"{tmp_path}/**")) == len(Folder(root=f"{tmp_path}/**/*.png")) == 5


def test_a_folder_whose_name_looks_like_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    root = _fill(tmp_path / "set[1]", "a.png")
    assert len(Folder(root=str(root))) == 1


@pytest.mark.parametrize(
    "roots", [("", "sub"), ("sub", ""), ("sub/*.png", ""), ("", "sub/*.png"), ("*/*", "sub")]
)
def test_an_image_below_two_roots_counts_once(tmp_path: Path, roots: tuple[str, str]) -> None:
    _fill(tmp_path, "sub/a.png", "sub/b.png", "other/c.png")
    given = [f"{tmp_path}/{root}" for root in roots]
    try:
        folder = Folder(root=given)
    except DataError as error:  # the second root has nothing left, and is named
        assert f"data.root={given[1]} holds no images" in str(error)
        folder = Folder(root=given[0])
    assert sorted(_names(folder, tmp_path)) == ["other/c.png", "sub/a.png", "sub/b.png"]


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    _fill(tmp_path, "outside/a.png", "root/b.png")
    (tmp_path / "root/link").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/back").symlink_to(tmp_path / "root")
    (tmp_path / "root/dangling.png").symlink_to(tmp_path / "nowhere")
    found = _names(Folder(root=str(tmp_path / "root")), tmp_path)
    assert found == ["root/b.png", "root/dangling.png", "root/link/a.png"]


def test_what_cannot_be_looked_at_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    _fill(tmp_path, "a.png", "notes.txt")
    (tmp_path / "b.png").symlink_to("gone.png")
    (tmp_path / "c.png").symlink_to("c.png")  # to itself
    (tmp_path / "d.txt").symlink_to("gone.txt")
    (tmp_path / "circle").symlink_to("circle.x")
    (tmp_path / "circle.x").symlink_to("circle.x")
    os.mkfifo(tmp_path / "e.png")  # to open it would never end
    with pytest.raises(
        DataError, match=r"data\.root: .*/circle is a link to circle\.x, which is not there: bring"
    ):
        Folder(root=str(tmp_path))
    (tmp_path / "circle").unlink()
    folder = Folder(root=str(tmp_path))
    assert _names(folder, tmp_path) == ["a.png", "b.png", "c.png"]
    for index in (1, 2):
        with pytest.raises(OSError, match=rf"{'bc'[index - 1]}\.png"):
            folder.read(index)
    with pytest.raises(DataError, match=r"/gone is a link to nowhere, which is not there"):
        (tmp_path / "gone").symlink_to("nowhere")
        Folder(root=f"{tmp_path}/go*")


def test_a_dead_link_among_the_images_of_a_run_is_noted_with_its_path(tmp_path: Path) -> None:
    _fill(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to("gone.png")
    bad = BadImages(indices=np.arange(2), max_bad=1.0, log=None)
    view = OneView(image_size=(4, 4))
    source = Folder(root=str(tmp_path))
    dataset = ViewDataset(
        source=source, indices=np.arange(2), view=view, seed=0, held_out=False, max_bad=1.0, bad_log=None
    )
    dataset.bad = bad
    assert isinstance(dataset[Key(1, 0)], Failure)  # nor is the other one an image
    assert bad.known[1][0] == f"{tmp_path}/b.png" and "No such file" in bad.known[1][1]


def test_odd_bytes_in_names_survive(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe \xc3\xa9.png"
    with open(path, "wb") as file:
        file.write(b"x")
    folder = Folder(root=str(tmp_path))
    assert folder.read(0) == b"x" and os.fsencode(folder.name(0)) == path


def test_missing_and_empty_folders_name_the_key(tmp_path: Path) -> None:
    root = re.escape(str(tmp_path))
    with pytest.raises(DataError, match=rf"data\.root={root}/no does not exist; set data\.root to a folder"):
        Folder(root=f"{tmp_path}/no")
    with pytest.raises(DataError, match=rf"data\.root={root} holds no images \(\.jpg .*sub-folders included"):
        Folder(root=str(tmp_path))
    with pytest.raises(DataError, match=r"no\* matches nothing; set data\.root"):
        Folder(root=f"{tmp_path}/no*")
    with pytest.raises(DataError, match=r"a\.png is a file, not a folder; set data\.root"):
        Folder(root=f"{_fill(tmp_path, 'a.png')}/a.png")
    with pytest.raises(DataError, match=r"data\.root is an empty list: name at least one"):
        Folder(root=[])


def test_the_fingerprint_tells_other_files_but_not_another_place(tmp_path: Path) -> None:
    here = Folder(root=str(_fill(tmp_path / "here", "a/1.png", "b/2.png")))
    there = Folder(root=str(_fill(tmp_path / "there", "a/1.png", "b/2.png")))
    more = Folder(root=str(_fill(tmp_path / "more", "a/1.png", "b/2.png", "b/3.png")))
    shifted = Folder(root=str(_fill(tmp_path / "shifted", "a/1.pngb", "x/2.png", "a/1.png")))
    assert here.fingerprint() == there.fingerprint()
    assert len({here.fingerprint(), more.fingerprint(), shifted.fingerprint()}) == 3


def test_many_paths_are_small_to_send_to_a_worker(tmp_path: Path) -> None:
    for number in range(500):
        (tmp_path / f"{number:03d}.png").touch()
    folder = Folder(root=str(tmp_path))
    assert len(pickle.dumps(folder)) < 500 * 32
    assert folder.name(499) == f"{tmp_path}/499.png"
    with pytest.raises(DataError, match="the file is empty"):
        decode(folder.read(3))
