"""Other people's BEiT with our weights, and weights under which every fault shows."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.beit import Beit as TimmBeit
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
)
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import ClassHead, MIMHead
from beit_pretrain.models.upernet import SegmentationHead


@torch.no_grad()
def strengthen(*modules: nn.Module, seed: int = 0) -> None:
    """Random weights in place under which each part of the model matters.

    At the default initialisation a transposed bias index would change nothing. Tokens enter small, so that
    the eps of the norms counts; branches are of the order of 1, so that what happens inside them does.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    for module in modules:
        for name, parameter in module.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf == "relative_position_bias_table":
                normal(parameter, 1.0)
            elif leaf in ("gamma_1", "gamma_2"):
                normal(parameter, 0.1, 0.5)
            elif "norm" in name or isinstance(module.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d):
                normal(parameter, 0.2, 1.0 if leaf == "weight" else 0.0)
            elif "patch_embed" in name or leaf in ("cls_token", "mask_token", "pos_embed"):
                normal(parameter, 0.01 / math.sqrt(parameter[0].numel()) if parameter.ndim == 4 else 0.01)
            elif parameter.ndim in (2, 4):
                normal(parameter, 1 / math.sqrt(parameter[0].numel()))
            else:
                normal(parameter, 0.3)
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                normal(buffer, 0.1, float(name.endswith("var")))


def difference(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| in units of max(1, max |reference|)."""
    return ((ours - reference).abs().max() / reference.abs().max().clamp(min=1)).item()


def timm_twin(encoder: Beit, image_size: tuple[int, int], head: ClassHead | None = None) -> TimmBeit:
    """timm's BEiT with a table in each block and no final norm, with `encoder`'s weights and a head's."""
    block: Any = encoder.blocks[0]
    twin = TimmBeit(
        img_size=image_size,
        patch_size=encoder.patch_size,
        embed_dim=encoder.width,
        depth=encoder.depth,
        num_heads=block.attn.heads,
        init_values=0.1,
        use_abs_pos_emb=encoder.pos_embed is not None,
        use_rel_pos_bias=True,
        num_classes=0 if head is None else head.head.out_features,
        global_pool="avg",
    )
    top = _only(twin, "fc_norm.") if head is None else head.state_dict()
    twin.load_state_dict({**encoder.state_dict(), **top})
    return twin.eval()


def _only(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if name.startswith(prefix)}


HUGGING_FACE_NAMES = {
    "cls_token": "beit.embeddings.cls_token",
    "mask_token": "beit.embeddings.mask_token",
    "pos_embed": "beit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "beit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "beit.embeddings.patch_embeddings.projection.bias",
    "rel_pos_bias.relative_position_bias_table": "beit.shared_position_bias.relative_position_bias_table",
    "blocks.{}.attn.relative_position_bias_table": (
        "beit.layers.{}.relative_position_bias.relative_position_bias_table"
    ),
    "blocks.{}.gamma_1": "beit.layers.{}.lambda_1",
    "blocks.{}.gamma_2": "beit.layers.{}.lambda_2",
    "blocks.{}.norm1.weight": "beit.layers.{}.layernorm_before.weight",
    "blocks.{}.norm1.bias": "beit.layers.{}.layernorm_before.bias",
    "blocks.{}.norm2.weight": "beit.layers.{}.layernorm_after.weight",
    "blocks.{}.norm2.bias": "beit.layers.{}.layernorm_after.bias",
    "blocks.{}.attn.q_bias": "beit.layers.{}.attention.q_proj.bias",
    "blocks.{}.attn.v_bias": "beit.layers.{}.attention.v_proj.bias",
    "blocks.{}.attn.proj.weight": "beit.layers.{}.attention.o_proj.weight",
    "blocks.{}.attn.proj.bias": "beit.layers.{}.attention.o_proj.bias",
    "blocks.{}.mlp.fc1.weight": "beit.layers.{}.mlp.fc1.weight",
    "blocks.{}.mlp.fc1.bias": "beit.layers.{}.mlp.fc1.bias",
    "blocks.{}.mlp.fc2.weight": "beit.layers.{}.mlp.fc2.weight",
    "blocks.{}.mlp.fc2.bias": "beit.layers.{}.mlp.fc2.bias",
}


def hugging_face_twin(
    encoder: Beit, head: MIMHead, image_size: tuple[int, int]
) -> BeitForMaskedImageModeling:
    """Transformers' model of masked image modelling with a shared table, with our weights."""
    config = _config(encoder, image_size, use_mask_token=True, use_shared_relative_position_bias=True)
    config.vocab_size = head.lm_head.out_features
    twin = BeitForMaskedImageModeling(config)
    bias: Any = twin.beit.shared_position_bias
    if image_size[0] != image_size[1]:
        bias.forward = _plain_lookup(bias, encoder.grid)
    state = {"layernorm." + name: value for name, value in head.norm.state_dict().items()}
    state |= {"lm_head." + name: value for name, value in head.lm_head.state_dict().items()}
    twin.load_state_dict(state | _encoder_state(encoder))
    return twin.eval()


def hugging_face_encoder(encoder: Beit, image_size: tuple[int, int]) -> BeitModel:
    """Transformers' model without tables and without a head, with our weights."""
    absolute = encoder.pos_embed is not None
    config = _config(encoder, image_size, use_mask_token=True, use_absolute_position_embeddings=absolute)
    twin = BeitModel(config, add_pooling_layer=False)
    twin.load_state_dict({k.removeprefix("beit."): v for k, v in _encoder_state(encoder).items()})
    return twin.eval()


def hugging_face_classifier(
    encoder: Beit, head: ClassHead, image_size: tuple[int, int]
) -> BeitForImageClassification:
    """Transformers' classifier over the mean of the patches with a table in each block, with our weights."""
    config = _config(encoder, image_size, use_mask_token=False, use_relative_position_bias=True)
    config.num_labels = head.head.out_features
    twin = BeitForImageClassification(config)
    layers: Any = twin.beit.layers
    for layer in layers if image_size[0] != image_size[1] else ():
        layer.relative_position_bias.forward = _plain_lookup(layer.relative_position_bias, encoder.grid)
    assert head.fc_norm is not None
    state = {"beit.pooler.layernorm." + name: value for name, value in head.fc_norm.state_dict().items()}
    state |= {"classifier." + name: value for name, value in head.head.state_dict().items()}
    twin.load_state_dict(state | _encoder_state(encoder))
    return twin.eval()


# Our names of the segmentation head to Transformers', as prefixes.
SEGMENTER_NAMES = {
    "neck.fpn1.0.": "fpn.fpn1.conv_transpose1.",
    "neck.fpn1.1.": "fpn.fpn1.normalization.",
    "neck.fpn1.3.": "fpn.fpn1.conv_transpose2.",
    "neck.fpn2.0.": "fpn.fpn2.",
    "decode_head.bottleneck.": "decode_head.psp_bottleneck.",
    "decode_head.psp_modules.": "decode_head.psp_modules.blocks.",
}
SEGMENTER_PARTS = {"bn": "normalization", "conv": "convolution", "conv_seg": "classifier"}


def hugging_face_segmenter(
    encoder: Beit, head: SegmentationHead, image_size: tuple[int, int], blocks: list[int]
) -> BeitForSemanticSegmentation:
    """Transformers' segmentation model with our weights, which looks at the same blocks."""
    config = _config(encoder, image_size, use_mask_token=False, use_relative_position_bias=True)
    # It looks at hidden state i - 1, where 0 is the embedding, and its check does not let it name the last block.
    config._out_indices = [block + 2 for block in blocks]
    config.num_labels = head.decode_head.conv_seg.out_channels
    twin = BeitForSemanticSegmentation(config)
    layers: Any = twin.beit.layers
    for layer in layers if image_size[0] != image_size[1] else ():
        layer.relative_position_bias.forward = _plain_lookup(layer.relative_position_bias, encoder.grid)
    state = _encoder_state(encoder)
    for name, value in head.state_dict().items():
        before, after = next(((o, t) for o, t in SEGMENTER_NAMES.items() if name.startswith(o)), ("", ""))
        rest = [SEGMENTER_PARTS.get(word, word) for word in name.removeprefix(before).split(".")]
        if "psp_modules" in before:
            rest[1] = "conv"
        state[after + ".".join(rest)] = value
    twin.load_state_dict(state)
    return twin.eval()


def _config(encoder: Beit, image_size: tuple[int, int], **options: Any) -> BeitConfig:
    block: Any = encoder.blocks[0]
    config = BeitConfig(
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=block.attn.heads,
        intermediate_size=block.mlp.fc1.out_features,
        image_size=list(image_size),
        patch_size=encoder.patch_size,
        layer_norm_eps=1e-6,
        use_mean_pooling=True,  # otherwise Transformers puts a second norm before the head's
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        **options,
    )
    config._attn_implementation = "eager"
    return config


def _encoder_state(encoder: Beit) -> dict[str, Tensor]:
    """The encoder's weights under Transformers' names."""
    ours, state = encoder.state_dict(), {}
    for name, theirs in HUGGING_FACE_NAMES.items():
        for i in range(encoder.depth if "{}" in name else 1):
            if name.format(i) in ours:
                state[theirs.format(i)] = ours.pop(name.format(i))
    for i in range(encoder.depth):
        weights = ours.pop(f"blocks.{i}.attn.qkv.weight").chunk(3)
        for letter, weight in zip("qkv", weights, strict=True):
            state[f"beit.layers.{i}.attention.{letter}_proj.weight"] = weight
    assert not ours, f"left over: {list(ours)}"
    return state


def _plain_lookup(bias: BeitRelativePositionBias, grid: tuple[int, int]) -> Any:
    # Transformers resizes every table, to its own grid too, and swaps rows and columns on the way: nothing
    # happens on square grids, others are scrambled. Compared here is the layout: its index reads the table.
    index = bias.generate_relative_position_index(grid)

    def forward(window_size: tuple[int, int], *_: Any, **__: Any) -> Tensor:
        assert window_size == grid
        return bias.relative_position_bias_table[index].permute(2, 0, 1)[None]

    return forward
