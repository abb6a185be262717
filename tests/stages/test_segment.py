"""Segmentation: its loss by hand, its updates against one batch, its score against loops and torchmetrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from oracles import strengthen
from PIL import Image
from stages.probing import KNOWN_WARNINGS, fit
from stages.segmenting import (
    NAMES,
    SIZE,
    Fields,
    crops,
    data_of,
    segment,
    sliding,
)
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision.transforms.v2 import functional
from worst_ranks import CLASSES, OFFERED, offer, work

from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.models.batch_norm import BatchNorm
from beit_pretrain.optim import Recipe
from beit_pretrain.stages.worst import WorstImages

pytestmark = pytest.mark.filterwarnings(*KNOWN_WARNINGS)


def strong(**options: Any) -> Any:
    """A stage in whose answer every part of the model matters."""
    stage = segment(**options)
    strengthen(stage.encoder, stage.head)
    return stage


def whole_logits(stage: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Both heads' logits (B, C, S, S') at the size of the images, put together from the model's parts."""
    pixels = (image / 255 - stage.mean) / stage.std
    grid = [side // 4 for side in image.shape[-2:]]
    tokens = stage.encoder.features(pixels, stage.blocks)
    levels = stage.head.neck([t[:, 1:].permute(0, 2, 1).reshape(len(image), 12, *grid) for t in tokens])
    outputs = stage.head.decode_head(levels), stage.head.auxiliary_head(levels[2])
    first, second = (F.interpolate(out, image.shape[-2:], mode="bilinear") for out in outputs)
    return first, second


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, (20, 32)], ids=str)
def test_the_loss_is_the_mean_over_labelled_pixels_of_both_heads(size: tuple[int, int]) -> None:
    stage, given = strong(auxiliary_weight=0.3), crops(size=size)
    result = stage.compute(given, 0)
    labelled = given.label_map != 255
    assert result.count == labelled.sum() and 0 < labelled.sum() < given.label_map.numel()
    assert stage.expected_count(given) == 3 * size[0] * size[1]
    logits, auxiliary = whole_logits(stage, given.image)
    # One pixel after the other.
    truth = given.label_map[labelled].long()
    means = {}
    for name, out in (("decode", logits), ("auxiliary", auxiliary)):
        pixels = out.permute(0, 2, 3, 1)[labelled].log_softmax(-1)
        means[name] = -pixels[range(len(truth)), truth].mean()
        torch.testing.assert_close(result.sums[name] / result.count, means[name])
    torch.testing.assert_close(result.loss / result.count, means["decode"] + 0.3 * means["auxiliary"])
    assert result.sums["accuracy"] == (logits.argmax(1)[labelled] == truth).sum()
    expected = F.cross_entropy(logits, given.label_map.long(), ignore_index=255)
    torch.testing.assert_close(means["decode"], expected)


def test_an_ignored_pixel_teaches_nothing() -> None:
    stage, given = segment(), crops()
    leaves = [torch.randn(3, 4, *SIZE, requires_grad=True) for _ in range(2)]
    stage.head.with_auxiliary = lambda maps: leaves
    stage.compute(given, 0).loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None
        moved = leaf.grad.abs().sum(1) > 0
        assert torch.equal(moved, given.label_map != 255)


def test_checkpointing_changes_no_gradient_and_no_statistic() -> None:
    found = []
    for checkpointing in (False, True):
        stage = strong(shape={"checkpointing": checkpointing})
        stage.compute(crops(), 0).loss.backward()
        found.append(
            {name: p.grad for name, p in stage.named_parameters()} | dict(stage.head.named_buffers())
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


# --- updates ------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Encoder and head after each update, beginning with how they start."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def _note(self, stage: Any) -> None:
        parts = ("encoder.", "head.")
        self.states.append({k: v.clone() for k, v in stage.state_dict().items() if k.startswith(parts)})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._note(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if len(self.states) <= trainer.global_step:
            self._note(pl_module)


def trained(stage: Any, source: Fields, micro: int | None = None, **options: Any) -> list[dict[str, Tensor]]:
    watch, data = Watch(), data_of(stage, source, micro=micro)
    fit(stage, data, callbacks=[watch], accumulate_grad_batches=data.plan(1).accumulate, **options)
    return watch.states


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses = []
    recipe = Recipe(lr=0.03, min_lr=0.0, schedule="poly", warmup_epochs=0, clip=None)
    stage = segment(tmp_path, epochs=12, optim=recipe)
    stage.log_metrics = lambda metrics, step=None: losses.append(metrics.get("train/decode"))
    states = trained(stage, Fields(), check_val_every_n_epoch=12)
    seen = [loss for loss in losses if loss is not None]
    assert len(states) == len(seen) + 1 == 25
    assert seen[0] == pytest.approx(math.log(4), abs=0.01) and max(seen[-4:]) < 0.85 * seen[0]
    assert stage.held_out["val/miou"] > 0.3


def test_micro_batches_with_unlike_shares_of_labels_are_one_batch(tmp_path: Path) -> None:
    """Statistics of the norms come from a micro-batch by nature: they are held fast."""
    # The first step of AdamW is then g / (|g| + 1).
    recipe = Recipe(lr=1.0, min_lr=0.0, eps=1.0, warmup_epochs=0, weight_decay=0.0, clip=None)
    source, states = Fields(blank=[2, 6, 10]), []

    def stage_of() -> Any:
        stage = strong(folder=tmp_path, optim=recipe)
        for module in stage.modules():
            if isinstance(module, BatchNorm):
                module.eval()
        return stage

    for micro in (None, 2, 1):
        states.append(trained(stage_of(), source, micro, limit_val_batches=0))
        assert len(states[-1]) == 5
    for parts in states[1:]:
        torch.testing.assert_close(parts[1], states[0][1], rtol=0, atol=2e-6)
    stage = stage_of()
    first = next(iter(data_of(stage, source).train_dataloader()))
    result = stage.compute(first, 0)
    (result.loss / (first.label_map != 255).sum()).backward()
    for name, parameter in stage.named_parameters():
        expected = -parameter.grad / (parameter.grad.abs() + 1)
        torch.testing.assert_close(states[0][1][name] - states[0][0][name], expected, rtol=1e-4, atol=2e-6)


def test_a_batch_without_a_label_harms_nothing(tmp_path: Path) -> None:
    stage = segment(tmp_path)
    states = trained(stage, Fields(count=12, blank=range(12)))
    assert len(states) == 3 and int(stage.bad_steps[0]) == 0
    assert all(value.isfinite().all() for state in states for value in state.values())
    assert stage.latest["train/loss"] == 0.0
    # Without a labelled pixel there is no score.
    assert math.isnan(stage.held_out["val/miou"]) and stage.results()["segmentation"]["worst"] == []


@pytest.mark.parametrize("poisoned", [0, 1], ids=["first micro-batch", "second micro-batch"])
def test_a_refused_update_leaves_weights_and_statistics_alone(
    poisoned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, calls = segment(tmp_path), [0]
    plain = stage.normalize

    def normalize(image: Tensor) -> Tensor:
        calls[0] += stage.training
        spoilt = stage.training and calls[0] == 2 * 2 + poisoned + 1  # of the third update
        return plain(image) * (math.nan if spoilt else 1.0)

    monkeypatch.setattr(stage, "normalize", normalize)
    with pytest.warns(UserWarning, match="step 2: loss or gradient is not finite"):
        states = trained(stage, Fields(), micro=2)
    assert len(states) == 5 and stage.bad_steps.tolist() == [1, 0]
    torch.testing.assert_close(states[3], states[2], rtol=0, atol=0)
    counts = [int(state["head.neck.fpn1.1.num_batches_tracked"]) for state in states]
    assert counts == [0, 2, 4, 4, 6]
    for name, value in states[4].items():
        assert value.isfinite().all(), name
    moved = [name for name, value in states[4].items() if not torch.equal(value, states[3][name])]
    assert "head.neck.fpn1.1.running_mean" in moved and "encoder.blocks.0.mlp.fc1.weight" in moved


def test_neck_and_heads_learn_at_the_full_rate_and_blocks_by_their_height() -> None:
    stage = segment(optim=Recipe(lr=1.0, layer_decay=0.5, weight_decay=0.05))
    scale = {name: group["lr_scale"] for group in stage.parameter_groups() for name in group["names"]}
    decay = {name: group["weight_decay"] for group in stage.parameter_groups() for name in group["names"]}
    assert scale.keys() == {name for name, _ in stage.named_parameters()}
    for name, value in scale.items():
        block = int(name.split(".")[2]) if name.startswith("encoder.blocks.") else -1
        assert value == (1.0 if name.startswith("head.") else 0.5 ** (3 - block)), name
    assert {n.split(".")[1] for n in scale if n.startswith("head.")} == {
        "neck",
        "decode_head",
        "auxiliary_head",
    }
    norms = {name for name, module in stage.named_modules() if isinstance(module, BatchNorm)}
    for name, value in decay.items():
        if name.startswith("head."):
            free = name.endswith("bias") or name.rpartition(".")[0] in norms
            assert value == (0.0 if free else 0.05), name


# --- prediction and score -----------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(stage: Any, image: Tensor, working: tuple[int, int]) -> Tensor:
    """The classes (H, W) of an image from one window at the working size."""
    seen = functional.resize(image, list(working), antialias=True)
    logits, _ = whole_logits(stage, seen[None])
    return F.interpolate(logits, image.shape[-2:], mode="bilinear").argmax(1)[0]


@pytest.mark.parametrize(
    ("size", "working", "mode"),
    [
        ((12, 8), (12, 8), "slide"),
        ((27, 18), (12, 8), "slide"),
        ((16, 8), (16, 8), "whole"),
        ((31, 17), (16, 8), "whole"),
        ((7, 19), (8, 20), "whole"),
    ],
    ids=str,
)
def test_where_one_window_covers_an_image_its_classes_are_those_of_the_highest_logits(
    size: tuple[int, int], working: tuple[int, int], mode: str
) -> None:
    stage = strong(predict=sliding(mode=mode)).eval()
    image = crops(1, size).image[0]
    found, expected = stage.predict(image), by_hand(stage, image, working)
    assert found.dtype == torch.uint8 and found.shape == size and not found.requires_grad
    # Rounding may turn a tie.
    assert (found == expected).float().mean() > 0.995 and len(found.unique()) > 1


def test_an_image_of_any_size_is_covered_by_windows() -> None:
    stage = strong().eval()
    for size in ((1, 1), (3, 40), (29, 17), (64, 9)):
        assert stage.predict(crops(1, size).image[0]).shape == size


def validated(tmp_path: Path, source: Fields | None = None, **options: Any) -> tuple[Any, Fields]:
    """A stage whose answers are partly right, after an evaluation."""
    source = source or Fields(count=24, blank=[5])
    stage = strong(folder=tmp_path, **options)
    data = data_of(stage, source)
    fit(stage, data, max_epochs=1)
    return stage, source


def test_the_score_is_that_of_torchmetrics_over_images_of_any_size(tmp_path: Path) -> None:
    stage, source = validated(tmp_path)
    held_out = [int(i) for i in source.splits["val"]]
    assert len({source.images[i].shape for i in held_out}) > 5
    theirs = {
        "iou": MulticlassJaccardIndex(4, average="none", ignore_index=255),
        "accuracy": MulticlassAccuracy(4, average="none", ignore_index=255),
    }
    right = MulticlassAccuracy(4, average="micro", ignore_index=255)
    pixels = torch.zeros(256, dtype=torch.int64)
    stage.eval()
    for i in held_out:
        truth, predicted = source.maps[i], stage.predict(source.images[i])
        for metric in (*theirs.values(), right):
            metric.update(predicted[None], truth[None])
        pixels += truth.flatten().bincount(minlength=256)
    iou, accuracy = (metric.compute() for metric in theirs.values())
    scores = stage.held_out
    assert scores["val/miou"] == pytest.approx(iou.mean().item()) and 0.05 < scores["val/miou"] < 0.95
    assert scores["val/macc"] == pytest.approx(accuracy.mean().item())
    assert scores["val/aacc"] == pytest.approx(right.compute().item())
    assert scores["val/images"] == 12 and set(scores) == {
        "val/miou",
        "val/macc",
        "val/aacc",
        "val/images",
    }
    found = stage.results()["segmentation"]
    assert found["iou"] == pytest.approx(iou.tolist())
    assert found["accuracy"] == pytest.approx(accuracy.tolist())
    assert found["pixels"] == pixels[:4].tolist()
    assert found["ignored"] == pytest.approx((pixels[255] / pixels.sum()).item())


def test_what_is_told_of_a_score(tmp_path: Path) -> None:
    stage, source = validated(tmp_path)
    assert segment().results() == {}
    stage.look = {"label_maps": 12}
    told = stage.results()["segmentation"]
    assert list(told) == [
        "split",
        "classes",
        "iou",
        "accuracy",
        "pixels",
        "mistakes",
        "ignored",
        "worst",
        "how",
        "look",
    ]
    assert (told["split"], told["classes"], told["look"]) == ("val", NAMES, {"label_maps": 12})
    assert told["how"] == "sliding windows of 12 x 8, stride 8 x 5; one scale"
    assert all(true != predicted and count > 0 for true, predicted, count in told["mistakes"])
    wrong = sum(count for *_, count in told["mistakes"])
    assert 1 - wrong / sum(told["pixels"]) == pytest.approx(stage.held_out["val/aacc"])
    # Image 5 has no label; of the other eleven held-out ones the worst eight are shown.
    shown = told["worst"]
    assert len(shown) == 8 and "/fields/5.png" not in [entry["name"] for entry in shown]
    scores = {}
    stage.eval()
    for i in source.splits["val"].tolist():
        truth, predicted = source.maps[i], stage.predict(source.images[i])
        there = truth != 255
        if there.any():
            pairs = [(truth[there] == c, predicted[there] == c) for c in range(4)]
            ious = [float((t & p).sum() / (t | p).sum()) for t, p in pairs if (t | p).any()]
            right = float((truth[there] == predicted[there]).float().mean())
            scores[f"/fields/{i}.png"] = (sum(ious) / len(ious), right)
    order = sorted(scores, key=lambda name: scores[name][0])[:8]
    assert [entry["name"] for entry in shown] == order
    for number, entry in enumerate(shown):
        assert (entry["miou"], entry["accuracy"]) == pytest.approx(scores[entry["name"]])
        assert entry["picture"] == f"pictures/worst/{number}.png"
        with Image.open(tmp_path / entry["picture"]) as picture:
            assert picture.format == "PNG" and picture.width > 4 * 100
    stage.on_test_epoch_end()
    assert stage.results()["segmentation"]["split"] == "test"
    assert json.dumps(told)  # plain values only


def test_a_finished_run_that_goes_on_still_knows_its_score(tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the results: no held-out image is left to be seen."""
    stage = segment(tmp_path)
    fit(stage, data_of(stage, Fields())).save_checkpoint(tmp_path / "a.ckpt")
    again = segment(tmp_path)
    fit(again, data_of(again, Fields()), tmp_path / "a.ckpt")
    assert again.held_out == stage.held_out
    assert again.results() == stage.results() != {}


def test_a_run_does_not_go_on_with_other_classes(tmp_path: Path) -> None:
    stage = segment(tmp_path)
    fit(stage, data_of(stage, Fields()), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    other = segment(tmp_path, classes=["earth", "water", "air", "aether"])
    with pytest.raises(CheckpointError, match=r"only there: fire; only here: aether\): bring them back"):
        fit(other, data_of(other, Fields()), tmp_path / "a.ckpt")


# --- the worst images ---------------------------------------------------------------------------------------


def worst_of(offered: dict[int, int]) -> list[int]:
    """By sorting; of images that are alike the earlier one comes first."""
    return sorted(offered, key=lambda sample: (-offered[sample], sample))[:8]


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_worst_images_are_shown_whatever_the_order_they_come_in(order: str, tmp_path: Path) -> None:
    worst = WorstImages()
    for sample, wrong in sorted(OFFERED.items(), reverse=order == "falling"):
        offer(worst, sample, wrong)
    offer(worst, 99, 0, labelled=0)
    told = worst.write(tmp_path, CLASSES, "image {}".format)
    expected = worst_of(OFFERED)
    assert [entry["name"] for entry in told] == [f"image {sample}" for sample in expected]
    for entry, sample in zip(told, expected, strict=True):
        wrong = OFFERED[sample]  # of 100 pixels of earth; water is predicted only
        assert entry["miou"] == pytest.approx((100 - wrong) / 100 / 2)
        assert entry["accuracy"] == pytest.approx(1 - wrong / 100)
        with Image.open(tmp_path / entry["picture"]) as picture:
            shades = {colour[1] for colour in picture.convert("RGB").getcolors(2**20) or ()}
            assert (sample, sample, sample) in shades, "another image"


def test_another_evaluation_shows_its_own_images(tmp_path: Path) -> None:
    worst = WorstImages()
    for sample, wrong in OFFERED.items():
        offer(worst, sample, wrong)
    assert len(worst.write(tmp_path, CLASSES, str)) == 8
    before = {path.name: path.read_bytes() for path in (tmp_path / "pictures" / "worst").iterdir()}
    assert sorted(before) == [f"{number}.png" for number in range(8)]
    offer(worst, 50, 7)
    offer(worst, 51, 9)
    assert [entry["name"] for entry in worst.write(tmp_path, CLASSES, str)] == ["51", "50"]
    after = {path.name: path.read_bytes() for path in (tmp_path / "pictures" / "worst").iterdir()}
    assert sorted(after) == ["0.png", "1.png"] and after["0.png"] != before["0.png"]
    assert worst.write(tmp_path, CLASSES, str) == []


def test_large_images_are_kept_small() -> None:
    worst = WorstImages()
    truth, image = torch.zeros(1500, 700, dtype=torch.uint8), torch.zeros(3, 1500, 700, dtype=torch.uint8)
    worst.offer(0, image, truth, truth, 4)
    (scene,) = worst._scenes
    assert scene.image.shape == (480, 224, 3) and scene.truth.shape == scene.predicted.shape == (480, 224)


def test_the_worst_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    spawn(work, args=(tmp_path,), nprocs=2)
    one = WorstImages()
    for sample, wrong in OFFERED.items():
        offer(one, sample, wrong)
    told = one.write(tmp_path / "one", CLASSES, "image {}".format)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [told, told]
    for entry in told:
        pictures = [(tmp_path / run / entry["picture"]).read_bytes() for run in ("one", "run-0")]
        assert pictures[0] == pictures[1]
    assert not (tmp_path / "run-1").exists()


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks", [[0, 1, 2], [0, 1, 1, 1], [1, 0, 2, 2], [-1, 0, 1, 2], [0, 1, 2, 3]], ids=str
)
def test_blocks_must_rise_to_the_last(blocks: list[int]) -> None:
    says = (
        f"stage.blocks={blocks}: set four blocks in rising order, the last one 2, the encoder's last, such as "
        "[0, 1, 1, 2], or leave it out"
    )
    with pytest.raises(ConfigError) as caught:
        segment(blocks=blocks)
    assert caught.value.faults == [says]


def test_blocks_that_are_given_are_those_looked_at() -> None:
    stage = strong(blocks=[0, 0, 1, 2])
    given = crops()
    assert not torch.allclose(stage.compute(given, 0).loss, strong().compute(given, 0).loss)
    stage.blocks = [0, 1, 1, 2]
    torch.testing.assert_close(stage.compute(given, 0).loss, strong().compute(given, 0).loss)


@pytest.mark.parametrize(
    ("key", "value"), [("blocks", 3), ("blocks", "abcd"), ("channels", "wide"), ("auxiliary_weight", "some")]
)
def test_an_option_of_a_wrong_kind_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^stage.{key}={value}: set "):
        segment(**{key: value})


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        segment(blocks=[0, 1], channels=0, auxiliary_weight=-0.1)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "stage.blocks=[0, 1]",
        "stage.channels=0",
        "stage.auxiliary_weight=-0.1",
    ]
    assert not any("\n" in fault for fault in caught.value.faults)
    assert segment(auxiliary_weight=0.0).auxiliary_weight == 0.0
