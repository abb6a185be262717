"""From one stage's weights to another's (BEiT paper, Sec. 2.6): pure functions that account for every key.

A state maps names to tensors as a stage's `state_dict` does: `encoder.*` and `head.*`. Letters: R rows of a
relative position table, H heads, L = 1 + N tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.rel_pos import Grid, resize_positions, resize_table

State = Mapping[str, Tensor]

SHARED = "encoder.rel_pos_bias.relative_position_bias_table"
TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"  # a buffer of published checkpoints; follows from the grid
GRID_BOUND = (TABLE, "pos_embed")
MASK_TOKEN = "encoder.mask_token"  # stands for hidden patches, of which only pre-training has any
# The last layers, whose rows are classes.
CLASSIFIER = tuple(
    f"head.{layer}.{kind}"
    for layer in ("head", "decode_head.conv_seg", "auxiliary_head.conv_seg")
    for kind in ("weight", "bias")
)


@dataclass
class Report:
    """What became of every key, each in one list: of the source `loaded`, `expanded`, `resized`, `mapped` and
    `dropped`, of the target `fresh`."""

    loaded: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)  # source keys that became one per block
    resized: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)  # classifier rows taken over by class name
    dropped: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a user should know of a file of another program

    def lines(self) -> list[str]:
        """The report as text: one line for each kind that occurred."""
        said = [
            ("loaded", self.loaded),
            ("copied into each block", self.expanded),
            ("resized", self.resized),
            ("classes taken over by name", self.mapped),
            ("left out", self.dropped),
            ("left as initialised", self.fresh),
        ]
        return [*(f"{what}: {_summary(keys)}" for what, keys in said if keys), *self.notes]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a state does not say of itself: the grid its tables are for, the names of its classes in order."""

    grid: Grid
    classes: Sequence[str] | None = None


def adapt(state: State, like: State, *, source: Layout, target: Layout) -> tuple[dict[str, Tensor], Report]:
    """`state` in the shape of `like`, ready for a strict load, and what became of every key.

    - A shared table becomes one copy per block; tables and absolute positions are resized to the target's grid.
    - A classifier over the same classes is loaded. Over others, rows of classes with the same name are taken over
      and the rest stay as they are in `like`.
    - What the target has no place for is left out: the head of another stage, the mask token. What the source
      does not have stays as it is in `like`; in the encoder that is an error.

    `state` is not changed, and tensors that fit are passed on without a copy. Raises CheckpointError, in one
    line, if the encoders differ in width, depth, heads, patch or kind of positions, or have nothing in common.
    """
    _refuse(state, like)
    report = Report()
    result: dict[str, Tensor] = {}
    tables = _tables(state, like, report)
    for name, value in {**state, **tables}.items():
        place = like.get(name)
        if name == SHARED and tables:
            continue  # its copies stand for it
        if place is None:
            _leave_out(name, value, report)
        elif name in CLASSIFIER and not _same_classes(len(value), len(place), source, target):
            _by_name(name, value, place, source, target, result, report)
        elif name.endswith(GRID_BOUND):
            result[name] = _on_grid(name, value, source.grid, target.grid, report, copied=name in tables)
        elif name.startswith("head.") and value.shape != place.shape:
            _leave_out(name, value, report)
        else:
            result[name] = value
            report.loaded.append(name)
    for name in like.keys() - result.keys():
        report.fresh.append(name)
    report.fresh.sort()
    wrong = [n for n in report.fresh if n.startswith("encoder.")]
    wrong += [n for n in result if result[n].shape != like[n].shape]
    if wrong:
        raise CheckpointError(
            f"init_from: the checkpoint's encoder differs from this one in {', '.join(sorted(wrong)[:5])}: "
            "set model.* to the encoder that it holds"
        )
    return {name: result.get(name, like[name]) for name in like}, report


def _refuse(state: State, like: State) -> None:
    """Whole encoders that cannot be made from one another, in the words of the configuration."""
    if not any(name.startswith("encoder.") for name in state.keys() & like.keys()) and SHARED not in state:
        raise CheckpointError(
            "init_from: the checkpoint has nothing in common with this encoder: set init_from to a BEiT"
        )
    if SHARED in like and SHARED not in state and _own_tables(state):
        raise CheckpointError(
            "init_from: the checkpoint has a relative position table for each block, and they cannot become the one "
            "that model.rel_pos=shared asks for: set model.rel_pos=per_layer, or start from a pre-training run"
        )
    faults = [
        f"model.{key}={now} here, {then} there"
        for key, now, then in zip(
            ("width", "depth", "heads", "patch_size"), _shape(like), _shape(state), strict=True
        )
        if now is not None and then is not None and now != then
    ]
    if faults:
        raise CheckpointError(
            f"init_from: the checkpoint holds another encoder ({'; '.join(faults)}): set model=... to the one it holds"
        )


def _shape(state: State) -> tuple[int | None, int | None, int | None, int | None]:
    """Width, depth, heads and patch size as far as a state shows them."""
    patch = state.get("encoder.patch_embed.proj.weight")
    blocks = {name.split(".")[2] for name in state if name.startswith("encoder.blocks.")}
    tables = [value.shape[1] for name, value in state.items() if name.endswith(TABLE)]
    return (
        None if patch is None else patch.shape[0],
        len(blocks) or None,
        tables[0] if tables else None,
        None if patch is None else patch.shape[-1],
    )


def _own_tables(state: State) -> list[str]:
    return [name for name in state if name.startswith("encoder.blocks.") and name.endswith(TABLE)]


def _tables(state: State, like: State, report: Report) -> dict[str, Tensor]:
    """The shared table under the names of the blocks' own ones, if that is what the target has."""
    if SHARED not in state or SHARED in like:
        return {}
    places = _own_tables(like)
    if places:
        report.expanded.append(f"{SHARED} to {len(places)}")
    return {name: state[SHARED] for name in places}


def _on_grid(name: str, value: Tensor, source: Grid, target: Grid, report: Report, *, copied: bool) -> Tensor:
    if source != target:
        report.resized.append(f"{name} {source[0]} x {source[1]} to {target[0]} x {target[1]}")
        resize = resize_table if name.endswith(TABLE) else resize_positions
        return resize(value, source, target)
    if not copied:
        report.loaded.append(name)
    # Blocks must not share the memory of one table.
    return value.clone() if copied else value


def _same_classes(before: int, now: int, source: Layout, target: Layout) -> bool:
    if source.classes is None or target.classes is None:
        return before == now
    return list(source.classes) == list(target.classes)


def _by_name(
    name: str,
    value: Tensor,
    place: Tensor,
    source: Layout,
    target: Layout,
    result: dict[str, Tensor],
    report: Report,
) -> None:
    """Rows of the classifier for the classes that both know."""
    rows = {label: row for row, label in enumerate(source.classes or ())}
    pairs = [(row, rows[label]) for row, label in enumerate(target.classes or ()) if label in rows]
    if not pairs or value.shape[1:] != place.shape[1:]:
        _leave_out(name, value, report)
        return
    to, came_from = (torch.tensor(side) for side in zip(*pairs, strict=True))
    result[name] = place.clone().index_copy_(0, to, value[came_from].to(place.dtype))
    report.mapped.append(f"{name} {len(pairs)} of {len(place)}")


def _leave_out(name: str, value: Tensor, report: Report) -> None:
    """Nothing of the encoder may get lost but what only pre-training needs."""
    if name.startswith("encoder.") and name != MASK_TOKEN and not name.endswith(INDEX):
        raise CheckpointError(
            f"init_from: this encoder has no place for {name}: set model.* to the encoder that the checkpoint holds"
        )
    report.dropped.append(f"{name} {tuple(value.shape)}")


def _summary(keys: Sequence[str]) -> str:
    """A few names, or how many there are."""
    return ", ".join(keys) if len(keys) <= 4 else f"{len(keys)}, such as {keys[0]}"


def class_difference(then: Sequence[str] | None, now: Sequence[str]) -> str:
    """How the classes of a checkpoint differ from those of the data, in a few words; nothing if they do not."""
    if then is None or list(then) == list(now):
        return ""
    known, here = set(then), set(now)
    lost, new = [n for n in then if n not in here], [n for n in now if n not in known]
    if not lost and not new:
        return "the same classes in another order"
    only = [f"only {where} {_summary(names)}" for where, names in (("there:", lost), ("here:", new)) if names]
    return f"{len(then)} classes there, {len(now)} here; {'; '.join(only)}"


def check_classes(checkpoint: Mapping[str, Any], now: Sequence[str]) -> None:
    """Raises CheckpointError if a run of ours goes on with other classes than it was started with."""
    then = checkpoint["beit_pretrain"]["preprocessing"]["class_names"]
    if difference := class_difference(then, now):
        raise CheckpointError(
            f"data: the classes are not those this run was started with ({difference}): bring them back, or start "
            "anew with another name="
        )
