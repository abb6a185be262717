"""Class folders: labels by folder, splits by folder, and what is wrong with a root in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timm.data.imagenet_info import ImageNetInfo
from torchvision.datasets import ImageFolder

from beit_pretrain.data.class_folders import ClassFolders
from beit_pretrain.data.folder import Folder
from beit_pretrain.data.module import DataModule
from beit_pretrain.errors import DataError


def _fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def _names(source: ClassFolders, split: str, root: Path) -> list[str]:
    return [os.path.relpath(source.name(index), root) for index in source.splits[split].tolist()]


def _labels(source: ClassFolders, split: str) -> list[int]:
    assert source.labels is not None
    return source.labels[source.splits[split]].tolist()


def _module(source: ClassFolders, **changes: Any) -> DataModule:
    settings: dict[str, Any] = {"batch_size": 4, "micro_batch_size": None, "workers": 0, "seed": 0}
    return DataModule(source=source, views=None, eval_views=None, bad_log=None, **(settings | changes))


def test_labels_and_splits_are_those_of_the_folders(tmp_path: Path) -> None:
    _fill(
        tmp_path,
        "train/b/2.png",
        "train/b/deep/er/1.jpg",
        "train/a-/9.png",
        "train/a/1.JPEG",
        "train/a/.hidden.png",
        "train/a/notes.txt",
        "train/.cache/1.png",
        "train/list.csv",
        "val/b/3.png",
        "held/a/4.png",
        "other/5.png",
    )
    source = ClassFolders(root=str(tmp_path), test="held")
    assert source.class_names == ["a", "a-", "b"] and len(source) == 6
    assert _names(source, "train", tmp_path) == [
        "train/a/1.JPEG",
        "train/a-/9.png",
        "train/b/2.png",
        "train/b/deep/er/1.jpg",
    ]
    assert _labels(source, "train") == [0, 1, 2, 2]
    assert _names(source, "val", tmp_path) == ["val/b/3.png"] and _labels(source, "val") == [2]
    assert _names(source, "test", tmp_path) == ["held/a/4.png"] and _labels(source, "test") == [0]
    assert source.labels is not None and source.labels.dtype == np.int64
    assert [source.read(index).decode() for index in range(6)] == [
        os.path.relpath(source.name(index), tmp_path) for index in range(6)
    ]


def test_classes_and_their_images_are_torchvisions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"train/{'n' * int(k)}{k}/{i}.png" for k in range(9) for i in range(int(rng.integers(1, 7)))]
    theirs = ImageFolder(str(_fill(tmp_path, *names) / "train"))
    ours = ClassFolders(root=str(tmp_path))
    assert ours.class_names == theirs.classes and ours.labels is not None
    assert [(ours.name(i), int(ours.labels[i])) for i in range(len(ours))] == theirs.samples


def test_folders_that_are_not_there_count_as_absent(tmp_path: Path) -> None:
    _fill(tmp_path, *(f"train/{label}/{i}.png" for label in "ab" for i in range(10)))
    assert set(ClassFolders(root=str(tmp_path), val="val", test="test").splits) == {"train"}
    (tmp_path / "val/a").mkdir(parents=True)  # no image in it: some of the training images are held out
    parts = _module(ClassFolders(root=str(tmp_path)), val_share=0.2).splits
    assert {name: len(part) for name, part in parts.items()} == {"train": 16, "val": 4}


def test_without_a_train_folder_the_classes_lie_in_the_root(tmp_path: Path) -> None:
    _fill(tmp_path, "a/1.png", "b/1.png", "b/2.png")
    source = ClassFolders(root=str(tmp_path), train=None, val=None)
    assert source.class_names == ["a", "b"] and _labels(source, "train") == [0, 1, 1]
    _fill(tmp_path, "val/b/3.png")
    source = ClassFolders(root=str(tmp_path), train=None)
    assert source.class_names == ["a", "b"] and _labels(source, "val") == [1]


def test_what_is_held_out_is_stratified_and_every_class_keeps_an_image(tmp_path: Path) -> None:
    sizes = [1, 1, 2, 3, 10, 40, 163]
    names = [f"train/{label}/{i}.png" for label, size in enumerate(sizes) for i in range(size)]
    source = ClassFolders(root=str(_fill(tmp_path, *names)))
    assert source.labels is not None
    for share, expected in [(0.1, [0, 0, 0, 0, 1, 4, 17]), (0.02, [0, 0, 0, 0, 0, 1, 4])]:
        parts = _module(source, val_share=share).splits
        held_out = np.bincount(source.labels[parts["val"]], minlength=7)
        assert held_out.tolist() == expected
        assert np.bincount(source.labels[parts["train"]]).tolist() == (np.array(sizes) - held_out).tolist()
        assert np.array_equal(np.sort(np.concatenate([parts["train"], parts["val"]])), np.arange(220))
    parts = _module(source, val_share=0.95).splits
    assert np.bincount(source.labels[parts["train"]]).min() == 1


def test_classes_of_one_image_each_leave_nothing_to_hold_out(tmp_path: Path) -> None:
    source = ClassFolders(root=str(_fill(tmp_path, *(f"train/{label}/1.png" for label in range(50)))))
    parts = _module(source, val_share=0.1).splits
    assert set(parts) == {"train"} and len(parts["train"]) == 50


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    _fill(tmp_path, "outside/1.png", "root/train/a/1.png", "root/train/b/1.png")
    (tmp_path / "root/train/c").symlink_to(tmp_path / "outside")
    (tmp_path / "root/train/a/back").symlink_to(tmp_path / "root/train")
    (tmp_path / "root/train/b/self").symlink_to(tmp_path / "root/train/b")
    source = ClassFolders(root=str(tmp_path / "root"))
    assert source.class_names == ["a", "b", "c"] and _labels(source, "train") == [0, 1, 2]


def test_the_fingerprint_tells_other_files_but_not_another_place(tmp_path: Path) -> None:
    names = ("train/a/1.png", "train/b/2.png", "val/a/3.png")
    variants: dict[str, Iterable[str]] = {
        "here": names,
        "there": names,
        "more": (*names, "train/b/3.png"),
        "renamed": ("train/a/1.png", "train/c/2.png", "val/a/3.png"),
        "moved": ("train/a/1.png", "train/b/2.png", "val/b/3.png"),
    }
    prints = {
        name: ClassFolders(root=str(_fill(tmp_path / name, *files))).fingerprint()
        for name, files in variants.items()
    }
    assert prints["here"] == prints.pop("there") and len(set(prints.values())) == len(prints)


def test_odd_bytes_in_names_survive(tmp_path: Path) -> None:
    for folder in (b"a", b"\xff\xfe"):
        path = os.path.join(os.fsencode(tmp_path), b"train", folder)
        os.makedirs(path)
        with open(os.path.join(path, b"\xff.png"), "wb") as file:
            file.write(folder)
    source = ClassFolders(root=str(tmp_path))
    assert source.read(1) == b"\xff\xfe" and source.class_names == ["a", os.fsdecode(b"\xff\xfe")]
    assert len(source.fingerprint()) == 64


# --- what is wrong ------------------------------------------------------------------------------------------


def test_a_root_that_is_no_root_is_named(tmp_path: Path) -> None:
    root = re.escape(str(tmp_path))
    with pytest.raises(
        DataError, match=rf"data\.root={root}/no does not exist; set data\.root to the folder"
    ):
        ClassFolders(root=f"{tmp_path}/no")
    _fill(tmp_path, "a/1.png", "b/1.png", "c.png")
    with pytest.raises(DataError, match=r"c\.png is a file, not a folder; set data\.root"):
        ClassFolders(root=f"{tmp_path}/c.png")
    with pytest.raises(DataError, match=r"has no folder train; set data\.source\.train to .* or to null if"):
        ClassFolders(root=str(tmp_path))
    with pytest.raises(DataError, match=r"data\.root=\['x'\]: class folders have one root; set data\.root"):
        ClassFolders(root=["x"])  # pyright: ignore[reportArgumentType]


def test_fewer_than_two_classes_are_no_classes(tmp_path: Path) -> None:
    _fill(tmp_path, "train/train/a/1.png")
    with pytest.raises(DataError, match=r"train=train\) has 1 class folder \(train\), at least 2 are needed"):
        ClassFolders(root=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has 0 class folders, at least 2 are needed; set data\.root"):
        ClassFolders(root=f"{tmp_path}/empty", train=None)


def test_images_outside_of_the_class_folders_are_counted_and_named(tmp_path: Path) -> None:
    _fill(tmp_path, "train/a/1.png", "train/b/1.png", "val/2.JPEG", "val/1.JPEG", "val/list.txt")
    with pytest.raises(DataError) as caught:
        ClassFolders(root=str(tmp_path))
    assert str(caught.value) == (
        f"data.root={tmp_path}: 2 images in {tmp_path}/val outside of any class folder, such as 1.JPEG; move "
        "each into the folder of its class, or set data.source.val=null to leave this part out"
    )
    _fill(tmp_path, "train/loose.png")
    with pytest.raises(DataError, match=r"1 image in .*/train outside of any .* folder of its class$"):
        ClassFolders(root=str(tmp_path), val=None)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_held_out_class_that_train_lacks_is_named(split: str, tmp_path: Path) -> None:
    _fill(tmp_path, "train/a/1.png", "train/b/1.png", f"{split}/c/1.png", f"{split}/a/1.png")
    message = rf"{split} has 1 class folder that train has not: c; add .* or set data\.source\.{split}=null"
    with pytest.raises(DataError, match=message):
        ClassFolders(root=str(tmp_path), test="test")


def test_class_folders_without_a_training_image_are_named(tmp_path: Path) -> None:
    _fill(tmp_path, "train/a/1.png", "train/b/1.png", *(f"train/e{i}/notes.txt" for i in range(7)))
    message = (
        r"7 of 9 class folders without a training image \(\.jpg .*\): e0, e1, e2, e3, e4, \.\.\. \(7 in all\)"
    )
    with pytest.raises(DataError, match=message):
        ClassFolders(root=str(tmp_path))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path, "train/a/1.png", "train/b/1.png")

    def refuse(path: bytes) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"data\.root: .*/train cannot be listed: .*Permission denied"):
        ClassFolders(root=str(tmp_path))


def _synset_folders(root: Path, names: Iterable[str]) -> str:
    root.mkdir()
    for name in names:
        os.mkdir(root / name)
    return str(root)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    _fill(tmp_path, "train/a/1.png", "train/b/1.png")
    assert len(ClassFolders(root=str(tmp_path), classes=2)) == 2
    for expected in (3, 1000):  # nothing here is ImageNet: its names would be no help
        with pytest.raises(DataError) as caught:
            ClassFolders(root=str(tmp_path), classes=expected)
        assert str(caught.value) == (
            f"data.root={tmp_path} (data.source.train=train) has 2 class folders, not the {expected} of "
            "data.source.classes; set data.source.classes=null to train on what is there"
        )


def test_missing_and_foreign_classes_of_imagenet_are_named(tmp_path: Path) -> None:
    listed = ImageNetInfo("imagenet-1k").label_names()
    root = _synset_folders(tmp_path / "in1k", [*listed[2:], "archive"])
    with pytest.raises(DataError) as caught:
        ClassFolders(root=root, train=None, val=None, classes=1000)
    assert str(caught.value) == (
        f"data.root={root} has 999 class folders, not the 1000 of data.source.classes; add what ImageNet-1k has: "
        f"{listed[0]}, {listed[1]}, or move away what ImageNet-1k has not: archive, or set "
        "data.source.classes=null to train on what is there"
    )


def test_the_two_synsets_that_22k_has_too_many_are_named(tmp_path: Path) -> None:
    root = _synset_folders(tmp_path / "in22k", ImageNetInfo("imagenet-21k-goog").label_names())
    with pytest.raises(DataError) as caught:
        ClassFolders(root=root, train=None, val=None, classes=21841)
    assert str(caught.value) == (
        f"data.root={root} has 21843 class folders, not the 21841 of data.source.classes; move away what "
        "ImageNet-22k of fall 2011 has not: n03931044, n09859684 (they are in Google's list of 21,843 classes), or "
        "set data.source.classes=null to train on what is there"
    )


def test_images_are_found_as_by_the_source_of_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    names = [f"{k}/{'sub/' * int(rng.integers(3))}{i}.png" for k in "abc" for i in range(20)]
    _fill(tmp_path, *names)
    ours, theirs = ClassFolders(root=str(tmp_path), train=None, val=None), Folder(root=str(tmp_path))
    assert [ours.name(i) for i in range(60)] == [theirs.name(i) for i in range(60)]
    assert np.array_equal(ours.labels, theirs.labels) and ours.class_names == theirs.class_names  # pyright: ignore


def test_a_dead_link_where_a_class_or_a_split_may_have_been_is_an_error(tmp_path: Path) -> None:
    _fill(tmp_path, "train/a/1.png", "train/001.b/2.png", "val/a/3.png")
    (tmp_path / "train/a/4.png").symlink_to("gone.png")
    source = ClassFolders(root=str(tmp_path))
    assert _names(source, "train", tmp_path) == ["train/001.b/2.png", "train/a/1.png", "train/a/4.png"]
    (tmp_path / "train/002.c").symlink_to("/gone/002.c")
    with pytest.raises(
        DataError, match=r"train/002\.c is a link to /gone/002\.c, which is not there: .* the link$"
    ):
        ClassFolders(root=str(tmp_path))
    (tmp_path / "train/002.c").unlink()
    (tmp_path / "test").symlink_to("/gone/test")
    with pytest.raises(DataError, match=r"/test is a link to .* or set data\.source\.test=null"):
        ClassFolders(root=str(tmp_path), test="test")
    assert set(ClassFolders(root=str(tmp_path)).splits) == {"train", "val"}
