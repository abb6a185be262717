"""Images that cannot be read: noted once, replaced by the next, too many end the run in one line."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit_pretrain.data.dataset import BadImages, ViewDataset
from beit_pretrain.data.sampler import EvalBatches, Key, ResumableLoader, mix
from beit_pretrain.data.sources import Source
from beit_pretrain.data.transforms import Crops, ImageBatch, Item, OneView
from beit_pretrain.errors import DataError


class Files(Source):
    """Image i is one shade, i; those in `broken` are cut short, those in `missing` are not there."""

    def __init__(self, count: int, broken: Sequence[int] = (), missing: Sequence[int] = ()) -> None:
        self.count, self.broken, self.missing = count, set(broken), set(missing)
        self.labels = np.arange(count) % 7

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        if index in self.missing:
            raise FileNotFoundError(2, "No such file or directory", self.name(index))
        file = io.BytesIO()
        Image.new("RGB", (9, 8), (index,) * 3).save(file, "PNG")
        return file.getvalue()[: 30 if index in self.broken else None]

    def name(self, index: int) -> str:
        return f'/images/it\'s "{index}",\u00e9.png'

    def fingerprint(self) -> str:
        return str(self.count)


class Recorder(OneView):
    """A view that keeps the key it was called with in the corner of its image."""

    def __call__(self, image: torch.Tensor, key: int) -> Crops:
        crops = super().__call__(image, key)
        crops.image[0, 0, :8] = torch.tensor(list(key.to_bytes(8, "big")), dtype=torch.uint8)
        return crops


def _dataset(source: Source, indices: Sequence[int], **changes: Any) -> ViewDataset:
    settings: dict[str, Any] = {"seed": 3, "held_out": False, "max_bad": 0.5, "bad_log": None} | changes
    view = Recorder(image_size=(8, 8), flip=0.0)
    return ViewDataset(source=source, indices=np.array(indices), view=view, **settings)


def _key(item: Any) -> int:
    assert isinstance(item, Item)
    return int.from_bytes(bytes(item.crops.image[0, 0].tolist()), "big")


def test_a_key_is_seed_epoch_and_sample_and_held_out_ones_never_change() -> None:
    train, held = _dataset(Files(5), range(5)), _dataset(Files(5), range(5), held_out=True)
    assert _key(train[Key(2, 4)]) == mix(3, 4, 2)
    assert _key(held[Key(2, 0)]) == _key(held[Key(2, 9)]) == mix(3, 0x68656C64, 2)
    item = train[Key(2, 4)]
    assert isinstance(item, Item) and (item.sample, item.view, item.label) == (2, 4, 2)


def test_a_bad_image_is_replaced_by_the_next_readable_one_of_its_split(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = _dataset(Files(20, broken=[4, 18], missing=[6]), [1, 4, 6, 9, 18], max_bad=0.6)
    with caplog.at_level(logging.WARNING):
        found = [dataset[Key(sample, 2)] for sample in (1, 4, 6, 9, 18)]
    assert all(isinstance(item, Item) for item in found)
    assert [item.sample for item in found if isinstance(item, Item)] == [1, 9, 9, 9, 1]  # 18 is the last
    assert [item.label for item in found if isinstance(item, Item)] == [1, 2, 2, 2, 1]
    assert _key(found[1]) == _key(found[3]) == mix(3, 2, 9)  # the view, too, is the neighbour's own
    assert int(found[1].crops.image[1, 4, 4]) == 9 if isinstance(found[1], Item) else False
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"cannot read {Files(1).name(sample)}" for sample in (4, 6, 18)
    ]


def test_the_log_names_sample_path_and_reason_once_over_processes_and_restarts(tmp_path: Path) -> None:
    log = tmp_path / "bad.csv"
    source = Files(20, broken=[4, 5], missing=[6])
    for _ in range(3):  # three processes that know nothing of one another
        dataset = _dataset(source, range(20), bad_log=log)
        for sample in range(20):
            dataset[Key(sample, 0)]
    rows = list(csv.reader(io.StringIO(log.read_bytes().decode())))
    assert rows[0] == ["sample", "name", "reason"]
    assert [row[:2] for row in rows[1:]] == [[str(sample), source.name(sample)] for sample in (4, 5, 6)]
    assert "No such file" in rows[3][2] and rows[1][2]
    assert not _dataset(Files(3), range(3), bad_log=tmp_path / "none.csv").bad.known
    assert not (tmp_path / "none.csv").exists()


def test_too_many_bad_images_end_with_the_first_ten_paths(tmp_path: Path) -> None:
    bad = BadImages(indices=np.arange(0, 200, 2), max_bad=0.12, log=tmp_path / "bad.csv")
    for sample in range(24, 0, -2):
        bad.note(sample, f"/i/{sample}.png", "cut\nshort")
        bad.note(sample, f"/i/{sample}.png", "cut\nshort")
    with pytest.raises(DataError) as caught:
        bad.note(0, "/i/0.png", "cut short")
    message = str(caught.value)
    assert message.startswith(
        "13 of 100 images cannot be read, more than the share data.max_bad=0.12 allows: /i/0.png"
    )
    assert "/i/18.png (cut short), ...; mend or remove them, or raise data.max_bad" in message
    assert "/i/20.png" not in message and "\n" not in message


def test_another_process_and_another_split_are_told_apart_in_the_shared_log(tmp_path: Path) -> None:
    log = tmp_path / "bad.csv"
    even = BadImages(indices=np.arange(0, 20, 2), max_bad=0.2, log=log)
    odd = BadImages(indices=np.arange(1, 20, 2), max_bad=0.2, log=log)
    twin = BadImages(indices=np.arange(0, 20, 2), max_bad=0.2, log=log)
    even.note(2, "2", "r")
    odd.note(3, "3", "r")
    odd.note(5, "5", "r")
    twin.note(4, "4", "r")
    with log.open("a") as file:
        file.write("sample,name,reason\n8,half a li")  # a race, and a writer that was killed
    assert sorted(even.known) == [2] and sorted(twin.known) == [2, 4]
    with pytest.raises(DataError, match=r"3 of 10 images"):
        even.note(6, "6", "r")


def test_names_and_reasons_are_no_commands_and_no_formulas(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, log = ["=1+1", "a\x1b[2J\n\u202eb", "-x"], tmp_path / "bad.csv"
    bad = BadImages(indices=np.arange(9), max_bad=0.3, log=log)
    for sample, name in enumerate(names[:2]):
        bad.note(sample, name, "@reason\x9b")
    assert all(line.isprintable() for line in caplog.messages) and r"a\x1b[2J\n\u202eb" in caplog.messages[1]
    with log.open(newline="") as file:
        assert list(csv.reader(file))[1:] == [
            ["0", "'=1+1", "'@reason\x9b"],
            ["1", names[1], "'@reason\x9b"],
        ]
    other = BadImages(indices=np.arange(9), max_bad=0.3, log=log)
    with pytest.raises(DataError) as ended:
        other.note(2, names[2], "x")
    assert [other.known[sample][0] for sample in range(3)] == names
    assert str(ended.value).isprintable() and "=1+1 (@reason" in str(ended.value)


def test_without_any_readable_image_the_run_ends() -> None:
    failure = _dataset(Files(3, broken=[0, 1, 2]), range(3), max_bad=1.0)[Key(0, 0)]
    assert not isinstance(failure, Item) and failure.message.startswith("none of the 3 images can be read")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_reaches_the_training_process_as_one_line(workers: int, tmp_path: Path) -> None:
    dataset = _dataset(Files(12, broken=[5, 7, 8]), range(12), max_bad=0.2, bad_log=tmp_path / "bad.csv")
    batches = EvalBatches(indices=np.arange(12), batch_size=3)
    loader = ResumableLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert type(caught.value) is DataError
    assert str(caught.value).startswith("3 of 12 images cannot be read") and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fewer_bad_images_than_allowed_leave_the_batches_equal_with_and_without_workers(
    tmp_path: Path,
) -> None:
    runs: list[list[ImageBatch]] = []
    for workers in (0, 2):
        dataset = _dataset(Files(12, broken=[5, 7]), range(12), bad_log=tmp_path / f"{workers}.csv")
        batches = EvalBatches(indices=np.arange(12), batch_size=3)
        runs.append(
            list(
                ResumableLoader(
                    dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate
                )
            )
        )
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    logs = [sorted((tmp_path / f"{workers}.csv").read_text().splitlines()) for workers in (0, 2)]
    assert logs[0] == logs[1]
