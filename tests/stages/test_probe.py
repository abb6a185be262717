"""Linear probes trained by Lightning, against scikit-learn and against themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from stages.probing import KNOWN_WARNINGS, LRS, Slopes, data_of, encoder, fit, probe, recipe, weights

from beit_pretrain.build import make
from beit_pretrain.compose import compose
from beit_pretrain.data.sources import Digits
from beit_pretrain.data.transforms import EvalView
from beit_pretrain.errors import CheckpointError, ConfigError, DataError
from beit_pretrain.models.probes import Classifier, ProbeBank, pooled_row
from beit_pretrain.optim import Recipe, learning_rate
from beit_pretrain.stages.probe import Score

pytestmark = pytest.mark.filterwarnings(*KNOWN_WARNINGS)


# --- learning -----------------------------------------------------------------------------------------------


def test_a_classifier_learns_in_the_run_as_it_does_in_a_run_of_its_own(tmp_path: Path) -> None:
    many, one = (
        probe(tmp_path),
        probe(tmp_path, lrs=[0.003], poolings=["mean"], pixels=False, optim=recipe(0.003)),
    )
    for name in ("weight", "bias"):
        mine, its = (stage.bank.by_lr[i]["mean"] for stage, i in ((one, 0), (many, 1)))  # pyright: ignore
        getattr(mine, name).data.copy_(getattr(its, name).data)
    for stage in (many, one):
        fit(stage, data_of(stage))
    a, b = weights(many), weights(one)
    for name in ("weight", "bias"):
        torch.testing.assert_close(a[f"by_lr.1.mean.{name}"], b[f"by_lr.0.mean.{name}"], rtol=0, atol=1e-6)
    # Without its learning rate's own schedule it would have got elsewhere.
    assert not torch.allclose(a["by_lr.0.mean.weight"], a["by_lr.1.mean.weight"], atol=1e-2)


def test_the_encoder_stays_as_it_is_and_drops_no_path(tmp_path: Path) -> None:
    stage = probe(tmp_path, augment=True, attentive=True)
    before = {name: value.clone() for name, value in stage.encoder.state_dict().items()}
    fit(stage, data_of(stage))
    stage.train()
    assert not stage.encoder.training and stage.bank.training
    for name, value in stage.encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(name.startswith("bank.") for name, _ in stage.trained_parameters())


def test_digits_are_told_apart_as_well_as_by_logistic_regression(tmp_path: Path) -> None:
    body = encoder(image_size=(32, 32), width=48, depth=2, abs_pos=True)
    size = (32, 32)
    view = EvalView(image_size=size, crop_pct=1.0)
    stage = probe(
        tmp_path,
        encoder=body,
        classes=[str(i) for i in range(10)],
        lrs=[0.1, 0.03, 0.003],
        poolings=["both"],
        optim=recipe(0.1),
        eval_views=view,
        epochs=30,
    )
    data = data_of(stage, Digits(), batch_size=64)
    trainer = fit(stage, data, check_val_every_n_epoch=30)
    trainer.test(stage, datamodule=data, verbose=False)
    result = stage.results()["probe"]
    source = data.source
    assert isinstance(source, Digits) and source.labels is not None
    with torch.no_grad():
        images = stage.normalize(source.images)
        tokens = [
            torch.cat(parts)
            for parts in zip(*(body.features(x, [0, 1]) for x in images.split(256)), strict=True)
        ]
    inputs = [pooled_row([t], None).numpy() for t in tokens] + [images.flatten(1).numpy()]
    train, test = source.splits["train"], source.splits["test"]
    for x, row in zip(inputs, [*result["rows"], result["pixels"]], strict=True):
        x = StandardScaler().fit(x[train]).transform(x)
        oracle = LogisticRegression(max_iter=1000).fit(x[train], source.labels[train])
        assert row["test"] == pytest.approx(oracle.score(x[test], source.labels[test]), abs=0.035)
    assert result["pixels"]["test"] > 0.93 and result["accuracy"] > 0.8


def test_passes_without_a_training_image_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the splits lie one after another, as in folders and shards, some passes hold only held-out images."""
    ends = []
    for size in (64, 7):
        monkeypatch.setattr("beit_pretrain.stages.probe._BATCH", size)
        stage = probe(tmp_path)
        fit(stage, data_of(stage))
        ends.append(weights(stage))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-5)


# --- the choice ---------------------------------------------------------------------------------------------


def test_the_best_is_chosen_on_validation_images_and_of_equals_by_loss(tmp_path: Path) -> None:
    stage = probe(tmp_path, poolings=["cls", "both"])
    every = stage.bank.classifiers
    loss, val, test = ([0.5] * len(every) for _ in range(3))
    first, second = every.index(Classifier("cls", 1, 0.03)), every.index(Classifier("both", 0, 0.003))
    for i, classifier in enumerate(every):
        test[i] = 0.9 if classifier.block == 0 else 0.4
        if classifier.pooling == "pixels":
            val[i], loss[i] = 0.99, 0.1
    val[first], val[second], loss[second] = 0.8, 0.8, 0.4
    stage.scores = {"val": Score(20, loss, val)}
    only_val = stage.results()["probe"]
    assert only_val["best"] == {"block": 0, "pooling": "both", "lr": 0.003, "val": 0.8, "test": None}
    assert only_val["accuracy"] == 0.8 and only_val["images"] == 20
    stage.scores["test"] = Score(30, loss, test)
    result = stage.results()["probe"]
    assert result["accuracy"] == 0.9 and result["images"] == 30
    assert [(r["block"], r["pooling"]) for r in result["rows"]] == [
        (0, "cls"),
        (0, "both"),
        (1, "cls"),
        (1, "both"),
    ]
    assert result["rows"][2] == {"block": 1, "pooling": "cls", "lr": 0.03, "val": 0.8, "test": 0.4}
    assert result["pixels"] == {"block": None, "pooling": "pixels", "lr": 0.03, "val": 0.99, "test": 0.4}
    assert result["attentive"] == []


def test_the_logged_loss_is_a_mean_over_classifiers(tmp_path: Path) -> None:
    stage = probe(tmp_path, epochs=1, log_every=1)
    fit(stage, data_of(stage))
    count = len(stage.bank.classifiers)
    assert count > 10 and 0.5 < stage.latest["train/loss"] < 5.0
    assert stage.latest["train/loss"] == pytest.approx(
        float(stage._totals["loss"] / stage._totals["count"]) / count
    )


def test_scores_are_those_of_each_image_counted_once(tmp_path: Path) -> None:
    stage = probe(tmp_path, attentive=True)
    data = data_of(stage)
    trainer = fit(stage, data)
    trainer.test(stage, datamodule=data, verbose=False)
    source = data.source
    assert isinstance(source, Slopes) and source.labels is not None
    for split, images in (("val", 15), ("test", 15)):
        index = source.splits[split]
        view = torch.stack([stage.eval_views(source.images[i], 0).image for i in index])
        with torch.no_grad():
            logits = stage.bank(stage.inputs(view))  # (B, n, C)
        label = torch.from_numpy(source.labels[index])
        right = (logits.argmax(-1) == label[:, None]).double().mean(0)
        loss = -logits.log_softmax(-1)[torch.arange(images), :, label].mean(0)
        score = stage.scores[split]
        assert score.images == images and score.accuracy == pytest.approx(right.tolist())
        assert score.loss == pytest.approx(loss.tolist(), rel=1e-4)
    linear = [i for i, c in enumerate(stage.bank.classifiers) if c.pooling in ("cls", "mean", "both")]
    val = stage.scores["val"].accuracy
    assert stage.held_out["val/best"] == max(val[i] for i in linear)
    chosen = {c: i for i, c in enumerate(stage.bank.classifiers)}
    result = stage.results()["probe"]
    best = chosen[Classifier(*(result["best"][key] for key in ("pooling", "block", "lr")))]
    assert stage.tested["test/best"] == stage.scores["test"].accuracy[best] == result["accuracy"]
    assert stage.held_out["val/loss"] == stage.scores["val"].loss[best]
    for block in (0, 1):
        here = [val[i] for i in linear if stage.bank.classifiers[i].block == block]
        assert stage.held_out[f"val/block_{block}"] == max(here)
    (attentive,) = result["attentive"]
    assert attentive["block"] == 1 and attentive["lr"] in LRS


def test_only_twins_learn_from_validation_images_and_only_they_are_tested(tmp_path: Path) -> None:
    right, wrong, without = (
        probe(tmp_path, all_labels=True),
        probe(tmp_path, all_labels=True),
        probe(tmp_path),
    )
    data = data_of(right)
    trainer = fit(right, data, max_epochs=12)
    assert len(data.splits["train"]) == 45 and len(data.splits["val"]) == 15
    fit(wrong, data_of(wrong, Slopes(wrong=True)), max_epochs=12)
    a, b = weights(right), weights(wrong)
    for name in a:
        learnt = name.startswith("twins.by_lr")
        assert torch.equal(a[name], b[name]) != learnt, name
    # At the scales that the training images alone give.
    fit(without, data_of(without))
    assert torch.equal(without.bank.scale.mean, right.bank.scale.mean)
    trainer.test(right, datamodule=data, verbose=False)
    source = data.source
    assert isinstance(source, Slopes) and source.labels is not None and right.twins is not None
    index = source.splits["test"]
    view = torch.stack([right.eval_views(source.images[i], 0).image for i in index])
    with torch.no_grad():
        predicted = right.twins(right.inputs(view)).argmax(-1)  # (B, n)
    accuracy = (predicted == torch.from_numpy(source.labels[index])[:, None]).double().mean(0)
    assert right.scores["test"].accuracy == pytest.approx(accuracy.tolist())


# --- going on, and ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("augment", "twins"), [(False, False), (True, False), (False, True)])
def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path, augment: bool, twins: bool) -> None:
    whole = probe(tmp_path / "a", augment=augment, all_labels=twins)
    fit(whole, data_of(whole))
    half = probe(tmp_path / "b", augment=augment, all_labels=twins)
    fit(half, data_of(half), max_epochs=2).save_checkpoint(tmp_path / "b" / "half.ckpt")
    saved = torch.load(tmp_path / "b" / "half.ckpt", weights_only=True)
    kept = {"bank", "bad_steps", *(["twins"] if twins else [])}
    assert {name.split(".")[0] for name in saved["state_dict"]} == kept
    again = probe(tmp_path / "b", augment=augment, all_labels=twins)
    for p in again.bank.parameters():
        p.data.fill_(7.0)
    fit(again, data_of(again), tmp_path / "b" / "half.ckpt")
    assert again.encoder.seen == (2 * (24 + 15) if augment else 45)  # pyright: ignore
    assert again.trainer.global_step == whole.trainer.global_step == (20 if twins else 12)
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value), name
    assert again.results() == whole.results()


def test_a_finished_run_still_knows_its_scores(tmp_path: Path) -> None:
    stage = probe(tmp_path)
    fit(stage, data_of(stage)).save_checkpoint(tmp_path / "end.ckpt")
    again = probe(tmp_path)
    fit(again, data_of(again), tmp_path / "end.ckpt")
    assert again.results() == stage.results() != {}
    renamed = probe(tmp_path, classes=["up", "down", "flat"])
    with pytest.raises(
        CheckpointError, match=r"the classes are not those .*the same classes in another order"
    ):
        fit(renamed, data_of(renamed), tmp_path / "end.ckpt")
    other = probe(tmp_path, encoder=encoder(seed=5))
    with pytest.raises(CheckpointError, match="the encoder's weights"):
        fit(other, data_of(other), tmp_path / "end.ckpt")


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_learn_and_score_as_one(tmp_path: Path, cache: str) -> None:
    alone = probe(tmp_path / "one", cache=cache)
    one = fit(alone, data_of(alone))
    pair = probe(tmp_path / "two", cache=cache)
    two = fit(pair, data_of(pair), devices=2, strategy="ddp_fork")
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(pair)[name], value, rtol=1e-4, atol=2e-5)
    assert {k: float(v) for k, v in two.callback_metrics.items()} == pytest.approx(
        {k: float(v) for k, v in one.callback_metrics.items()}, rel=1e-4
    )
    assert not (tmp_path / "two" / "features.f32").exists()


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": [0.03, 0.03]}, r"stage.lrs=\[0.03, 0.03\]: set one or more different numbers above 0"),
        ({"lrs": []}, r"stage.lrs=\[\]: set one or more"),
        ({"lrs": [0.03, -1]}, r"stage.lrs=\[0.03, -1\]: set one or more"),
        ({"lrs": [math.nan]}, r"stage.lrs=\[nan\]: set one or more"),
        ({"optim": recipe(0.5)}, "stage.optim.lr=0.5 has no use here: set the learning rates with stage.lrs"),
        (
            {"optim": recipe(clip=3.0)},
            "stage.optim.clip=3.0 would tie the classifiers together: set it to null",
        ),
        (
            {"poolings": ["max"]},
            r"stage.poolings=\['max'\]: set one or more different ones of cls, mean, both",
        ),
        ({"poolings": []}, r"stage.poolings=\[\]: set one or more"),
        ({"cache": "ram"}, "stage.cache=ram: set one of auto, memory, disk, none"),
        ({"cache_gb": -1.0}, "stage.cache_gb=-1.0: set a number of GB from 0"),
        (
            {"cache": "memory", "augment": True},
            "stage.cache=memory: with stage.augment=true there is nothing",
        ),
        (
            {"cache": "disk", "attentive": True},
            "stage.cache=disk: with stage.attentive=true there is nothing",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(tmp_path, **options)


def test_without_validation_images_there_is_nothing_to_choose_on(tmp_path: Path) -> None:
    stage = probe(tmp_path)
    with pytest.raises(DataError, match=r"these data have none: set data.val_share above 0"):
        fit(stage, data_of(stage, Slopes(held_out=False)))


# --- the published recipe -----------------------------------------------------------------------------------


def test_the_recipe_is_that_of_the_published_linear_probe() -> None:
    """One classifier per block on CLS and mean; AdamW, lr 4e-3 at batch 1024, decay 1e-4, cosine to 0, 100 epochs."""
    cfg = compose(["stage=probe", "experiment=probe_1k", "data.root=images"])
    rule: Recipe = make(cfg.stage.optim)
    steps = 1_281_167 // 1024
    total = 100 * steps
    assert (cfg.batch_size, cfg.stage.epochs, steps) == (1024, 100, 1251)
    # Half of the cosine is done halfway, a quarter of its fall (1 - cos 60 degrees) / 2 after a third.
    points = [learning_rate(rule, step, steps, total) for step in (0, total // 3, total // 2, total - 1)]
    assert points == pytest.approx([4e-3, 3e-3, 2e-3, 0.0], abs=1e-9)
    assert rule.weight_decay == 1e-4 and rule.betas == (0.9, 0.999) and rule.clip is None
    assert cfg.stage.poolings == ["both"] and list(cfg.stage.lrs) == [4e-3] and cfg.stage.augment
    assert cfg.stage.views.crop_scale == [0.08, 1.0] and cfg.stage.views.flip == 0.5
    torch.manual_seed(0)
    bank = ProbeBank(width=768, depth=1, classes=100, lrs=[4e-3], poolings=["both"], pixels=0, heads=None)
    spread = torch.cat([p.flatten() for n, p in bank.named_parameters() if n.endswith("weight")]).std()
    assert spread.item() == pytest.approx(0.01, rel=0.02)


def test_the_papers_own_protocol_is_half_as_long_and_on_the_mean_alone() -> None:
    """Table 9 of the paper and its text: the script's settings but for the epochs and what a classifier sees."""
    cfg, script = (
        compose(["stage=probe", f"experiment={name}", "data.root=images"])
        for name in ("probe_1k_paper", "probe_1k")
    )
    assert (cfg.stage.epochs, list(cfg.stage.poolings)) == (50, ["mean"])
    cfg.stage.epochs, cfg.stage.poolings = script.stage.epochs, script.stage.poolings
    assert cfg == script
