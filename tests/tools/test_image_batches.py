"""Batches of images by processes that read ahead, from storage that hangs and under a long TMPDIR."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from beit_pretrain.errors import DataError
from beit_pretrain.tools import images

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)


def _paint(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (5, 3), (number, 0, 0)).save(path)
    return paths


def test_storage_that_hangs_ends_the_reading_with_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LIMIT", 1.0)
    paths = _paint(tmp_path, 9)
    paths[5].unlink()
    os.mkfifo(paths[5])
    before, seen, began = set(multiprocessing.active_children()), [], time.monotonic()
    with pytest.raises(DataError, match=rf"{paths[4]}, or one of the 1 after it, could not be read in 1 s"):
        for found, _ in images.batches(paths, lambda image: image, size=2, unreadable=[]):
            seen += found
    assert seen == paths[:4] and time.monotonic() - began < 30
    assert set(multiprocessing.active_children()) <= before


def test_a_long_path_of_temporary_files_is_only_too_long_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ("x" * 110)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 110)))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    monkeypatch.setattr(images, "LIMIT", 20.0)
    paths = _paint(tmp_path, 7)
    batches = list(images.batches(paths, lambda image: image, size=3, unreadable=[]))
    assert [path for found, _ in batches for path in found] == paths
    assert [int(pixels[0, 0, 0, 0]) for _, pixels in batches] == [0, 3, 6]
