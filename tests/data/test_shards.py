"""Images in shards: what is read is what webdataset reads; damage, foreign shards, and many processes."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import tars
from data.shard_server import ShardServer, serving
from torch.utils.data import DataLoader, Dataset

from beit_pretrain.data import shards as shards_module
from beit_pretrain.data.shard_tar import scan
from beit_pretrain.data.shards import ShardSource
from beit_pretrain.errors import ConfigError, DataError
from beit_pretrain.tools.shards import show

COUNTS = {"train": [4, 0, 3], "val": [2], "test": [1]}


def images(samples: tars.Samples) -> list[bytes]:
    return [sample["jpg"] for sample in samples]


def read(source: ShardSource) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


class Bytes(Dataset[bytes]):
    def __init__(self, source: ShardSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes:
        return self.source.read(index)


# --- shards of this project's writing -----------------------------------------------------------------------


def test_a_set_gives_what_webdataset_reads_in_its_order(tmp_path: Path) -> None:
    tars.write_set(tmp_path, COUNTS, class_names=["a", "b", "c"], flaws={})
    names = [f"train-00000{n}.tar" for n in range(3)] + ["val-000000.tar", "test-000000.tar"]
    truth = tars.read([tmp_path / name for name in names])
    source = ShardSource(root=str(tmp_path))
    assert len(source) == 10 and read(source) == images(truth) and not source.streamed
    assert source.labels is not None and source.labels.dtype == np.int64
    assert source.labels.tolist() == [int(sample["cls"]) for sample in truth]
    assert {name: part.tolist() for name, part in source.splits.items()} == {
        "train": [0, 1, 2, 3, 4, 5, 6],
        "val": [7, 8],
        "test": [9],
    }
    assert source.bounds is not None and source.bounds.tolist() == [0, 4, 4, 7, 9, 10]
    assert source.class_names == ["a", "b", "c"]
    shard = [0] * 4 + [2] * 3 + [3] * 2 + [4]
    for index, sample in enumerate(truth):
        assert source.name(index) == f"{names[shard[index]]}:{sample['__key__']}"
        assert source.where(index) == f"{names[shard[index]]}, sample {index - source.bounds[shard[index]]}"


def test_moved_and_renamed_shards_are_the_same_data_and_others_are_not(tmp_path: Path) -> None:
    tars.write_set(tmp_path / "a", {"train": [3], "val": [2]})
    tars.write_set(tmp_path / "b", {"train": [3], "val": [2]})
    os.rename(tmp_path / "b/train-000000.tar", tmp_path / "b/train-7.tar")
    text = (tmp_path / "b/index.json").read_text()
    (tmp_path / "b/index.json").write_text(text.replace("train-000000", "train-7"))
    first = ShardSource(root=str(tmp_path / "a")).fingerprint()
    assert first == ShardSource(root=str(tmp_path / "b")).fingerprint()
    others = [{"train": [3], "val": [1]}, {"train": [3, 2]}, {"train": [3], "test": [2]}]
    for name, counts in zip("cde", others, strict=True):
        tars.write_set(tmp_path / name, counts)
    assert len({first, *(ShardSource(root=str(tmp_path / name)).fingerprint() for name in "cde")}) == 4


def test_classes_are_named_by_a_file_the_index_or_their_numbers(tmp_path: Path) -> None:
    tars.write_set(tmp_path, {"train": [3]})
    assert ShardSource(root=str(tmp_path)).class_names == ["0", "1", "2"]
    names = tmp_path / "names.txt"
    names.write_text("rose\nüber\ntulip\n")
    assert ShardSource(root=str(tmp_path), class_names=str(names)).class_names == ["rose", "über", "tulip"]
    names.write_text("rose\n")
    with pytest.raises(
        DataError, match=r"names\.txt has 1 lines, but there are labels up to 2; set data\.source\.cl"
    ):
        ShardSource(root=str(tmp_path), class_names=str(names))
    with pytest.raises(ConfigError, match=r"^data\.source\.class_names=/none cannot be read: .*No such file"):
        ShardSource(root=str(tmp_path), class_names="/none")
    tars.write_set(tmp_path, {"train": [3]}, class_names=["a"])
    with pytest.raises(DataError, match="the index names 1 classes, but there are labels up to 2"):
        ShardSource(root=str(tmp_path))


def test_unlabelled_shards_have_no_labels_and_no_classes(tmp_path: Path) -> None:
    tars.write(tmp_path / "a.tar", tars.samples(3, classes=None))
    source = ShardSource(root=str(tmp_path / "a.tar"))
    assert source.labels is None and source.class_names is None and len(read(source)) == 3


def test_a_flipped_byte_is_found_where_it_lies_and_nowhere_else(tmp_path: Path) -> None:
    truth = images(tars.write_set(tmp_path, {"train": [2, 3]}))
    path = tmp_path / "train-000001.tar"
    offset, size, _, _ = scan(path)[0][1].item()
    for place in (offset, offset + size - 1):
        tars.flip(path, place)
        source = ShardSource(root=str(tmp_path))
        words = (
            r"^shard train-000001\.tar, sample 000000003: its bytes are not those that were written \(CRC\); "
        )
        with pytest.raises(DataError, match=words):
            source.read(3)
        assert [source.read(index) for index in (0, 1, 2, 4)] == [truth[index] for index in (0, 1, 2, 4)]
        tars.flip(path, place)
    assert read(ShardSource(root=str(tmp_path))) == truth


def test_a_shard_cut_anywhere_loses_the_samples_behind_the_cut_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = images(tars.write_set(tmp_path, {"train": [5]}))
    path = tmp_path / "train-000000.tar"
    whole, rows = path.read_bytes(), scan(path)[0]
    for cut in (0, 100, 513, int(rows["offset"][2]), int(rows["offset"][2]) + 1, int(rows["offset"][4]) + 3):
        path.write_bytes(whole[:cut])
        caplog.clear()
        source = ShardSource(root=str(tmp_path))
        (line,) = caplog.messages
        assert f"1 have another size: train-000000.tar ({cut} bytes instead of {len(whole)})" in line
        for index, row in enumerate(rows):
            if row["offset"] + row["size"] <= cut:
                assert source.read(index) == truth[index]
            else:
                with pytest.raises(
                    DataError, match=rf"^shard train-000000\.tar is cut short: it .* of {len(whole)}; "
                ):
                    source.read(index)
                assert source.name(index).startswith("train-000000.tar")


def test_missing_shards_are_one_warning_and_all_of_them_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = images(tars.write_set(tmp_path, {"train": [1] * 6}))
    for number in range(1, 6):
        os.unlink(tmp_path / f"train-00000{number}.tar")
    with caplog.at_level(logging.WARNING):
        source = ShardSource(root=str(tmp_path))
    (line,) = caplog.messages
    assert "of 6 shards 5 are not there: train-000001.tar, train-000002.tar, train-000003.tar, ...;" in line
    assert source.read(0) == truth[0] and source.name(2) == "train-000002.tar, sample 0"
    with pytest.raises(DataError, match=r"^shard train-000002\.tar cannot be opened \(.*\): No such file"):
        source.read(2)
    os.unlink(tmp_path / "train-000000.tar")
    with pytest.raises(
        DataError, match=r"^none of the 6 shards is where its index is, such as [^\n]*set data\.root"
    ):
        ShardSource(root=str(tmp_path))


def test_a_flawed_sample_says_its_reason(tmp_path: Path) -> None:
    tars.write(tmp_path / "a.tar", [*tars.samples(1), {"__key__": "x", "jpg": b"1", "cls": "rose"}])
    source = ShardSource(root=str(tmp_path / "*.tar"))
    assert dict(source.flaws) == {1: "sample x: its label x.cls is no class number (0, 1, 2, ...)"}
    with pytest.raises(DataError, match=r"^sample x: its label x\.cls is no class number"):
        source.read(1)
    assert source.labels is not None and source.labels.tolist() == [0, -1]


def test_few_files_are_open_however_many_shards_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_OPEN", 4)
    truth = images(tars.write_set(tmp_path, {"train": [1] * 30}))

    def opened() -> int:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in links if link.is_symlink())

    source = ShardSource(root=str(tmp_path))
    for _ in range(3):
        assert read(source) == truth and opened() <= 5  # four, and the mapped index
    threads = [threading.Thread(target=read, args=(source,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(source) == truth and opened() <= 5
    del source
    gc.collect()
    assert opened() == 0


def test_workers_read_the_same_from_files_that_were_open_before_they_began(tmp_path: Path) -> None:
    truth = images(tars.write_set(tmp_path, {"train": [40, 40]}))
    source = ShardSource(root=str(tmp_path))
    assert source.read(0) == truth[0] and source.read(79) == truth[79]  # both are open now
    loader = DataLoader(Bytes(source), batch_size=None, num_workers=2)
    assert list(loader) == truth and read(source) == truth


def test_a_source_is_pickled_without_its_open_files(tmp_path: Path) -> None:
    truth = images(tars.write_set(tmp_path, COUNTS))
    source = ShardSource(root=str(tmp_path))
    source.read(0)
    again = pickle.loads(pickle.dumps(source))
    assert read(again) == truth and again.fingerprint() == source.fingerprint()


# --- where a set lies ---------------------------------------------------------------------------------------


def test_a_folder_without_an_index_is_told_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has no index\.json: set data\.root to .*/train-\{000000\.\.000146\}\.tar$"
    ):
        ShardSource(root=str(tmp_path))
    tars.write(tmp_path / "x.tar", tars.samples(1))
    with pytest.raises(DataError, match=r"has no index\.json: .*/\*\.tar$"):
        ShardSource(root=str(tmp_path))
    tars.write_set(tmp_path, {"train": [1]})
    with pytest.raises(
        ConfigError, match=r"^data\.source\.val=v\.tar: the index in data\.root=.* says which"
    ):
        ShardSource(root=str(tmp_path), val="v.tar")
    with pytest.raises(
        ConfigError, match=r"^data\.source\.samples=7, but the shards hold 1; set it to null$"
    ):
        ShardSource(root=str(tmp_path), samples=7)


def test_patterns_name_the_shards_of_each_split_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = []
    for name in ("a-00", "a-01", "a-10", "b", "c-1", "c-2"):
        content = tars.samples(2, start=len(truth))
        tars.write(tmp_path / f"{name}.tar", content)
        truth += content
    source = ShardSource(
        root=[f"{tmp_path}/a-{{00..01}}.tar", f"{tmp_path}/a-1*.tar"],
        val=f"{tmp_path}/b.tar",
        test=[f"{tmp_path}/c-{{1,2}}.tar"],
    )
    assert read(source) == images(truth)
    assert [part.tolist() for part in source.splits.values()] == [[*range(6)], [6, 7], [8, 9, 10, 11]]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "the index of these shards is kept if data.source.cache is set to a folder",
        "indexing 6 shards",
    ]
    one = f"{tmp_path}/a-00.tar"
    for words, settings in [
        (
            r"^data\.root=.*a-\{3\.\.1\.tar has a brace without its other half",
            {"root": f"{tmp_path}/a-{{3..1.tar"},
        ),
        (r"^data\.root=.*/z\*\.tar matches no file", {"root": f"{tmp_path}/z*.tar"}),
        (r"^data\.source\.val=.*: .*a-00\.tar is in two patterns or comes twice", {"root": one, "val": one}),
        (r"^data\.root names no shard", {"root": [], "val": one}),
        (
            r"^2 of the 3 shards in data\.root.* are not there: .*d-1\.tar",
            {"root": [one, f"{tmp_path}/d-{{1,2}}.tar"]},
        ),
    ]:
        with pytest.raises((ConfigError, DataError), match=words):
            ShardSource(**settings)


def test_shards_that_cannot_be_used_are_named_together(tmp_path: Path) -> None:
    tars.write(tmp_path / "a.tar", tars.samples(2))
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1500])
    with pytest.raises(
        DataError, match=r"^shards cannot be used: shard b\.tar is empty .*; shard c\.tar is cut short"
    ):
        ShardSource(root=f"{tmp_path}/*.tar")


def test_the_index_of_foreign_shards_is_made_once_and_anew_when_one_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"root": f"{tmp_path}/*.tar", "cache": str(tmp_path / "cache")}
    truth = tars.samples(4)
    tars.write(tmp_path / "a.tar", truth[:3])
    tars.write(tmp_path / "b.tar", [truth[3], {"__key__": "x", "txt": "no image"}])
    first = ShardSource(**settings)
    assert "indexing 2 shards" in capsys.readouterr().err and first.flaws.keys() == {4}
    assert first.fingerprint() == ShardSource(root=settings["root"]).fingerprint()
    capsys.readouterr()
    second = ShardSource(**settings)
    assert capsys.readouterr().err == "" and second.fingerprint() == first.fingerprint()
    assert [second.read(index) for index in range(4)] == images(truth) and isinstance(
        second.index.entries, np.memmap
    )
    for path in (tmp_path / "cache").rglob("index.npy"):  # a damaged index is made again
        tars.flip(path, -3)
    assert ShardSource(**settings).fingerprint() == first.fingerprint()
    assert "indexing" in capsys.readouterr().err
    tars.write(tmp_path / "b.tar", tars.samples(1, start=9))
    assert len(ShardSource(**settings)) == 4 and "indexing" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("parts"))


def test_an_interrupted_index_goes_on_with_the_shards_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"root": f"{tmp_path}/*.tar", "cache": str(tmp_path / "cache")}
    for number in range(4):
        tars.write(tmp_path / f"{number}.tar", tars.samples(2, start=2 * number))
    scanned: list[str] = []

    def counted(path: Path, **settings: Any) -> Any:
        scanned.append(path.name)
        if len(scanned) == 3:
            raise KeyboardInterrupt
        return scan(path, **settings)

    monkeypatch.setattr("beit_pretrain.data.shard_sets.scan", counted)
    with pytest.raises(KeyboardInterrupt):
        ShardSource(**settings)
    source = ShardSource(**settings)
    assert scanned == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar"] and read(source) == images(
        tars.samples(8)
    )


def test_processes_at_once_make_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        tars.write(tmp_path / f"{number}.tar", tars.samples(10, start=10 * number))
    processes = multiprocessing.get_context("fork")
    begin, scans, found = processes.Barrier(3), processes.Value("i", 0), processes.Queue()

    def slow(path: Path, **settings: Any) -> Any:
        with scans:
            scans.value += 1
        time.sleep(0.1)
        return scan(path, **settings)

    def rank() -> None:
        begin.wait(30)
        source = ShardSource(root=f"{tmp_path}/*.tar", cache=str(tmp_path / "cache"))
        found.put((source.fingerprint(), read(source)))

    monkeypatch.setattr("beit_pretrain.data.shard_sets.scan", slow)
    ranks = [processes.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    said = [found.get(timeout=30) for _ in ranks]
    for process in ranks:
        process.join()
    assert said[0] == said[1] == said[2] and said[0][1] == images(tars.samples(30)) and scans.value == 3


def test_a_cache_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    tars.write(tmp_path / "a.tar", tars.samples(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"^data\.source\.cache=.*/file/x cannot be written to \(Not a directory\); "
    ):
        ShardSource(root=f"{tmp_path}/a.tar", cache=str(tmp_path / "file/x"))


# --- keys with several images -------------------------------------------------------------------------------


def photos(path: Path, names: list[str]) -> Path:
    return tars.archive(path, [(name, name.encode()) for name in names])


def test_dots_in_names_lose_no_image_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"photo.2020-01-0{n}.jpg" for n in range(1, 7)]
    members = [*((name, name.encode()) for name in names), ("photo.2020-01-06.cls", b"4")]
    path = tars.archive(tmp_path / "x.tar", members)
    for cache in (None, str(tmp_path / "cache")):
        with pytest.raises(DataError, match=r"^5 of 6 images \(83\.3%\) .* such as photo\.2020.*key_until="):
            ShardSource(root=str(path), cache=cache)
        capsys.readouterr()
        source = ShardSource(root=str(path), cache=cache, key_until="last_dot")
        assert (
            read(source) == [name.encode() for name in names] and "passed over" not in capsys.readouterr().err
        )
        assert source.labels is not None and source.labels.tolist() == [-1] * 5 + [4]
        assert source.name(5) == "x.tar:photo.2020-01-06"
    with pytest.raises(ConfigError, match=r"^data\.source\.key_until=first: set it to last_dot, or to null"):
        ShardSource(root=str(path), key_until="first")
    tars.write_set(tmp_path / "set", {"train": [2]})
    with pytest.raises(ConfigError, match=r"the index in data\.root=\S+ says what the samples are"):
        ShardSource(root=str(tmp_path / "set"), key_until="last_dot")


def test_images_that_are_passed_over_are_told_once_and_kept_in_the_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "a.tar", [f"{n}{end}" for n in range(4) for end in (".depth.png", ".jpg")])
    photos(tmp_path / "b.tar", ["9.a.jpg", "9.b.jpg", *(f"x{n}.jpg" for n in range(95))])
    settings: dict[str, Any] = {"root": f"{tmp_path}/*.tar", "cache": str(tmp_path / "cache")}
    source = ShardSource(**settings)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert line.startswith("5 of 105 images (4.8%) are passed over, such as 9.b.jpg: ")
    assert read(source)[:5] == [b"0.jpg", b"1.jpg", b"2.jpg", b"3.jpg", b"9.a.jpg"]
    ShardSource(**settings)
    assert capsys.readouterr().err == "" and source.index.passed_over == (5, 1, "9.b.jpg")
    (path,) = (tmp_path / "cache").glob("index-*/index.json")
    show(str(path.parent))
    assert "images passed over: 5, such as 9.b.jpg" in capsys.readouterr().out.splitlines()
    content = json.loads(path.read_text())
    del content["passed_over"]  # as earlier versions wrote it
    path.write_text(json.dumps(content))
    assert read(ShardSource(**settings)) == read(source)
    assert "is of an earlier version" in capsys.readouterr().err


def test_the_name_of_a_shard_is_made_of_plain_letters(tmp_path: Path) -> None:
    for name in ("a;b c$(d).tar", "-x.tar", "\x1b[2J.tar"):
        photos(tmp_path / name, ["0.jpg"])
    settings: dict[str, Any] = {"root": f"{tmp_path}/*.tar", "cache": str(tmp_path / "cache")}
    for _ in range(2):
        source = ShardSource(**settings)
        assert {source.name(n) for n in range(3)} == {"__2J.tar:0", "_x.tar:0", "c__d_.tar:0"}


# --- shards from afar ---------------------------------------------------------------------------------------


def test_a_remote_set_is_read_by_way_of_the_cache(tmp_path: Path) -> None:
    truth = images(tars.write_set(tmp_path / "set", COUNTS))
    with serving(ShardServer()) as server:
        server.files.update({path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()})
        settings: dict[str, Any] = {
            "root": server.url(""),
            "cache": str(tmp_path / "cache"),
            "cache_gb": 1,
        }
        source = ShardSource(**settings)
        assert set(server.asked) == {"index.json", "index.npy"} and len(source) == 10
        assert source.name(8) == "val-000000.tar, sample 1" and "val-000000.tar" not in server.asked
        assert read(source) == truth and read(ShardSource(**settings)) == truth
        assert sum(name.endswith(".tar") for name in server.asked) == 4  # of five, one is empty
        assert source.fingerprint() == ShardSource(root=str(tmp_path / "set")).fingerprint()
        del server.files["index.json"]
        with pytest.raises(DataError, match=r"^data\.root=http\S+/ has no index\.json: set data\.root to"):
            ShardSource(**settings)


def test_foreign_remote_shards_are_fetched_once_to_be_indexed_and_read(tmp_path: Path) -> None:
    with serving(ShardServer()) as server:
        for name, start in (("a-0.tar", 0), ("a-1.tar", 3)):
            server.files[name] = tars.write(tmp_path / name, tars.samples(3, start=start)).read_bytes()
        settings: dict[str, Any] = {
            "root": server.url("a-{0..1}.tar"),
            "val": str(tars.write(tmp_path / "val.tar", tars.samples(2, start=6))),
            "cache": str(tmp_path / "cache"),
            "cache_gb": 1,
        }
        for _ in range(2):
            source = ShardSource(**settings)
            assert read(source) == images(tars.samples(8)) and source.splits["val"].tolist() == [6, 7]
        assert sorted(server.asked) == ["a-0.tar", "a-1.tar"]
        assert source.where(4) == "a-1.tar, sample 1"


def test_remote_shards_without_a_cache_are_streamed(tmp_path: Path) -> None:
    tars.write_set(tmp_path, COUNTS)
    with serving(ShardServer()) as server:
        server.files["index.json"] = (tmp_path / "index.json").read_bytes()
        source = ShardSource(root=server.url(""))
        assert source.streamed and len(source) == 7
        assert source.urls == [server.url(f"train-00000{number}.tar") for number in range(3)]
    for root in ("https://host/{0..2}.tar", "s3://bucket/{0..2}.tar", "pipe:cat /data/{0..2}.tar"):
        source = ShardSource(root=root, samples=40)
        assert source.streamed and len(source) == 40 and source.labels is None and source.bounds is None
        assert source.urls == [root.replace("{0..2}", str(number)) for number in range(3)]
        assert source.fingerprint() != ShardSource(root=root, samples=41).fingerprint()
        assert pickle.loads(pickle.dumps(source)).urls == source.urls
        with pytest.raises(
            ConfigError, match=r"^data\.source\.samples is null: set it to the number of images"
        ):
            ShardSource(root=root)
        with pytest.raises(
            ConfigError, match=r"^data\.source\.cache is null, so shards are streamed, and held-out"
        ):
            ShardSource(root=root, val=root.replace("{0..2}", "9"), samples=40)


def test_reading_from_shards_costs_little(tmp_path: Path) -> None:
    content = [{"__key__": f"{n:09d}", "jpg": bytes(100_000), "cls": "0"} for n in range(200)]
    source = ShardSource(root=str(tars.write(tmp_path / "a.tar", content)))
    began = time.process_time()
    for index in np.random.default_rng(0).permutation(200).tolist() * 5:
        source.read(index)
    assert time.process_time() - began < 1  # 1,000 reads, some 0.1 ms each; an image takes 4 ms to decode


def test_names_in_a_remote_index_are_no_commands(tmp_path: Path) -> None:
    tars.write_set(tmp_path / "set", {"train": [2]})
    path = tmp_path / "set/index.json"
    whole = path.read_text()
    for name in (f"train-000000.tar;touch {tmp_path}/harm #", "$(touch harm).tar", "../x.tar", "-x.tar"):
        path.write_text(whole.replace("train-000000.tar", name))
        for cache in (None, str(tmp_path / "cache")):
            with pytest.raises(DataError, match=r"index\.json is damaged .* is no name of a shard"):
                ShardSource(root=f"pipe:cat {tmp_path}/set/", cache=cache, cache_gb=0.001)
    assert not (tmp_path / "harm").exists()
    path.write_text(whole)
    assert (
        len(read(ShardSource(root=f"pipe:cat {tmp_path}/set/", cache=str(tmp_path / "c"), cache_gb=0.001)))
        == 2
    )
