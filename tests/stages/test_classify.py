"""Fine-tuning: its loss against torch and timm, its running average by hand, its score by rigged weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from oracles import strengthen
from stages.probing import KNOWN_WARNINGS, NAMES, Slopes, data_of, fit
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from beit_pretrain.checks import check
from beit_pretrain.compose import compose
from beit_pretrain.data.transforms import EvalView, ImageBatch, OneView
from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.models.beit import Beit
from beit_pretrain.optim import Recipe
from beit_pretrain.stages.base import StepResult
from beit_pretrain.stages.classify import Classify

pytestmark = pytest.mark.filterwarnings(*KNOWN_WARNINGS)


def classify(folder: Path = Path("."), size: tuple[int, int] = (12, 8), **options: Any) -> Any:
    """A stage with everything switched off; `Any` because the stand-ins of the probe's tests are typed for it."""
    defaults: dict[str, Any] = {
        "classes": NAMES,
        "pooling": "mean",
        "head_init_scale": 1.0,
        "smoothing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "erasing": 0.0,
        "ema": None,
        "optim": Recipe(lr=0.01, min_lr=0.0, warmup_epochs=0, clip=None),
        "epochs": 2,
        "views": OneView(image_size=size, crop_scale=(0.5, 1.0)),
        "eval_views": EvalView(image_size=size, crop_pct=1.0),
        "normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.5]},
        "seed": 0,
        "log_every": 50,
        "max_bad_steps": 3,
        "run_dir": folder,
    }
    torch.manual_seed(0)
    encoder = Beit(
        image_size=size, patch_size=4, width=24, depth=2, heads=2, rel_pos="per_layer", mask_token=False
    )
    stage = Classify(encoder=encoder, **{**defaults, **options})
    stage.record = {"preprocessing": {"class_names": list(stage.classes)}, "lineage": {"parents": {}}}
    return stage


def batch(images: int = 6, size: tuple[int, int] = (12, 8), label: int | None = None) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    number = torch.arange(images)
    image = torch.randint(256, (images, 3, *size), generator=generator).to(torch.uint8)
    labels = number % 3 if label is None else torch.full((images,), label)
    return ImageBatch(image=image, label=labels, sample=number, view=number)


def seen(stage: Any, given: ImageBatch, seed: int = 3) -> tuple[StepResult, Tensor]:
    """What a step gives, and the images that its encoder saw."""
    images: list[Tensor] = []
    hook = stage.encoder.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
    torch.manual_seed(seed)
    result = stage.compute(given, 0)
    hook.remove()
    return result, images[0]


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_sum_of_smoothed_cross_entropies(smoothing: float) -> None:
    stage, given = classify(smoothing=smoothing), batch()
    strengthen(stage.encoder, stage.head)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.5]))
    result, image = seen(stage, given)
    torch.testing.assert_close(image, (given.image / 255 - mean) / std)
    logits = stage.head(stage.encoder(image))
    expected = 6 * F.cross_entropy(logits, given.label, label_smoothing=smoothing)
    torch.testing.assert_close(result.loss, expected)
    assert result.count == stage.expected_count(given) == 6
    assert result.sums["accuracy"] == (logits.argmax(-1) == given.label).sum()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_images_and_their_soft_targets_are_those_of_timm(mixup: float, cutmix: float) -> None:
    stage, given = classify(smoothing=0.1, mixup=mixup, cutmix=cutmix), batch()
    strengthen(stage.encoder, stage.head)
    losses = []
    for seed in range(4):
        result, image = seen(stage, given, seed)
        torch.manual_seed(seed)
        drawn = int(torch.randint(2**31, ()))
        random.seed(drawn)
        np.random.seed(drawn)
        mix = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=3)
        expected, target = mix(stage.normalize(given.image), given.label)
        torch.testing.assert_close(image, expected)
        assert not torch.allclose(image, stage.normalize(given.image))
        loss = SoftTargetCrossEntropy()(stage.head(stage.encoder(expected)), target)
        torch.testing.assert_close(result.loss, 6 * loss)
        assert not result.sums, "of mixed images no label is right"
        losses.append(result.loss.item())
    assert len(set(losses)) == 4


def test_erasing_puts_noise_in_one_rectangle_of_a_share_of_the_images() -> None:
    given = batch(200, (24, 16))
    stage = classify(size=(24, 16), erasing=0.25)
    plain = stage.normalize(given.image)
    _, image = seen(stage, given)
    changed = (image != plain).any(1)  # (B, 24, 16)
    erased = changed.flatten(1).any(1)
    assert 0.15 < erased.float().mean() < 0.35
    boxes = set()
    for one in changed[erased]:
        rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        assert one.sum() == len(rows) * len(columns), "not a rectangle"
        assert 0.01 < one.float().mean() < 0.4
        boxes.add((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    assert len(boxes) > 20, "each image has a rectangle of its own"
    noise = image[changed[:, None].expand_as(image)]
    assert noise.mean().abs() < 0.05 and 0.95 < noise.std() < 1.05
    assert torch.equal(seen(classify(size=(24, 16)), given)[1], plain)


def test_all_draws_follow_the_step_and_leave_the_generators_of_python_and_numpy_alone() -> None:
    stage, given = classify(mixup=0.8, cutmix=1.0, erasing=0.9), batch()
    first, image = seen(stage, given, seed=3)
    random.seed(99)
    np.random.seed(98)
    before = random.getstate(), np.random.get_state()[1].tolist()  # pyright: ignore
    again, same = seen(stage, given, seed=3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # pyright: ignore
    assert torch.equal(image, same) and first.loss == again.loss
    assert not torch.equal(image, seen(stage, given, seed=4)[1])


def test_mixing_needs_pairs() -> None:
    base = ["stage=classify", "experiment=digits_finetune", "trainer.accelerator=cpu", "batch_size=50"]
    for change in ("stage.mixup=0.8", "stage.cutmix=1.0"):
        check(compose([*base, change]))
        odd = [*base, change, "micro_batch_size=25"]
        says = "stage.mixup and stage.cutmix mix images in pairs, but a device takes 25 at a time: set batch_size"
        with pytest.raises(ConfigError, match=says):
            check(compose(odd))
        with pytest.raises(ConfigError, match="takes 25 at a time"):
            check(compose([*base, change, "trainer.devices=2"]))
    check(compose([*base, "micro_batch_size=25"]))


def test_values_out_of_range_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        classify(smoothing=1.0, erasing=-0.1, mixup=-1.0, cutmix=-2.0, ema=1.0)
    assert caught.value.faults == [
        "stage.smoothing=1.0: set a share from 0 (off) to below 1",
        "stage.erasing=-0.1: set a share from 0 (off) to below 1",
        "stage.mixup=-1.0: set 0 (off) or more, such as 0.8",
        "stage.cutmix=-2.0: set 0 (off) or more, such as 0.8",
        "stage.ema=1.0: set a decay between 0 and 1, such as 0.9999, or null",
    ]


# --- the running average ------------------------------------------------------------------------------------


def weights(stage: Any) -> dict[str, Tensor]:
    """Encoder and head as they are trained."""
    state = stage.state_dict()
    return {k: v.clone() for k, v in state.items() if k.startswith(("encoder.", "head."))}


def average(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "ema.module."
    return {k.removeprefix(prefix): v.clone() for k, v in state.items() if k.startswith(prefix)}


class Watch(Callback):
    """Weights and average after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(weights(pl_module))
        self.averages.append(average(pl_module.state_dict()))


def test_the_average_begins_as_a_copy_and_follows_the_weights(tmp_path: Path) -> None:
    stage, watch = classify(tmp_path, ema=0.7), Watch()
    data = data_of(stage)
    trainer = fit(stage, data, callbacks=[watch])
    assert len(watch.weights) == 6
    expected = watch.weights[0]
    for now, found in zip(watch.weights, watch.averages, strict=True):
        expected = {k: 0.7 * v + 0.3 * now[k] for k, v in expected.items()}
        torch.testing.assert_close(found, expected)
    head = "head.head.weight"
    assert not torch.allclose(watch.averages[-1][head], watch.weights[-1][head], atol=1e-3)
    # Both are scored, and nothing of the average is trained or counted.
    for name, state in (("val", watch.weights[-1]), ("val_ema", watch.averages[-1])):
        other = classify()
        other.load_state_dict(state, strict=False)
        other.eval()
        given: list[Any] = list(data.val_dataloader())
        logits = torch.cat([other.head(other.encoder(other.normalize(b.image))) for b in given])
        labels = torch.cat([b.label for b in given])
        assert stage.held_out[f"{name}/top1"] == pytest.approx((logits.argmax(-1) == labels).float().mean())
        assert stage.held_out[f"{name}/loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert stage.held_out["val/images"] == 15
    assert {name.split(".")[0] for name, _ in stage.trained_parameters()} == {"encoder", "head"}
    names = [n for group in trainer.optimizers[0].param_groups for n in group["names"]]
    assert sorted(names) == sorted(n for n, _ in classify().named_parameters())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.testing.assert_close(average(saved["state_dict"]), watch.averages[-1], rtol=0, atol=0)


def test_a_refused_step_leaves_the_average_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Classify.compute

    def poisoned(self: Classify, batch: Any, step: int) -> StepResult:
        result = compute(self, batch, step)
        return StepResult(result.loss * float("nan") if step == 3 else result.loss, result.count)

    monkeypatch.setattr(Classify, "compute", poisoned)
    stage, watch = classify(tmp_path, ema=0.7), Watch()
    with pytest.warns(UserWarning, match="step 3: loss or gradient is not finite"):
        fit(stage, data_of(stage), callbacks=[watch])
    torch.testing.assert_close(watch.averages[3], watch.averages[2], rtol=0, atol=0)
    head = "head.head.weight"
    assert not torch.equal(watch.averages[4][head], watch.averages[3][head])
    assert stage.ema.n_averaged == 5


def test_without_an_average_there_is_none_to_score(tmp_path: Path) -> None:
    stage = classify(tmp_path)
    fit(stage, data_of(stage), max_epochs=1)
    assert set(stage.held_out) == {"val/loss", "val/top1", "val/top5", "val/images"}
    assert not any(name.startswith("ema") for name in stage.state_dict())


# --- the score ----------------------------------------------------------------------------------------------


@torch.no_grad()
def always(head: Any, answer: int) -> None:
    head.head.weight.zero_()
    head.head.bias.copy_(F.one_hot(torch.tensor(answer), len(head.head.bias)))


@pytest.mark.parametrize(("better", "answer"), [("raw", 0), ("ema", 1)])
def test_weights_are_chosen_on_validation_even_if_the_others_do_better_in_the_test(
    better: str, answer: int
) -> None:
    stage = classify(ema=0.9).eval()
    always(stage.head, 0)
    always(stage.ema.module["head"], 1)
    assert stage.results() == {}
    stage.evaluate(batch(4, label=answer))
    stage.held_out = stage.evaluation()
    expected = {
        "split": "val",
        "weights": better,
        "classes": NAMES,
        "support": [4 * (c == answer) for c in range(3)],
        "correct": [4 * (c == answer) for c in range(3)],
        "confusion": [[4 * (c == k == answer) for k in range(3)] for c in range(3)],
        "mistakes": [],
        "chance": 1.0,
    }
    assert stage.results() == {"classification": expected}
    stage.evaluate(batch(5, label=1 - answer))
    stage.evaluate(batch(1, label=2))
    stage.on_test_epoch_end()
    found = stage.results()["classification"]
    assert (found["split"], found["weights"]) == ("test", better)
    assert found["correct"] == [0, 0, 0] and found["chance"] == pytest.approx(5 / 6)
    assert found["mistakes"] == [[1 - answer, answer, 5], [2, answer, 1]]
    assert found["confusion"][1 - answer][answer] == 5 and found["confusion"][2][answer] == 1
    other = {"raw": "test_ema", "ema": "test"}[better]
    assert stage.tested[f"{other}/top1"] == pytest.approx(5 / 6)
    assert stage.held_out["val/images"] == 4 and stage.tested["test/images"] == 6


def test_above_a_hundred_classes_nobody_reads_the_table_of_confusions() -> None:
    for classes, whole in ((100, True), (101, False)):
        stage = classify(classes=[str(i) for i in range(classes)]).eval()
        stage.evaluate(batch(3))
        stage.held_out = stage.evaluation()
        found = stage.results()["classification"]
        assert (found["confusion"] is not None) == whole and len(found["support"]) == classes


# --- going on -----------------------------------------------------------------------------------------------


def test_a_finished_run_that_goes_on_still_knows_its_score(tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the results: no held-out image is left to be seen."""
    stage = classify(tmp_path, ema=0.7)
    fit(stage, data_of(stage)).save_checkpoint(tmp_path / "a.ckpt")
    again = classify(tmp_path, ema=0.7)
    fit(again, data_of(again), tmp_path / "a.ckpt")
    assert again.held_out == stage.held_out
    assert again.results() == stage.results() != {}


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (["down", "flat", "hill"], r"3 classes there, 3 here; only there: up; only here: hill"),
        (["up", "down", "flat"], "the same classes in another order"),
    ],
)
def test_a_run_does_not_go_on_with_other_classes(tmp_path: Path, now: list[str], says: str) -> None:
    stage = classify(tmp_path)
    fit(stage, data_of(stage), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    other = classify(tmp_path, classes=now)
    source = Slopes()
    source.class_names = now
    with pytest.raises(
        CheckpointError, match=rf"not those this run was started with \({says}\): bring them"
    ) as e:
        fit(other, data_of(other, source), tmp_path / "a.ckpt")
    assert "\n" not in str(e.value)
