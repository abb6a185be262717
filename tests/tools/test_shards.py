"""Whether shards are whole and what is in them, as beit-tools shards tells."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from data import tars

from beit_pretrain.data.shard_index import read_index
from beit_pretrain.data.shard_tar import scan
from beit_pretrain.errors import DataError
from beit_pretrain.tools.shards import show, verify

COUNTS = {"train": [5, 4], "val": [2]}
FIRST, SECOND = "train-000000.tar", "train-000001.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tars.write_set(tmp_path, COUNTS)
    return tmp_path


def said(folder: Path, capsys: pytest.CaptureFixture[str], code: int = 1) -> list[str]:
    """The lines of a verification that ends with this exit code; the last is the sum."""
    assert verify(str(folder), 2) == code
    return capsys.readouterr().out.splitlines()


def test_a_whole_set_is_said_to_be_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(folder, capsys, code=0)
    assert line.startswith(f"{folder} is as it was written (size, SHA-256, ") and "not decoded" in line
    assert line.endswith(": 3 shards, 11 images, 0.00 GB")


def test_a_change_of_any_byte_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / SECOND
    rows, size = scan(path)[0], path.stat().st_size
    image = int(rows["offset"][1])
    key, end = "000000006", int(rows["offset"][-1] + rows["size"][-1])
    for place, words in [
        (image, f"{SECOND}, sample {key}: its bytes are not those that were written (CRC)"),
        (image - 500, "damaged"),  # its header
        (end, "its SHA-256 is another, though every image and label is as it was written"),  # padding
        (size - 1, "its SHA-256 is another"),  # behind the end mark
    ]:
        tars.flip(path, place)
        fault, total = said(folder, capsys)
        assert words in fault and total.startswith(
            f"{folder}: 1 of 3 shards are not as they were written; copy"
        )
        tars.flip(path, place)
    assert len(said(folder, capsys, code=0)) == 1


def test_every_faulty_shard_has_its_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars.write(folder / FIRST, tars.samples(30))
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    os.unlink(folder / "val-000000.tar")
    lines = said(folder, capsys)
    assert lines[0].startswith(f"{FIRST}: it has ") and " bytes instead of " in lines[0]
    assert (
        lines[1].startswith(f"{SECOND}: it has ") and lines[2] == "val-000000.tar: No such file or directory"
    )
    assert lines[3].startswith(f"{folder}: 3 of 3 shards") and "beit-tools shards write" in lines[3]


def test_other_images_of_the_same_size_labels_and_places_are_told_apart(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / FIRST
    content = tars.samples(5)
    for sample in content:
        sample["cls"] = "9"
    tars.write(path, content)
    lines = said(folder, capsys)
    assert lines[:-1] == [
        *(f"{FIRST}, sample 00000000{n}: its label is not the one that was written" for n in range(3)),
        f"{FIRST}, 2 more samples: its label is not the one that was written",
    ]
    first, second = tars.samples(5)[:2]
    first["jpg"], second["jpg"] = first["jpg"] + b"x", second["jpg"][:-1]
    tars.write(path, [first, second, *tars.samples(5)[2:]])
    lines = said(folder, capsys)
    assert lines[0] == f"{FIRST}, sample 000000000: its image lies elsewhere or has another size"
    assert not any("CRC" in line for line in lines)
    whole = path.read_bytes()
    tars.write(path, tars.samples(4))
    path.write_bytes(path.read_bytes().ljust(len(whole), b"\0"))
    assert said(folder, capsys)[0] == f"{FIRST}: it holds 4 samples instead of 5"


def test_without_an_index_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    for command in (show, lambda root: verify(root, 1)):
        with pytest.raises(DataError, match=r"^\S+index\.json cannot be read: No such file"):
            command(str(tmp_path))


def test_what_is_in_a_set_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change: dict[str, Any] = {
        "class_names": ["rose", "tulip", "daisy", "violet"],
        "flaws": [[1, "no image"], *([n, "no label"] for n in range(2, 5))],
        "written": {
            "by": "beit-tools",
            "resize": 256,
            "size_mb": None,
            "left_out": [[3, "a.jpg", "truncated"], [5, "b.jpg", "no image"]],
            "psnr": {"images": 200, "mean": 41.234, "worst": 33.3},
        },
    }
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    show(str(folder))
    out = capsys.readouterr().out
    rows = {
        cells[0]: cells[1:] for line in out.splitlines() if len(cells := line.strip("│ ").split(" │ ")) == 5
    }
    sizes = read_index(folder).entries["size"]
    stripped = {name: [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert {name.strip(): cells for name, cells in stripped.items()} == {
        "train": ["9", "2", "0.00", f"{sizes[:9].mean():,.0f}"],
        "val": ["2", "1", "0.00", f"{sizes[9:].mean():,.0f}"],
        "all": ["11", "3", "0.00", f"{sizes.mean():,.0f}"],
    }
    for line in [
        "4 classes (rose, tulip, daisy, ...), 0 to 4 images each",
        "by: beit-tools",
        "resize: 256",
        "left out: 2",
        "psnr: images 200, mean 41.2, worst 33.3",
        "unusable: 1 (no image)",
        "unusable: 1 more",
    ]:
        assert line in out.splitlines()
    assert "size mb" not in out


def test_what_a_set_says_does_not_command_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil, deep = "a\x1b[2J\x9b\u202e\nb", {"x": 1}
    for _ in range(200):
        deep = {"x": deep}
    path = folder / "index.json"
    change = {"class_names": [evil] * 3, "flaws": [[1, evil]], "written": {evil: evil, "y": {evil: deep}}}
    change["passed_over"] = {"images": 1, "unclear": 0, "example": evil}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    show(str(folder))
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n")) and out.count(r"a\x1b[2J\x9b\u202e\nb") >= 5
