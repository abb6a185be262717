"""Layers, groups and schedules, worked out by hand and with numpy."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.beit import Beit as TimmBeit
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from beit_pretrain.errors import ConfigError
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.optim import (
    Recipe,
    layer_id,
    learning_rate,
    parameter_groups,
    set_schedule,
    warmup_cosine,
    warmup_remark,
    weight_decay,
)


class Stage(nn.Module):
    """A pre-training stage in names only."""

    def __init__(self, depth: int, **options: Any) -> None:
        super().__init__()
        self.encoder = Beit(
            image_size=(8, 8), patch_size=4, width=8, depth=depth, heads=2, abs_pos=True, **options
        )
        self.head = MIMHead(width=8, vocab_size=5)


LAYERS_OF_TWELVE_BLOCKS = {
    "encoder.cls_token": 0,
    "encoder.mask_token": 0,
    "encoder.pos_embed": 0,
    "encoder.patch_embed.proj.weight": 0,
    "encoder.patch_embed.proj.bias": 0,
    "encoder.blocks.0.norm1.weight": 1,
    "encoder.blocks.0.attn.relative_position_bias_table": 1,
    "encoder.blocks.1.gamma_1": 2,
    "encoder.blocks.9.attn.qkv.weight": 10,
    "encoder.blocks.10.mlp.fc2.bias": 11,
    "encoder.blocks.11.attn.q_bias": 12,
    "encoder.rel_pos_bias.relative_position_bias_table": 13,
    "head.norm.weight": 13,
    "head.lm_head.weight": 13,
    "head.patch_embed.weight": 13,
    "neck.up.0.weight": 13,
}


@pytest.mark.parametrize(("name", "layer"), LAYERS_OF_TWELVE_BLOCKS.items())
def test_each_parameter_of_a_twelve_block_stage_is_in_its_layer(name: str, layer: int) -> None:
    assert layer_id(name, depth=12) == layer


@pytest.mark.parametrize(
    "name", ["encoder.blocks.12.norm1.weight", "encoder._orig_mod.cls_token", "encoder.norm"]
)
def test_an_encoder_parameter_without_a_place_is_not_guessed(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no place in an encoder of 12 blocks"):
        layer_id(name, depth=12)


def test_learning_rates_decay_downwards_by_one_factor_per_layer() -> None:
    groups = parameter_groups(Stage(12).named_parameters(), Recipe(layer_decay=0.5), depth=12)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["head.lm_head.weight"] == 1
    assert scales["encoder.rel_pos_bias.relative_position_bias_table"] == 1
    assert scales["encoder.blocks.11.attn.proj.weight"] == 1 / 2
    assert scales["encoder.blocks.10.gamma_2"] == 1 / 4
    assert scales["encoder.blocks.0.norm2.bias"] == 1 / 4096
    assert scales["encoder.patch_embed.proj.weight"] == scales["encoder.mask_token"] == 1 / 8192
    assert [group["lr"] for group in groups] == [1.5e-3 * group["lr_scale"] for group in groups]


# Fine-tuning under the published decay of 0.65: the layer of each parameter of 12 blocks and a class head, and the
# factor on its learning rate, 0.65^(13 - layer).
FINE_TUNING = {
    "encoder.cls_token": (0, 0.003697206),
    "encoder.patch_embed.proj.*": (0, 0.003697206),
    "encoder.blocks.0.*": (1, 0.005688009),
    "encoder.blocks.1.*": (2, 0.008750783),
    "encoder.blocks.2.*": (3, 0.01346274),
    "encoder.blocks.3.*": (4, 0.02071191),
    "encoder.blocks.4.*": (5, 0.03186448),
    "encoder.blocks.5.*": (6, 0.04902228),
    "encoder.blocks.6.*": (7, 0.07541889),
    "encoder.blocks.7.*": (8, 0.1160291),
    "encoder.blocks.8.*": (9, 0.1785063),
    "encoder.blocks.9.*": (10, 0.274625),
    "encoder.blocks.10.*": (11, 0.4225),
    "encoder.blocks.11.*": (12, 0.65),
    "encoder.rel_pos_bias.*": (13, 1.0),
    "head.fc_norm.*": (13, 1.0),
    "head.head.*": (13, 1.0),
}


def classifier(rel_pos: Any) -> nn.ModuleDict:
    encoder = Beit(
        image_size=(8, 8), patch_size=4, width=8, depth=12, heads=2, rel_pos=rel_pos, mask_token=False
    )
    return nn.ModuleDict({"encoder": encoder, "head": ClassHead(width=8, classes=5)})


def scales(groups: list[dict[str, Any]]) -> dict[str, tuple[float, bool]]:
    """Factor on the learning rate and whether it is decayed, of each parameter."""
    return {name: (group["lr_scale"], group["decay"]) for group in groups for name in group["names"]}


@pytest.mark.parametrize("rel_pos", ["per_layer", "shared"])
def test_fine_tuning_slows_each_layer_by_the_table(rel_pos: str) -> None:
    groups = parameter_groups(classifier(rel_pos).named_parameters(), Recipe(layer_decay=0.65), depth=12)
    found = scales(groups)
    assert len(found) == len(dict(classifier(rel_pos).named_parameters()))
    unused = {"encoder.rel_pos_bias.*"} if rel_pos == "per_layer" else set()
    for pattern, (layer, scale) in FINE_TUNING.items():
        names = [name for name in found if fnmatch(name, pattern)]
        assert bool(names) == (pattern not in unused), pattern
        for name in names:
            assert layer_id(name, depth=12) == layer, name
            assert found.pop(name)[0] == pytest.approx(scale, rel=1e-6), name
    assert not found


@pytest.mark.parametrize("rel_pos", ["per_layer", "shared"])
def test_fine_tuning_groups_are_those_of_timm_but_for_the_shared_table(rel_pos: str) -> None:
    """timm counts the shared table with the stem, where it learns 270 times as slowly as it did for the authors."""
    with torch.device("meta"):
        shared = rel_pos == "shared"
        twin = TimmBeit(
            img_size=8,
            patch_size=4,
            embed_dim=8,
            depth=12,
            num_heads=2,
            init_values=0.1,
            use_abs_pos_emb=False,
            use_rel_pos_bias=not shared,
            use_shared_rel_pos_bias=shared,
            num_classes=5,
        )
    named = {id(parameter): name for name, parameter in twin.named_parameters()}
    theirs = {
        named[id(parameter)]: (group["lr_scale"], group["weight_decay"] > 0)
        for group in param_groups_layer_decay(
            twin, no_weight_decay_list=twin.no_weight_decay(), layer_decay=0.65
        )
        for parameter in group["params"]
    }
    recipe = Recipe(layer_decay=0.65, decay_rel_pos=False)  # timm decays no table; the authors do
    groups = parameter_groups(classifier(rel_pos).named_parameters(), recipe, depth=12)
    ours = {name.partition(".")[2]: value for name, value in scales(groups).items()}
    if shared:
        table = "rel_pos_bias.relative_position_bias_table"
        assert ours.pop(table) == (1.0, False)
        assert theirs.pop(table) == (pytest.approx(0.65**13), False)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value), name


def test_groups_run_from_the_bottom_up_and_hold_each_parameter_once() -> None:
    stage = Stage(2)
    groups = parameter_groups(stage.named_parameters(), Recipe(layer_decay=0.9), depth=2)
    kinds = ("decay", "no_decay")
    assert [group["group"] for group in groups] == [f"layer_{i}_{kind}" for i in range(4) for kind in kinds]
    parameters = dict(stage.named_parameters())
    assert sorted(name for group in groups for name in group["names"]) == sorted(parameters)
    for group in groups:
        for parameter, name in zip(group["params"], group["names"], strict=True):
            assert parameter is parameters[name]


def test_without_layer_decay_there_are_two_groups() -> None:
    groups = parameter_groups(Stage(2).named_parameters(), Recipe(), depth=2)
    assert [group["group"] for group in groups] == ["all_decay", "all_no_decay"]
    assert [group["lr_scale"] for group in groups] == [1, 1]


def undecayed(recipe: Recipe, **options: Any) -> set[str]:
    groups = parameter_groups(Stage(1, **options).named_parameters(), recipe, depth=1)
    for group in groups:
        assert group["weight_decay"] == (0.05 if group["decay"] else 0)
    return {name for group in groups if not group["decay"] for name in group["names"]}


def test_vectors_biases_positions_and_cls_are_not_decayed_but_tables_and_mask_token_are() -> None:
    block = [
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "attn.q_bias",
        "attn.v_bias",
        "attn.proj.bias",
        "mlp.fc1.bias",
        "mlp.fc2.bias",
        "gamma_1",
        "gamma_2",
    ]
    expected = {"encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.bias"}
    expected |= {"encoder.blocks.0." + name for name in block}
    expected |= {"head.norm.weight", "head.norm.bias", "head.lm_head.bias"}
    assert undecayed(Recipe()) == expected
    shared = {"encoder.rel_pos_bias.relative_position_bias_table"}
    assert undecayed(Recipe(decay_rel_pos=False)) == expected | shared
    own = {"encoder.blocks.0.attn.relative_position_bias_table"}
    assert undecayed(Recipe(decay_rel_pos=False, layer_decay=0.5), rel_pos="per_layer") == expected | own


def test_frozen_parameters_are_left_out() -> None:
    stage = Stage(1)
    stage.encoder.requires_grad_(False)
    groups = parameter_groups(stage.named_parameters(), Recipe(), depth=1)
    assert {name.split(".")[0] for group in groups for name in group["names"]} == {"head"}


def published_schedule(peak: float, minimum: float, warmup: int, total: int) -> np.ndarray:
    ramp = np.linspace(0, peak, warmup)
    i = np.arange(total - warmup)
    return np.concatenate([ramp, minimum + 0.5 * (peak - minimum) * (1 + np.cos(np.pi * i / len(i)))])


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (1, 7), (2, 9), (10, 101), (7, 8), (500, 5000)])
def test_the_schedule_equals_a_linspace_followed_by_half_a_cosine(warmup: int, total: int) -> None:
    options = {"peak": 1.5e-3, "minimum": 1e-5, "warmup_steps": warmup, "total_steps": total}
    ours = [warmup_cosine(step, **options) for step in range(total)]
    np.testing.assert_allclose(ours, published_schedule(1.5e-3, 1e-5, warmup, total), rtol=1e-12, atol=0)


def test_the_schedule_passes_through_points_worked_out_by_hand() -> None:
    at = {s: warmup_cosine(s, peak=8.0, minimum=2.0, warmup_steps=5, total_steps=9) for s in range(12)}
    assert [at[s] for s in range(6)] == [0, 2, 4, 6, 8, 8]  # the peak comes twice
    assert at[7] == pytest.approx(5)  # half way down
    assert at[8] == pytest.approx(
        5 - 3 / 2**0.5
    )  # three quarters of the way, the last step: 2 is not reached
    assert [at[9], at[11]] == [2, 2]


def test_a_run_shorter_than_its_warm_up_stays_on_the_ramp() -> None:
    assert warmup_cosine(1, peak=9.0, minimum=1.0, warmup_steps=10, total_steps=2) == pytest.approx(1.0)


def test_warm_up_is_counted_in_epochs_unless_steps_are_given() -> None:
    epochs, steps = Recipe(warmup_epochs=2.5), Recipe(warmup_epochs=2.5, warmup_steps=4)
    for step in range(100):
        expected = published_schedule(1.5e-3, 1e-5, 25, 100)[step]
        assert learning_rate(epochs, step, 10, 100) == pytest.approx(expected, rel=1e-12)
        expected = published_schedule(1.5e-3, 1e-5, 4, 100)[step]
        assert learning_rate(steps, step, 10, 100) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(Recipe(warmup_steps=0), 0, 10, 100) == 1.5e-3


@pytest.mark.parametrize(
    ("options", "epochs", "said"),
    [
        (
            {"warmup_epochs": 20},
            1,
            "warmup_epochs=20 is a warm-up of 60 .* are 3: .* at most 5.1e-05 .*warmup_epochs=0.1",
        ),
        (
            {"warmup_epochs": 2},
            2,
            "warmup_epochs=2 is a warm-up of 6 .* are 6: .* at most 0.0015 .*warmup_epochs=0.2",
        ),
        (
            {"warmup_steps": 1500},
            7,
            "warmup_steps=1500 is .* of 1,500 .* are 21: .* set stage.optim.warmup_steps=2",
        ),
        (
            {"warmup_steps": 1500, "schedule": "poly"},
            1,
            "warmup_steps=1500 .* at most 6.8e-07 .*warmup_steps=0",
        ),
        ({"warmup_epochs": 1.5}, 2, ""),
        ({"warmup_epochs": 20, "warmup_steps": 5}, 2, ""),
        ({"warmup_epochs": 0}, 1, ""),
    ],
)
def test_a_warm_up_that_a_training_does_not_outlast_is_said(
    options: dict[str, Any], epochs: int, said: str
) -> None:
    remark = warmup_remark(Recipe(**options), epochs=epochs, steps_per_epoch=3)
    assert re.fullmatch(f".*{said}" if said else "", remark) and "\n" not in remark


@pytest.mark.parametrize(("power", "total"), [(1.0, 10), (0.9, 37), (2.0, 7)])
def test_the_polynomial_schedule_is_that_of_torch(power: float, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-5)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=total, power=power)
    recipe = Recipe(lr=3e-5, min_lr=0.0, schedule="poly", power=power, warmup_steps=0)
    for step in range(total + 3):
        assert learning_rate(recipe, step, 1, total) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-19
        )
        optimizer.step()
        theirs.step()


def test_the_ramp_of_the_polynomial_schedule_is_multiplied_on_it_as_in_the_published_runs() -> None:
    """REFERENCE 5: warm-up of 1,500 from ratio 1e-6, 160,000 updates, power 1 to 0; mmcv's formula by hand."""
    recipe = Recipe(lr=3e-5, min_lr=0.0, schedule="poly", warmup_steps=1500)
    at = {step: learning_rate(recipe, step, 1250, 160_000) for step in (0, 750, 1499, 1500, 80_000, 159_999)}
    assert at[0] == pytest.approx(3e-11)
    assert at[750] == pytest.approx(3e-5 * (1 - 750 / 160_000) * (1 - (1 - 0.5) * (1 - 1e-6)))
    assert at[1499] == pytest.approx(3e-5 * (1 - 1499 / 160_000) * (1 - (1 - 1499 / 1500) * (1 - 1e-6)))
    assert at[1500] == pytest.approx(3e-5 * (1 - 1500 / 160_000))
    assert at[80_000] == pytest.approx(1.5e-5)
    assert at[159_999] == pytest.approx(3e-5 / 160_000)
    above = Recipe(lr=4e-5, min_lr=1e-5, schedule="poly", power=2.0, warmup_steps=0)
    assert learning_rate(above, 5, 1, 10) == pytest.approx(1e-5 + 3e-5 / 4)


def test_weight_decay_stays_or_follows_a_cosine_of_its_own() -> None:
    assert [weight_decay(Recipe(), step, 10) for step in (0, 5, 9)] == [0.05] * 3
    moving = Recipe(weight_decay=0.04, weight_decay_end=0.4)
    expected = published_schedule(0.04, 0.4, 0, 10)
    assert [weight_decay(moving, step, 10) for step in range(10)] == pytest.approx(expected)


def test_the_schedule_is_written_into_the_groups_of_the_optimiser() -> None:
    recipe = Recipe(layer_decay=0.5, weight_decay=0.04, weight_decay_end=0.4, warmup_steps=3)
    groups = parameter_groups(Stage(1).named_parameters(), recipe, depth=1)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    for step in (0, 1, 7):
        set_schedule(optimizer, recipe, step, steps_per_epoch=5, total_steps=10)
        lr = published_schedule(1.5e-3, 1e-5, 3, 10)[step]
        decay = published_schedule(0.04, 0.4, 0, 10)[step]
        for group in optimizer.param_groups:
            layer = int(group["group"].split("_")[1])
            assert group["lr"] == pytest.approx(lr * 0.5 ** (2 - layer))
            assert group["weight_decay"] == pytest.approx(decay if group["decay"] else 0)


def test_the_defaults_are_the_published_recipe_of_pre_training() -> None:
    recipe = Recipe()
    assert (recipe.lr, recipe.min_lr, recipe.warmup_epochs, recipe.warmup_steps) == (1.5e-3, 1e-5, 10, None)
    assert (recipe.weight_decay, recipe.weight_decay_end, recipe.clip) == (0.05, None, 3.0)
    assert (recipe.betas, recipe.eps, recipe.layer_decay, recipe.decay_rel_pos) == (
        (0.9, 0.999),
        1e-8,
        1.0,
        True,
    )


def test_betas_may_come_as_a_list() -> None:
    betas: Any = [0.9, 0.98]
    assert Recipe(betas=betas).betas == (0.9, 0.98)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "stage.optim.lr=0: must be a number above 0"),
        ({"lr": float("nan")}, "stage.optim.lr=nan: must be a number above 0"),
        ({"lr": "fast"}, "stage.optim.lr=fast: must be a number above 0"),
        ({"lr": None}, "stage.optim.lr=None: must be a number above 0"),
        ({"min_lr": -1e-6}, "stage.optim.min_lr=-1e-06: must be a number from 0"),
        ({"lr": 1e-3, "min_lr": 2e-3}, "stage.optim.min_lr=0.002: must be at most stage.optim.lr=0.001"),
        ({"warmup_epochs": -1}, "stage.optim.warmup_epochs=-1: must be a number of epochs from 0"),
        ({"warmup_steps": 2.5}, "stage.optim.warmup_steps=2.5: must be a whole number from 0, or null"),
        ({"weight_decay": -0.1}, "stage.optim.weight_decay=-0.1: must be a number from 0"),
        ({"weight_decay_end": -0.1}, "stage.optim.weight_decay_end=-0.1: must be a number from 0, or null"),
        ({"betas": (0.9,)}, r"stage.optim.betas=\(0.9,\): must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, r"stage.optim.betas=0.9: must be two numbers in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"stage.optim.betas=\(0.9, 1.0\): must be two numbers in \[0, 1\)"),
        ({"eps": 0.0}, "stage.optim.eps=0.0: must be a number above 0"),
        ({"clip": 0}, "stage.optim.clip=0: must be a number above 0, or null for no clipping"),
        ({"layer_decay": 1.2}, "stage.optim.layer_decay=1.2: must be a number above 0 and at most 1"),
        ({"decay_rel_pos": "yes"}, "stage.optim.decay_rel_pos=yes: must be true or false"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


def test_all_values_out_of_range_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(lr=0, eps=-1, clip=-3)
    assert len(caught.value.faults) == 3
