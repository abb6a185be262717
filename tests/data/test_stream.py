"""Streamed shards: every sample of a pass once, and after a restart exactly the batches that were left."""

from __future__ import annotations

import csv
import io
import logging
import re
import subprocess
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from data.shard_server import ShardServer, serving
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from beit_pretrain.data import fetch, stream
from beit_pretrain.data.decode import decode
from beit_pretrain.data.sampler import ResumableLoader, mix
from beit_pretrain.data.stream import StreamDataset, StreamLoader
from beit_pretrain.data.transforms import Crops, OneView
from beit_pretrain.errors import ConfigError, DataError

SHARDS, SAMPLES = 12, 10  # of each; 120 in all

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER", 7)
    monkeypatch.setattr(fetch, "PAUSE", 0.01)


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def make_tar(shard: int, broken: Any = ()) -> bytes:
    """Shades shard * 10 onwards; the label is the shade, those in `broken` are no pictures."""
    members = {}
    for shade in range(shard * SAMPLES, (shard + 1) * SAMPLES):
        members[f"{shade:03d}.png"] = b"none" if shade in broken else picture(shade)
        members[f"{shade:03d}.cls"] = str(shade).encode()
    return tar(members)


def write(folder: Path, broken: Any = ()) -> list[str]:
    for shard in range(SHARDS):
        (folder / f"train-{shard:02d}.tar").write_bytes(make_tar(shard, broken))
    return [str(folder / f"train-{shard:02d}.tar") for shard in range(SHARDS)]


class Recorder(OneView):
    """A view whose picture is the shade of its image, and the key that it was called with."""

    def __call__(self, image: torch.Tensor, key: int) -> Crops:
        return Crops(torch.tensor([int(image[0, 0, 0]), *key.to_bytes(8, "big")], dtype=torch.uint8))


def make_dataset(urls: list[str], **changes: Any) -> StreamDataset:
    settings: dict[str, Any] = {
        "urls": urls,
        "samples": SHARDS * SAMPLES,
        "view": Recorder(image_size=(4, 4)),
        "seed": 5,
        "micro_batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "steps_per_epoch": 10,
        "accumulate": 1,
        "epoch": 0,
        "start": 0,
        "max_bad": 1.0,
        "bad_log": None,
        "timeout": 5.0,
    }
    return StreamDataset(**(settings | changes))


Batches = list[tuple[tuple[int, ...], ...]]  # shade and key of every image


def load(dataset: StreamDataset, workers: int = 0) -> Batches:
    """What comes of the loader."""
    return seen(ResumableLoader(dataset, num_workers=workers, batch_size=None))


def seen(batches: Any) -> Batches:
    return [tuple(tuple(image) for image in batch.image.tolist()) for batch in batches]


def deal(dataset: StreamDataset, workers: int) -> Batches:
    """What comes of a loader with so many workers, without their processes: batches in turn from the first on."""
    parts = []
    for worker in range(workers):
        info = SimpleNamespace(id=worker, num_workers=workers)
        with mock.patch.object(stream, "get_worker_info", return_value=info):
            parts.append(iter(dataset))
    rounds = zip_longest(*parts)
    return seen(batch for turn in rounds for batch in turn if batch is not None)


def shades(batches: Any) -> list[int]:
    return [image[0] for batch in batches for image in batch]


def noted(log: Path) -> list[tuple[str, str]]:
    """Name and reason of each line."""
    with log.open(newline="") as file:
        return [(row["name"], row["reason"]) for row in csv.DictReader(file)]


# --- order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "workers"), [(1, 1), (1, 2), (1, 5), (2, 3), (3, 2), (4, 3), (5, 1), (1, 12)]
)
def test_a_restart_gives_exactly_the_batches_that_were_left(tmp_path: Path, world: int, workers: int) -> None:
    urls = write(tmp_path, broken=[3, 4, 40, 41, 42, 99])
    for rank in {0, world - 1}:
        place = {"world_size": world, "rank": rank, "accumulate": 2, "steps_per_epoch": 9}
        whole = deal(make_dataset(urls, **place), workers)
        assert len(whole) == 18
        for start in (1, 2, 5, 8):
            assert deal(make_dataset(urls, **place, start=start), workers) == whole[2 * start :], start


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_a_loaders_processes_do_the_same(tmp_path: Path, workers: int, start: int) -> None:
    place = {"world_size": 3, "rank": 2, "accumulate": 3, "start": start}
    urls = write(tmp_path)
    assert load(make_dataset(urls, **place), workers) == deal(make_dataset(urls, **place), max(1, workers))


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 2), (3, 1), (2, 6), (12, 1)])
def test_a_pass_gives_every_sample_once_mixed_and_differently_in_every_epoch(
    tmp_path: Path, world: int, workers: int
) -> None:
    urls = write(tmp_path)
    steps = SHARDS * SAMPLES // (world * 2)
    orders = []
    for epoch in (0, 1):
        places = [{"world_size": world, "rank": rank, "epoch": epoch} for rank in range(world)]
        ranks = [deal(make_dataset(urls, steps_per_epoch=steps, **place), workers) for place in places]
        assert sorted(shades(chain(*ranks))) == list(range(SHARDS * SAMPLES))
        orders.append(shades(ranks[0]))
    first = orders[0]
    assert first != orders[1] and first != sorted(first)
    assert len({shade // SAMPLES for shade in first}) == SHARDS // world


def test_samples_of_different_shards_meet_in_a_batch(tmp_path: Path) -> None:
    batches = load(make_dataset(write(tmp_path), micro_batch_size=6, steps_per_epoch=20))
    assert sum(len({shade // SAMPLES for shade in shades([batch])}) > 1 for batch in batches) > 10


def test_a_lane_that_runs_out_begins_again_with_other_views(tmp_path: Path) -> None:
    # Three lanes of one shard each, of which the epoch asks 25 of 10 samples.
    urls = write(tmp_path)[:3]
    found = deal(make_dataset(urls, micro_batch_size=5, steps_per_epoch=15, samples=30), 3)
    counts = Counter(shades(found))
    assert set(counts) == set(range(30)) and set(counts.values()) == {2, 3}
    assert len({image for batch in found for image in batch}) == 75  # no shade twice with one key


def test_the_key_is_of_seed_epoch_and_name_and_so_is_the_number(tmp_path: Path) -> None:
    urls = write(tmp_path)
    batches = list(make_dataset(urls, epoch=4, steps_per_epoch=60))
    for batch in batches:
        for image, label, sample, view in zip(
            batch.image, batch.label, batch.sample, batch.view, strict=True
        ):
            shade = int(image[0])
            name = f"train-{shade // SAMPLES:02d}.tar/{shade:03d}"
            assert sample == zlib.crc32(name.encode()) and (label, view) == (shade, 4)
            assert int.from_bytes(bytes(image[1:].tolist()), "big") == mix(5, 4, int(sample), 0)


def test_what_was_had_before_a_restart_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(stream, "decode", lambda data: decoded.append(data) or decode(data))
    assert len(load(make_dataset(write(tmp_path), start=7))) == 3
    assert len(decoded) == 6


# --- what cannot be read ------------------------------------------------------------------------------------


def test_an_unreadable_image_is_replaced_by_the_next_of_its_lane_and_noted_once(tmp_path: Path) -> None:
    bad, log = {13, 14, 77}, tmp_path / "bad_samples.csv"
    whole = shades(load(make_dataset(write(tmp_path), steps_per_epoch=60)))
    urls = write(tmp_path, broken=bad)
    found = shades(load(make_dataset(urls, steps_per_epoch=60, bad_log=log)))
    expected = list(whole)
    for place in reversed(range(len(whole))):
        if expected[place] in bad:
            expected[place] = expected[place + 1]
    assert found == expected
    load(make_dataset(urls, steps_per_epoch=60, bad_log=log))
    assert sorted(name for name, _ in noted(log)) == [
        "train-01.tar/013", "train-01.tar/014", "train-07.tar/077"
    ]  # fmt: skip
    assert noted(log)[0][1].startswith("no image format known")


def test_too_many_unreadable_images_end_the_run_in_one_line(tmp_path: Path) -> None:
    urls = write(tmp_path, broken=range(30))
    with pytest.raises(DataError, match=r"^25 of 120 images cannot be read, .*data\.max_bad=0\.2"):
        load(make_dataset(urls, steps_per_epoch=60, max_bad=0.2), workers=1)


def test_a_shard_that_ends_anywhere_is_left_there_and_noted_once(tmp_path: Path) -> None:
    whole, other = make_tar(0), make_tar(1)
    (tmp_path / "b.tar").write_bytes(other)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # where the end mark begins
    for cut in [*range(0, end, 512), *range(100, end, 1700), end + 300]:
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        log = tmp_path / f"{cut}.csv"
        dataset = make_dataset([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], bad_log=log)
        complete = (
            max(0, cut - 512) // 2048
        )  # two headers and two members of a block each, and the next header
        found = shades(load(dataset))
        assert set(found) == {*range(complete), *range(10, 20)}, cut
        assert [name for name, _ in noted(log)] == ["a.tar"], cut
    assert re.search(r"a\.tar is no whole tar file \(.*\) after 9 samples", noted(log)[0][1])


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    data = bytearray(make_tar(0))
    data[3 * 2048 + 150] ^= 1  # the fourth sample's checksum
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(make_tar(1))
    log = tmp_path / "bad.csv"
    found = load(make_dataset([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], bad_log=log))
    assert set(shades(found)) == {0, 1, *range(10, 20)}
    assert [name for name, _ in noted(log)] == ["a.tar"]


def test_a_lane_whose_shards_are_broken_takes_others(tmp_path: Path) -> None:
    urls = write(tmp_path)[:4]
    for url in urls[1:]:
        Path(url).write_bytes(b"no tar")
    for rank in range(4):
        found = shades(load(make_dataset(urls, world_size=4, rank=rank)))
        assert len(found) == 20 and set(found) == set(range(10))


def test_when_nothing_can_be_read_the_run_ends(tmp_path: Path) -> None:
    urls = write(tmp_path, broken=range(SHARDS * SAMPLES))
    with pytest.raises(DataError, match=r"none of the 12 shards has an image that can be read"):
        load(make_dataset(urls), workers=2)
    with pytest.raises(DataError, match=r"none of the 2 shards has an image that can be read"):
        load(make_dataset([str(tmp_path / "none-0.tar"), str(tmp_path / "none-1.tar")]))


# --- from the network ---------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with serving(ShardServer({f"{shard}.tar": make_tar(shard) for shard in range(3)})) as server:
        yield server


@pytest.mark.parametrize("mood", ["cut", "stops", "silent"])
def test_a_transfer_that_breaks_goes_on_where_it_was(server: ShardServer, tmp_path: Path, mood: Any) -> None:
    urls, log = [server.url(name) for name in server.files], tmp_path / "bad.csv"
    whole = load(make_dataset(urls, samples=30, steps_per_epoch=15))
    assert sorted(shades(whole)) == list(range(30))
    server.moods = [mood]
    assert load(make_dataset(urls, samples=30, steps_per_epoch=15, bad_log=log, timeout=0.5)) == whole
    assert not log.exists()


def test_a_server_that_falls_silent_ends_the_run_and_is_named(server: ShardServer, tmp_path: Path) -> None:
    log = tmp_path / "bad.csv"
    server.moods = ["silent"] * 100
    urls = [server.url(name) for name in server.files]
    with pytest.raises(DataError, match=r"none of the 3 shards .* see .*bad\.csv"):
        load(make_dataset(urls, samples=30, bad_log=log, timeout=0.1), workers=1)
    assert sorted(noted(log)) == [
        (f"{shard}.tar", f"{server.url(f'{shard}.tar')}: no byte for 0.1 s, after 0 samples")
        for shard in range(3)
    ]


def test_a_missing_package_ends_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DataError, match=r"^http://x/a\.tar is read by curl, which is not there; install it$"):
        load(make_dataset(["http://x/a.tar"]))


# --- what a tar holds ---------------------------------------------------------------------------------------


def test_images_of_a_key_without_a_rule_are_noted_and_one_of_a_plain_name_comes_first(tmp_path: Path) -> None:
    names = ["0.depth.png", "0.png", "1.a.png", "1.b.png", "1.c.png", "2.png", "2.seg.png"]
    (tmp_path / "a.tar").write_bytes(tar({name: picture(n) for n, name in enumerate(names)}))
    shades_of = {None: {1, 2, 5}, "last_dot": set(range(7))}
    for key_until, expected in shades_of.items():
        log = tmp_path / f"{key_until}.csv"
        settings = {"micro_batch_size": 7, "steps_per_epoch": 1, "last_dot": key_until is not None}
        (batch,) = make_dataset([str(tmp_path / "a.tar")], bad_log=log, **settings)
        assert {int(image[0]) for image in batch.image} == expected
        assert log.exists() == (key_until is None)
    found = noted(tmp_path / "None.csv")
    assert {name for name, _ in found} == {"a.tar/1.b.png", "a.tar/1.c.png"}
    assert all("key_until=last_dot" in reason for _, reason in found)


def test_an_image_beyond_the_bound_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"0.png": bytes(3_000_000), "1.png": picture(1)}))
    subprocess.run(["gzip", "-9", tmp_path / "a.tar"], check=True)
    monkeypatch.setattr("beit_pretrain.data.stream._LARGEST", 1_000_000)
    log = tmp_path / "bad.csv"
    list(make_dataset([str(tmp_path / "a.tar.gz")], bad_log=log, steps_per_epoch=1))
    ((name, reason),) = noted(log)
    assert name.endswith("/0") and reason == "its image has 3000000 bytes, 1000000 are the most"


def test_samples_are_those_that_webdataset_finds(tmp_path: Path) -> None:
    long = "folder/with a long name, é " + "x" * 120
    members: dict[str, bytes] = {
        "__meta__.json": b"{}",
        "./a/001.PNG": picture(1),
        "./a/001.cls": b"7\n",
        "b.c/002.json": b"{}",
        "b.c/002.png": picture(2),
        f"{long}.png": picture(3),
        f"{long}.cls": b"9",
        "004.seg.png": picture(4),
        "005.txt": b"no image",
        "006.png": picture(6),
        "006.cls": b"a cat",
        "007.png": picture(7),
    }
    (tmp_path / "a.tar").write_bytes(tar(members))
    subprocess.run(["gzip", "-k", tmp_path / "a.tar"], check=True)
    with (tmp_path / "a.tar").open("rb") as file:
        oracle = list(group_by_keys(part | {"__url__": "a.tar"} for part in tar_file_iterator(file)))
    expected = {}
    for sample in oracle:
        images = [data for name, data in sample.items() if name.endswith("png")]
        label = sample.get("cls", b"-1")
        if images and label != b"a cat":
            number = zlib.crc32(f"a.tar/{sample['__key__']}".encode())
            expected[number] = (int(decode(images[0])[0, 0, 0]), int(label))
    assert len(expected) == 5
    for name in ("a.tar", "a.tar.gz"):
        log = tmp_path / f"{name}.csv"
        batches = list(
            make_dataset([str(tmp_path / name)], bad_log=log, micro_batch_size=7, steps_per_epoch=1)
        )
        found = {
            (int(image[0]), int(label))
            for batch in batches
            for image, label in zip(batch.image, batch.label, strict=True)
        }
        assert found == set(expected.values())
        if name == "a.tar":
            assert {int(number) for batch in batches for number in batch.sample} == set(expected)
        assert {(bad.partition("/")[2], reason.partition(" (")[0]) for bad, reason in noted(log)} == {
            ("005", "no image"),
            ("006", "its label 006.cls is no class number"),
        }


# --- the loader ---------------------------------------------------------------------------------------------


def test_the_loader_goes_on_at_the_step_and_says_what_that_costs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    position = [0]

    def make(dataset: StreamDataset) -> ResumableLoader:
        return ResumableLoader(dataset, num_workers=2, batch_size=None)

    with caplog.at_level(logging.WARNING):
        settings = {"workers": 2, "position": lambda: position[0], "make": make}
        urls = write(tmp_path)
        loader = StreamLoader(dataset=make_dataset(urls, accumulate=2), **settings)
        StreamLoader(dataset=make_dataset(urls, accumulate=2, rank=1, world_size=2), **settings)
    (record,) = caplog.records  # of rank 0
    assert "reads its epoch again up to where it was" in record.message
    assert "number of devices and workers; data.source.cache=<folder> avoids both" in record.message
    assert len(loader) == 20
    for position[0], epoch, start in ((0, 0, 0), (7, 0, 7), (10, 1, 0), (24, 2, 4)):
        found = seen(loader)
        assert found == deal(make_dataset(urls, accumulate=2, epoch=epoch, start=start), 2)
        assert len(found) == 20 - 2 * start


@pytest.mark.parametrize(
    ("world", "workers", "advice"),
    [(1, 13, "data.workers to 12 or less, or "), (4, 4, "data.workers to 3 or less, or "), (13, 0, "")],
)
def test_fewer_shards_than_readers_are_refused(world: int, workers: int, advice: str) -> None:
    dataset = make_dataset([f"{shard}.tar" for shard in range(SHARDS)], world_size=world)
    with pytest.raises(ConfigError) as caught:
        StreamLoader(dataset=dataset, workers=workers, position=lambda: 0, make=lambda dataset: [])
    assert str(caught.value) == (
        f"12 shards cannot be dealt to {world} devices with data.workers={workers} each; set {advice}"
        "data.source.cache to a folder for them, where they need not be dealt"
    )


def test_a_pass_is_mixed_far_beyond_its_buffer_of_shards() -> None:
    raws = [stream._Raw("", number, b"", -1, None) for number in range(500)]
    order = [raw.number for raw in stream._mixed(raws, 1, 2)]
    assert sorted(order) == list(range(500))
    moved = np.abs(np.array(order) - np.arange(500))
    assert 3 < moved.mean() < 15  # a buffer of seven


def test_large_images_wait_in_a_buffer_of_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_HELD", 100)
    raws = [stream._Raw("", number, bytes(10 + 37 * (number % 4)), -1, None) for number in range(60)]
    taken = 0

    def arriving() -> Iterator[stream._Raw]:
        nonlocal taken
        for raw in raws:
            taken += len(raw.image)
            yield raw

    given, order = 0, []
    for raw in stream._mixed(arriving(), 1, 2):
        assert taken - given <= 100 + 2 * 121
        given += len(raw.image)
        order.append(raw.number)
    assert sorted(order) == list(range(60)) and order != list(range(60))
