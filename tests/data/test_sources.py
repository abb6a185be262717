"""Sources by name: the embedded digits, torchvision's and the hub's."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import datasets as sklearn_datasets

from beit_pretrain.data.named import HuggingFaceSource, TorchvisionSource
from beit_pretrain.data.sources import Digits
from beit_pretrain.errors import DataError

TEST_BEGINS, TEST_SUM = [2, 4, 5, 6, 7], 364841
VAL_BEGINS, VAL_SUM = [10, 15, 21, 25, 43], 244556
PIXELS, TARGETS = sklearn_datasets.load_digits(return_X_y=True)
SPLITS = {"train": "train", "val": "validation", "test": "test"}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_the_digits_are_split_for_good_and_by_class(digits: Digits) -> None:
    splits = digits.splits
    assert {name: len(indices) for name, indices in splits.items()} == {
        "train": 1120,
        "val": 280,
        "test": 397,
    }
    assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(1797))
    assert digits.labels is not None and np.array_equal(digits.labels, TARGETS)
    for indices in splits.values():
        share = np.bincount(digits.labels[indices]) / len(indices)
        assert np.abs(share - np.bincount(digits.labels) / 1797).max() < 1 / len(indices)
    # Results are compared over versions of this project: these parts must never move.
    assert splits["test"][:5].tolist() == TEST_BEGINS and int(splits["test"].sum()) == TEST_SUM
    assert splits["val"][:5].tolist() == VAL_BEGINS and int(splits["val"].sum()) == VAL_SUM


def test_a_digit_is_its_eight_by_eight_picture_enlarged(digits: Digits) -> None:
    image = digits.read(17)
    assert isinstance(image, torch.Tensor) and image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    small = image[0].float().unflatten(0, (8, 4)).unflatten(2, (8, 4)).mean((1, 3))
    correlation = np.corrcoef(small.flatten().numpy(), PIXELS[17])[0, 1]
    assert correlation > 0.98 and abs(small.mean() - PIXELS[17].mean() * 255 / 16) < 4
    assert digits.name(17) == "digit 17" and digits.class_names == list("0123456789")
    assert digits.fingerprint() == Digits().fingerprint() and len(digits) == 1797


def _write_cifar(root: Path) -> None:
    """CIFAR-10's files in miniature; torchvision's checksums are switched off by the caller."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for name in names:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, len(name) % 10]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))


@pytest.mark.parametrize("download", [True, False])
def test_torchvisions_train_and_test_part_are_laid_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    _write_cifar(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = TorchvisionSource(dataset="CIFAR10", root=str(tmp_path), download=download)
    assert len(source) == 24
    assert source.splits["train"].tolist() == list(range(20)) and source.splits["test"].tolist() == [
        20,
        21,
        22,
        23,
    ]
    assert source.labels is not None and source.labels.tolist() == [0, 1, 2, 2] * 5 + [0, 1, 2, 0]
    assert source.class_names is not None and source.class_names[3] == "class 3"
    stored = pickle.loads((tmp_path / "cifar-10-batches-py/test_batch").read_bytes())["data"]
    assert np.array_equal(source.read(22), stored[2].reshape(3, 32, 32))
    assert source.name(22) == "CIFAR10 22"


def test_without_a_network_torchvision_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(
        DataError, match=r"^data\.dataset=CIFAR10 is not in .*Temporary failure.*network.*=true$"
    ):
        TorchvisionSource(dataset="CIFAR10", root=str(tmp_path))
    with pytest.raises(DataError, match=r"data\.dataset=MNIST is not in .*Dataset not found"):
        TorchvisionSource(dataset="MNIST", root=str(tmp_path), download=False)


def test_an_unknown_torchvision_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(
        DataError, match=r"data\.dataset=cifar-10: did you mean CIFAR10\? Known: CIFAR10, CIFAR100"
    ):
        TorchvisionSource(dataset="cifar-10", root="/nowhere")
    with pytest.raises(DataError, match=r"data\.dataset=zzz: Known: "):
        TorchvisionSource(dataset="zzz", root="/nowhere")


class ClassLabel(SimpleNamespace):
    names: list[str]


class Table:
    """As much of a Hugging Face data set as the source touches."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, key: int | str) -> Any:
        return (
            self.columns[key]
            if isinstance(key, str)
            else {name: col[key] for name, col in self.columns.items()}
        )

    def cast_column(self, column: str, feature: Any) -> Table:
        assert column == "image" and feature.decode is False
        return self


def _png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def _table(shades: list[int], labels: list[Any], feature: Any) -> Table:
    cells: list[Any] = [{"bytes": _png(shade), "path": None} for shade in shades]
    return Table({"image": cells, "label": labels}, {"image": None, "label": feature})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A `datasets` module whose hub holds one data set with train and test."""
    names = ClassLabel(names=["dark", "light"])
    found = {"train": _table([1, 200, 3], [0, 1, 0], names), "test": _table([9], [0], names)}
    (tmp_path / "kept.png").write_bytes(_png(77))
    found["test"].columns["image"][0] = {"bytes": None, "path": str(tmp_path / "kept.png")}

    def load_dataset(name: str, subset: str | None) -> Any:
        if name != "me/shades":
            raise ConnectionError(f"Couldn't reach\n{name} on the Hub")
        assert subset is None
        return found

    module = ModuleType("datasets")
    vars(module).update(load_dataset=load_dataset, ClassLabel=ClassLabel, Image=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return found


def test_the_hubs_splits_are_laid_end_to_end_with_labels_and_names(hub: dict[str, Any]) -> None:
    source = HuggingFaceSource(dataset="me/shades", splits=SPLITS)
    assert len(source) == 4 and {k: v.tolist() for k, v in source.splits.items()} == {
        "train": [0, 1, 2],
        "test": [3],
    }
    assert source.labels is not None and source.labels.tolist() == [0, 1, 0, 0]
    assert source.class_names == ["dark", "light"]
    assert source.read(1) == _png(200) and source.read(3) == _png(77)
    assert [source.name(index) for index in (0, 2, 3)] == [
        "me/shades train 0",
        "me/shades train 2",
        "me/shades test 0",
    ]
    assert HuggingFaceSource(dataset="me/shades", splits=SPLITS, label=None).labels is None
    only = HuggingFaceSource(dataset="me/shades", splits={"train": "test", "val": None})
    assert len(only) == 1 and only.fingerprint() != source.fingerprint()
    hub["train"].columns["image"][0] = None
    with pytest.raises(DataError, match="no image in this row"):
        source.read(0)


def test_what_the_hub_lacks_is_named_with_the_key(hub: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"^data\.dataset=you/no could not be loaded: Couldn't reach you/no on"
    ):
        HuggingFaceSource(dataset="you/no", splits=SPLITS)
    with pytest.raises(DataError, match=r"splits\.train=all is no split of me/shades, which has train, test"):
        HuggingFaceSource(dataset="me/shades", splits={"train": "all"})
    with pytest.raises(
        DataError, match=r"data\.source\.image=img is no column of .* has image, label; set it"
    ):
        HuggingFaceSource(dataset="me/shades", splits=SPLITS, image="img")
    with pytest.raises(DataError, match=r"data\.source\.label=fine is no column .*\(or null for none\)"):
        HuggingFaceSource(dataset="me/shades", splits=SPLITS, label="fine")
    hub["train"].columns["label"] = ["a", "b", "a"]
    with pytest.raises(DataError, match=r"data\.source\.label=label holds <U1 values, not class numbers"):
        HuggingFaceSource(dataset="me/shades", splits=SPLITS)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install beit-pretrain\[huggingface\]"):
        HuggingFaceSource(dataset="me/shades", splits=SPLITS)
