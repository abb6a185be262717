"""What a tar holds, against webdataset's own reader and GNU tar; and the index beside the shards."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import tars

from beit_pretrain.data.shard_index import Shard, ShardIndex, parse_index, read_index, write_index
from beit_pretrain.data.shard_tar import INDEX, key_at, scan
from beit_pretrain.data.shards import ShardSource
from beit_pretrain.errors import DataError

SUFFIX = ("jpg", "png", "jpeg", "webp")


def check(path: Path) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """A tar's scan, after it was compared with webdataset's reader."""
    rows, flaws, _ = scan(path)
    truth = tars.read([path])
    data = path.read_bytes()
    assert rows.dtype == INDEX and len(rows) == len(truth)
    flawed = {row for row, _ in flaws}
    with path.open("rb") as file:
        for number, (row, sample) in enumerate(zip(rows, truth, strict=True)):
            if number in flawed:
                continue
            offset, size, crc, label = row.item()
            image = next(sample[suffix] for suffix in SUFFIX if suffix in sample)
            assert data[offset : offset + size] == image and crc == zlib.crc32(image)
            assert label == (int(sample["cls"]) if "cls" in sample else -1)
            assert key_at(file.fileno(), offset) == sample["__key__"]
    return rows, flaws


def test_the_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    path = tars.write(tmp_path / "a.tar", tars.samples(50))
    total = hashlib.sha256()
    rows, flaws = check(path)
    assert len(rows) == 50 and flaws == [] and rows["label"].tolist() == [n % 3 for n in range(50)]
    assert np.array_equal(scan(path, total)[0], rows)
    assert total.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_samples_without_labels_have_none(tmp_path: Path) -> None:
    rows, flaws = check(tars.write(tmp_path / "a.tar", tars.samples(5, classes=None)))
    assert rows["label"].tolist() == [-1] * 5 and flaws == []


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_names_of_any_length_and_script_in_folders_and_with_dots(tmp_path: Path, form: int) -> None:
    stems = [
        "n01/a",
        "n01.v2/a",
        "x" * 99,
        "long/" * 60 + "name",
        "y" * 200,
        "Ähre/日本",
        "__data/b",
        "z" * 250,
    ]
    members = []
    for number, stem in enumerate(stems):
        members += [(f"{stem}.{SUFFIX[number % 4].upper()}", bytes([number]) * (number * 300 + 1))]
        members += [(f"{stem}.CLS", str(number).encode())]
    rows, flaws = check(tars.archive(tmp_path / "a.tar", members, format=form))
    assert rows["label"].tolist() == list(range(len(stems))) and flaws == []


def test_what_gnu_tar_packs_is_read_and_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/" + "c" * 120, "ü"):
        (folder / f"{name}.jpg").write_bytes(name.encode() * 700)
        (folder / f"{name}.cls").write_text("7\n")
    (folder / "link.jpg").symlink_to("a.jpg")
    (folder / "other.jpg").hardlink_to(folder / "a.jpg")
    for form in ("pax", "gnu"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", folder, "."], check=True)
        rows, flaws = check(path)
        assert rows["label"].tolist() == [7] * 4 and flaws == []


def test_hidden_names_and_meta_data_belong_to_no_sample(tmp_path: Path) -> None:
    members = [
        ("__meta__", b"x"),
        ("__dir__/a.jpg", b"x"),
        ("._b.jpg", b"x"),
        ("README", b"x"),
        ("b.jpg", b"image"),
    ]
    rows, flaws = check(tars.archive(tmp_path / "a.tar", members))
    assert rows["size"].tolist() == [5] and flaws == []


@pytest.mark.parametrize(
    ("members", "reason", "label"),
    [
        ([("a.json", b"{}")], r"sample a: no image \(\.jpg", -1),
        ([("a.jpg", b"x"), ("a.cls", b"rose")], r"its label a\.cls is no class number", -1),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "no class number", -1),
        ([("a.jpg", b"x"), ("a.cls", b"")], "no class number", -1),
        ([("a.jpg", b"x"), ("a.cls", b"1_0")], "no class number", -1),
        ([("a.jpg", b"x"), ("a.cls", b"99999999999999")], "no class number", -1),
        ([("a.jpg", b""), ("a.cls", b"4")], "its image has no bytes", 4),
    ],
)
def test_a_sample_that_is_unusable_keeps_its_place_with_the_reason(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str, label: int
) -> None:
    around = [("0.jpg", b"first"), ("0.cls", b" 1\n"), *members, ("z.jpg", b"last"), ("z.cls", b"2")]
    rows, flaws = check(tars.archive(tmp_path / "a.tar", around))
    assert rows["label"].tolist() == [1, label, 2]
    ((row, said),) = flaws
    assert row == 1 and re.search(reason, said)


def test_the_first_image_of_a_sample_counts_wherever_the_label_stands(tmp_path: Path) -> None:
    members = [
        ("a.cls", b"3"),
        ("a.txt", b"words"),
        ("a.png", b"first"),
        ("a.jpg", b"second"),
        ("b.jpg", b"x"),
    ]
    rows, flaws, _ = scan(tars.archive(tmp_path / "a.tar", members))
    assert rows[["size", "label"]].tolist() == [(5, 3), (1, -1)] and flaws == []


# --- tars that are not whole --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path, form: int) -> None:
    members = [
        ("0.jpg", b"i" * 700),
        ("0.cls", b"1"),
        ("d/" * 70 + "1.jpg", b"j" * 10),
        ("2.jpg", b"k" * 1024),
    ]
    whole = tars.archive(tmp_path / "whole.tar", members, format=form)
    data = whole.read_bytes()
    end = -(-len(data.rstrip(b"\0")) // 512) * 512  # of the last member; the end mark begins here
    assert len(scan(whole)[0]) == 3
    cut = tmp_path / "cut.tar"
    places = [*range(0, end, 512), *range(7, end, 512), *range(511, end + 512, 512), end + 100]
    for place in places:
        cut.write_bytes(data[:place])
        with pytest.raises(
            DataError, match=r"^shard cut\.tar is (cut short or damaged|empty|no tar file)[^\n]*$"
        ):
            scan(cut)


def test_a_damaged_header_is_refused_and_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tars.write(tmp_path / "a.tar", tars.samples(4))
    offset = int(scan(path)[0]["offset"][2])
    tars.flip(path, offset - 512 + 3)
    with pytest.raises(
        DataError, match=rf"it has {path.stat().st_size} bytes, and at byte \d+ neither a whole file"
    ):
        scan(path)


def test_a_header_with_a_wrong_size_is_refused(tmp_path: Path) -> None:
    path = tars.write(tmp_path / "a.tar", tars.samples(4))
    header = int(scan(path)[0]["offset"][1]) - 512
    for size in (b"00000002000", b"77777777777", b"00000040000", b"\xff" * 11, b"\x80" + b"\xff" * 10):
        data = bytearray(path.read_bytes())
        data[header + 124 : header + 135] = size
        data[header + 148 : header + 156] = b" " * 8
        data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(DataError, match=r"^shard b\.tar is cut short or damaged"):
            scan(tmp_path / "b.tar")


def test_what_is_no_tar_is_refused_in_one_line(tmp_path: Path) -> None:
    content = {
        "is no tar file": b"not a tar" * 200,
        "is empty": b"",
        "is compressed \\(gzip\\)": gzip.compress(b"x" * 5000),
    }
    for words, data in content.items():
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match=rf"^shard a\.tar {words}[^\n]*$"):
            scan(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"^shard none\.tar cannot be read: No such file"):
        scan(tmp_path / "none.tar")


# --- the index ----------------------------------------------------------------------------------------------


def test_an_index_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = np.zeros(7, INDEX)
    rows["offset"], rows["label"] = np.arange(7) * 2**35, [-1, 0, 1, 2, 3, 4, 5]
    shards = [Shard("train-000000.tar", "train", 4, 10, "ab"), Shard("e.tar", "train", 0, 9, None)]
    shards += [Shard("val-000000.tar", "val", 3, 11, None)]
    written = ShardIndex(shards, rows, ["ä", "b"], {3: "no image"}, {"seed": 0})
    write_index(tmp_path, written)
    index = read_index(tmp_path)
    assert index.shards == shards and np.array_equal(index.entries, rows) and index.class_names == ["ä", "b"]
    assert (
        index.flaws == {3: "no image"}
        and index.written == {"seed": 0}
        and index.bounds.tolist() == [0, 4, 4, 7]
    )
    assert index.split("train").tolist() == [0, 1, 2, 3] and index.split("val").tolist() == [4, 5, 6]
    assert index.split("test").tolist() == [] and isinstance(index.entries, np.memmap)
    npy = (tmp_path / "index.npy").read_bytes()
    assert index.sha256 == written.sha256 == hashlib.sha256(npy).hexdigest()
    assert sorted(os.listdir(tmp_path)) == ["index.json", "index.npy"]


def change(folder: Path, **entries: Any) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_damaged_index_is_refused_in_one_line(tmp_path: Path) -> None:
    def refuses(words: str) -> None:
        with pytest.raises(DataError, match=rf"^[^\n]*{words}[^\n]*$"):
            read_index(tmp_path)

    refuses(r"index\.json cannot be read: No such file")
    tars.write_set(tmp_path, {"train": [3, 2]})
    whole, entries = (tmp_path / "index.json").read_text(), (tmp_path / "index.npy").read_bytes()
    (tmp_path / "index.json").write_text(whole[:-10])
    refuses(r"index\.json is damaged \(JSONDecodeError")
    shard = json.loads(whole)["shards"][0]
    for changed, words in [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"samples": 6}, "the samples of its shards are not 6 in all"),
        ({"shards": [shard]}, "are not 5 in all"),
        (
            {"shards": [shard, shard | {"name": "../a.tar", "samples": 2}]},
            r"'\.\./a\.tar' is no name of a shard",
        ),
        ({"shards": [shard, shard | {"split": "dev", "samples": 2}]}, "'dev' is none of train, val, test"),
        ({"shards": 3}, r"is damaged \(TypeError"),
        ({"flaws": [[5, "x"]]}, "is damaged"),
        ({"sha256": "0"}, r"index\.npy is damaged, or not that of its index\.json"),
    ]:
        (tmp_path / "index.json").write_text(whole)
        change(tmp_path, **changed)
        refuses(words)
    (tmp_path / "index.json").write_text(whole)
    assert len(read_index(tmp_path).entries) == 5
    for damaged in (entries[:-1], entries[:-1] + bytes([entries[-1] ^ 1]), b""):
        (tmp_path / "index.npy").write_bytes(damaged)
        refuses(r"index\.npy is damaged")
    (tmp_path / "index.npy").unlink()
    refuses(r"index\.npy cannot be read: No such file")


def test_a_write_that_fails_leaves_the_index_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars.write_set(tmp_path, {"train": [3]})
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        DataError, match=r"index\.npy was not written: No space left on device; free some space"
    ):
        write_index(tmp_path, ShardIndex([Shard("a.tar", "train", 1, 1, None)], np.zeros(1, INDEX)))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_million_samples_are_opened_at_once_in_little_memory(tmp_path: Path) -> None:
    shards = [Shard(f"train-{n:06d}.tar", "train", 10_000, 1, None) for n in range(100)]
    write_index(tmp_path, ShardIndex(shards, np.zeros(1_000_000, INDEX)))
    for shard in shards:
        (tmp_path / shard.name).write_bytes(b"x")
    began = time.process_time()
    assert len(ShardSource(root=str(tmp_path)).fingerprint()) == 64
    assert time.process_time() - began < 2  # some 0.1 s where nothing else runs
    tracemalloc.start()
    try:
        source = ShardSource(root=str(tmp_path))
        assert len(source) == 1_000_000 and source.labels is not None and source.labels[-1] == 0
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 60e6  # with the index, 20 MB mapped into memory, below 100 MB


def test_ten_thousand_files_are_scanned_quickly(tmp_path: Path) -> None:
    path = tars.archive(
        tmp_path / "a.tar", [(f"{n:09d}.{s}", b"12") for n in range(5_000) for s in ("jpg", "cls")]
    )
    began = time.process_time()
    assert len(scan(path)[0]) == 5_000
    assert time.process_time() - began < 5  # some 0.7 s where nothing else runs


# --- whoever made it may mean harm --------------------------------------------------------------------------

NAMES = ["", ".", "..", ".a.tar", "-rf", "a/b.tar", "../a.tar", "/a.tar", "a\0.tar", "a\n.tar", "a b.tar"]
NAMES += [
    "a.tar;touch x #",
    "$(x).tar",
    "`x`.tar",
    "a.tar?b",
    "a.tar#b",
    "a%2e.tar",
    "\x1b[2J.tar",
    "a" * 201,
]


@pytest.mark.parametrize("name", [*NAMES, 5, None, [], {}, True], ids=repr)
def test_a_name_that_is_no_plain_one_is_none_of_a_shard(tmp_path: Path, name: Any) -> None:
    tars.write_set(tmp_path, {"train": [2]})
    (shard,) = json.loads((tmp_path / "index.json").read_text())["shards"]
    change(tmp_path, shards=[shard | {"name": name}])
    with pytest.raises(DataError, match=r"index\.json is damaged \(ValueError: .* is no name of a shard"):
        read_index(tmp_path)


def test_a_forged_index_is_one_error_with_its_name(tmp_path: Path) -> None:
    tars.write_set(tmp_path, {"train": [2]})
    path = tmp_path / "index.json"
    whole = path.read_text()
    (shard,) = json.loads(whole)["shards"]
    forged: list[dict[str, Any]] = [{"class_names": names} for names in (5, "ab", [1, 2], [None], {"a": 1})]
    forged += [{"samples": count} for count in (2.0, "2", True, None, 1e999)]
    numbers = (-1, 2**63, 10**400, 1.5, "1", None, True)
    forged += [{"shards": [shard | {key: count}]} for key in ("samples", "bytes") for count in numbers]
    forged += [{"shards": [shard | {"samples": 2**62}] * 3, "samples": 3 * 2**62}]
    forged += [
        {"shards": [shard | {"sha256": 5}]},
        {"shards": [[]]},
        {"shards": {"a": 1}},
        {"shards": [None]},
    ]
    forged += [{"flaws": flaws} for flaws in (5, [5], [["0", "x"]], [[-1, "x"]], [[0]], [[2, "x"]])]
    forged += [{"written": 5}, {"written": [1]}, {"passed_over": 5}, {"passed_over": {"images": -1}}]
    for entries in forged:
        path.write_text(json.dumps(json.loads(whole) | entries))
        with pytest.raises(DataError, match=r"^[^\n]*index\.json is damaged \([^\n]{1,300}$"):
            read_index(tmp_path)
    for text in ("[" * 100_000, '{"a":' * 100_000, "[]", "5", "null", '"x"', "", "\xff", whole[:-3]):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=r"^[^\n]*index\.json is damaged \([^\n]{1,300}$"):
            read_index(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"index\.json is no file"):
        read_index(tmp_path)


def test_an_index_beyond_its_bound_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars.write_set(tmp_path, {"train": [2]})
    data = (tmp_path / "index.json").read_bytes()
    monkeypatch.setattr("beit_pretrain.data.shard_index.MOST_BYTES", len(data) - 1)
    with pytest.raises(DataError, match=r"index\.json has more than \d+ bytes"):
        read_index(tmp_path)
    with pytest.raises(DataError, match=r"^there has more than \d+ bytes"):
        parse_index(data, "there")


def entries_of(folder: Path, entries: Any) -> None:
    """Puts an index.npy there that the index.json agrees with."""
    content = io.BytesIO()
    np.save(content, entries, allow_pickle=True)
    (folder / "index.npy").write_bytes(content.getvalue())
    change(folder, sha256=hashlib.sha256(content.getvalue()).hexdigest())


def test_forged_entries_are_one_error_and_are_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (tmp_path / "harm").write_text, ("x",)

    tars.write_set(tmp_path, {"train": [2]})
    below = np.zeros(2, INDEX)
    below["label"] = -2
    for entries in ([Harm(), Harm()], np.zeros(2), np.zeros((2, 1), INDEX), np.zeros(3, INDEX), below):
        entries_of(tmp_path, np.array(entries, dtype=object) if isinstance(entries, list) else entries)
        with pytest.raises(DataError, match=r"^[^\n]*index\.npy (is damaged|does not hold the 2 entries)"):
            read_index(tmp_path)
    for data in (b"", b"PK\3\4", b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535, b"\x93NUMPY\1\0\2\0{}"):
        (tmp_path / "index.npy").write_bytes(data)
        change(tmp_path, sha256=hashlib.sha256(data).hexdigest())
        with pytest.raises(DataError, match=r"^[^\n]*index\.npy is damaged"):
            read_index(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_places_beyond_a_shard_are_unreadable_images_in_no_memory(tmp_path: Path) -> None:
    tars.write_set(tmp_path, {"train": [2]})
    for offset in (2**64 - 1, 2**63, 2**63 - 1, 10**9):
        entries = np.zeros(2, INDEX)
        entries["offset"], entries["size"] = offset, 2**32 - 1
        entries_of(tmp_path, entries)
        source = ShardSource(root=str(tmp_path))
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=r"^shard train-000000\.tar is cut short: "):
                source.read(0)
            assert source.name(0) == "train-000000.tar, sample 0" and tracemalloc.get_traced_memory()[1] < 1e6
        finally:
            tracemalloc.stop()


def test_a_label_that_can_number_no_classes_is_a_flaw_and_no_list_of_names(tmp_path: Path) -> None:
    members = [("0.jpg", b"x"), ("0.cls", b"999999999"), ("1.jpg", b"y"), ("1.cls", b"1")]
    path = tars.archive(tmp_path / "a.tar", members)
    tracemalloc.start()
    try:
        source = ShardSource(root=str(path))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert (
        source.labels is not None and source.labels.tolist() == [-1, 1] and source.class_names == ["0", "1"]
    )
    with pytest.raises(DataError, match=r"^its label 999999999 is no class number: 999999 is the highest"):
        source.read(0)
    assert source.read(1) == b"y"
