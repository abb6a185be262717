"""Classifiers on frozen features, against plain linear layers, scikit-learn and timm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from beit_pretrain.models.probes import (
    FLOOR,
    AttentiveProbe,
    Classifier,
    Inputs,
    ProbeBank,
    Standardize,
    pooled_row,
)

WIDTH, DEPTH, CLASSES, PIXELS = 6, 3, 4, 15


def bank(poolings: tuple[str, ...] = ("cls", "mean", "both"), heads: int | None = 2) -> ProbeBank:
    torch.manual_seed(0)
    made = ProbeBank(
        width=WIDTH,
        depth=DEPTH,
        classes=CLASSES,
        lrs=[0.1, 0.01],
        poolings=poolings,
        pixels=PIXELS,
        heads=heads,
    )
    for scale in (made.scale, made.token_scale):
        if scale is not None:
            scale.mean.normal_()
            scale.deviation.uniform_(0.5, 2)
    return made


def tokens(count: int = 7, seed: int = 1) -> list[Tensor]:
    """After each block, of `count` images of 2 x 5 patches."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 11, WIDTH, generator=draw) for _ in range(DEPTH)]


def inputs(count: int = 7, seed: int = 1) -> Inputs:
    picture = torch.randn(count, 3, 1, 5, generator=torch.Generator().manual_seed(seed + 100))
    seen = tokens(count, seed)
    return Inputs(pooled_row(seen, picture), seen[-1])


def test_a_row_is_cls_and_mean_of_the_patches_of_each_block_then_the_picture() -> None:
    seen, picture = tokens(2), torch.randn(2, 3, 1, 5)
    row = pooled_row([t.bfloat16() for t in seen], picture)
    assert row.dtype == torch.float32 and row.shape == (2, 2 * DEPTH * WIDTH + PIXELS)
    for image in range(2):
        parts = []
        for t in seen:
            patches = [t[image, i].bfloat16().float() for i in range(11)]
            parts += [patches[0], torch.stack(patches[1:]).sum(0) / 10]
        torch.testing.assert_close(row[image], torch.cat([*parts, picture[image].flatten()]))


def test_each_classifier_is_a_linear_layer_on_its_own_standardised_features() -> None:
    made, seen = bank(), inputs()
    assert seen.tokens is not None and made.token_scale is not None
    logits = made(seen)
    row = (seen.row - made.scale.mean) / made.scale.deviation
    state = made.state_dict()
    place = 0
    for rate, lr in enumerate([0.1, 0.01]):
        for name in ("cls", "mean", "both"):
            for block in range(DEPTH):
                first = 2 * block * WIDTH
                span = {"cls": (0, WIDTH), "mean": (WIDTH, 2 * WIDTH), "both": (0, 2 * WIDTH)}[name]
                x = row[:, first + span[0] : first + span[1]]
                weight, bias = (state[f"by_lr.{rate}.{name}.{part}"][block] for part in ("weight", "bias"))
                torch.testing.assert_close(logits[:, place], F.linear(x, weight, bias))
                assert made.classifiers[place] == Classifier(name, block, lr)
                place += 1
        weight, bias = (state[f"by_lr.{rate}.pixels.{part}"][0] for part in ("weight", "bias"))
        torch.testing.assert_close(logits[:, place], F.linear(row[:, -PIXELS:], weight, bias))
        assert made.classifiers[place] == Classifier("pixels", None, lr)
        assert made.classifiers[place + 1] == Classifier("attentive", DEPTH - 1, lr)
        place += 2
    assert logits.shape == (7, place, CLASSES)


def test_an_attentive_probe_is_attention_of_one_query_over_all_tokens() -> None:
    torch.manual_seed(0)
    probe, x = AttentiveProbe(width=WIDTH, heads=2, classes=CLASSES), torch.randn(3, 11, WIDTH)
    pool: Any = probe.pool
    q = pool.q(pool.latent[0, 0]).view(2, 3)  # (H, D / H)
    kv = pool.kv(x).view(3, 11, 2, 2, 3)
    weight = torch.einsum("hc,blhc->bhl", q, kv[:, :, 0]).div(3**0.5).softmax(-1)
    gathered = pool.proj(torch.einsum("bhl,blhc->bhc", weight, kv[:, :, 1]).flatten(1))
    gathered = gathered + pool.mlp(pool.norm(gathered))
    expected = F.linear(gathered, probe.linear.weight[0], probe.linear.bias[0])
    torch.testing.assert_close(probe(x)[:, 0], expected)


@pytest.mark.parametrize("name", ["cls", "both", "pixels"])
def test_a_classifier_learns_in_the_bank_as_it_does_alone(name: str) -> None:
    made, block, rate = bank(), 0 if name == "pixels" else 1, 1
    part = made.by_lr[rate][name]  # pyright: ignore[reportIndexIssue]
    alone = nn.Linear(part.weight.shape[2], CLASSES)
    alone.load_state_dict({"weight": part.weight[block].detach(), "bias": part.bias[block].detach()})
    how: Any = {"weight_decay": 0.1, "eps": 1e-8}
    both = torch.optim.AdamW(
        [{"params": made.by_lr[i].parameters(), "lr": lr} for i, lr in ((0, 0.1), (1, 0.01))], **how
    )
    one = torch.optim.AdamW(alone.parameters(), lr=0.01, **how)
    place = made.classifiers.index(Classifier(name, None if name == "pixels" else block, 0.01))
    for step in range(20):
        seen = inputs(8, seed=step)
        target = torch.randint(CLASSES, (8,), generator=torch.Generator().manual_seed(step))
        logits = made(seen)
        loss = F.cross_entropy(
            logits.flatten(0, 1), target.repeat_interleave(logits.shape[1]), reduction="sum"
        )
        row = made.scale(seen.row)
        x = {"cls": row[:, 12:18], "both": row[:, 12:24], "pixels": row[:, -PIXELS:]}[name]
        torch.testing.assert_close(logits[:, place], alone(x), rtol=0, atol=1e-5)
        both.zero_grad()
        one.zero_grad()
        (loss / 8).backward()
        F.cross_entropy(alone(x), target).backward()
        both.step()
        one.step()
    torch.testing.assert_close(part.weight[block], alone.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(part.bias[block], alone.bias, rtol=0, atol=1e-6)


def test_weights_begin_normal_with_a_hundredth_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    made = ProbeBank(width=64, depth=4, classes=50, lrs=[1e-3], poolings=["mean"], pixels=0, heads=None)
    weight = made.state_dict()["by_lr.0.mean.weight"]
    assert weight.shape == (4, 50, 64)
    assert weight.std().item() == pytest.approx(0.01, rel=0.03) and abs(weight.mean().item()) < 3e-4
    assert (made.state_dict()["by_lr.0.mean.bias"] == 0).all()


def test_the_scale_is_that_of_scikit_learn_with_a_floor() -> None:
    x = np.random.default_rng(0).normal(size=(50, 9)) * np.geomspace(0.01, 100, 9) + 5
    x[:, 2] = 3.0  # never varies
    x[:, 7:] = 4.1  # a whole input that never varies
    moments = torch.from_numpy(np.stack([x.sum(0), (x**2).sum(0)]))
    scale = Standardize(9)
    assert scale.images == 0
    scale.set(moments, 50, [4, 3, 2])
    oracle = StandardScaler().fit(x)
    variance = np.asarray(oracle.var_)
    variance = variance * (variance > 1e-10)
    floor = np.repeat([variance[:4].mean(), variance[4:7].mean(), 0.0], [4, 3, 2]) * FLOOR
    expected = (x - x.mean(0)) / np.sqrt(np.where(variance + floor > 1e-12, variance + floor, 1))
    np.testing.assert_allclose(scale(torch.from_numpy(x).float()).numpy(), expected, rtol=2e-3, atol=1e-3)
    assert scale.images == 50


def test_classifiers_compute_in_float32_under_autocast() -> None:
    made, seen = bank(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(seen)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, made(seen), rtol=0, atol=0)
