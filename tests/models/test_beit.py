"""The encoder by itself: names, counts, initialisation, masking, grids, checkpointing."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.models.beit import Beit
from beit_pretrain.models.heads import MIMHead

SMALL: dict[str, Any] = {
    "image_size": (16, 24),
    "patch_size": 8,
    "width": 24,
    "depth": 3,
    "heads": 3,
}  # 2 x 3
BASE: dict[str, Any] = {"image_size": (224, 224), "width": 768, "depth": 12, "heads": 12}
LARGE: dict[str, Any] = {"image_size": (224, 224), "width": 1024, "depth": 24, "heads": 16}


def build(**options: Any) -> Beit:
    torch.manual_seed(0)
    return Beit(**SMALL | options)


def strong(**options: Any) -> Beit:
    encoder = build(**options)
    oracles.strengthen(encoder)
    return encoder


def pictures(batch: int = 2, height: int = 16, width: int = 24) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def count(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_models_of_masked_image_modelling_have_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        assert count(Beit(**BASE), MIMHead(width=768, vocab_size=8192)) == 91_965_776
        assert count(Beit(**LARGE), MIMHead(width=1024, vocab_size=8192)) == 311_534_016


def test_the_classifiers_have_the_published_parameter_counts() -> None:
    options = {"rel_pos": "per_layer", "mask_token": False}
    with torch.device("meta"):
        for size, published in ((BASE, 86_530_984), (LARGE, 304_430_568)):
            width = size["width"]
            norm_and_head = 2 * width + 1000 * width + 1000
            assert count(Beit(**size, **options)) + norm_and_head == published


BLOCK_NAMES = [
    "gamma_1",
    "gamma_2",
    "norm1.weight",
    "norm1.bias",
    "norm2.weight",
    "norm2.bias",
    "attn.qkv.weight",
    "attn.q_bias",
    "attn.v_bias",
    "attn.proj.weight",
    "attn.proj.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
]
STEM_NAMES = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_parameters_are_named_as_in_the_published_checkpoints() -> None:
    blocks = {f"blocks.{i}.{name}" for i in range(3) for name in BLOCK_NAMES}
    tables = {f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)}
    shared = {"rel_pos_bias.relative_position_bias_table"}
    assert set(build().state_dict()) == STEM_NAMES | blocks | shared | {"mask_token"}
    assert set(build(rel_pos="per_layer", mask_token=False).state_dict()) == STEM_NAMES | blocks | tables
    plain = build(rel_pos="none", abs_pos=True, mask_token=False, layer_scale=0)
    gammas = {name for name in blocks if "gamma" in name}
    assert set(plain.state_dict()) == STEM_NAMES | {"pos_embed"} | blocks - gammas
    assert plain.state_dict()["pos_embed"].shape == (1, 7, 24)


def std_of_normal_cut_at(cut: float) -> float:
    """Standard deviation of N(0, 1) given that it is within +-cut."""
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))


@pytest.mark.parametrize(
    ("cut", "std"), [(0.02, 0.02 * std_of_normal_cut_at(1)), (0.05, 0.0191), (2.0, 0.02)]
)
def test_weights_begin_as_a_cut_normal_and_output_matrices_shrink_with_depth(cut: float, std: float) -> None:
    torch.manual_seed(0)
    encoder = Beit(
        image_size=(64, 64),
        patch_size=16,
        width=192,
        depth=3,
        heads=3,
        abs_pos=True,
        layer_scale=1e-5,
        init_cut=cut,
    )
    for name, parameter in encoder.named_parameters():
        leaf = name.rpartition(".")[2]
        if "norm" in name and leaf == "weight":
            assert (parameter == 1).all(), name
        elif "bias" in leaf:  # biases and the table
            assert (parameter == 0).all(), name
        elif "gamma" in leaf:
            assert (parameter == 1e-5).all(), name
        else:
            shrunk = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            factor = math.sqrt(2 * (int(name.split(".")[1]) + 1)) if shrunk else 1.0
            values = parameter.detach() * factor
            assert values.abs().max() <= cut * (1 + 1e-6), name
            assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel()), name
            assert values.std().item() == pytest.approx(std, rel=max(0.005, 4 / math.sqrt(values.numel()))), (
                name
            )
    assert std_of_normal_cut_at(2.5) * 0.02 == pytest.approx(0.0191, abs=1e-4)


def test_the_cut_normal_has_the_distribution_of_a_cut_normal() -> None:
    torch.manual_seed(0)
    encoder = Beit(image_size=(16, 16), patch_size=16, width=384, depth=1, heads=6)
    values = encoder.get_parameter("blocks.0.mlp.fc1.weight").detach().flatten().sort().values.double()
    edge = math.erf(1 / math.sqrt(2))
    distribution = ((values / 0.02 / math.sqrt(2)).erf() / edge + 1) / 2
    steps = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    assert (distribution - steps).abs().max() < 1.95 / math.sqrt(len(values))  # Kolmogorov-Smirnov, p = 0.001


def test_the_drop_rate_rises_linearly_from_the_first_block_to_the_last() -> None:
    blocks: Any = build(depth=5, drop_path=0.2).blocks
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    one: Any = build(depth=1, drop_path=0.2).blocks
    assert one[0].drop_path.drop_prob == 0


@torch.no_grad()
def test_nothing_of_a_hidden_patch_is_seen_and_everything_of_a_visible_one() -> None:
    encoder, image = strong(), pictures(1)
    mask = torch.tensor([[False, True, False, False, False, True]])
    tokens = encoder(image, mask)
    for patch in range(6):
        row, column = divmod(patch, 3)
        other = image.clone()
        other[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        assert torch.equal(encoder(other, mask), tokens) == bool(mask[0, patch])
        assert not torch.equal(encoder(other), encoder(image))


@torch.no_grad()
def test_a_mask_that_hides_nothing_is_no_mask() -> None:
    encoder, image = strong(), pictures()
    assert torch.equal(encoder(image, torch.zeros(2, 6, dtype=torch.bool)), encoder(image))


@torch.no_grad()
def test_features_come_in_the_order_asked_and_later_blocks_do_not_run() -> None:
    encoder, image = strong(), pictures()
    last, first = encoder.features(image, [2, 0])
    assert torch.equal(last, encoder(image)) and last.shape == (2, 7, 24)
    encoder.blocks[1].register_forward_hook(lambda *_: pytest.fail("block 1 ran"))
    assert torch.equal(encoder.features(image, [0])[0], first)
    assert encoder.features(image, []) == []


@pytest.mark.parametrize("options", [{}, {"rel_pos": "per_layer"}, {"rel_pos": "none", "abs_pos": True}])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 16), (8, 56), (40, 40)])
def test_any_grid_trains_every_parameter(options: dict[str, Any], height: int, width: int) -> None:
    encoder = strong(**options)
    patches = height * width // 64
    mask = torch.arange(2 * patches).reshape(2, patches) % 2 == 0
    tokens = encoder(pictures(2, height, width), mask)
    assert tokens.shape == (2, 1 + patches, 24)
    tokens.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@torch.no_grad()
def test_positions_are_resized_bicubically_and_cls_keeps_its_own() -> None:
    encoder = strong(rel_pos="none", abs_pos=True)
    other = build(rel_pos="none", abs_pos=True, image_size=(32, 40))
    state = encoder.state_dict()
    square = state["pos_embed"][0, 1:].T.reshape(1, 24, 2, 3)
    patches = F.interpolate(square, (4, 5), mode="bicubic")[0].flatten(1).T
    state["pos_embed"] = torch.cat([state["pos_embed"][0, :1], patches])[None]
    other.load_state_dict(state)
    torch.testing.assert_close(encoder(pictures(2, 32, 40)), other(pictures(2, 32, 40)))


@torch.no_grad()
def test_the_kernels_agree_on_the_whole_encoder() -> None:
    plain, sdpa = strong(attention="plain"), strong(attention="sdpa")
    assert oracles.difference(sdpa(pictures()), plain(pictures())) < 1e-5


@pytest.mark.parametrize("rel_pos", ["shared", "per_layer"])
def test_checkpointing_changes_no_bit_of_outputs_and_gradients_with_drop_path(rel_pos: str) -> None:
    outcomes = []
    for checkpointing in (False, True):
        encoder = strong(rel_pos=rel_pos, checkpointing=checkpointing, drop_path=0.5).train()
        torch.manual_seed(3)
        tokens = encoder(pictures(4), torch.arange(24).reshape(4, 6) % 2 == 0)
        tokens.square().sum().backward()
        outcomes.append([tokens, torch.rand(1), *(parameter.grad for parameter in encoder.parameters())])
    for plain, checkpointed in zip(*outcomes, strict=True):
        assert torch.equal(plain, checkpointed)


def test_checkpointing_runs_blocks_again_in_the_backward_pass() -> None:
    encoder, runs = build(checkpointing=True), []
    encoder.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    encoder(pictures()).sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize("rel_pos", ["shared", "per_layer"])
def test_the_encoder_is_traced_as_one_graph(rel_pos: str) -> None:
    encoder = strong(rel_pos=rel_pos)
    mask = torch.arange(12).reshape(2, 6) % 2 == 0
    traced = torch.compile(encoder, backend="eager", fullgraph=True)
    assert oracles.difference(traced(pictures(), mask), encoder(pictures(), mask)) < 1e-6


def test_bfloat16_autocast_stays_near_float32_and_the_stream_stays_in_float32() -> None:
    encoder = strong()
    mask = torch.arange(12).reshape(2, 6) % 2 == 0
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(pictures(), mask)
    assert tokens.dtype == torch.float32
    assert oracles.difference(tokens, encoder(pictures(), mask)) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": (20, 24)},
            r"image_size=\(20, 24\) cannot be cut .* model.patch_size=8: set both sides",
        ),
        ({"heads": 5}, "model.width=24 cannot be shared by model.heads=5"),
        ({"depth": 0}, "model.depth=0: set at least 1"),
        ({"drop_path": 1.0}, "model.drop_path=1.0 is no rate"),
        ({"rel_pos": "both"}, "model.rel_pos=both is unknown: set one of shared, per_layer, none"),
        ({"attention": "flash"}, "model.attention=flash is unknown: set one of auto, plain, sdpa"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_what_to_set(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build(heads=5, depth=0, image_size=(20, 20))
    assert len(caught.value.faults) == 3


def test_inputs_that_do_not_fit_are_refused_with_what_to_set() -> None:
    encoder = build()
    with pytest.raises(BeitError, match="image of 20 x 24 pixels cannot be cut into patches of 8: set"):
        encoder(pictures(2, 20, 24))
    with pytest.raises(
        BeitError, match=r"mask of shape \(2, 7\) for 2 images of 2 x 3 patches: needed is \(2, 6\)"
    ):
        encoder(pictures(), torch.zeros(2, 7, dtype=torch.bool))
    with pytest.raises(BeitError, match=r"without a mask token: set model\.mask_token=true"):
        build(mask_token=False)(pictures(), torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(BeitError, match=r"blocks \[3, -1\] asked of an encoder of 3: set numbers in 0\.\.2"):
        encoder.features(pictures(), [0, 3, -1])
