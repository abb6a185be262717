"""The recipes against tables worked out by hand from the paper and the authors' published commands."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import nn

from beit_pretrain.build import build_stage, make
from beit_pretrain.chain import link_overrides
from beit_pretrain.compose import choices, compose, config_dir, flat_keys
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.optim import Recipe, learning_rate, parameter_groups, weight_decay

DOCS = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"


def rows(text: str) -> dict[str, dict[str, str]]:
    """A table of words: the first column is the key, the first line the names of the others."""
    names, *lines = [line.split() for line in text.strip().splitlines()]
    return {line[0]: dict(zip(names[1:], line[1:], strict=True)) for line in lines}


# Updates: images to train on / batch, rounded down, times epochs.
#   22k: 14,197,122 images, of which 0.002 (28,394.2, rounded up to 28,395) are held out: 14,168,727.
#        / 2048 = 6918.3,  x 150 = 1,037,700 and x 90 = 622,620;   / 4096 = 3459.2,  x 90 = 311,310
#   1k:  1,281,167 images, the 50,000 of val/ are extra.
#        / 2048 = 625.6,   x 800 = 500,000 (the paper, Sec. 2.5: "about 500k steps") and x 300 = 187,500
#        / 512 = 2502.3,   x 30 = 75,060;   / 1024 = 1251.1,  x 100 = 125,100 and x 50 = 62,550
# Warm-up: 10,000 updates on 22k, 10 x 625 on 1k; 5 x 3459, 5 x 6918, 5 x 2502, 20 x 1251, 5 x 1251 in fine-tuning.
# Parameters, as published: MIM 91,965,776 (B) and 311,534,016 (L), classifiers of 1,000 classes at 224 pixels
# 86,530,984 and 304,430,568. Beyond:
#   21,841 classes: 20,841 more of 768 + 1 = 769 (B: 16,026,729) or 1,025 (L: 21,362,025) weights.
#   384, 512 pixels: a table has (2 x 24 - 1)^2 + 3 = 2,212 or (2 x 32 - 1)^2 + 3 = 3,972 rows in place of 732, for each
#   head of each block: B 144 x 1,480 = 213,120; L 384 x 1,480 = 568,320 and 384 x 3,240 = 1,244,160 more.
RECIPES = rows("""
recipe                    data px  batch epochs per_epoch steps   warmup decay drop_path wd   clip pixels   parameters
pretrain_base_22k         22k  224 2048  150    6918      1037700 10000  1     0.1       0.05 3    half     91965776
pretrain_large_22k        22k  224 2048  150    6918      1037700 10000  1     0.1       0.05 1    half     311534016
pretrain_base_1k          1k   224 2048  800    625       500000  6250   1     0.1       0.05 3    imagenet 91965776
pretrain_base_1k_300      1k   224 2048  300    625       187500  6250   1     0.1       0.05 3    imagenet 91965776
pretrain_large_1k         1k   224 2048  800    625       500000  6250   1     0.1       0.05 1    imagenet 311534016
finetune_base_22k         22k  224 4096  90     3459      311310  17295  0.65  0.2       0.05 3    half     102557713
finetune_large_22k        22k  224 2048  90     6918      622620  34590  0.75  0.2       0.05 1    half     325792593
finetune_base_22k_1k_224  1k   224 512   30     2502      75060   12510  0.85  0.1       1e-8 -    half     86530984
finetune_base_22k_1k_384  1k   384 512   30     2502      75060   12510  0.85  0.1       1e-8 -    half     86744104
finetune_large_22k_1k_224 1k   224 512   30     2502      75060   12510  0.9   0.4       1e-8 -    half     304430568
finetune_large_22k_1k_384 1k   384 512   30     2502      75060   12510  0.9   0.4       1e-8 -    half     304998888
finetune_large_22k_1k_512 1k   512 512   30     2502      75060   12510  0.9   0.4       1e-8 -    half     305674728
finetune_base_1k          1k   224 1024  100    1251      125100  25020  0.65  0.1       0.05 -    imagenet 86530984
finetune_large_1k         1k   224 1024  50     1251      62550   6255   0.75  0.2       0.05 -    imagenet 304430568
""")

# Peaks: lr x layer decay^(top - layer). B has layers 0 (stem), 1 .. 12 (blocks), 13 (head), L 0, 1 .. 24, 25:
#   0.65^13 = 0.003697206  0.65^12 = 0.005688009  0.65^7  = 0.04902228   0.85^13 = 0.1209055  0.85^12 = 0.1422418
#   0.85^7  = 0.3205771    0.75^25 = 0.0007525435 0.75^24 = 0.001003391  0.75^13 = 0.02375726
#   0.9^25  = 0.07178980   0.9^24  = 0.07976644   0.9^13  = 0.2541866
# `middle` is block 5 of 12 (counted from 0, layer 6) or block 11 of 24 (layer 12).
PEAKS = rows("""
recipe                    stem          first         middle        last     head
finetune_base_22k         1.1091618e-5  1.7064027e-5  1.4706684e-4  1.95e-3  3e-3
finetune_large_22k        1.5050869e-6  2.0067826e-6  4.7514528e-5  1.5e-3   2e-3
finetune_base_22k_1k_224  2.4181099e-6  2.8448351e-6  6.4115418e-6  1.7e-5   2e-5
finetune_base_22k_1k_384  2.4181099e-6  2.8448351e-6  6.4115418e-6  1.7e-5   2e-5
finetune_large_22k_1k_224 1.4357960e-6  1.5953289e-6  5.0837317e-6  1.8e-5   2e-5
finetune_large_22k_1k_384 1.4357960e-6  1.5953289e-6  5.0837317e-6  1.8e-5   2e-5
finetune_large_22k_1k_512 1.4357960e-6  1.5953289e-6  5.0837317e-6  1.8e-5   2e-5
finetune_base_1k          1.4788824e-5  2.2752036e-5  1.9608912e-4  2.6e-3   4e-3
finetune_large_1k         7.5254346e-7  1.0033913e-6  2.3757264e-5  7.5e-4   1e-3
""")

# The head's learning rate: `ramp` at step W // 2 = lr x (W // 2) / (W - 1), `peak` at W - 1 and again at W, and
# `later` at the step where the cosine has come half its way: W + (T - W) / 2, (lr + min_lr) / 2. Where T - W is odd
# (finetune_base_22k: 294,015, finetune_large_1k: 56,295) after a third of it, 98,005 or 18,765 steps, where
# cos(pi / 3) = 1/2: min_lr + 3/4 (lr - min_lr).
SCHEDULES = rows("""
recipe                    half   ramp          peak    step     later
pretrain_base_22k         5000   7.5007501e-4  1.5e-3  523850   7.55e-4
pretrain_large_22k        5000   7.5007501e-4  1.5e-3  523850   7.55e-4
pretrain_base_1k          3125   7.5012002e-4  1.5e-3  253125   7.55e-4
pretrain_base_1k_300      3125   7.5012002e-4  1.5e-3   96875   7.55e-4
pretrain_large_1k         3125   7.5012002e-4  1.5e-3  253125   7.55e-4
finetune_base_22k         8647   1.5e-3        3e-3    115300   2.25025e-3
finetune_large_22k        17295  1.0000289e-3  2e-3    328605   1.0005e-3
finetune_base_22k_1k_224  6255   1.0000799e-5  2e-5     43785   1.05e-5
finetune_base_22k_1k_384  6255   1.0000799e-5  2e-5     43785   1.05e-5
finetune_large_22k_1k_224 6255   1.0000799e-5  2e-5     43785   1.05e-5
finetune_large_22k_1k_384 6255   1.0000799e-5  2e-5     43785   1.05e-5
finetune_large_22k_1k_512 6255   1.0000799e-5  2e-5     43785   1.05e-5
finetune_base_1k          12510  2.0000799e-3  4e-3     75060   2.0005e-3
finetune_large_1k         3127   5e-4          1e-3     25020   7.5025e-4
""")

PIXELS = {
    "half": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "imagenet": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}
MIXED = ("finetune_base_1k", "finetune_large_1k")  # straight from pre-training
every_recipe = pytest.mark.parametrize("name", RECIPES)


def stage_of(name: str) -> str:
    return {"pretrain": "pretrain", "finetune": "classify", "segment": "segment"}[name.split("_")[0]]


def size_of(name: str) -> str:
    return name.split("_")[1]


@cache
def made(*overrides: str) -> DictConfig:
    """A configuration, not to be changed."""
    return compose([*overrides, "data.root=images"])


def composed(name: str) -> DictConfig:
    return made(f"stage={stage_of(name)}", f"experiment={name}")


@cache
def model(name: str) -> nn.ModuleDict:
    """Encoder and head without memory for their weights, under the names they have in their stage."""
    cfg, row = composed(name), RECIPES[name]
    classes = {"22k": 21_841, "1k": 1_000}[row["data"]]
    with torch.device("meta"):
        encoder = make(cfg.model)
        head = (
            MIMHead(width=encoder.width, vocab_size=8192)
            if stage_of(name) == "pretrain"
            else ClassHead(width=encoder.width, classes=classes, pooling=cfg.stage.pooling, init_scale=0.001)
        )
    return nn.ModuleDict({"encoder": encoder, "head": head})


def groups(name: str) -> list[dict[str, Any]]:
    recipe: Recipe = make(composed(name).stage.optim)
    return parameter_groups(model(name).named_parameters(), recipe, composed(name).model.depth)


def test_the_tables_hold_every_recipe() -> None:
    kinds = ("pretrain_", "finetune_", "segment_")
    known = [name for name in choices("experiment") if name.startswith(kinds)]
    assert known == sorted([*RECIPES, *SEGMENT, "segment_multi_scale"])
    assert RECIPES.keys() == SCHEDULES.keys()
    assert PEAKS.keys() == {name for name in RECIPES if stage_of(name) == "classify"}


@every_recipe
def test_length_and_batch(name: str) -> None:
    cfg, row = composed(name), RECIPES[name]
    assert (cfg.batch_size, cfg.stage.epochs) == (int(row["batch"]), int(row["epochs"]))
    assert (
        cfg.micro_batch_size is None
        and cfg.data.name == {"22k": "imagenet22k", "1k": "imagenet"}[row["data"]]
    )
    if row["data"] == "22k":
        assert math.ceil(cfg.data.val_share * 14_197_122) == 28_395
    images = {"22k": 14_168_727, "1k": 1_281_167}[row["data"]]
    assert images // cfg.batch_size == int(row["per_epoch"])
    assert int(row["per_epoch"]) * cfg.stage.epochs == int(row["steps"])


@every_recipe
def test_schedule(name: str) -> None:
    recipe: Recipe = make(composed(name).stage.optim)
    row, points = RECIPES[name], SCHEDULES[name]
    warmup, total = int(row["warmup"]), int(row["steps"])
    minimum = 1e-5 if stage_of(name) == "pretrain" else 1e-6

    def lr(step: int) -> float:
        return learning_rate(recipe, step, int(row["per_epoch"]), total)

    peak = pytest.approx(float(points["peak"]), rel=1e-9)
    assert lr(0) == 0
    assert lr(int(points["half"])) == pytest.approx(float(points["ramp"]), rel=1e-7)
    assert (
        lr(warmup - 2) != peak
        and lr(warmup - 1) == peak
        and lr(warmup) == peak
        and lr(warmup + 1) < recipe.lr
    )
    assert lr(int(points["step"])) == pytest.approx(float(points["later"]), rel=1e-9)
    # Approached, never reached.
    assert minimum < lr(total - 1) < minimum * (1 + 1e-5)
    assert {weight_decay(recipe, step, total) for step in (0, warmup, total - 1)} == {float(row["wd"])}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_each_layer_in_fine_tuning(name: str) -> None:
    lr = {parameter: group["lr"] for group in groups(name) for parameter in group["names"]}
    top = {"base": 11, "large": 23}[size_of(name)]
    places = {
        "stem": ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"),
        "first": ("blocks.0.norm1.weight", "blocks.0.attn.relative_position_bias_table"),
        "middle": (f"blocks.{top // 2}.mlp.fc2.weight",),
        "last": (f"blocks.{top}.gamma_1", f"blocks.{top}.attn.q_bias"),
    }
    named = {place: [f"encoder.{end}" for end in ends] for place, ends in places.items()}
    named["head"] = ["head.fc_norm.weight", "head.head.weight", "head.head.bias"]
    for place, parameters in named.items():
        for parameter in parameters:
            assert lr[parameter] == pytest.approx(float(PEAKS[name][place]), rel=1e-6), parameter
    assert len(groups(name)) == 2 * (top + 3)  # of each layer a decayed and an undecayed one


@pytest.mark.parametrize("name", [name for name in RECIPES if stage_of(name) == "pretrain"])
def test_pre_training_has_one_peak_for_all(name: str) -> None:
    assert [group["lr"] for group in groups(name)] == [1.5e-3, 1.5e-3]


@every_recipe
def test_adamw(name: str) -> None:
    optim, row = composed(name).stage.optim, RECIPES[name]
    assert list(optim.betas) == [0.9, 0.999] and optim.eps == 1e-8
    assert optim.clip == (None if row["clip"] == "-" else float(row["clip"]))
    assert optim.layer_decay == float(row["decay"])
    decay = {parameter: group["weight_decay"] for group in groups(name) for parameter in group["names"]}
    free = {"encoder.cls_token"} | {p for p in decay if p.endswith("bias") or "norm" in p or "gamma" in p}
    assert decay == {p: 0.0 if p in free else float(row["wd"]) for p in decay}


@every_recipe
def test_the_encoder_and_what_it_sees(name: str) -> None:
    cfg, row = composed(name), RECIPES[name]
    assert cfg.model.name == size_of(name) and cfg.model.drop_path == float(row["drop_path"])
    assert cfg.model.layer_scale == {"base": 0.1, "large": 1e-5}[size_of(name)]
    side = int(row["px"])
    assert list(cfg.model.image_size) == list(cfg.stage.views.image_size) == [side, side]
    assert OmegaConf.to_container(cfg.stage.normalize, resolve=True) == PIXELS[row["pixels"]]
    assert list(cfg.stage.views.crop_scale) == [0.08, 1.0] and cfg.stage.views.flip == 0.5
    if stage_of(name) == "pretrain":
        assert (cfg.model.rel_pos, cfg.model.mask_token, cfg.model.init_cut) == ("shared", True, 0.02)
        assert cfg.tokenizer.name == "dalle" and list(cfg.stage.views.token_image_size) == [112, 112]
        assert cfg.masking._target_.endswith("BlockwiseMask") and cfg.stage.views.jitter == 0.4
        assert (cfg.masking.count, cfg.masking.min_block) == (75, 16)
    else:
        assert (cfg.model.rel_pos, cfg.model.mask_token, cfg.model.init_cut) == ("per_layer", False, 2.0)
        assert list(cfg.stage.eval_views.image_size) == [side, side]
        assert cfg.stage.eval_views.crop_pct == (0.875 if side == 224 else 1.0)


@pytest.mark.parametrize("name", [name for name in RECIPES if stage_of(name) == "classify"])
def test_the_labels(name: str) -> None:
    stage = composed(name).stage
    assert (stage.mixup, stage.cutmix) == ((0.8, 1.0) if name in MIXED else (0.0, 0.0))
    assert (stage.smoothing, stage.erasing, stage.pooling, stage.ema) == (0.1, 0.25, "mean", None)
    assert stage.views.rand_augment == "rand-m9-mstd0.5-inc1" and stage.head_init_scale == 0.001


@every_recipe
def test_the_model_has_the_published_number_of_parameters(name: str) -> None:
    count = sum(parameter.numel() for parameter in model(name).parameters())
    assert count == int(RECIPES[name]["parameters"])


# --- ADE20k -------------------------------------------------------------------------------------------------

# 160,000 updates of 16 images; ADE20k has 20,210 to train on, 1,263 batches and a rest: 128 epochs of 1,250.
# L at 640 was published as 320,000 passes of 8 images, two to an update, with a ramp of 3,000 passes: the same.
# Images are brought into `px` by 4 x `px` pixels; windows lie two thirds of a crop apart, rounded down.
# Parameters, as published: encoder, neck and both heads of 150 classes.
SEGMENT = rows("""
recipe                from               px  long stride lr   decay drop_path layer_scale channels parameters
segment_base_512      pretrain           512 2048 341    7e-4 0.65  0.1       0.1         768      163080812
segment_base_22k_512  finetune_base_22k  512 2048 341    3e-5 0.9   0.1       0.1         768      163080812
segment_base_22k_640  finetune_base_22k  640 2560 426    3e-5 0.9   0.1       0.1         768      163407980
segment_large_22k_512 finetune_large_22k 512 2048 341    2e-5 0.95  0.2       1e-6        1024     440398636
segment_large_22k_640 finetune_large_22k 640 2560 426    2e-5 0.95  0.2       1e-6        1024     441271084
""")

# As `PEAKS`, and 0.9^12 = 0.2824295  0.9^7 = 0.4782969  0.95^25 = 0.2773896  0.95^24 = 0.2919890  0.95^13 = 0.5133421
SEGMENT_PEAKS = rows("""
recipe                stem         first        middle       last    head
segment_base_512      2.5880441e-6 3.9816063e-6 3.4315595e-5 4.55e-4 7e-4
segment_base_22k_512  7.6255975e-6 8.4728861e-6 1.4348907e-5 2.7e-5  3e-5
segment_base_22k_640  7.6255975e-6 8.4728861e-6 1.4348907e-5 2.7e-5  3e-5
segment_large_22k_512 5.5477915e-6 5.8397805e-6 1.0266842e-5 1.9e-5  2e-5
segment_large_22k_640 5.5477915e-6 5.8397805e-6 1.0266842e-5 1.9e-5  2e-5
""")

# Share of the peak at an update: a line from 1 to 0 over all, in the first 1,500 times one from 1e-6 to 1.
# 750: (1 - 750 / 160,000) (0.5 + 0.5e-6); 1,499: 0.99063125 x 0.999333334
SEGMENT_SCHEDULE = {
    0: 1e-6,
    750: 0.49765674765625,
    1499: 0.9899708298,
    1500: 0.990625,
    80_000: 0.5,
    159_999: 6.25e-6,
}
every_segmentation = pytest.mark.parametrize("name", SEGMENT)


@cache
def segmentation(name: str) -> Any:
    """The stage without memory for its weights."""
    with torch.device("meta"):
        return build_stage(composed(name), [f"class {i}" for i in range(150)])


@every_segmentation
def test_segmentation_length_and_schedule(name: str) -> None:
    cfg, row = composed(name), SEGMENT[name]
    assert (cfg.batch_size, cfg.micro_batch_size, cfg.data.name) == (16, None, "ade20k")
    assert cfg.data.epoch_steps == 1250 <= 20_210 // 16
    assert cfg.data.epoch_steps * cfg.stage.epochs == 160_000
    assert cfg.stage.epochs % cfg.trainer.evaluate_every == 0
    recipe: Recipe = make(cfg.stage.optim)
    for step, share in SEGMENT_SCHEDULE.items():
        assert learning_rate(recipe, step, 1250, 160_000) == pytest.approx(float(row["lr"]) * share, rel=1e-9)
    assert {weight_decay(recipe, step, 160_000) for step in (0, 1500, 159_999)} == {0.05}


@every_segmentation
def test_the_peak_of_each_layer_in_segmentation(name: str) -> None:
    groups = segmentation(name).parameter_groups()
    lr = {parameter: group["lr"] for group in groups for parameter in group["names"]}
    top = {"base": 11, "large": 23}[size_of(name)]
    named = {
        "stem": ("encoder.cls_token", "encoder.patch_embed.proj.weight"),
        "first": ("encoder.blocks.0.norm1.weight", "encoder.blocks.0.attn.relative_position_bias_table"),
        "middle": (f"encoder.blocks.{top // 2}.mlp.fc2.weight",),
        "last": (f"encoder.blocks.{top}.gamma_1", f"encoder.blocks.{top}.attn.q_bias"),
        "head": tuple(parameter for parameter in lr if parameter.startswith("head.")),
    }
    assert len(named["head"]) > 50
    for place, parameters in named.items():
        for parameter in parameters:
            assert lr[parameter] == pytest.approx(float(SEGMENT_PEAKS[name][place]), rel=1e-6), parameter
    assert len(groups) == 2 * (top + 3)


@every_segmentation
def test_adamw_in_segmentation(name: str) -> None:
    optim = composed(name).stage.optim
    assert (list(optim.betas), optim.eps, optim.clip) == ([0.9, 0.999], 1e-8, None)
    assert optim.layer_decay == float(SEGMENT[name]["decay"])
    for group in segmentation(name).parameter_groups():
        for parameter, value in zip(group["names"], group["params"], strict=True):
            free = value.ndim == 1 or parameter == "encoder.cls_token"
            assert group["weight_decay"] == (0.0 if free else 0.05), parameter


@every_segmentation
def test_the_segmenter_and_what_it_sees(name: str) -> None:
    cfg, row, stage = composed(name), SEGMENT[name], segmentation(name)
    side, stride = int(row["px"]), int(row["stride"])
    assert cfg.model.name == size_of(name) and list(cfg.model.image_size) == [side, side]
    assert (cfg.model.rel_pos, cfg.model.mask_token) == ("per_layer", False)
    assert (cfg.model.drop_path, cfg.model.layer_scale) == (
        float(row["drop_path"]),
        float(row["layer_scale"]),
    )
    assert OmegaConf.to_container(cfg.stage.normalize, resolve=True) == PIXELS["imagenet"]
    views = stage.views
    assert (views.image_size, views.resize, views.scale) == (
        (side, side),
        (side, int(row["long"])),
        (0.5, 2.0),
    )
    assert (views.cat_max_ratio, views.flip, views.distortion) == (0.75, 0.5, True)
    assert views.fill == [124, 116, 104]  # 0 once it is normalised
    sliding = stage.sliding
    assert (sliding.crop, sliding.stride, sliding.mode) == ((side, side), (stride, stride), "slide")
    assert (sliding.scales, sliding.flip) == ((1.0,), False)
    assert stage.blocks == {"base": [3, 5, 7, 11], "large": [7, 11, 15, 23]}[size_of(name)]
    assert stage.auxiliary_weight == 0.4
    head, channels = stage.head, int(row["channels"])
    assert (
        head.decode_head.conv_seg.in_channels == channels and head.auxiliary_head.conv_seg.in_channels == 256
    )
    assert head.decode_head.dropout.p == head.auxiliary_head.dropout.p == 0.1
    assert sum(p.numel() for _, p in stage.trained_parameters()) == int(row["parameters"])


@every_segmentation
def test_a_segmentation_names_what_it_starts_from(name: str) -> None:
    assert f" init_from=runs/{SEGMENT[name]['from']} " in text(name)
    assert SEGMENT[name]["from"] == "pretrain" or size_of(name) == size_of(SEGMENT[name]["from"])


def test_the_published_scores_of_several_scales_are_of_six_and_mirrored() -> None:
    predict = compose(["stage=segment", "experiment=segment_multi_scale"]).stage.predict
    assert predict.scales == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75] and predict.flip is True


# --- the files ----------------------------------------------------------------------------------------------


def text(name: str) -> str:
    return (config_dir() / "experiment" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", [*RECIPES, *SEGMENT])
def test_a_recipe_says_only_what_differs(name: str) -> None:
    own = yaml.safe_load(text(name))
    first, *others = own.pop("defaults")
    if isinstance(first, str):  # a recipe on top of another one
        without = composed(first)
    else:
        groups = [
            f"{group.removeprefix('override /')}={choice}"
            for d in (first, *others)
            for group, choice in d.items()
        ]
        without = made(f"stage={stage_of(name)}", *groups)
    said = {key: OmegaConf.select(OmegaConf.create(own), key) for key in flat_keys(OmegaConf.create(own))}
    for key, value in said.items():
        before = OmegaConf.select(without, key, default="no such option")
        assert OmegaConf.is_dict(value) or before not in ("no such option", value), key


@every_recipe
def test_a_recipe_continues_on_the_pixels_of_the_one_before(name: str) -> None:
    if before := re.search(r"init_from=runs/(\w+)", text(name)):
        assert RECIPES[before[1]]["pixels"] == RECIPES[name]["pixels"]
        assert size_of(before[1]) == size_of(name)
    else:
        assert stage_of(name) == "pretrain"


@pytest.mark.parametrize(("size", "pixels"), [("base", 384), ("large", 512)])
def test_the_chain_goes_from_pixels_to_the_last_fine_tuning(size: str, pixels: int, tmp_path: Path) -> None:
    given = f"chain.size={size} chain.image_size={pixels} chain.imagenet22k=/22k chain.imagenet1k=/1k".split()
    cfg = compose(["chain=imagenet", *given, f"runs={tmp_path}"])
    links = link_overrides(cfg, [], {}, tmp_path)
    own = [" ".join(o for o in link if not o.startswith(("name=", "runs="))) for link in links.values()]
    assert own == [
        f"stage=pretrain experiment=pretrain_{size}_22k data.root=/22k",
        f"stage=classify experiment=finetune_{size}_22k data.root=/22k init_from={tmp_path}/pretrain",
        f"stage=classify experiment=finetune_{size}_22k_1k_{pixels} data.root=/1k init_from={tmp_path}/finetune_22k",
    ]


# --- the page -----------------------------------------------------------------------------------------------

# GFLOP of one image in training, 2 per multiply-add: three times the forward pass (35.1, 111.0 for B at 224, 384;
# 123.1, 382.1, 724.0 for L at 224, 384, 512), in pre-training with the head on 75 patches (0.9, 1.3) and 52.1 of the
# tokenizer, forward only.
GFLOP = {"base 224": 105.4, "base 384": 332.9, "large 224": 369.3, "large 384": 1146.4, "large 512": 2171.9}
GFLOP_PRETRAIN = {"base": 160.3, "large": 425.2}


def hours(name: str) -> float:
    """Of an A100 at 40% of 312 TFLOP/s."""
    row, size = RECIPES[name], size_of(name)
    gflop = GFLOP_PRETRAIN[size] if stage_of(name) == "pretrain" else GFLOP[f"{size} {row['px']}"]
    return int(row["steps"]) * int(row["batch"]) * gflop * 1e9 / (0.4 * 312e12) / 3600


def test_the_page_says_of_each_recipe_what_it_is() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    page = {cells[0].strip("`"): cells for cells in lines if len(cells) == 7}
    shown = []
    for name, row in RECIPES.items():
        _, _, epochs, batch, steps, cost, published = page[name]
        assert (epochs, batch) == (row["epochs"], row["batch"])
        assert steps.replace(",", "") == row["steps"]
        assert float(cost.replace(",", "")) == pytest.approx(hours(name), rel=0.02)
        # The figures are those of the files.
        assert re.findall(r"\b8\d\.\d+", published) == re.findall(r"\b(8\d\.\d+)%", text(name))
        shown.append(f"{name:26} {epochs:>4} {batch:>5} {steps:>10} {cost:>6} A100-h  {published}")
    print("\n" + "\n".join(shown))  # pytest -s shows it


def test_the_page_has_the_commands_of_the_files() -> None:
    page = DOCS.read_text()
    for name in RECIPES:
        command = next(line.lstrip("# ") for line in text(name).splitlines() if "beit-train" in line)
        assert command in page, command


# GFLOP of one image in training at 512 and 640: three times the forward pass of encoder and heads.
GFLOP_SEGMENT = {"base 512": 3641, "base 640": 5790, "large 512": 7493, "large 640": 11978}


def test_the_page_says_of_each_segmentation_what_it_is() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    page = {cells[0].strip("`"): cells for cells in lines if len(cells) == 7}
    for name, row in SEGMENT.items():
        _, start, px, lr, decay, cost, published = page[name]
        assert (px, lr, decay) == (row["px"], row["lr"], row["decay"])
        assert start == ("a base pre-training" if row["from"] == "pretrain" else f"`{row['from']}`")
        gflop = GFLOP_SEGMENT[f"{size_of(name)} {px}"]
        assert float(cost) == pytest.approx(160_000 * 16 * gflop * 1e9 / (0.4 * 312e12) / 3600, rel=0.02)
        assert re.findall(r"\b[45]\d\.\d+\b", published) == re.findall(r"\b[45]\d\.\d+\b", text(name))
