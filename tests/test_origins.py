"""What a fine-tuning may start from, what it may not, and whose weights it then has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import DIGITS, TINY, save_classifier
from runs import DIGITS_TOKENIZER, pretrain, save_run
from torch import Tensor

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files
from beit_pretrain.checks import check
from beit_pretrain.compose import compose
from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.models.rel_pos import resize_table
from beit_pretrain.origins import load_weights, start_remarks
from beit_pretrain.tokenizer import collapse

CLASSIFY = ["stage=classify", "data=digits", "batch_size=64", "trainer.accelerator=cpu"]
EVALUATE = [*CLASSIFY, "mode=evaluate"]
RECIPE = ["stage=classify", "experiment=digits_finetune", "trainer.accelerator=cpu"]
TABLE = "attn.relative_position_bias_table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Path:
    return save_run(folder / "tok", DIGITS_TOKENIZER)


@pytest.fixture(scope="module")
def pretrained(folder: Path, tokenizer: Path) -> Path:
    return save_run(folder / "pre", [*pretrain(tokenizer), "model.width=24", "model.depth=2"])


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    return save_classifier(folder / "tuned", "stage.ema=0.9")


def faults(*overrides: str) -> list[str]:
    try:
        check(compose(overrides), overrides)
    except ConfigError as error:
        assert all("\n" not in fault for fault in error.faults)
        return error.faults
    return []


def the_fault(*overrides: str) -> str:
    found = faults(*overrides)
    assert len(found) == 1, found
    return found[0]


def started(*overrides: str, classes: list[str] = DIGITS) -> tuple[Any, Any]:
    """The stage with the weights of `init_from`, and the report."""
    assert not faults(*overrides)
    cfg = compose(overrides)
    stage = build_stage(cfg, classes)
    origin, report = load_weights(stage, cfg, classes)
    assert origin["sha256"] == files.sha256(files.resolve(Path(cfg.init_from), key="init_from"))
    return stage, report


def saved(folder: Path) -> dict[str, Tensor]:
    return files.read(folder / "checkpoints" / "last.ckpt")["state_dict"]


# --- before anything is built -------------------------------------------------------------------------------


def test_a_pre_training_or_a_classifier_may_be_fine_tuned(pretrained: Path, tuned: Path) -> None:
    own = [*RECIPE, "model.width=24", "model.depth=2"]
    for start in (pretrained, tuned):
        assert faults(*CLASSIFY, f"init_from={start}") == []
        assert faults(*CLASSIFY, f"init_from={start}", "image_size=48") == []
        assert faults(*own, f"init_from={start}") == []
    assert faults(*own) == []  # from scratch
    assert faults(*EVALUATE, f"init_from={tuned}", "image_size=[40,48]") == []


def test_a_recipe_for_another_encoder_is_refused_by_key(pretrained: Path) -> None:
    fault = the_fault(*RECIPE, f"init_from={pretrained}")
    assert fault == (
        f"init_from={pretrained} holds another encoder than this one; here (there): model.width=96 (24), "
        "model.depth=4 (2): set model=micro and what else is different as there"
    )
    own = [*RECIPE, "model.width=24", "model.depth=2", f"init_from={pretrained}"]
    assert "model.rel_pos=none (shared)" in the_fault(*own, "model.rel_pos=none")
    assert "model.layer_scale=0.1 (0.0)" in the_fault(*own, "model.layer_scale=0.1")


@pytest.mark.parametrize("mode", ["fit", "evaluate"])
def test_other_pixels_than_the_encoder_is_used_to_are_for_those_who_ask_for_them(
    folder: Path, mode: str
) -> None:
    grey = folder / f"grey-{mode}"
    save_classifier(grey, "data.normalize.mean=[0.1,0.2,0.3]")
    start = [*CLASSIFY, f"init_from={grey}", f"mode={mode}"]
    if mode == "fit":
        fault = the_fault(*start)
        assert "saw images normalised with mean [0.1,0.2,0.3] and std [0.5,0.5,0.5], here they are" in fault
        assert (mended := re.search(r"set '(data\.normalize\.mean=\[0.1,0.2,0.3\])'$", fault))
        assert faults(*start, mended[1]) == []
    else:
        assert faults(*start) == []  # they are the checkpoint's by themselves
    assert faults(*start, "data.normalize.mean=[0.3,0.3,0.3]") == []


def test_tables_of_their_own_cannot_become_one(tuned: Path, tokenizer: Path) -> None:
    says = (
        f"init_from={tuned} has a relative position table for each block, which cannot become the one that "
        "model.rel_pos=shared asks for: start from a pre-training run"
    )
    assert the_fault(*CLASSIFY, f"init_from={tuned}", "model.rel_pos=shared") == says
    shape = ["model.width=24", "model.depth=2", "trainer.accelerator=cpu"]
    assert the_fault(*pretrain(tokenizer), *shape, f"init_from={tuned}") == says


def test_only_a_classifier_can_be_scored_as_one(pretrained: Path, tokenizer: Path) -> None:
    assert the_fault(*EVALUATE).startswith("mode=evaluate needs weights to score: set init_from")
    assert the_fault(*EVALUATE, f"init_from={pretrained}") == (
        f"init_from={pretrained}: the checkpoint (of stage pretrain) holds no head.head: set init_from to a run of "
        "stage=classify"
    )
    for mode, part, stage in (("fit", "encoder", "pretrain"), ("evaluate", "head.head", "classify")):
        fault = the_fault(*CLASSIFY, f"init_from={tokenizer}", f"mode={mode}")
        assert fault.endswith(
            f"(of stage tokenizer) holds no {part}: set init_from to a run of stage={stage}"
        )


def test_a_probe_has_nothing_to_evaluate_and_nothing_without_weights(pretrained: Path) -> None:
    probe = ["stage=probe", "data=digits", "batch_size=64", "trainer.accelerator=cpu"]
    assert the_fault(*probe).startswith("stage=probe needs weights to score: set init_from")
    fault = the_fault(*probe, f"init_from={pretrained}", "mode=evaluate")
    assert fault.startswith(
        "stage=probe trains its classifiers and has nothing to evaluate without: leave mode="
    )


# --- putting it in ------------------------------------------------------------------------------------------


def test_fine_tuning_begins_with_the_encoder_and_a_head_of_its_own(pretrained: Path) -> None:
    stage, report = started(*CLASSIFY, f"init_from={pretrained}", "stage.ema=0.9")
    theirs, ours = saved(pretrained), stage.state_dict()
    shared = theirs.pop("encoder.rel_pos_bias.relative_position_bias_table")
    for i in range(2):
        assert torch.equal(ours[f"encoder.blocks.{i}.{TABLE}"], shared)
    for name in (name for name in theirs if name.startswith("encoder.") and name != "encoder.mask_token"):
        assert torch.equal(ours[name], theirs[name]), name
    assert report.expanded == ["encoder.rel_pos_bias.relative_position_bias_table to 2"]
    assert set(report.fresh) == {n for n in ours if n.startswith("head.")}
    assert stage.ema.n_averaged == 0  # the first update copies what is trained


def test_at_another_size_tables_are_resized(tuned: Path) -> None:
    stage, report = started(*CLASSIFY, f"init_from={tuned}", "image_size=[40,48]")
    for i in range(2):
        name = f"encoder.blocks.{i}.{TABLE}"
        assert torch.equal(stage.state_dict()[name], resize_table(saved(tuned)[name], (8, 8), (10, 12)))
    assert len(report.resized) == 3 and not report.fresh  # the absolute positions too


@pytest.mark.parametrize("mode", ["fit", "evaluate"])
def test_raw_weights_and_their_average_are_told_apart(tuned: Path, mode: str) -> None:
    theirs = saved(tuned)
    for which, prefix in (("raw", ""), ("ema", "ema.module.")):
        start = [*CLASSIFY, f"init_from={tuned}", f"mode={mode}", f"init_weights={which}"]
        stage, report = started(*start)
        own = {k: v for k, v in stage.state_dict().items() if k.startswith(("encoder.", "head."))}
        for name, value in own.items():
            assert torch.equal(value, theirs[prefix + name]), name
        assert sorted(report.loaded) == sorted(own)
    assert not torch.equal(theirs["head.head.weight"], theirs["ema.module.head.head.weight"])
    says = "^init_weights=exp: there is no such choice \\(known: raw, ema\\)$"
    with pytest.raises(ConfigError, match=says):
        check(compose([*CLASSIFY, f"init_from={tuned}", "init_weights=exp"]))


def test_weights_that_are_not_finite_are_refused_where_they_are_used(
    pretrained: Path, tuned: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def spoil(run: Path, *names: str) -> Path:
        saved = files.read(run)
        for name in names:
            saved["state_dict"][name] = saved["state_dict"][name].clone()
            saved["state_dict"][name].view(-1)[-1] = float("-inf")
        files.write(tmp_path / f"{run.name}.ckpt", saved)
        return tmp_path / f"{run.name}.ckpt"

    names = ("encoder.blocks.1.mlp.fc1.bias", "encoder.cls_token", "head.lm_head.bias")
    cfg = compose([*CLASSIFY, f"init_from={spoil(pretrained, *names)}"])
    # The head is not taken over, so it does not count.
    with pytest.raises(
        CheckpointError, match=r"init_from.* in 2 tensors, first in cls_token: give"
    ) as caught:
        load_weights(build_stage(cfg, list("abc")), cfg, list("abc"))
    assert "\n" not in str(caught.value)
    name = next(name for name in files.read(tokenizer)["state_dict"] if name.startswith("tokenizer.decoder"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.checkpoint.* in 1 tensor, first in decoder"):
        build_stage(compose(pretrain(spoil(tokenizer, name))))
    average = spoil(tuned, "ema.module.encoder.cls_token")
    for which, fails in (("raw", False), ("ema", True)):
        cfg = compose([*CLASSIFY, f"init_from={average}", f"init_weights={which}"])
        stage = build_stage(cfg, list("0123456789"))
        if fails:
            with pytest.raises(CheckpointError, match="NaN or infinity in 1 tensor"):
                load_weights(stage, cfg, list("0123456789"))
        else:
            load_weights(stage, cfg, list("0123456789"))


@pytest.mark.parametrize(
    ("held_out", "vocabulary", "says"),
    [
        ({"val/perplexity": 2.05}, 256, "of its 256 tokens, held-out images have as few as 2.0 "),
        ({"val/perplexity": 3.99}, 8192, "of its 8,192 tokens"),
        ({"val/perplexity": 1.9}, 8, "of its 8 tokens"),
        ({"val/perplexity": 2.1}, 8, ""),
        ({"val/perplexity": 4.0}, 256, ""),
        ({"val/perplexity": float("nan")}, 256, ""),
        ({"val/loss": 2.0}, 256, ""),
        ({}, 256, ""),
    ],
)
def test_a_tokenizer_that_has_collapsed_is_told(
    held_out: dict[str, float], vocabulary: int, says: str
) -> None:
    remark = collapse(held_out, vocabulary)
    assert says in remark and bool(remark) == bool(says) and "\n" not in remark


def test_pre_training_with_a_collapsed_tokenizer_is_told_before_it_begins(
    tokenizer: Path, tmp_path: Path
) -> None:
    saved = files.read(tokenizer)
    path = tmp_path / "collapsed.ckpt"
    for held_out, remarks in (({"val/perplexity": 1.5}, 1), (None, 0), ({}, 0)):
        saved["beit_pretrain"]["held_out"] = held_out
        files.write(path, saved)
        found = list(start_remarks(compose(pretrain(path))))
        assert len(found) == remarks
        assert all(line.startswith(f"tokenizer.checkpoint={path}: the tokenizer has") for line in found)
    del saved["beit_pretrain"]["config"]["tokenizer"]["vocab_size"]  # of a user's class it may be no option
    saved["beit_pretrain"]["held_out"] = {"val/perplexity": 1.5}
    files.write(path, saved)
    cfg = compose(pretrain(tokenizer))
    cfg.tokenizer.checkpoint = str(path)
    assert not list(start_remarks(cfg))
    assert not list(start_remarks(compose(pretrain(tokenizer)))), "of an old file nothing is known"
    assert not list(start_remarks(compose([*pretrain(tokenizer)[:-1], "tokenizer=dalle"])))


def test_an_average_that_was_not_kept_cannot_be_had(pretrained: Path) -> None:
    says = "init_weights=ema, but the checkpoint of init_from keeps no running average: set init_weights=raw"
    with pytest.raises(CheckpointError, match=says):
        started(*CLASSIFY, f"init_from={pretrained}", "init_weights=ema")


def test_a_score_is_over_the_classes_that_were_trained(tuned: Path, folder: Path) -> None:
    other = [*DIGITS[:8], "eight", "nine"]
    says = r"tells other classes apart than data=digits has \(10 classes there, 10 here; only there: 8, 9; only here: "
    with pytest.raises(
        CheckpointError, match=says + r"eight, nine\): evaluate on images of the same classes"
    ):
        started(*EVALUATE, f"init_from={tuned}", classes=other)
    with pytest.raises(CheckpointError, match="the same classes in another order"):
        started(*EVALUATE, f"init_from={tuned}", classes=DIGITS[::-1])
    # To train on, rows are taken over by name.
    stage, report = started(*CLASSIFY, f"init_from={tuned}", classes=other)
    assert torch.equal(stage.head.head.weight[:8], saved(tuned)["head.head.weight"][:8])
    assert report.mapped == ["head.head.weight 8 of 10", "head.head.bias 8 of 10"]


def test_what_a_classifier_is_given_reaches_its_logits(tuned: Path) -> None:
    """Scored with another kernel and at another size, the picture is what the saved weights make of it."""
    stage, _ = started(*EVALUATE, f"init_from={tuned}", "image_size=[40,48]", "model.attention=sdpa")
    own, _ = started(*EVALUATE, f"init_from={tuned}", *TINY[:3])
    image = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        found, expected = (s.eval().head(s.encoder(image)) for s in (stage, own))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
