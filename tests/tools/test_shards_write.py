"""`beit-tools shards write`: shards hold what was in the source, whatever happens while they are written."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import tarfile
import time
import warnings
from collections import namedtuple
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from filelock import FileLock
from PIL import Image, features

from beit_pretrain.compose import compose
from beit_pretrain.data.decode import decode
from beit_pretrain.data.folder import FileSource
from beit_pretrain.data.shard_index import read_index
from beit_pretrain.data.sources import Digits
from beit_pretrain.errors import BeitError, ConfigError, DataError
from beit_pretrain.tools import shards_plan
from beit_pretrain.tools.app import app
from beit_pretrain.tools.shards_pack import PARTS, SUFFIXES, Planned, pack, recorded
from beit_pretrain.tools.shards_write import write

IMAGES = 130  # in `folder`: 100 to train on and 30 for validation
WAYS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images of all kinds by class, each with other pixels; the names of some say another format."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        split = "train" if number < 100 else "val"
        path = root / split / f"class {number % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = [*WAYS][number % len(WAYS)]
        pixels = rng.integers(0, 256, (8 + number % 5, 12, 3), np.uint8)
        Image.fromarray(pixels).save(path, kind)
    return root


@cache
def _composed(overrides: tuple[str, ...]) -> Any:
    return compose(overrides)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Composing takes longer than writing the shards: each configuration is composed once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards_plan, "compose", lambda overrides: deepcopy(_composed(tuple(overrides))))
        yield


def run(src: Any, out: Path, *overrides: str, **options: Any) -> int:
    settings: dict[str, Any] = {
        "samples": 7,
        "size_mb": None,
        "workers": 1,
        "seed": 0,
        "resize": None,
        "quality": None,
        "overwrite": False,
    }
    return write(str(src), out, overrides, **(settings | options))


def files_of(root: Path) -> list[Path]:
    """The images in the order of the source: train before val, by class, then by name."""
    return sorted(root.glob("*/*/*.*"))


def tars(out: Path) -> dict[str, str]:
    """SHA-256 of each shard; nothing but shards and the index may be there."""
    names = sorted(entry.name for entry in out.iterdir())
    assert [name for name in names if not name.endswith(".tar")] == ["index.json", "index.npy"]
    return {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names if name.endswith(".tar")
    }


def members(out: Path, split: str) -> dict[str, bytes]:
    """Names and contents of the members of a split's shards, in their order, by Python's reader."""
    found: dict[str, bytes] = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


def begin(*arguments: Any, **options: Any) -> int:
    """Start `run` as a group of processes of its own. Returns the group's number."""
    if process := os.fork():
        return process
    code = 99
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        code = run(*arguments, **options)
    finally:
        os._exit(code)


# --- what is in them ----------------------------------------------------------------------------------------


def test_image_files_go_in_unchanged_with_their_labels(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out") == 0
    paths = files_of(folder)
    seen = []
    for split in ("train", "val"):
        content = members(tmp_path / "out", split)
        for name, data in content.items():
            key, _, suffix = name.partition(".")
            path = paths[int(key)]
            assert path.parts[-3] == split
            if suffix == "cls":
                assert f"class {data.decode()}" == path.parent.name
            else:
                assert data == path.read_bytes()
                assert suffix == WAYS[[*WAYS][int(path.stem) % len(WAYS)]]
                assert f"{key}.cls" in content
                seen.append(int(key))
    assert sorted(seen) == list(range(IMAGES))
    assert seen[:100] != sorted(seen[:100])
    index = read_index(tmp_path / "out")
    assert index.class_names == ["class 0", "class 1", "class 2"]
    assert index.flaws == {} and index.written["left_out"] == []
    assert [len(index.split(split)) for split in ("train", "val", "test")] == [100, 30, 0]


def _closed(reader: Any) -> list[dict[str, Any]]:
    """All samples; the reader leaves its files to the garbage collector."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        samples = list(reader)
        del reader
        gc.collect()
    return samples


def test_webdataset_reads_the_same_samples_in_the_order_of_the_index(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    index = read_index(out)
    urls = [str(out / shard.name) for shard in index.shards]
    reader = webdataset.WebDataset(urls, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    row = 0
    for sample in _closed(reader):
        offset, size, _, label = index.entries[row].tolist()
        with open(sample["__url__"], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        [image] = [value for key, value in sample.items() if key[0] != "_" and key != "cls"]
        assert data == image == files_of(folder)[int(sample["__key__"])].read_bytes()
        assert label == int(sample["cls"])
        row += 1
    assert row == IMAGES


def test_pixels_of_a_source_go_in_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = Digits()
    digits.images, digits.labels = digits.images[::20], digits.labels[::20]
    digits.splits = {"test": np.arange(0, 90, 2)}  # what is in no part is to train on
    monkeypatch.setattr("beit_pretrain.data.sources.Digits", lambda: digits)
    assert run("digits", tmp_path / "out", samples=1000) == 0
    test, train = members(tmp_path / "out", "test"), members(tmp_path / "out", "train")
    assert sorted(int(name[:9]) for name in test if name.endswith(".png")) == list(range(0, 90, 2))
    assert len(test) + len(train) == 180
    for number in range(90):
        content = train if number % 2 else test
        assert torch.equal(decode(content[f"{number:09d}.png"]), digits.images[number])
        assert content[f"{number:09d}.cls"] == str(digits.labels[number]).encode()


def test_a_folder_without_classes_is_all_for_training(folder: Path, tmp_path: Path) -> None:
    flat = folder / "train" / "class 1"
    assert run(flat, tmp_path / "out", samples=None) == 0
    index = read_index(tmp_path / "out")
    assert [shard.name for shard in index.shards] == ["train-000000.tar"]
    assert index.class_names is None and set(index.entries["label"].tolist()) == {-1}
    assert {name[-4:] for name in members(tmp_path / "out", "train")}.isdisjoint({".cls"})


def test_the_order_is_that_of_the_seed_or_of_the_source(folder: Path, tmp_path: Path) -> None:
    orders = {}
    for seed in (0, 1, None):
        run(folder, tmp_path / str(seed), seed=seed, samples=50)
        content = members(tmp_path / str(seed), "train")
        orders[seed] = [int(name[:9]) for name in content if not name.endswith(".cls")]
    assert orders[None] == list(range(100)) == sorted(orders[0]) == sorted(orders[1])
    assert len({tuple(order) for order in orders.values()}) == 3
    # Neighbours of a shuffled order have nothing to do with each other: 33 apart on average.
    assert np.abs(np.diff(orders[0])).mean() > 25


def test_the_same_bytes_with_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "one", workers=1)
    run(folder, tmp_path / "two", workers=3)
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    for name in ("index.json", "index.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_shards_are_of_one_size(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "count", samples=7)
    sizes: dict[str, list[int]] = {"train": [], "val": []}
    for shard in read_index(tmp_path / "count").shards:
        sizes[shard.split].append(shard.samples)
    assert {split: len(part) for split, part in sizes.items()} == {"train": 15, "val": 5}
    assert all(max(part) - min(part) <= 1 for part in sizes.values())
    run(folder, tmp_path / "size", samples=None, size_mb=0.06)
    train = [shard.bytes for shard in read_index(tmp_path / "size").shards if shard.split == "train"]
    assert np.mean(train) == pytest.approx(60_000, rel=0.25)  # a tar is a multiple of 10 kB


# --- resized ------------------------------------------------------------------------------------------------


def test_larger_images_become_smaller_and_the_loss_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the same steps with Pillow, written out here."""
    rng, images = np.random.default_rng(1), tmp_path / "images"
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    for number, (height, width) in enumerate([(20, 70), (90, 41), (64, 64), (32, 99), (33, 33), (31, 200)]):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        picture.save(images / f"{number}.jpg", exif=exif if number == 1 else b"")
    assert run(images, tmp_path / "out", resize=32, quality=80, samples=2, seed=None) == 0
    content = members(tmp_path / "out", "train")
    psnrs = []
    for number, path in enumerate(sorted(images.iterdir())):
        data = content[f"{number:09d}.jpg"]
        if number in (0, 3, 5):  # the shorter side is no longer than 32
            assert data == path.read_bytes()
            continue
        with Image.open(path) as picture:
            upright = picture.transpose(Image.Transpose.ROTATE_270) if number == 1 else picture.convert("RGB")
        size = {1: (70, 32), 2: (32, 32), 4: (32, 32)}[number]  # 90 * 32 / 41 = 70.2
        small = upright.resize(size, Image.Resampling.BICUBIC)
        expected = io.BytesIO()
        small.save(expected, "JPEG", quality=80)
        assert data == expected.getvalue()
        with Image.open(expected) as again:
            error = np.mean((np.asarray(again, float) - np.asarray(small, float)) ** 2)
        psnrs.append(10 * math.log10(255**2 / error))
    written = read_index(tmp_path / "out").written
    assert (written["resize"], written["quality"]) == (32, 80)
    assert written["psnr"] == pytest.approx({"images": 3, "mean": np.mean(psnrs), "worst": min(psnrs)})
    stated = (
        f"PSNR {np.mean(psnrs):.1f} dB, at worst {min(psnrs):.1f} dB, against the resized pixels of 3 images"
    )
    assert stated in capsys.readouterr().out


# --- what cannot be read ------------------------------------------------------------------------------------


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> dict[int, bytes | None]:
    """Contents that files have instead of their own; None: an error of the disk."""
    instead: dict[int, bytes | None] = {}
    read = FileSource.read

    def or_instead(self: FileSource, index: int) -> bytes:
        if index not in instead:
            return read(self, index)
        if (data := instead[index]) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.name(index))
        return data

    monkeypatch.setattr(FileSource, "read", or_instead)
    return instead


def picture(kind: str, seed: int = 0) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def flipped(data: bytes) -> bytes:
    """With other bits in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


UNREADABLE: dict[str, bytes | None] = {
    "error": None,
    "empty": b"",
    "text": b"<html>no image",
    "cut PNG": picture("PNG")[:-1500],
    "cut JPEG": picture("JPEG")[:-300],
    "cut WebP": picture("WEBP")[:-300],
    "flipped TIFF": flipped(picture("TIFF")[:-3000]),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_read_is_left_out_and_named(
    folder: Path,
    tmp_path: Path,
    unreadable: dict[int, bytes | None],
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """In the words of the training."""
    unreadable[17] = content = UNREADABLE[kind]
    reason = os.strerror(errno.EIO)
    if content is not None:
        with pytest.raises(DataError) as refused:
            decode(content)
        reason = str(refused.value)
    assert run(folder, tmp_path / "out", samples=50) == 0
    index = read_index(tmp_path / "out")
    assert index.written["left_out"] == [[17, str(files_of(folder)[17]), reason]]
    assert len(index.entries) == IMAGES - 1 == sum(shard.samples for shard in index.shards)
    assert "000000017.cls" not in members(tmp_path / "out", "train")
    assert (
        f"left out, because they cannot be read: 1\n  {files_of(folder)[17]}: {reason}"
        in capsys.readouterr().out
    )


def test_a_format_that_shards_do_not_hold_becomes_png(
    folder: Path, tmp_path: Path, unreadable: dict[int, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(SUFFIXES, "WEBP")  # whatever Pillow can do here
    given = {18: picture("WEBP"), 19: picture("AVIF") if features.check("avif") else picture("WEBP", 1)}
    unreadable.update(given)
    assert run(folder, tmp_path / "out", samples=50) == 0
    content = members(tmp_path / "out", "train")
    for number, data in given.items():
        written = content[f"{number:09d}.png"]
        assert written.startswith(b"\x89PNG") and torch.equal(decode(written), decode(data))
    assert read_index(tmp_path / "out").written["left_out"] == []


def test_names_of_images_do_not_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(120):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}\x1b[2J\n.png").write_bytes(picture("PNG", number) if number else b"")
    assert run(tmp_path / "images", tmp_path / "out", samples=200) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n")) and r"/0\x1b[2J\n.png: " in out
    assert len(read_index(tmp_path / "out").entries) == 119


def test_too_many_that_cannot_be_read_are_no_set_until_they_are_mended(
    folder: Path, tmp_path: Path, unreadable: dict[int, bytes | None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    unreadable.update({17: b"", 99: None})
    assert run(folder, out, samples=10) == 1
    said = capsys.readouterr().out
    assert all(str(files_of(folder)[number]) in said for number in unreadable)
    assert "stopped: more than 1% of the 130 images cannot be read" in said
    assert not (out / "index.json").exists()
    unreadable.clear()
    assert run(folder, out, samples=10) == 0
    assert "shards are there, the others follow" in capsys.readouterr().out
    run(folder, tmp_path / "other", samples=10)
    assert tars(out) == tars(tmp_path / "other")


def test_a_shard_of_which_nothing_is_left_is_a_tar_too(tmp_path: Path) -> None:
    (tmp_path / PARTS).mkdir()
    source = Digits()
    source.read = lambda index: b""  # pyright: ignore[reportAttributeAccessIssue]
    planned = Planned("train-000000.tar", "train", 0, 1, 0, None)
    part = pack(
        planned, np.array([3]), source=source, out=tmp_path, resize=None, note=lambda images, written: None
    )
    assert part.left_out == [[3, "digit 3", "the file is empty"]] and not len(part.rows)
    assert members(tmp_path, "train") == {}


# --- interrupted --------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    read = FileSource.read

    def slowly(self: FileSource, index: int) -> bytes:
        time.sleep(0.003)
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", slowly)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of an undisturbed command."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(folder, out)
    return tars(out)


@pytest.mark.usefixtures("slow")
def test_killed_anywhere_it_goes_on_and_gives_the_same_shards(
    folder: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    out, rng, found = tmp_path / "out", random.Random(0), []
    for _ in range(4):
        group = begin(folder, out, workers=2)
        before = len(list(out.glob("*.tar")))
        deadline = time.monotonic() + 10
        while len(list(out.glob("*.tar"))) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        os.killpg(group, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(group, 0)[1])
        found.append(len(list(out.glob("*.tar"))))
    assert found == sorted(set(found)) and found[-1] < len(whole)
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert run(folder, out) == 0
    assert tars(out) == whole
    # At most those that were being written when it was killed are written again.
    again = sum((out / name).stat().st_mtime_ns != when for name, when in written.items())
    assert again <= 2


@pytest.mark.usefixtures("slow")
def test_after_ctrl_c_nothing_half_done_is_left(folder: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"
    group = begin(folder, out, workers=2)
    while len(list(out.glob("*.tar"))) < 3:
        time.sleep(0.005)
    os.killpg(group, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(group, 0)[1]) == 130
    left = {entry.name for entry in out.iterdir()}
    assert left - {name for name in left if name.endswith(".tar")} == {".parts"}
    assert not [name for name in left if name.startswith(".train")]
    assert run(folder, out) == 0
    assert tars(out) == whole


@pytest.mark.usefixtures("slow")
def test_ctrl_c_does_not_wait_for_a_shard(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    group = begin(folder, out, samples=100)
    while not list(out.glob(".train-*.tmp")):
        time.sleep(0.005)
    os.killpg(group, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(group, 0)[1]) == 130
    assert list(out.iterdir()) == []


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 15 kB."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_line_and_leaves_nothing_half_done(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"\.tar was not written: File too large; mend that, then the same"):
        run(folder, out, samples=100)
    assert list(out.iterdir()) == []
    with pytest.raises(ConfigError, match=r"OUT=.*: about \d+\.\d GB are needed and 0\.0 GB are free there"):
        _full(lambda: run(folder, out, samples=100))


def _full(action: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        usage = namedtuple("usage", "total used free")(10**9, 10**9, 99)
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        action()


def test_a_disk_that_gives_back_something_else_is_found_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def spoil(file: int) -> None:
        sync(file)
        if os.fstat(file).st_size >= 10_240:  # a tar
            byte = os.pread(os.open(f"/proc/self/fd/{file}", os.O_RDONLY), 1, 600)
            os.pwrite(file, bytes([byte[0] ^ 1]), 600)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", spoil)
        with pytest.raises(DataError, match=r"\.tar: what was read back is not what was written"):
            run(folder, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_process_that_is_killed_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, str]
) -> None:
    read, parent = FileSource.read, os.getpid()

    def read_or_die(self: FileSource, index: int) -> bytes:
        if index == 40 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(FileSource, "read", read_or_die)
        with pytest.raises(BeitError, match=r"a process was killed .* with fewer --workers"):
            run(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert run(folder, tmp_path / "out") == 0
    assert tars(tmp_path / "out") == whole


# --- what is there already ----------------------------------------------------------------------------------


def test_a_finished_set_is_left_alone_and_mended(
    folder: Path,
    tmp_path: Path,
    unreadable: dict[int, bytes | None],
    whole: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    when = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert run(folder, out, overwrite=True) == 0  # which is for other shards
    assert "out is finished: 130 images in 20 shards, 0.00 GB; to train on them: beit-train" in (
        capsys.readouterr().out
    )
    assert when == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    lost = out / "train-000004.tar"
    with tarfile.open(lost) as tar:
        inside = int(tar.getnames()[0][:9])
    lost.unlink()
    unreadable[inside] = files_of(folder)[inside - 1].read_bytes()
    with pytest.raises(DataError, match=r"train-000004\.tar would not be what it was .* SRC has changed"):
        run(folder, out)
    unreadable.clear()
    assert run(folder, out) == 0
    assert tars(out) == whole
    others = [path for path in when if path != lost]
    assert [when[path] for path in others] == [path.stat().st_mtime_ns for path in others]


def test_another_plan_is_refused_with_what_differs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out, samples=50)
    with pytest.raises(
        ConfigError,
        match=r"^OUT=.* another plan: --shuffle-seed 0, not 1, --resize none, not 9, --quality .*--over",
    ):
        run(folder, out, samples=50, seed=1, resize=9)
    with pytest.raises(ConfigError, match="other images than those of SRC; give another folder"):
        run(folder / "val", out, samples=50)
    assert run(folder, out, samples=40, seed=1, overwrite=True) == 0
    run(folder, tmp_path / "new", samples=40, seed=1)
    assert tars(out) == tars(tmp_path / "new")


def test_a_plan_that_was_begun_is_not_mixed_with_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read, parent = tmp_path / "out", FileSource.read, os.getpid()

    def read_or_fail(self: FileSource, index: int) -> bytes:
        if index == 129 and os.getpid() != parent:
            raise RuntimeError("for the test")
        return read(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(FileSource, "read", read_or_fail)
        with pytest.raises(RuntimeError, match="for the test"):
            run(folder, out, seed=None, workers=1)
    assert (out / "train-000000.tar").exists() and not (out / "index.json").exists()
    with pytest.raises(ConfigError, match="another plan: --samples 7, not 8"):
        run(folder, out, samples=8, seed=None)
    plan = out / PARTS / "plan.json"
    whole = json.loads(plan.read_text())
    forged = [whole | {"asked": 5}, whole | {"mean": "x"}, whole | {"samples_per_shard": 0}, {}]
    for text in ("[", "5", "[" * 100_000, *map(json.dumps, forged)):
        plan.write_text(text)
        with pytest.raises(DataError, match=r"^\S+plan\.json is damaged: give --overwrite"):
            run(folder, out, seed=None)
    assert run(folder, out, samples=8, seed=None, overwrite=True) == 0
    assert len(tars(out)) == 13 + 4
    index = out / "index.json"
    content = json.loads(index.read_text())
    content["written"]["samples_per_shard"] = "8"
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="another plan: --samples-per-shard 8, not none"):
        run(folder, out, samples=8, seed=None)


def test_a_damaged_record_of_a_shard_is_none(tmp_path: Path) -> None:
    (tmp_path / PARTS).mkdir()
    (tmp_path / "a.tar").write_bytes(b"x")
    about = io.BytesIO()
    np.savez(about, rows=np.zeros(1), about="[")
    for content in (b"", b"PK\3\4", about.getvalue(), about.getvalue()[:-9]):
        (tmp_path / PARTS / "a.tar.npz").write_bytes(content)
        assert recorded(tmp_path, "a.tar") is None


def test_shards_of_somebody_else_and_other_files_are_not_touched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_text("precious")
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(
        ConfigError, match=r"holds shards that this command has not begun; give another folder"
    ):
        run(folder, tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}
    assert run(folder, tmp_path, overwrite=True) == 0
    assert (tmp_path / "notes.txt").read_text() == "precious"
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        run(folder, tmp_path)
    assert run(folder, tmp_path, overwrite=True) == 0
    assert len(read_index(tmp_path).entries) == IMAGES


def test_an_index_of_another_program_is_not_thrown_away(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"pages": 3}')
    with pytest.raises(ConfigError, match=r"holds an index\.json and no shards"):
        run(folder, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    assert (tmp_path / "index.json").read_text() == '{"pages": 3}'


def test_two_commands_do_not_write_to_one_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_plan, "TAKEN_OVER", 0.05)
    (tmp_path / ".parts").mkdir()
    with (
        FileLock(tmp_path / ".parts" / "lock"),
        pytest.raises(ConfigError, match="is being written by another process"),
    ):
        run(folder, tmp_path)


# --- the command --------------------------------------------------------------------------------------------


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a line that is written over, as on a terminal
    arguments = ["shards", "write", "class_folders", str(tmp_path / "out"), f"data.root={folder}"]
    options = ["data.source.val=null", "--samples", "50", "--no-shuffle", "--workers", "2"]
    assert app([*arguments, *options], standalone_mode=False) == 0
    said = capsys.readouterr().out
    assert "2 of 2 shards, 100 images" in said and "images/s" in said
    assert said.endswith(
        f"to train on them: beit-train stage=pretrain data=shards data.root={tmp_path}/out\n"
    )
    about = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["split"] for shard in about["shards"]] == ["train", "train"]
    assert about["written"]["source"] == f"class_folders data.root={folder} data.source.val=null"


def test_in_a_log_each_line_counts_what_it_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["shards", "write", "class_folders", str(tmp_path / "out"), f"data.root={folder}"]
    options = ["data.source.val=null", "--samples", "40", "--no-shuffle", "--workers", "2"]
    assert app([*arguments, *options], standalone_mode=False) == 0
    said = re.findall(r"^(\S+), (\d+) images; (\d) of 3 shards, (\d+) images", capsys.readouterr().out, re.M)
    sizes = {"train-000000.tar": 33, "train-000001.tar": 33, "train-000002.tar": 34}
    assert len(said) == 3 and {name: int(images) for name, images, *_ in said} == sizes
    for i, (*_, done, total) in enumerate(said):
        assert int(done) == i + 1 and int(total) == sum(int(images) for _, images, *_ in said[: i + 1])
    (tmp_path / "out" / "train-000001.tar").unlink()
    assert app([*arguments, *options], standalone_mode=False) == 0
    again = capsys.readouterr().out
    assert "2 of 3 shards are there" in again and "000001.tar, 33 images; 1 of 1 shards, 33 images" in again


@pytest.mark.parametrize(
    ("src", "overrides", "options", "message"),
    [
        ("digits", [], {"size_mb": 1.0}, "--samples and --size-mb both say"),
        ("digits", [], {"quality": 80}, "--quality is that of resized images"),
        ("nowhere", [], {}, r"SRC=nowhere is no folder and no choice of data \(.*digits, folder"),
        ("imagenet", [], {}, r"^data\.root is needed: set data\.root="),
        ("huggingface", [], {}, r"^data\.dataset is needed"),
        ("digits", ["data=folder"], {}, "data=folder: SRC=digits says which images"),
        ("digits", ["data.rooot=1"], {}, r"data\.rooot: there is no such option"),
        (".", ["data.root=/x"], {}, r"data\.root=/x: SRC=\. is the root"),
        ("folder", ["data.root=out"], {}, "OUT=out is where the images come from"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    src: str,
    overrides: list[str],
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(src, Path("out"), *overrides, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"OUT=.*file/out cannot be written to \(Not a directory\)"):
        run(folder, tmp_path / "file" / "out")


def test_images_with_label_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SRC=shapes has a label map for each image"):
        run("shapes", tmp_path / "out", f"data.root={tmp_path}/shapes")
