"""Whether weights, and what the optimiser remembers of them, are numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def not_finite(state: Mapping[str, Tensor], trained: Collection[str] | None = None) -> list[str]:
    """Names of the tensors that hold NaN or infinity; of tensors in shares, this rank's share is looked at.

    Infinity counts in the `trained` tensors only (None: in all), as a buffer may hold it on purpose: a mask of -inf.
    """
    return [
        name
        for name, value in state.items()
        if not _finite(value, may_be_infinite=trained is not None and name not in trained)
    ]


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


def trained_names(states: Iterable[Mapping[str, Any]]) -> set[str] | None:
    """Names of the tensors that optimisers' states (`state_dict()`) are of; None where they have no names."""
    groups = [group for state in states for group in state["param_groups"]]
    if not groups or not all("names" in group for group in groups):
        return None
    return {name for group in groups for name in group["names"]}


def _finite(value: Tensor, *, may_be_infinite: bool) -> bool:
    if isinstance(value, DTensor):
        value = value.to_local()
    if not value.is_floating_point() or not value.numel():
        return True
    # One pass over the memory: forty times as fast as isfinite() of every value. Of NaN both ends are NaN.
    ends = torch.stack(torch.aminmax(value))
    return not bool(ends.isnan().any()) if may_be_infinite else bool(torch.isfinite(ends).all())
