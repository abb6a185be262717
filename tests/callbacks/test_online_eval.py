"""OnlineKnn, against scikit-learn's neighbours on features worked out by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callbacks.toy import KNOWN_WARNINGS, Data, Images, Toy, collate, fit
from lightning.pytorch.loggers import Logger
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

from beit_pretrain.callbacks.csv_log import CsvLog, read_rows
from beit_pretrain.callbacks.online_eval import OnlineKnn
from beit_pretrain.evaluation import block_features

pytestmark = pytest.mark.filterwarnings(*KNOWN_WARNINGS)


def by_hand(stage: Toy, images: Images) -> tuple[list[np.ndarray], np.ndarray]:
    """One image at a time, every block, mean over all tokens but the first."""
    stage.eval()
    rows: list[list[Tensor]] = []
    with torch.no_grad():
        for i in range(len(images)):
            tokens = stage.encoder.features(stage.normalize(images[i].image[None]), [0, 1])
            rows.append([sum(t[0, j] for j in range(1, t.shape[1])) / (t.shape[1] - 1) for t in tokens])  # pyright: ignore
    labels = np.array([int(images[i].label) for i in range(len(images))])
    return [torch.stack([row[block] for row in rows]).numpy() for block in (0, 1)], labels


def test_features_are_the_mean_of_the_patch_tokens_of_every_block() -> None:
    stage, images = Toy().eval(), Images(3, 11)
    with torch.no_grad():
        features, labels = block_features(
            stage.encoder,
            stage.normalize,
            DataLoader(images, batch_size=4, collate_fn=collate),
            torch.device("cpu"),
        )
    expected, expected_labels = by_hand(stage, images)
    assert [f.shape for f in features] == [(11, 5), (11, 5)] and features[0].dtype == torch.float32
    for got, want in zip(features, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-6)
    assert labels.tolist() == expected_labels.tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning:sklearn")
def test_accuracies_are_those_of_scikit_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stage, data = Toy(epochs=1), Data()
    knn = OnlineKnn(every_epochs=5, image_size=8, limit=48, crop_pct=0.9, k=7, temperature=0.1)
    fit(stage, data, tmp_path, [knn])
    ((step, logged),) = stage.logged
    assert step == 6
    support, support_labels = by_hand(stage, Images(0, 48))
    query, query_labels = by_hand(stage, Images(1000, 20))
    for block in (0, 1):
        weights: Any = lambda distance: np.exp((1 - distance) / 0.1)  # noqa: E731
        oracle = KNeighborsClassifier(7, metric="cosine", weights=weights)
        accuracy = oracle.fit(support[block], support_labels).score(query[block], query_labels)
        # Rounding may swap two neighbours, which turns at most one of the 20 answers.
        assert logged[f"knn/block_{block}"] == pytest.approx(accuracy, abs=0.051)
    assert logged["knn/best"] == max(logged["knn/block_0"], logged["knn/block_1"])
    assert logged[f"knn/block_{logged['knn/best_block']}"] == logged["knn/best"]
    how = {"image_size": (8, 8), "limit": 48, "crop_pct": 0.9}
    assert data.asked == [("train", how), ("val", how)]


@pytest.mark.filterwarnings("ignore::FutureWarning:sklearn")
def test_the_best_block_wins_and_labels_need_not_be_dense() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([3, 70, 901])[torch.randint(3, (150,), generator=draw)]
    blocks = [torch.randn(150, 6, generator=draw) for _ in range(3)]
    for block, strength in ((0, 0.3), (1, 1.2), (2, 0.7)):
        blocks[block][:, :3] += strength * (labels[:, None] == torch.tensor([3, 70, 901]))
    knn = OnlineKnn(every_epochs=1, image_size=8, limit=None, k=9, temperature=0.07)
    support, query = [b[:100] for b in blocks], [b[100:] for b in blocks]
    scores = knn._score((support, labels[:100]), (query, labels[100:]), torch.device("cpu"))
    weights: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    oracle = KNeighborsClassifier(9, metric="cosine", weights=weights)
    expected = [
        float(oracle.fit(s.numpy(), labels[:100].numpy()).score(q.numpy(), labels[100:].numpy()))
        for s, q in zip(support, query, strict=True)
    ]
    assert expected[0] < expected[2] < expected[1] < 1
    assert [scores[f"knn/block_{i}"] for i in range(3)] == pytest.approx(expected)
    assert (scores["knn/best"], scores["knn/best_block"]) == (pytest.approx(expected[1]), 1)


def test_measured_when_due_and_after_the_last_epoch(tmp_path: Path) -> None:
    stage = Toy(epochs=3)
    fit(stage, Data(), tmp_path, [OnlineKnn(every_epochs=2, image_size=(8, 6), limit=None, k=5)])
    assert [step for step, _ in stage.logged] == [12, 18]


def test_the_row_of_the_step_takes_the_accuracies(tmp_path: Path) -> None:
    logger: Logger = CsvLog(tmp_path)
    knn = OnlineKnn(every_epochs=1, image_size=8, limit=None, k=5)
    fit(Toy(epochs=1), Data(), tmp_path, [knn], logger=[logger])
    row = read_rows(tmp_path / "metrics.csv")[-1]
    assert row["step"] == "6" and row["knn/best_block"] in ("0", "1")


@pytest.mark.parametrize(
    ("data", "k", "why"),
    [
        (Data(labels=False), 5, "the data have no labels"),
        (Data(), 49, "48 labelled training images, but callbacks.knn.k=49"),
    ],
)
def test_without_enough_labels_one_line_and_no_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: Data, k: int, why: str
) -> None:
    stage = Toy(epochs=3)
    with caplog.at_level(logging.INFO):
        fit(stage, data, tmp_path, [OnlineKnn(every_epochs=1, image_size=8, limit=None, k=k)])
    assert stage.logged == []
    assert [r.getMessage() for r in caplog.records if "kNN" in r.getMessage()] == [
        f"No kNN while training: {why}."
    ]


def test_a_stage_without_an_encoder_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Bare(Toy):
        def __init__(self) -> None:
            super().__init__(epochs=1)
            self.body = self.encoder
            del self.encoder
            self.__dict__["encoder"] = self.body

    stage = Bare()
    assert isinstance(stage.body, nn.Module)
    with caplog.at_level(logging.INFO):
        fit(stage, Data(), tmp_path, [OnlineKnn(every_epochs=1, image_size=8, limit=None, k=5)])
    assert "No kNN while training: this stage has no encoder." in caplog.text


def test_a_stage_that_learns_from_labels_is_left_alone(tmp_path: Path) -> None:
    class Supervised(Toy):
        self_supervised = False

    stage = Supervised(epochs=1)
    fit(stage, Data(), tmp_path, [OnlineKnn(every_epochs=1, image_size=8, limit=None, k=5)])
    assert stage.logged == []
