"""The arithmetic of the optimiser: which parameter learns how fast, and when.

Everything here is a function of its arguments; the schedules know the step and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from beit_pretrain.errors import ConfigError

ENCODER = "encoder."  # prefix of the encoder's parameters in every stage; all others belong to heads
STEM = ("cls_token", "mask_token", "pos_embed", "patch_embed.")
NEVER_DECAYED = ("pos_embed", "cls_token")
TABLE = "relative_position_bias_table"
WARMUP_RATIO = 1e-6  # where the ramp of a polynomial schedule begins, as a share of what it leads to

Schedule = Literal["cosine", "poly"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How AdamW is driven; the defaults are BEiT's pre-training (BEiT paper, Sec. 2.5).

    - `lr`, `min_lr`: peak and final learning rate, for the global batch as it is (no scaling rule).
    - `warmup_epochs` of linear ramp, or `warmup_steps` of it, which wins if given.
    - `schedule` after the ramp: "cosine", or "poly" of the given `power` as in segmentation (1: a straight line).
    - `weight_decay` moves along a cosine to `weight_decay_end`; None keeps it.
    - `clip`: largest gradient norm; None for no clipping.
    - `layer_decay`: factor on the learning rate per layer downwards; 1 treats all alike.
    - `decay_rel_pos`: whether relative position tables are decayed, as in the published runs.

    Raises ConfigError with all faults at once.
    """

    lr: float = 1.5e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 10
    warmup_steps: int | None = None
    schedule: Schedule = "cosine"
    power: float = 1.0
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 3.0
    layer_decay: float = 1.0
    decay_rel_pos: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.betas, Sequence):  # yaml gives a list
            object.__setattr__(self, "betas", tuple(self.betas))
        faults = [
            f"stage.optim.{key}={getattr(self, key)}: must be {needed}"
            for key, (holds, needed) in _LIMITS.items()
            if not (getattr(self, key) is None and key in _OPTIONAL) and not holds(getattr(self, key))
        ]
        if not faults and self.min_lr > self.lr:
            faults = [f"stage.optim.min_lr={self.min_lr}: must be at most stage.optim.lr={self.lr}"]
        if faults:
            raise ConfigError(faults)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least_zero(value: Any) -> bool:
    return _number(value) and value >= 0


def _above_zero(value: Any) -> bool:
    return _number(value) and value > 0


def _two_rates(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_at_least_zero(b) and b < 1 for b in value)


_OPTIONAL = ("warmup_steps", "weight_decay_end", "clip")
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_above_zero, "a number above 0"),
    "min_lr": (_at_least_zero, "a number from 0"),
    "warmup_epochs": (_at_least_zero, "a number of epochs from 0"),
    "warmup_steps": (lambda v: _at_least_zero(v) and v == int(v), "a whole number from 0, or null"),
    "schedule": (lambda v: v in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
    "power": (_above_zero, "a number above 0"),
    "weight_decay": (_at_least_zero, "a number from 0"),
    "weight_decay_end": (_at_least_zero, "a number from 0, or null to keep weight_decay"),
    "betas": (_two_rates, "two numbers in [0, 1)"),
    "eps": (_above_zero, "a number above 0"),
    "clip": (_above_zero, "a number above 0, or null for no clipping"),
    "layer_decay": (lambda v: _above_zero(v) and v <= 1, "a number above 0 and at most 1"),
    "decay_rel_pos": (lambda v: isinstance(v, bool), "true or false"),
}


def layer_id(name: str, depth: int) -> int:
    """The layer of a stage's parameter, 0 .. depth + 1: stem, blocks, and at the top whatever follows them.

    `encoder.`'s stem is 0 and its block i is i + 1. The shared table counts with the top, as in the published
    code, although it acts on every block. What has another prefix than `encoder.` is a head: top.
    Raises ValueError for an encoder parameter that is in none of these places.
    """
    if not name.startswith(ENCODER):
        return depth + 1
    inner = name.removeprefix(ENCODER)
    if inner.startswith(STEM):
        return 0
    if inner.startswith("blocks."):
        block = int(inner.split(".")[1])
        if block < depth:
            return block + 1
    if inner.startswith("rel_pos_bias."):
        return depth + 1
    raise ValueError(f"{name} has no place in an encoder of {depth} blocks")


def _decays(name: str, parameter: nn.Parameter, recipe: Recipe) -> bool:
    leaf = name.rpartition(".")[2]
    if parameter.ndim <= 1 or leaf == "bias" or leaf in NEVER_DECAYED:
        return False
    return recipe.decay_rel_pos or leaf != TABLE


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], recipe: Recipe, depth: int
) -> list[dict[str, Any]]:
    """Groups for AdamW, bottom layer first, decayed before undecayed; frozen parameters are left out.

    Each has `params`, their `names`, `lr`, `lr_scale` = layer_decay^(depth + 1 - layer), `weight_decay`,
    `decay` (whether it follows the schedule of the weight decay) and a name, `group`. With a layer decay of 1
    layers are not told apart: two large groups step faster than many small ones.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer = depth + 1 if recipe.layer_decay == 1 else layer_id(name, depth)
        decays = _decays(name, parameter, recipe)
        if (layer, decays) not in groups:
            scale = recipe.layer_decay ** (depth + 1 - layer)
            place = "all" if recipe.layer_decay == 1 else f"layer_{layer}"
            groups[layer, decays] = {
                "params": [],
                "names": [],
                "lr": recipe.lr * scale,
                "lr_scale": scale,
                "weight_decay": recipe.weight_decay if decays else 0.0,
                "decay": decays,
                "group": f"{place}_{'decay' if decays else 'no_decay'}",
            }
        groups[layer, decays]["params"].append(parameter)
        groups[layer, decays]["names"].append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def warmup_cosine(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """The value at optimiser step `step`, counted from 0.

    1. In the warm-up, W steps: a line from 0 to the peak, both included.
    2. After it: half a cosine that starts at the peak once more and would reach the minimum at `total_steps`.
    3. From `total_steps` on: the minimum.
    """
    if step >= total_steps:
        return minimum
    if step < warmup_steps:
        return peak * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return minimum + (peak - minimum) / 2 * (1 + math.cos(math.pi * progress))


def warmup_poly(
    step: int, *, peak: float, minimum: float, power: float, warmup_steps: int, total_steps: int
) -> float:
    """The value at optimiser step `step`, counted from 0, as the published segmentation runs have it (mmcv's `poly`).

    minimum + (peak - minimum) (1 - step / total_steps)^power, counted from the very beginning; in the warm-up, W steps,
    times a line that rises from `WARMUP_RATIO` and would reach 1 at step W. From `total_steps` on: the minimum.
    """
    if step >= total_steps:
        return minimum
    value = minimum + (peak - minimum) * (1 - step / total_steps) ** power
    if step < warmup_steps:
        value *= WARMUP_RATIO + (1 - WARMUP_RATIO) * step / warmup_steps
    return value


def warmup_length(recipe: Recipe, steps_per_epoch: int) -> int:
    """Updates of the warm-up."""
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    return round(recipe.warmup_epochs * steps_per_epoch)


def warmup_remark(recipe: Recipe, *, epochs: int, steps_per_epoch: int) -> str:
    """What to say of a warm-up that a training does not outlast, or nothing."""
    total = epochs * steps_per_epoch
    warmup = warmup_length(recipe, steps_per_epoch)
    if not warmup or warmup < total:
        return ""
    if recipe.warmup_steps is None:
        key, given, better = "warmup_epochs", f"{recipe.warmup_epochs:g}", f"{epochs / 10:g}"
    else:
        key, given, better = "warmup_steps", str(recipe.warmup_steps), str(total // 10)
    highest = max(learning_rate(recipe, step, steps_per_epoch, total) for step in range(total))
    return (
        f"stage.optim.{key}={given} is a warm-up of {warmup:,} updates, and stage.epochs={epochs} are {total:,}: the "
        f"training ends within it, its learning rate is at most {highest:.2g} (stage.optim.lr={recipe.lr:g}); set "
        f"stage.optim.{key}={better}"
    )


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of a group of scale 1 at `step`."""
    warmup_steps = warmup_length(recipe, steps_per_epoch)
    if recipe.schedule == "poly":
        return warmup_poly(
            step,
            peak=recipe.lr,
            minimum=recipe.min_lr,
            power=recipe.power,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )
    return warmup_cosine(
        step, peak=recipe.lr, minimum=recipe.min_lr, warmup_steps=warmup_steps, total_steps=total_steps
    )


def weight_decay(recipe: Recipe, step: int, total_steps: int) -> float:
    """The weight decay of decayed groups at `step`; its cosine has no warm-up."""
    if recipe.weight_decay_end is None:
        return recipe.weight_decay
    return warmup_cosine(
        step,
        peak=recipe.weight_decay,
        minimum=recipe.weight_decay_end,
        warmup_steps=0,
        total_steps=total_steps,
    )


def set_schedule(
    optimizer: Optimizer, recipe: Recipe, step: int, *, steps_per_epoch: int, total_steps: int
) -> None:
    """Write learning rate and weight decay of `step` into groups made by `parameter_groups`."""
    lr = learning_rate(recipe, step, steps_per_epoch, total_steps)
    decay = weight_decay(recipe, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decay"]:
            group["weight_decay"] = decay
