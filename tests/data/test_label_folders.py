"""Images with label maps in two trees: which go together, what is in them, and what is wrong in one line."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.label_pairs import NAMES, png, source, write, write_pair
from PIL import Image

from beit_pretrain.data.label_folders import LabelFolders
from beit_pretrain.data.sources import SceneSource
from beit_pretrain.errors import DataError, LabelError

TABLE = """Idx\tRatio\tTrain\tVal\tStuff\tName
1\t0.1576\t11664\t1172\t1\twall
2\t0.1072\t6046\t612\t1\tbuilding, edifice
3 \t0.0878\t8265\t796\t1\tbed \t\t
4\t0.0621\t9336\t917\t0\tscreen door;screen
"""


def _map(root: Path, data: bytes, **changes: Any) -> torch.Tensor:
    """What the source reads of one label map file."""
    write_pair(root, "a", [[0]])
    write(root / "annotations/training/a.png", data)
    return source(root, **changes).label_map(0)


# --- layout -------------------------------------------------------------------------------------------------


def test_a_map_is_the_file_of_the_same_name_in_the_other_tree(tmp_path: Path) -> None:
    for name in ("b/2", "b/deep/1.part", "a", ".hidden/3", "b/.4"):
        write_pair(tmp_path, name, np.full((3, 4), 1))
    (tmp_path / "images/training/a.png").rename(tmp_path / "images/training/a.JPEG")
    write(tmp_path / "annotations/training/notes.txt", b"")
    write_pair(tmp_path, "v", np.full((2, 5), 2), "validation")
    write_pair(tmp_path, "t", np.full((5, 2), 3), "held")
    found = source(tmp_path, test="held")
    assert isinstance(found, SceneSource) and found.labels is None and found.class_names == list(NAMES)
    assert [os.path.relpath(found.name(i), tmp_path / "images") for i in range(len(found))] == [
        "training/a.JPEG",
        "training/b/2.png",
        "training/b/deep/1.part.png",
        "validation/v.png",
        "held/t.png",
    ]
    assert [os.path.relpath(found.map_name(i), tmp_path / "annotations") for i in range(len(found))] == [
        "training/a.png",
        "training/b/2.png",
        "training/b/deep/1.part.png",
        "validation/v.png",
        "held/t.png",
    ]
    assert {name: part.tolist() for name, part in found.splits.items()} == {
        "train": [0, 1, 2],
        "val": [3],
        "test": [4],
    }
    assert [tuple(found.label_map(i).shape) for i in (0, 3, 4)] == [(3, 4), (2, 5), (5, 2)]
    assert [int(found.label_map(i)[0, 0]) for i in (0, 3, 4)] == [1, 2, 3]
    assert set(source(tmp_path, val="absent").splits) == {"train"} == set(source(tmp_path, val=None).splits)


def test_the_fingerprint_is_of_names_and_classes_not_of_the_place(tmp_path: Path) -> None:
    for root in ("one", "two"):
        for name in ("a", "b"):
            write_pair(tmp_path / root, name, [[1]])
    first = source(tmp_path / "one").fingerprint()
    assert first == source(tmp_path / "two").fingerprint()
    assert first != source(tmp_path / "two", reduce_zero_label=True).fingerprint()
    (tmp_path / "two/classes.txt").write_text("\n".join((*NAMES, "more")))
    assert first != source(tmp_path / "two").fingerprint()
    write_pair(tmp_path / "one", "c", [[1]])
    assert first != source(tmp_path / "one").fingerprint()


def test_all_that_does_not_match_comes_in_one_message(tmp_path: Path) -> None:
    for number in range(5):
        write_pair(tmp_path, f"{number}", [[1]])
        (tmp_path / f"images/training/{number}.png").unlink()
    for name in ("x.jpg", "y.jpg", "y.png"):
        write(tmp_path / "images/training" / name, b"")
    write(tmp_path / "annotations/training/y.png", b"")
    with pytest.raises(DataError) as caught:
        source(tmp_path)
    message = str(caught.value)
    assert (
        message.startswith(f"data.root={tmp_path}: {tmp_path}/images/training and ") and "\n" not in message
    )
    assert "without a label map (.png of the same name): 1 (x);" in message
    assert "without an image (.jpg " in message and "): 5 (0, 1, 2, ...);" in message
    assert "more than one image for one label map: 1 (y)." in message


def test_an_empty_part_and_absent_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "images/training").mkdir(parents=True)
    with pytest.raises(
        DataError,
        match=r"no folder annotations/training; set .*, data\.source\.annotations and data\.source\.train",
    ):
        source(tmp_path)
    (tmp_path / "annotations/training").mkdir(parents=True)
    with pytest.raises(DataError, match=r"do not match: no image\. Complete or remove them$"):
        source(tmp_path)
    with pytest.raises(DataError, match=r"no folder pictures/training; set .* data\.source\.images"):
        source(tmp_path, images="pictures")
    write_pair(tmp_path, "a", [[1]])
    write(tmp_path / "images/validation/b.png", b"")
    (tmp_path / "annotations/validation").mkdir()
    with pytest.raises(DataError, match=r"1 \(b\)\. Complete or remove them, or set data\.source\.val=null"):
        source(tmp_path)
    with pytest.raises(
        DataError, match=r"data\.root=.*none does not exist; set data\.root to the folder above"
    ):
        LabelFolders(root=str(tmp_path / "none"), classes="c", reduce_zero_label=True)
    roots: Any = ["a", "b"]
    with pytest.raises(DataError, match=r"have one root; set data\.root to a single folder"):
        LabelFolders(root=roots, classes="c", reduce_zero_label=True)


# --- classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stuff", [True, False])
def test_ade20ks_table_gives_each_class_its_first_name(stuff: bool, tmp_path: Path) -> None:
    write_pair(tmp_path, "a", [[1]])
    rows = [line.split("\t") for line in TABLE.splitlines()]
    text = "\n".join("\t".join(row if stuff else [*row[:4], *row[5:]]) for row in rows)
    (tmp_path / "info.txt").write_text(text + "\n\n")
    for place in ("info.txt", str(tmp_path / "info.txt")):
        found = source(tmp_path, classes=place, class_count=4)
        assert found.class_names == ["wall", "building", "bed", "screen door"]
    (tmp_path / "info.txt").write_text(text.replace("3 \t", "5\t"))
    with pytest.raises(
        DataError, match=r"data\.source\.classes=info\.txt: line 4 should have Idx 3 and a Name"
    ):
        source(tmp_path, classes="info.txt")


def test_a_plain_list_of_names_keeps_commas_and_passes_over_empty_lines(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", [[1]])
    (tmp_path / "classes.txt").write_text("\ufeffwall, brick\n\n  floor \r\n")
    assert source(tmp_path).class_names == ["wall, brick", "floor"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {"classes": None}, r"data\.source\.classes=null names no file in data\.root=.*one per line"),
        (None, {"classes": "no.txt"}, r"data\.source\.classes=no\.txt names no file"),
        ("", {}, r"classes\.txt has 0 names; give 2 to 255"),
        ("\n".join(map(str, range(256))), {}, "has 256 names; give 2 to 255"),
        (
            "a\nb\nc",
            {"class_count": 4},
            r"has 3 names, not the 4 of data\.source\.class_count; .*class_count=null",
        ),
        ("a\nb\na", {}, r"has names twice \(a\); give every class its own"),
        ("a\nb\na", {"class_count": 4}, r"names twice \(a\).*; .*3 names, not the 4"),
    ],
)
def test_what_is_wrong_with_the_classes_is_said(
    text: Any, options: Any, message: str, tmp_path: Path
) -> None:
    write_pair(tmp_path, "a", [[1]])
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        source(tmp_path, **options)


# --- label maps ---------------------------------------------------------------------------------------------


def _pillow(values: np.ndarray, mode: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(values.astype({"1": bool, "I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        image.putpalette(
            [(7 * i + 31) % 256 for i in range(768)]
        )  # colours that have nothing to do with labels
    assert image.mode == mode
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "file",
    [
        *(pytest.param(lambda v, d=d: png(v, d), id=f"grey of {d} bits") for d in (1, 2, 4, 8, 16)),
        *(
            pytest.param(lambda v, d=d: png(v, d, 3, bytes(range(90, 96))), id=f"palette of {d} bits")
            for d in (1, 2, 4, 8)
        ),
        *(pytest.param(lambda v, m=m: _pillow(v, m), id=f"Pillow's {m}") for m in ("1", "L", "P", "I;16")),
        pytest.param(lambda v: _pillow(v, "P", transparency=1), id="transparent palette"),
    ],
)
def test_numbers_are_read_as_they_are_stored_in_every_kind_of_png(file: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2, (7, 11))
    found = _map(tmp_path, file(values))
    assert found.dtype == torch.uint8 and found.tolist() == values.tolist()


@pytest.mark.parametrize(("depth", "colour"), [(2, 0), (4, 0), (8, 0), (16, 0), (2, 3), (4, 3), (8, 3)])
def test_every_class_survives_in_few_bits(depth: int, colour: int, tmp_path: Path) -> None:
    count = min(1 << depth, 255)
    values = np.arange(count)[None]
    write(tmp_path / "classes.txt", "\n".join(map(str, range(count))).encode())
    palette = bytes(np.random.default_rng(1).integers(0, 256, 3 * count, dtype=np.uint8)) if colour else b""
    assert _map(tmp_path, png(values, depth, colour, palette)).tolist() == values.tolist()


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_what_is_ignored_and_what_is_shifted(reduce_zero_label: bool, tmp_path: Path) -> None:
    write(tmp_path / "classes.txt", "\n".join(map(str, range(254 + (not reduce_zero_label)))).encode())
    found = _map(tmp_path, png(np.arange(256)[None]), reduce_zero_label=reduce_zero_label)
    for value, label in enumerate(found[0].tolist()):
        expected = value if not reduce_zero_label or value == 255 else 255 if value == 0 else value - 1
        assert label == expected


@pytest.mark.parametrize(
    ("values", "depth", "reduce_zero_label", "message"),
    [
        (
            [[0, 5]],
            8,
            False,
            r"label map .*/annotations/training/a\.png has the value 5, which is none of the 5 classes: with "
            r"data\.source\.reduce_zero_label=false they are 0 to 4, and 255 is ignored; if the first class is 1 in "
            r"your files, set data\.source\.reduce_zero_label=true \(0 is then ignored\)$",
        ),
        ([[0, 6]], 8, False, r"the value 6, .*; add what is missing to data\.source\.classes=classes\.txt"),
        (
            [[0, 6]],
            8,
            True,
            r"the value 6, .*=true they are 1 to 5, and 0 and 255 are ignored; add what is missing to data",
        ),
        ([[0, 254]], 8, True, "the value 254, "),
        ([[0, 256]], 16, False, "the value 256, "),
        ([[0, 65535]], 16, True, "the value 65535, "),
    ],
)
def test_a_label_that_is_no_class_is_refused_with_its_mend(
    values: Any, depth: int, reduce_zero_label: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LabelError, match=message):
        _map(tmp_path, png(values, depth), reduce_zero_label=reduce_zero_label)


@pytest.mark.parametrize(("colour", "mode"), [(2, "RGB"), (4, "LA"), (6, "RGBA")])
def test_colours_are_no_labels(colour: int, mode: str, tmp_path: Path) -> None:
    values = np.ones((2, 3, len(mode)), int)
    with pytest.raises(LabelError, match=rf"a\.png holds colours \(mode {mode}\), not class numbers; store"):
        _map(tmp_path, png(values, 8, colour))


def test_a_file_that_cannot_be_read_is_a_bad_file_not_a_wrong_label(tmp_path: Path) -> None:
    whole = png(np.random.default_rng(0).integers(0, 5, (40, 40)))
    jpeg = io.BytesIO()
    Image.new("L", (8, 8)).save(jpeg, "JPEG")
    for data, message in ((whole[:200], r"a\.png: "), (jpeg.getvalue(), "is no PNG file"), (b"", "no PNG")):
        with pytest.raises(DataError, match=message) as caught:
            _map(tmp_path, data)
        assert not isinstance(caught.value, LabelError)
    (tmp_path / "annotations/training/a.png").unlink()
    with pytest.raises(DataError):
        source(tmp_path)


# --- a look before the start --------------------------------------------------------------------------------


def test_the_look_counts_what_numpy_counts_over_maps_spread_evenly(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    maps = [rng.choice([0, 1, 2, 3, 255], (rng.integers(2, 9), rng.integers(2, 9))) for _ in range(10)]
    for number, values in enumerate(maps):
        write_pair(tmp_path, str(number), values)
    found = source(tmp_path)
    indices = np.arange(1, 10)
    for most, seen in ((None, range(1, 10)), (20, range(1, 10)), (3, (1, 4, 7)), (4, (1, 3, 5, 7))):
        pixels = np.concatenate([maps[i].ravel() for i in seen])
        labelled = pixels[pixels != 255]
        look = found.look(indices, most)
        assert look["label_maps"] == len(list(seen))
        assert np.allclose(look["share"], np.bincount(labelled, minlength=5) / len(labelled))
        assert look["ignored"] == pytest.approx((pixels == 255).mean())
        assert look["remarks"] == ["1 of 5 classes never occur: pot"]


def test_the_look_passes_over_unreadable_maps_and_ends_at_a_wrong_label(tmp_path: Path) -> None:
    for number in range(4):
        write_pair(tmp_path, str(number), [[number]])
    write(tmp_path / "annotations/training/1.png", b"broken")
    look = source(tmp_path).look(np.arange(4), None)
    assert look["label_maps"] == 3 and np.allclose(look["share"], [1 / 3, 0, 1 / 3, 1 / 3, 0])
    assert look["remarks"] == ["2 of 5 classes never occur: floor, pot"]
    write(tmp_path / "annotations/training/3.png", png([[9]]))
    with pytest.raises(LabelError, match="the value 9"):
        source(tmp_path).look(np.arange(4), None)


def test_the_look_refuses_maps_without_a_label_and_counts_many_absent_classes(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", [[255, 255]])
    write_pair(tmp_path, "b", [[1, 255]])
    with pytest.raises(
        DataError, match=r"no pixel is labelled in the 1 label maps .* \(255\); set data\.root"
    ):
        source(tmp_path).look(np.array([0]), None)
    write_pair(tmp_path, "c", [[0, 1]])
    write(tmp_path / "classes.txt", "\n".join(map(str, range(9))).encode())
    assert source(tmp_path).look(np.arange(3), None)["remarks"] == ["7 of 9 classes never occur"]


def test_the_look_refuses_masks_of_one_class(tmp_path: Path) -> None:
    write(tmp_path / "classes.txt", b"ground\nflower")
    for number in range(3):
        write_pair(tmp_path, f"{number}", [[0, 255, 255]])  # the usual mask of black and white
    message = (
        r"^ground is the only class in the 3 label maps .* 66\.7% .* ignored \(255\); .* store 1 instead"
    )
    with pytest.raises(DataError, match=message + "$"):
        source(tmp_path).look(np.arange(3), None)
    message = message.replace("3 label", "2 label")
    with pytest.raises(
        DataError, match=message + r", or raise data\.check_label_maps if the others are rare$"
    ):
        source(tmp_path).look(np.arange(3), 2)
    for number in range(3):
        write_pair(tmp_path, f"{number}", [[0, 1, 1]])
    with pytest.raises(
        DataError, match=r"flower|ground is the only .*; if 0 is a class .*reduce_zero_label=false$"
    ):
        source(tmp_path, reduce_zero_label=True).look(np.arange(3), None)
    for number in range(3):  # nothing is ignored: a class may be rare, until all maps were looked at
        write_pair(tmp_path, f"{number}", [[0, 0, 0]])
    assert source(tmp_path).look(np.arange(3), 2)["remarks"] == ["1 of 2 classes never occur: flower"]
    with pytest.raises(
        DataError, match=r"ground is the only class in the 3 label maps .* 0\.0% of their pixels"
    ):
        source(tmp_path).look(np.arange(3), None)


# --- what cannot be looked at -------------------------------------------------------------------------------


def test_a_dead_link_is_an_unreadable_file_of_a_pair_and_not_a_missing_one(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_pair(tmp_path, name, [[0, 1]])
    for path in (tmp_path / "images/training/b.png", tmp_path / "annotations/training/c.png"):
        path.unlink()
        path.symlink_to("/gone/x.png")
    found = source(tmp_path)
    assert len(found) == 3
    with pytest.raises(FileNotFoundError, match=r"images/training/b\.png"):
        found.read(1)
    with pytest.raises(FileNotFoundError, match=r"annotations/training/c\.png"):
        found.label_map(2)
    (tmp_path / "images/validation").symlink_to("/gone/validation")
    with pytest.raises(
        DataError, match=r"images/validation is a link to /gone/validation, .*data\.source\.val=null"
    ):
        source(tmp_path)


def test_a_damaged_map_is_never_read_in_part(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 5, (31, 17))
    write_pair(tmp_path, "a", values)
    whole = (tmp_path / "annotations/training/a.png").read_bytes()
    found = source(tmp_path)
    for place in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        for data in (bytes(flipped), whole[:place]):
            write(tmp_path / "annotations/training/a.png", data)
            with pytest.raises(DataError, match=r"label map .*a\.png"):
                found.label_map(0)


def test_the_look_notices_classes_from_0_that_were_read_as_from_1(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", [[0, 1, 2, 3, 4]])  # a set of five classes whose first is 0
    remarks = source(tmp_path, reduce_zero_label=True).look(np.array([0]), None)["remarks"]
    assert remarks == [
        "1 of 5 classes never occur: pot",
        "the last class, pot, never occurs though all others do: if the first class is 0 in your files, set "
        "data.source.reduce_zero_label=false",
    ]
    for values, options in (
        ([[0, 1, 2, 3, 4, 5]], {"reduce_zero_label": True}),  # rightly so
        ([[0, 1, 2, 3]], {"reduce_zero_label": True}),  # a rare class
        ([[1, 2, 3, 4]], {"reduce_zero_label": True}),  # nothing is 0
        ([[0, 1, 2, 3, 255]], {}),
    ):
        write_pair(tmp_path, "a", values)
        assert "set data" not in str(source(tmp_path, **options).look(np.array([0]), None)["remarks"])
