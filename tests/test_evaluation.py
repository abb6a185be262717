"""Evaluation against scikit-learn, NumPy and resampling, in one process and over ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_ranks import (
    CLASSES,
    PATCHES,
    VOCABULARY,
    classified_batches,
    noted_ids,
    scored_batches,
    work,
)
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torchmetrics.classification import MulticlassAccuracy

from beit_pretrain import evaluation
from beit_pretrain.errors import ConfigError
from beit_pretrain.evaluation import (
    ClassScore,
    MaskedScore,
    UnigramCounts,
    entropy,
    knn_accuracy,
    knn_predict,
    perplexity,
)


def clouds(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping clouds of features (S, D), of very different lengths, and their classes (S,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 11, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (images,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(images, 11, generator=generator)
    return features * torch.rand(images, 1, generator=generator).mul(4).exp(), labels


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (33, 0.5), (20, 0.01)])
def test_knn_votes_as_scikit_learn(k: int, temperature: float) -> None:
    support, labels = clouds(500, 1)
    query, query_labels = clouds(301, 2)

    def weigh(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / temperature)

    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weigh)  # pyright: ignore[reportArgumentType]
    peer.fit(support.double().numpy(), labels.numpy())
    expected = peer.predict(query.double().numpy())
    found = knn_predict(support, labels, query, k=k, temperature=temperature, classes=CLASSES)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), expected)
    accuracy = knn_accuracy(
        support, labels, query, query_labels, k=k, temperature=temperature, classes=CLASSES
    )
    assert accuracy == pytest.approx((expected == query_labels.numpy()).mean())
    assert 0.3 < accuracy < 0.95  # neither chance nor too easy to tell faults


def test_the_weights_decide_between_one_near_and_two_far_neighbours() -> None:
    support = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([1, 0, 0]), torch.tensor([[3.0, 0.0]])
    # exp(1 / T) against 2 exp(0.8 / T): equal at T = 0.2 / log 2 = 0.289
    assert knn_predict(support, labels, query, k=3, temperature=0.28, classes=2).tolist() == [1]
    assert knn_predict(support, labels, query, k=3, temperature=0.30, classes=2).tolist() == [0]
    assert knn_predict(support, labels, query, k=3, temperature=0.001, classes=2).tolist() == [1]


def test_of_equal_votes_the_lowest_class_wins() -> None:
    support = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = knn_predict(support, torch.tensor([3, 1, 3, 1]), torch.tensor([[1.0, 1.0]]), k=4, classes=4)
    assert found.tolist() == [1]


def test_knn_in_small_chunks_and_under_autocast_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    support, labels = clouds(200, 3)
    query, _ = clouds(50, 4)
    whole = knn_predict(support, labels, query, classes=CLASSES)
    monkeypatch.setattr(evaluation, "_SIMILARITIES", 1000)
    assert torch.equal(knn_predict(support, labels, query, classes=CLASSES), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knn_predict(support, labels, query, classes=CLASSES), whole)


def test_more_neighbours_than_images_are_refused() -> None:
    support, labels = clouds(8, 5)
    with pytest.raises(ConfigError, match=r"k is 20 .* holds 8 images: set k between 1 and 8, or label more"):
        knn_predict(support, labels, support, classes=CLASSES)


def test_entropy_and_perplexity_agree_with_scipy() -> None:
    counts = torch.randint(0, 50, (3, 4, 9), generator=torch.Generator().manual_seed(0))
    counts[0, 0] = torch.tensor([5] + [0] * 8)
    expected = scipy_entropy(counts.numpy(), axis=-1)
    assert np.allclose(entropy(counts).numpy(), expected, rtol=1e-12, atol=1e-15)
    assert entropy(counts)[0, 0] == 0
    assert entropy(torch.zeros(3)).isnan()
    assert perplexity(torch.arange(12).reshape(3, 4), 20).item() == pytest.approx(12)
    assert perplexity(torch.full((2, 5), 7), 8).item() == pytest.approx(1)


def test_baselines_are_what_the_counted_shares_reach_on_the_counted_ids() -> None:
    """Loss and accuracy of predicting the shares, scored id by id in NumPy."""
    generator = torch.Generator().manual_seed(1)
    ids = (
        torch.rand(40, PATCHES, generator=generator) ** 2 * VOCABULARY * torch.linspace(0.2, 1, PATCHES)
    ).long()
    counts = UnigramCounts(patches=PATCHES, vocabulary=VOCABULARY)
    for part in ids.split(7):
        counts.note(part)
        counts.commit()
    counts.merge_ranks()
    losses: dict[str, list[float]] = {"position": [], "global": []}
    hits: dict[str, list[bool]] = {"position": [], "global": []}
    array = ids.numpy()
    for image in array:
        for patch, seen in enumerate(image):
            for name, known in [("position", array[:, patch]), ("global", array.ravel())]:
                shares = np.bincount(known, minlength=VOCABULARY) / known.size
                losses[name].append(-math.log(shares[seen]))
                hits[name].append(bool(seen == shares.argmax()))
    found = counts.baselines()
    assert found.keys() == {"loss_position", "accuracy_position", "loss_global", "accuracy_global"}
    for name in ("position", "global"):
        assert found[f"loss_{name}"] == pytest.approx(np.mean(losses[name]), rel=1e-12)
        assert found[f"accuracy_{name}"] == pytest.approx(np.mean(hits[name]), rel=1e-12)
    assert found["loss_position"] < found["loss_global"] - 0.05


def test_a_refused_step_leaves_no_trace_in_the_counts() -> None:
    counts = UnigramCounts(patches=PATCHES, vocabulary=VOCABULARY)
    kept, refused = noted_ids(0, 0), noted_ids(1, 0)
    counts.note(kept[:1])
    counts.note(kept[1:])
    counts.commit()
    counts.note(refused)
    counts.drop()
    counts.commit()
    counts.merge_ranks()
    counts.merge_ranks()  # adds nothing twice
    expected = torch.nn.functional.one_hot(kept, VOCABULARY).sum(0)
    assert torch.equal(counts.counts, expected)


def test_the_state_of_the_counts_is_the_merged_counts_alone() -> None:
    counts = UnigramCounts(patches=PATCHES, vocabulary=VOCABULARY)
    counts.note(noted_ids(0, 0).int())
    counts.commit()
    assert list(counts.state_dict()) == ["counts"]
    assert counts.state_dict()["counts"].sum() == 0
    counts.merge_ranks()
    assert counts.state_dict()["counts"].sum() == 2 * PATCHES
    assert counts.counts.dtype == torch.int64


def test_ids_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ids must have shape \(B, N=6\) for 5 ids, got \(2, 9\)"):
        UnigramCounts(patches=6, vocabulary=5).note(torch.zeros(2, 9, dtype=torch.int64))


def images_of(batches: list[tuple[Tensor, Tensor, Tensor]]) -> np.ndarray:
    """Sum of loss, correct and hidden patches of each image, token by token, (I, 3)."""
    rows: list[list[float]] = []
    for logits, targets, mask in batches:
        token = 0
        for image in mask:
            row = [0.0, 0.0, 0.0]
            for _ in range(int(image.sum())):
                scores, target = logits[token].double().numpy(), int(targets[token])
                row[0] += math.log(np.exp(scores).sum()) - scores[target]
                row[1] += int(scores.argmax()) == target
                row[2] += 1
                token += 1
            rows.append(row)
    return np.array(rows)


def expected_score(images: np.ndarray) -> dict[str, float]:
    total = images[:, 2].sum()
    found: dict[str, float] = {"images": len(images), "tokens": int(total)}
    for column, name in enumerate(["loss", "accuracy"]):
        ratio = images[:, column].sum() / total
        residuals = images[:, column] - ratio * images[:, 2]
        found[name] = ratio
        found[f"{name}_se"] = math.sqrt(len(images) / (len(images) - 1) * (residuals**2).sum()) / total
    return found


def test_a_masked_score_is_the_mean_over_tokens_with_errors_over_images() -> None:
    batches = scored_batches(0)
    score = MaskedScore()
    for batch in batches:
        score.update(*batch)
    assert score.result() == pytest.approx(expected_score(images_of(batches)), rel=1e-5)
    assert score.result()["images"] == 7
    score.reset()
    assert score.result()["images"] == 0


def test_an_image_without_hidden_patches_counts_as_an_image_only() -> None:
    logits, targets, mask = scored_batches(0)[0]
    score = MaskedScore()
    padded = torch.cat(
        [torch.zeros(1, PATCHES, dtype=torch.bool), mask, torch.zeros(1, PATCHES, dtype=torch.bool)]
    )
    score.update(logits, targets, padded)
    assert score.result() == pytest.approx(expected_score(images_of([(logits, targets, padded)])), rel=1e-5)
    assert score.result()["images"] == len(mask) + 2


def test_standard_errors_are_the_spread_over_resampled_images() -> None:
    """Tokens of an image share a difficulty: errors over tokens would be far too small."""
    generator = torch.Generator().manual_seed(7)
    images, patches = 400, 12
    mask = torch.rand(images, patches, generator=generator) < torch.rand(images, 1, generator=generator)
    hidden = mask.sum(1)
    ease = torch.randn(images, generator=generator).repeat_interleave(hidden)
    targets = torch.randint(VOCABULARY, (len(ease),), generator=generator)
    logits = torch.randn(len(ease), VOCABULARY, generator=generator)
    logits[torch.arange(len(ease)), targets] += 2 * ease
    score = MaskedScore()
    score.update(logits, targets, mask)
    found = score.result()
    rows = images_of([(logits, targets, mask)])
    rng = np.random.default_rng(0)
    drawn = rows[rng.integers(images, size=(4000, images))].sum(1)  # (4000, 3)
    for column, name in enumerate(["loss", "accuracy"]):
        spread = (drawn[:, column] / drawn[:, 2]).std()
        assert found[f"{name}_se"] == pytest.approx(spread, rel=0.06)
        over_tokens = 0.5 / math.sqrt(len(ease))
        assert found["accuracy_se"] > 1.3 * over_tokens


def test_a_score_of_one_image_or_none_claims_no_error() -> None:
    score = MaskedScore()
    empty = score.result()
    assert empty["tokens"] == 0
    assert all(math.isnan(empty[name]) for name in ("loss", "accuracy", "loss_se", "accuracy_se"))
    score.update(*scored_batches(1)[0])
    single = score.result()
    assert single["images"] == 1
    assert math.isfinite(single["loss"])
    assert math.isnan(single["loss_se"])


def expected_classes(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What scikit-learn and torchmetrics make of all images at once."""
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    classes = list(range(logits.shape[1]))
    scores, probabilities = logits.double().numpy(), logits.double().softmax(-1).numpy()
    confusion = confusion_matrix(labels, scores.argmax(-1), labels=classes)
    top = {
        k: MulticlassAccuracy(len(classes), top_k=k, average="micro")(logits, labels).item() for k in (1, 5)
    }
    for k in top:
        assert top_k_accuracy_score(labels, scores, k=k, labels=classes) == pytest.approx(top[k])
    return {
        "loss": pytest.approx(log_loss(labels, probabilities, labels=classes), rel=1e-5),
        "top1": pytest.approx(top[1]),
        "top5": pytest.approx(top[5]),
        "images": len(labels),
        "support": confusion.sum(1).tolist(),
        "correct": confusion.diagonal().tolist(),
        "confusion": confusion.tolist(),
    }


def test_classes_are_scored_as_by_scikit_learn_and_torchmetrics() -> None:
    score = ClassScore(CLASSES)
    for batch in classified_batches(0):
        score.update(*batch)
    found = score.result()
    assert found == expected_classes(classified_batches(0))
    assert found["top1"] < found["top5"] < 1 and found["support"][-1] == 0
    score.reset()
    empty = score.result()
    assert empty["images"] == 0 and sum(map(sum, empty["confusion"])) == 0
    assert all(math.isnan(empty[name]) for name in ("loss", "top1", "top5"))


def test_logits_in_half_precision_are_scored_in_single() -> None:
    generator = torch.Generator().manual_seed(4)
    # No two logits of an image are equal: which of them comes first would be anybody's choice.
    logits = torch.stack([torch.randperm(CLASSES, generator=generator) / 4 for _ in range(64)]).bfloat16()
    labels = torch.randint(CLASSES, (64,), generator=generator)
    score = ClassScore(CLASSES)
    score.update(logits, labels)
    assert score.result() == expected_classes([(logits.float(), labels)])


def test_of_fewer_than_five_classes_the_top_five_hold_every_one() -> None:
    score = ClassScore(3)
    score.update(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), torch.tensor([1, 0]))
    found = score.result()
    assert (found["top1"], found["top5"]) == (0.5, 1.0)
    assert found["confusion"] == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_many_classes_are_scored_without_a_table_of_pairs() -> None:
    score, few = ClassScore(CLASSES, confusion_classes=CLASSES - 1), ClassScore(CLASSES)
    for batch in classified_batches(0):
        score.update(*batch)
        few.update(*batch)
    assert score.result() == {**few.result(), "confusion": None}
    table = few.result()["confusion"]
    wrong = {(t, p): n for t, row in enumerate(table) for p, n in enumerate(row) if n and t != p}
    found = {(t, p): n for t, p, n in score.mistakes(most=CLASSES**2)}
    assert found == wrong and [n for _, _, n in score.mistakes()] == sorted(wrong.values())[::-1][:20]
    assert ClassScore(CLASSES, confusion_classes=1, pair_classes=2).mistakes() == []


def test_counts_and_scores_of_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    spawn(work, args=(tmp_path,), nprocs=2)
    ids = torch.cat([noted_ids(rank, step) for rank in range(2) for step in (0, 2, 3)])
    expected = torch.nn.functional.one_hot(ids, VOCABULARY).sum(0)
    both = expected_score(images_of([*scored_batches(0), *scored_batches(1)]))
    only_rank_0 = expected_score(images_of(scored_batches(0)))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["counts"], expected)
        assert found["both"] == pytest.approx(both, rel=1e-5)
        assert found["only 0"] == pytest.approx(only_rank_0, rel=1e-5)
        # 63 images here, 1 there: nothing is counted twice to even them out.
        assert found["classes"] == expected_classes([*classified_batches(0), *classified_batches(1)])
        assert found["classes again"] == found["classes"]
