"""A split of images with label maps: batches, unreadable pairs, wrong labels, workers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.label_pairs import png, source, write, write_pair
from data.shades import Shades
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from torch import Tensor

from beit_pretrain.data.dataset import SceneDataset
from beit_pretrain.data.module import DataModule
from beit_pretrain.data.sampler import Failure, Key, mix
from beit_pretrain.data.scenes import SceneBatch, SceneView, WholeBatch, WholeView
from beit_pretrain.data.transforms import EvalView, Item
from beit_pretrain.errors import ConfigError, DataError

FORK = "ignore:This process .* is multi-threaded:DeprecationWarning"


def _view(size: tuple[int, int], **changes: Any) -> SceneView:
    return SceneView(**({"image_size": size, "distortion": False, "fill": (0.5, 0.5, 0.5)} | changes))


def _labels(number: int) -> Tensor:
    """(9 + number, 21 - number) of five classes and ignored pixels."""
    rng = np.random.default_rng(number)
    values = rng.choice([0, 1, 2, 3, 4, 255], (9 + number, 21 - number))
    return torch.from_numpy(values.astype(np.uint8))


def _scenes(root: Path, count: int, split: str = "training") -> None:
    for number in range(count):
        write_pair(root, f"{number:02d}", _labels(number), split)


def _dataset(root: Path, view: Any, **changes: Any) -> SceneDataset:
    settings: dict[str, Any] = {"seed": 3, "held_out": False, "max_bad": 0.5, "bad_log": None} | changes
    found = source(root)
    return SceneDataset(source=found, view=view, indices=found.splits["train"], **settings)


def test_whole_images_come_with_their_own_sizes_and_numbers(tmp_path: Path) -> None:
    _scenes(tmp_path, 4)
    dataset = _dataset(tmp_path, WholeView())
    batch = dataset.collate([dataset[Key(sample, 0)] for sample in (2, 0, 3)])
    assert isinstance(batch, WholeBatch)
    assert [tuple(image.shape) for image in batch.images] == [(3, 11, 19), (3, 9, 21), (3, 12, 18)]
    for sample, image, label_map in zip((2, 0, 3), batch.images, batch.label_maps, strict=True):
        assert torch.equal(label_map, _labels(sample))
        assert (image == label_map[0, 0]).all()
    assert batch.sample.tolist() == [2, 0, 3] and batch.view.tolist() == [0, 0, 0]
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, WholeBatch) and moved.images[1].is_meta and moved.label_maps[2].is_meta


def test_training_crops_are_stacked_under_the_keys_of_their_samples(tmp_path: Path) -> None:
    _scenes(tmp_path, 4)
    view = _view((8, 12))
    dataset = _dataset(tmp_path, view)
    batch = dataset.collate([dataset[Key(sample, 6)] for sample in (1, 3)])
    assert isinstance(batch, SceneBatch) and batch.sample.tolist() == [1, 3] and batch.view.tolist() == [6, 6]
    assert batch.image.shape == (2, 3, 8, 12) and batch.label_map.shape == (2, 8, 12)
    for row, sample in enumerate((1, 3)):
        label_map = dataset.scenes.label_map(sample)
        image = label_map[0, 0].expand(3, *label_map.shape)  # as write_pair paints it
        crops = view(image, label_map, mix(3, 6, sample))
        assert crops.label_map is not None and torch.equal(batch.label_map[row], crops.label_map)
        assert torch.equal(batch.image[row], crops.image)


def test_a_pair_of_which_one_cannot_be_read_is_replaced_and_named(tmp_path: Path) -> None:
    _scenes(tmp_path, 5)
    write(tmp_path / "annotations/training/01.png", b"broken")
    write(tmp_path / "images/training/02.png", b"broken")
    write(tmp_path / "annotations/training/03.png", png(np.zeros((4, 30), int)))
    dataset = _dataset(tmp_path, WholeView(), max_bad=0.7, bad_log=tmp_path / "bad.csv")
    found = [dataset[Key(sample, 0)] for sample in range(5)]
    assert [item.sample for item in found if isinstance(item, Item)] == [0, 4, 4, 4, 4]
    rows = (tmp_path / "bad.csv").read_text().splitlines()[1:]
    assert "annotations/training/01.png is no PNG file" in rows[0] and "no image format known" in rows[1]
    assert "18 x 12 pixels, upright by its EXIF orientation, but its label map has 30 x 4" in rows[2]
    failure = _dataset(tmp_path, WholeView(), max_bad=0.1)[Key(1, 0)]
    assert isinstance(failure, Failure) and failure.message.startswith("1 of 5 images cannot be read")


def test_an_image_that_was_turned_fits_the_map_of_its_upright_picture(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", np.ones((6, 10), int))
    picture, exif, file = Image.new("RGB", (6, 10)), Image.Exif(), io.BytesIO()
    exif[274] = 6  # turned by a quarter
    picture.save(file, "PNG", exif=exif)
    write(tmp_path / "images/training/a.png", file.getvalue())
    item = _dataset(tmp_path, WholeView(), max_bad=0.0)[Key(0, 0)]
    assert isinstance(item, Item) and item.crops.image.shape == (3, 6, 10)


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_is_no_class_ends_the_run_however_many_bad_files_are_allowed(
    workers: int, tmp_path: Path
) -> None:
    _scenes(tmp_path, 4)
    write(tmp_path / "annotations/training/02.png", png(np.full((11, 19), 77)))
    module = _module(tmp_path, workers=workers, max_bad=1.0)
    with pytest.raises(
        DataError, match=r"label map .*02\.png has the value 77, which is none of the 5"
    ) as caught:
        list(module.train_dataloader())
    assert "\n" not in str(caught.value)


def _module(root: Path, **changes: Any) -> DataModule:
    settings: dict[str, Any] = {
        "micro_batch_size": None,
        "workers": 0,
        "seed": 0,
        "bad_log": None,
        "batch_size": 2,
        "val_share": 0.0,
    }
    views = {"views": _view((8, 12), distortion=True), "eval_views": WholeView()}
    return DataModule(**({"source": source(root), "scenes": True} | settings | views | changes))


@pytest.mark.filterwarnings(FORK)
def test_workers_ship_crops_and_whole_images_as_they_are(tmp_path: Path) -> None:
    _scenes(tmp_path, 7)
    _scenes(tmp_path, 5, "validation")
    runs = []
    for workers in (0, 2):
        module = _module(tmp_path, workers=workers)
        train, held_out = list(module.train_dataloader()), list(module.val_dataloader())
        assert all(isinstance(batch, SceneBatch) for batch in train)
        assert all(isinstance(batch, WholeBatch) for batch in held_out)
        flat = [part for batch in (*train, *held_out) for part in batch]
        runs.append([p for part in flat for p in (part if isinstance(part, list) else [part])])
    # Three batches; five images with their maps, one at a time.
    assert len(runs[0]) == 3 * 4 + 5 * 4
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_pre_training_looks_at_the_images_alone(tmp_path: Path) -> None:
    _scenes(tmp_path, 4)
    write(tmp_path / "annotations/training/02.png", b"never read")
    view = EvalView(image_size=(8, 8))
    batch = next(iter(_module(tmp_path, scenes=False, views=view, batch_size=4).train_dataloader()))
    assert batch.image.shape == (4, 3, 8, 8) and batch.label.tolist() == [-1] * 4


def test_a_source_without_label_maps_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"stage=segment needs images with label maps: set data=ade20k, data=image_"
    ):
        DataModule(
            source=Shades(9, range(9)),
            scenes=True,
            views=None,
            eval_views=None,
            batch_size=1,
            micro_batch_size=None,
            workers=0,
            seed=0,
            bad_log=None,
        )


def test_an_image_too_long_and_thin_for_windows_counts_as_unreadable(tmp_path: Path) -> None:
    for name, shape in (("a", (1, 256)), ("b", (1, 257)), ("c", (600, 2))):
        write_pair(tmp_path, name, np.arange(np.prod(shape)).reshape(shape) % 5)
    dataset = _dataset(tmp_path, WholeView(), held_out=True, max_bad=1.0)
    assert [getattr(dataset[Key(sample, 0)], "sample", None) for sample in range(3)] == [0, 0, 0]
    assert dataset.bad.known[1][1].startswith(
        "257 x 1 pixels: for label maps the long side is at most 256 times"
    )
    assert set(dataset.bad.known) == {1, 2}
