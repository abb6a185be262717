"""Tars that mean harm, and samples with several images."""

from __future__ import annotations

import tarfile
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from data import tars

from beit_pretrain.data.shard_tar import scan
from beit_pretrain.data.stream import StreamDataset
from beit_pretrain.errors import DataError

# --- headers of tars that mean harm -------------------------------------------------------------------------


def pax(name: str, headers: dict[str, str], data: bytes = b"image", kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = len(data), kind, headers
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def raw_header(kind: bytes, size: int, data: bytes = b"") -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


HARMFUL = {
    "map of words": pax("a.jpg", {"GNU.sparse.map": "x"}),
    "map of version 1": pax("a.jpg", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, b"9" * 9000),
    "size of words": pax("a.jpg", {"GNU.sparse.size": "x"}),
    "size without end": pax("a.jpg", {"size": "9" * 5000}),
    "negative size": pax("a.jpg", {"size": "-5"}),
    "character set": pax("a.jpg", {"hdrcharset": "\xff"}).replace("\xff".encode(), b"\xff\xff"),
    "headers of headers": raw_header(tarfile.XHDTYPE, 0) * 3000 + pax("a.jpg", {}),
    "long name": raw_header(tarfile.GNUTYPE_LONGNAME, 2**40, b"x" * 512),
    "long header": raw_header(tarfile.XHDTYPE, 2**33 - 1, b"x" * 512),
    "negative header": raw_header(tarfile.XHDTYPE, -(2**40), b"x" * 512),
    "member beyond all bounds": raw_header(tarfile.REGTYPE, 2**80),
    "sparse without end": raw_header(tarfile.GNUTYPE_SPARSE, 5)[:482] + b"\1" + bytes(29),
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_harmful_header_makes_no_traceback_and_no_memory(tmp_path: Path, harm: str) -> None:
    first, last = pax("0.jpg", {}) + pax("1.jpg", {}), pax("z.jpg", {})
    path = tmp_path / "a.tar"
    path.write_bytes(first + HARMFUL[harm] + last + bytes(1024))
    tracemalloc.start()
    try:
        with suppress(DataError):
            found = scan(path)
            assert found.rows["size"].tolist()[:2] == [5, 5] and len(found.rows) <= 4
        stream = StreamDataset(
            urls=[str(path)],
            samples=9,
            view=cast(Any, None),
            seed=0,
            micro_batch_size=1,
            rank=0,
            world_size=1,
            steps_per_epoch=1,
            accumulate=1,
            epoch=0,
            start=0,
            max_bad=1.0,
            bad_log=None,
            timeout=5.0,
        )
        assert 1 <= len(list(stream._raws(np.array([0])))) <= 4
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


# --- several images of a key --------------------------------------------------------------------------------


def images_of(names: list[str]) -> list[tuple[str, bytes]]:
    return [(name, name.encode()) for name in names]


@pytest.mark.parametrize(
    ("names", "taken", "passed", "unclear"),
    [
        (["0.jpg", "1.jpg"], ["0.jpg", "1.jpg"], 0, 0),
        (["0.depth.png", "0.jpg"], ["0.jpg"], 1, 0),
        (["0.jpg", "0.depth.png", "0.seg.png", "1.seg.PNG", "1.JPEG"], ["0.jpg", "1.JPEG"], 3, 0),
        (["0.jpg", "0.png"], ["0.jpg"], 1, 0),
        (["0.left.jpg", "1.left.jpg"], ["0.left.jpg", "1.left.jpg"], 0, 0),
        (["0.a.jpg", "0.b.jpg", "1.jpg"], ["0.a.jpg", "1.jpg"], 1, 1),
        ([f"photo.2020-01-0{n}.jpg" for n in range(6)], ["photo.2020-01-00.jpg"], 5, 5),
    ],
)
def test_images_beside_that_of_a_sample_are_counted(
    tmp_path: Path, names: list[str], taken: list[str], passed: int, unclear: int
) -> None:
    path = tars.archive(tmp_path / "a.tar", images_of(names))
    rows, flaws, passed_over = scan(path)
    data = path.read_bytes()
    assert [data[o : o + s].decode() for o, s in rows[["offset", "size"]].tolist()] == taken and not flaws
    assert passed_over[:2] == (passed, unclear) and (passed_over.example in names) == bool(passed)
    dotted = scan(path, last_dot=True)
    assert len(dotted.rows) == len({name.rpartition(".")[0] for name in names})


def test_links_to_images_are_counted(tmp_path: Path) -> None:
    path = tars.archive(tmp_path / "a.tar", images_of(["0.jpg"]))
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("1.jpg", tarfile.SYMTYPE),
            ("2.jpg", tarfile.LNKTYPE),
            ("3.jpg", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg"
            tar.addfile(info)
    assert len(scan(path).rows) == 1 and scan(path).passed_over == (2, 0, "1.jpg")


def test_the_map_of_a_sparse_file_is_read_within_its_bound(tmp_path: Path) -> None:
    """The old form of GNU tar: blocks of a map follow the header, each says whether there is another."""
    head = bytearray(raw_header(tarfile.GNUTYPE_SPARSE, 5))
    head[482] = 1
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    block, last = bytes(504) + b"\1" + bytes(7), bytes(512)
    for blocks, readable in ((3, True), (100_000, False)):
        (tmp_path / "a.tar").write_bytes(
            pax("0.jpg", {})
            + bytes(head)
            + block * blocks
            + last
            + b"image"
            + bytes(507)
            + pax("1.jpg", {})
            + bytes(1024)
        )
        tracemalloc.start()
        try:
            if readable:
                assert len(scan(tmp_path / "a.tar").rows) == 2
            else:
                with pytest.raises(DataError):
                    scan(tmp_path / "a.tar")
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()
