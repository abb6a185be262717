"""How a global batch falls to devices and passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from beit_pretrain.errors import ConfigError


class BatchPlan(NamedTuple):
    """How the global batch is split: batch_size = world * micro * accumulate."""

    world: int
    micro: int
    accumulate: int


def plan_batch(batch: int, micro: int | None, world_size: int) -> BatchPlan:
    """The split of the global batch over `world_size` devices. ConfigError if it does not divide."""
    fitting = batch // world_size if micro is None else micro
    if fitting and batch % (world_size * fitting) == 0:
        return BatchPlan(world_size, fitting, batch // (world_size * fitting))
    unit = world_size * (micro or 1)
    advice = [f"batch_size={_nearest(batch, range(unit, batch + 2 * unit, unit))}"]
    if micro is not None and batch % world_size == 0:
        share = batch // world_size
        divisors = [size for size in range(1, share + 1) if share % size == 0]
        advice.append(f"micro_batch_size={_nearest(micro, divisors)}")
    worlds = [world for world in range(1, batch + 1) if batch % (world * (micro or 1)) == 0]
    if worlds:
        advice.append(f"devices x nodes = {_nearest(world_size, worlds)}")
    raise ConfigError(
        f"batch_size={batch} (global) does not divide into {world_size} devices (trainer.devices x "
        f"trainer.num_nodes) with micro_batch_size={'null' if micro is None else micro}; "
        f"set {', or '.join(advice)}"
    )


def _nearest(value: int, options: Iterable[int]) -> str:
    """The options on either side of a value, in words."""
    options = list(options)
    below = max((option for option in options if option <= value), default=None)
    above = min((option for option in options if option > value), default=None)
    return " or ".join(str(option) for option in (below, above) if option is not None)
