"""Names of BEiT's weights in the formats of others, as tables read in both directions; pure functions.

Ours are `encoder.*` and `head.*`. The authors' files and timm's have the encoder's names bare, or below `backbone.` in
segmentation; Transformers has names of its own and splits the query, key and value of each block. {} is a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from beit_pretrain.checkpoint.adapt import INDEX

State = Mapping[str, Tensor]
Stage = Literal["pretrain", "classify", "segment", "encoder"]
Renames = Sequence[tuple[str, str]]  # beginnings of names, before and after; the rest of a name stays

# The encoder: the authors' name and that of Transformers 4, which Transformers 5 reads and writes too.
ENCODER: Renames = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("rel_pos_bias.relative_position_", "encoder.relative_position_bias.relative_position_"),
    (
        "blocks.{}.attn.relative_position_",
        "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_",
    ),
    ("blocks.{}.gamma_1", "encoder.layer.{}.lambda_1"),
    ("blocks.{}.gamma_2", "encoder.layer.{}.lambda_2"),
    ("blocks.{}.norm1.", "encoder.layer.{}.layernorm_before."),
    ("blocks.{}.norm2.", "encoder.layer.{}.layernorm_after."),
    ("blocks.{}.attn.q.weight", "encoder.layer.{}.attention.attention.query.weight"),
    ("blocks.{}.attn.k.weight", "encoder.layer.{}.attention.attention.key.weight"),
    ("blocks.{}.attn.v.weight", "encoder.layer.{}.attention.attention.value.weight"),
    ("blocks.{}.attn.q_bias", "encoder.layer.{}.attention.attention.query.bias"),
    ("blocks.{}.attn.v_bias", "encoder.layer.{}.attention.attention.value.bias"),
    ("blocks.{}.attn.proj.", "encoder.layer.{}.attention.output.dense."),
    ("blocks.{}.mlp.fc1.", "encoder.layer.{}.intermediate.dense."),
    ("blocks.{}.mlp.fc2.", "encoder.layer.{}.output.dense."),
)
QKV = "blocks.{}.attn.qkv.weight"  # one matrix in all formats but that of Transformers
SPLIT = ("q", "k", "v")

# Heads: our name, the authors', that of Transformers 4.
HEADS: dict[Stage, Sequence[tuple[str, str, str]]] = {
    "pretrain": (("norm.", "norm.", "layernorm."), ("lm_head.", "lm_head.", "lm_head.")),
    "classify": (
        ("fc_norm.", "fc_norm.", "beit.pooler.layernorm."),
        ("norm.", "norm.", "beit.layernorm."),
        ("head.", "head.", "classifier."),
    ),
    "segment": (
        ("neck.fpn", "backbone.fpn", "fpn"),
        ("decode_head.conv_seg.", "decode_head.conv_seg.", "decode_head.classifier."),
        ("decode_head.", "decode_head.", "decode_head."),
        ("auxiliary_head.conv_seg.", "auxiliary_head.conv_seg.", "auxiliary_head.classifier."),
        ("auxiliary_head.", "auxiliary_head.", "auxiliary_head."),
    ),
    "encoder": (),
}

# What Transformers 5 calls its weights in memory, and some of its users' files, as Transformers 4 does.
NEWER: Renames = (
    ("beit.shared_position_bias.", "beit.encoder.relative_position_bias."),
    (
        "beit.layers.{}.relative_position_bias.",
        "beit.encoder.layer.{}.attention.attention.relative_position_bias.",
    ),
    ("beit.layers.{}.attention.q_proj.", "beit.encoder.layer.{}.attention.attention.query."),
    ("beit.layers.{}.attention.k_proj.", "beit.encoder.layer.{}.attention.attention.key."),
    ("beit.layers.{}.attention.v_proj.", "beit.encoder.layer.{}.attention.attention.value."),
    ("beit.layers.{}.attention.o_proj.", "beit.encoder.layer.{}.attention.output.dense."),
    ("beit.layers.{}.mlp.fc1.", "beit.encoder.layer.{}.intermediate.dense."),
    ("beit.layers.{}.mlp.fc2.", "beit.encoder.layer.{}.output.dense."),
    ("beit.layers.{}.", "beit.encoder.layer.{}."),
    ("fpn.fpn1.conv_transpose1.", "fpn1.0."),
    ("fpn.fpn1.normalization.", "fpn1.1."),
    ("fpn.fpn1.conv_transpose2.", "fpn1.3."),
    ("fpn.fpn2.", "fpn2.0."),
    ("decode_head.psp_modules.blocks.{}.conv.convolution.", "decode_head.psp_modules.{}.1.conv."),
    ("decode_head.psp_modules.blocks.{}.conv.normalization.", "decode_head.psp_modules.{}.1.bn."),
    ("decode_head.psp_bottleneck.convolution.", "decode_head.bottleneck.conv."),
    ("decode_head.psp_bottleneck.normalization.", "decode_head.bottleneck.bn."),
    ("decode_head.fpn_bottleneck.convolution.", "decode_head.fpn_bottleneck.conv."),
    ("decode_head.fpn_bottleneck.normalization.", "decode_head.fpn_bottleneck.bn."),
    ("decode_head.lateral_convs.{}.convolution.", "decode_head.lateral_convs.{}.conv."),
    ("decode_head.lateral_convs.{}.normalization.", "decode_head.lateral_convs.{}.bn."),
    ("decode_head.fpn_convs.{}.convolution.", "decode_head.fpn_convs.{}.conv."),
    ("decode_head.fpn_convs.{}.normalization.", "decode_head.fpn_convs.{}.bn."),
    ("auxiliary_head.convs.{}.convolution.", "auxiliary_head.convs.{}.conv."),
    ("auxiliary_head.convs.{}.normalization.", "auxiliary_head.convs.{}.bn."),
)

# Weights of others that no model here has a place for: what follows from the grid, the second head that BEiT v2
# trains its CLS token with (arXiv 2208.06366, Sec. 3.3).
WITHOUT_PLACE = re.compile(rf".*{INDEX}|cls_pt_(layers|norm|lm_head)\..*")


class Placed(NamedTuple):
    """A file's weights under our names, and the names of those that have no place here or are in no table."""

    state: dict[str, Tensor]
    left_out: list[str]
    unknown: list[str]


def stage_of(state: State) -> Stage:
    """What a state of ours is of, by its head."""
    last: dict[Stage, str] = {"pretrain": "lm_head", "segment": "decode_head.conv_seg", "classify": "head"}
    for stage, layer in last.items():
        if f"head.{layer}.weight" in state:
            return stage
    return "encoder"


# --- the authors' ------------------------------------------------------------------------------------------------


def to_original(state: State) -> dict[str, Tensor]:
    """A state of ours under the names of the authors' files."""
    stage = stage_of(state)
    encoder = "backbone." if stage == "segment" else ""
    return _renamed(
        state, [("encoder.", encoder), *((f"head.{ours}", theirs) for ours, theirs, _ in HEADS[stage])]
    )


def from_original(state: State) -> Placed:
    """A state with the authors' names, or timm's, under ours.

    A bias of query, key and value in one is taken apart. The key's part is left out: it adds the same to all logits of
    a query, which a softmax does not see.
    """
    state = _split_biases(state)
    stage = _stage(state, lm_head="lm_head.weight", classifier="head.weight")
    prefix = "backbone." if stage == "segment" else ""
    heads = [(theirs, f"head.{ours}") for ours, theirs, _ in HEADS[stage]]
    encoder = [(f"{prefix}{name}", f"encoder.{name}") for name in (*(ours for ours, _ in ENCODER), QKV)]
    return _placed(state, [*heads, *encoder], loose=r"(backbone\.)?(fc_)?norm\..*")


def _split_biases(state: State) -> dict[str, Tensor]:
    result = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            query, _, value_part = value.chunk(3)
            result |= {
                name.replace("qkv.bias", f"{letter}_bias"): part
                for letter, part in (("q", query), ("v", value_part))
            }
        elif not name.endswith("attn.k_bias"):  # timm's buffer of zeros
            result[name] = value
    return result


# --- timm ----------------------------------------------------------------------------------------------------------


def to_timm(state: State) -> dict[str, Tensor]:
    """A state of ours as timm's Beit has it: what only pre-training needs is left out."""
    return {
        name: value
        for name, value in to_original(state).items()
        if name != "mask_token" and not name.startswith("lm_head.")
    }


# --- Transformers --------------------------------------------------------------------------------------------------


def to_hugging_face(state: State) -> dict[str, Tensor]:
    """A state of ours under the names of Transformers 4, which Transformers 5 loads as well."""
    encoder = [(f"encoder.{ours}", f"beit.{theirs}") for ours, theirs in ENCODER]
    heads = [(f"head.{ours}", theirs) for ours, _, theirs in HEADS[stage_of(state)]]
    return _renamed(_split(state), [*encoder, *heads])


def from_hugging_face(state: State) -> Placed:
    """A state with the names of Transformers 4 or 5 under ours.

    The bare encoder of a BeitModel, whose names lack `beit.`, is one too.
    """
    if not any(name.startswith("beit.") for name in state):
        state = {f"beit.{name}": value for name, value in state.items()}
    older = [_compiled(before, after) for before, after in NEWER]
    state = {_rename(name, older) or name: value for name, value in state.items()}
    stage = _stage(state, lm_head="lm_head.weight", classifier="classifier.weight")
    heads = [(theirs, f"head.{ours}") for ours, _, theirs in HEADS[stage]]
    encoder = [(f"beit.{theirs}", f"encoder.{ours}") for ours, theirs in ENCODER]
    found = _placed(state, [*heads, *encoder], loose=r"beit\.(pooler\.)?layernorm\..*")
    return found._replace(state=_joined(found.state))


def _split(state: State) -> dict[str, Tensor]:
    """Query, key and value of each block apart: what is one matrix (3 D, D) here is three (D, D)."""
    result = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.weight"):
            for letter, part in zip(SPLIT, value.chunk(3), strict=True):
                result[name.replace("qkv", letter)] = part.clone()
        else:
            result[name] = value
    return result


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    result = dict(state)
    for name in state:
        if name.endswith("attn.q.weight"):
            names = [name.removesuffix("q.weight") + f"{letter}.weight" for letter in SPLIT]
            if all(part in state for part in names):
                result[name.replace("q.weight", "qkv.weight")] = torch.cat([result.pop(n) for n in names])
    return result


# --- names -----------------------------------------------------------------------------------------------------------


def _stage(state: State, *, lm_head: str, classifier: str) -> Stage:
    if lm_head in state:
        return "pretrain"
    if any(name.startswith("decode_head.") for name in state):
        return "segment"
    return "classify" if classifier in state else "encoder"


def _compiled(before: str, after: str) -> tuple[re.Pattern[str], Callable[[re.Match[str]], str]]:
    pattern = re.escape(before).replace(r"\{\}", r"(\d+)")
    return re.compile(pattern), lambda match: after.format(*match.groups())


def _rename(name: str, table: Sequence[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]]) -> str | None:
    """The name with its beginning exchanged by the first line of the table that fits."""
    for pattern, after in table:
        if match := pattern.match(name):
            return after(match) + name[match.end() :]
    return None


def _renamed(state: State, renames: Renames) -> dict[str, Tensor]:
    """Every name of ours has a place in each format: one without is a mistake in the table."""
    table = [_compiled(before, after) for before, after in renames]
    result = {}
    for name, value in state.items():
        renamed = _rename(name, table)
        assert renamed is not None, name
        result[renamed] = value
    return result


def _placed(state: State, renames: Renames, loose: str) -> Placed:
    """`loose` are final norms, which have no place where no head of ours looks through them."""
    table = [_compiled(before, after) for before, after in renames]
    placed: dict[str, Tensor] = {}
    left, unknown = [], []
    for name, value in state.items():
        renamed = None if WITHOUT_PLACE.fullmatch(name) else _rename(name, table)
        if renamed is not None:
            placed[renamed] = value
        elif WITHOUT_PLACE.fullmatch(name) or re.fullmatch(loose, name):
            left.append(name)
        else:
            unknown.append(name)
    return Placed(placed, left, unknown)
