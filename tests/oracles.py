"""Other people's BEiT with our weights, and weights under which every fault shows."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.beit import Beit as TimmBeit
from torch import Tensor, nn
from transformers import BeitConfig, BeitForMaskedImageModeling
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import MIMHead


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
            elif "norm" in name:
                normal(parameter, 0.2, 1.0 if leaf == "weight" else 0.0)
            elif "patch_embed" in name or leaf in ("cls_token", "mask_token", "pos_embed"):
                normal(parameter, 0.01 / math.sqrt(parameter[0].numel()) if parameter.ndim == 4 else 0.01)
            elif parameter.ndim == 2:
                normal(parameter, 1 / math.sqrt(parameter.shape[1]))
            else:
                normal(parameter, 0.3)


def difference(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| in units of max(1, max |reference|)."""
    return ((ours - reference).abs().max() / reference.abs().max().clamp(min=1)).item()


def timm_twin(encoder: Beit, image_size: tuple[int, int]) -> TimmBeit:
    """timm's BEiT with a table in each block and no final norm, with `encoder`'s weights."""
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
        num_classes=0,
        global_pool="avg",
    )
    twin.load_state_dict({**encoder.state_dict(), **_only(twin, "fc_norm.")})
    return twin.eval()


def _only(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if name.startswith(prefix)}


HUGGING_FACE_NAMES = {
    "cls_token": "beit.embeddings.cls_token",
    "mask_token": "beit.embeddings.mask_token",
    "patch_embed.proj.weight": "beit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "beit.embeddings.patch_embeddings.projection.bias",
    "rel_pos_bias.relative_position_bias_table": "beit.shared_position_bias.relative_position_bias_table",
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
    block: Any = encoder.blocks[0]
    config = BeitConfig(
        vocab_size=head.lm_head.out_features,
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=block.attn.heads,
        intermediate_size=block.mlp.fc1.out_features,
        image_size=list(image_size),
        patch_size=encoder.patch_size,
        layer_norm_eps=1e-6,
        use_mask_token=True,
        use_mean_pooling=True,  # otherwise Transformers puts a second norm before the head's
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
    )
    config._attn_implementation = "eager"
    twin = BeitForMaskedImageModeling(config)
    bias: Any = twin.beit.shared_position_bias
    if image_size[0] != image_size[1]:
        bias.forward = _plain_lookup(bias, encoder.grid)
    ours = encoder.state_dict()
    state = {"layernorm." + name: value for name, value in head.norm.state_dict().items()}
    state |= {"lm_head." + name: value for name, value in head.lm_head.state_dict().items()}
    for name, theirs in HUGGING_FACE_NAMES.items():
        for i in range(encoder.depth if "{}" in name else 1):
            state[theirs.format(i)] = ours.pop(name.format(i))
    for i in range(encoder.depth):
        weights = ours.pop(f"blocks.{i}.attn.qkv.weight").chunk(3)
        for letter, weight in zip("qkv", weights, strict=True):
            state[f"beit.layers.{i}.attention.{letter}_proj.weight"] = weight
    assert not ours, f"left over: {list(ours)}"
    twin.load_state_dict(state)
    return twin.eval()


def _plain_lookup(bias: BeitRelativePositionBias, grid: tuple[int, int]) -> Any:
    # Transformers resizes every table, to its own grid too, and swaps rows and columns on the way: nothing
    # happens on square grids, others are scrambled. Compared here is the layout: its index reads the table.
    index = bias.generate_relative_position_index(grid)

    def forward(window_size: tuple[int, int], **_: Any) -> Tensor:
        assert window_size == grid
        return bias.relative_position_bias_table[index].permute(2, 0, 1)[None]

    return forward
