"""Colour jitter against Pillow's own enhancers on the whole image."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageStat

from beit_pretrain.data.jitter import (
    Jitter,
    apply_jitter,
    draw_jitter,
    jitter_batch,
    mean_grey,
    postpone,
    row,
)

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def natural(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A picture with the 1/f spectrum of photographs and an edge, (3, height, width) uint8."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectra = np.fft.fft2(rng.standard_normal((3, height, width))) / frequency
    shared, own = np.fft.ifft2(spectra.mean(0)).real, np.fft.ifft2(spectra).real
    mixed = 2 * shared / shared.std() + own / own.std((1, 2), keepdims=True)
    mixed += np.where(
        np.mgrid[:height, :width][1] > width * 0.6, 1.5, -0.5
    )  # a bright part beside a dark one
    return torch.from_numpy(np.clip(110 + 32 * mixed, 0, 255).astype(np.uint8))


def by_pillow(image: torch.Tensor, jitter: Jitter) -> torch.Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    for step in jitter.order:
        picture = ENHANCERS[step](picture).enhance(jitter.factors[step])
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _draws(count: int) -> list[Jitter]:
    return [draw_jitter(random.Random(seed), 0.4) for seed in range(count)]


@pytest.mark.parametrize("size", [(32, 32), (17, 45), (90, 91)])
def test_a_small_image_is_jittered_as_pillow_does_it(size: tuple[int, int]) -> None:
    image = natural(*size)
    for jitter in _draws(30):
        difference = (apply_jitter(image, image, jitter).int() - by_pillow(image, jitter).int()).abs()
        # float32 rounds once more or less in a product: at most one level, in one value of ten thousand
        assert difference.max() <= 1 and difference.float().mean() < 1e-4


def test_a_crop_of_a_photograph_is_jittered_as_pillow_jitters_the_whole() -> None:
    image = natural(375, 500)
    for jitter in _draws(12):
        crop = image[:, 20:200, 310:480]  # from the bright part: its own mean grey is far from the image's
        difference = (
            apply_jitter(crop, image, jitter).int() - by_pillow(image, jitter)[:, 20:200, 310:480].int()
        ).abs()
        assert difference.float().mean() <= 0.7
        assert (difference > 4).float().mean() <= 0.015


def test_contrast_about_the_crops_own_grey_would_be_seen() -> None:
    image = natural(375, 500)
    crop = image[:, 20:200, 310:480]
    jitter = Jitter((1, 0, 2), (1.0, 0.6, 1.0))
    right = by_pillow(image, jitter)[:, 20:200, 310:480].int()
    assert (apply_jitter(crop, crop, jitter).int() - right).abs().float().mean() > 5
    assert (apply_jitter(crop, image, jitter).int() - right).abs().float().mean() <= 0.7


def test_steps_before_contrast_reach_its_mean_grey() -> None:
    image = natural(200, 300)
    crop = image[:, :40, :50]
    jitter = Jitter((0, 2, 1), (1.4, 0.6, 1.4))
    assert (
        apply_jitter(crop, image, jitter).int() - by_pillow(image, jitter)[:, :40, :50].int()
    ).abs().max() <= 1


def test_factor_one_changes_nothing_and_the_source_stays_as_it_was() -> None:
    image = natural(40, 30)
    kept = image.clone()
    assert torch.equal(apply_jitter(image, image, Jitter((2, 0, 1), (1.0, 1.0, 1.0))), image)
    apply_jitter(image, image, Jitter((0, 1, 2), (1.4, 0.6, 0.7)))
    assert torch.equal(image, kept)


def test_draws_are_uniform_in_order_and_factor() -> None:
    draws = _draws(6000)
    counts = Counter(draw.order for draw in draws)
    assert len(counts) == 6 and all(abs(count - 1000) < 150 for count in counts.values())
    factors = np.array([draw.factors for draw in draws])
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    assert np.abs(factors.mean(0) - 1).max() < 0.012
    assert np.abs(factors.std(0) - 0.8 / np.sqrt(12)).max() < 0.006
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.05
    assert min(draw_jitter(random.Random(seed), 3.0).factors[0] for seed in range(200)) >= 0


@pytest.mark.parametrize("strength", [0.4, 3.0])
def test_a_batch_is_jittered_as_its_images_one_by_one(strength: float) -> None:
    whole = natural(96, 120)
    crops = torch.stack(
        [whole[:, y : y + 40, x : x + 50] for y, x in itertools.product((0, 20, 56), (0, 33, 70))]
    )
    draws = [draw_jitter(random.Random(seed), strength) for seed in range(9 * 8)]
    assert len({draw.order for draw in draws}) == 6
    for place in range(0, len(draws), 9):
        part = draws[place : place + 9]
        rows = torch.stack([row(draw, mean_grey(whole, draw)) for draw in part])
        assert rows.shape == (9, 5) and rows.dtype == torch.float32
        expected = torch.stack(
            [apply_jitter(crop, whole, draw) for crop, draw in zip(crops, part, strict=True)]
        )
        for batch in (crops, crops.contiguous(memory_format=torch.channels_last)):
            kept = batch.clone()
            jittered = jitter_batch(batch, rows)
            assert torch.equal(jittered, expected) and jittered.is_contiguous() and torch.equal(batch, kept)


def test_what_does_not_wait_and_what_is_left_make_up_the_whole_jitter() -> None:
    whole = natural(96, 120)
    crop, kinds = whole[:, 10:60, 20:90], set()
    for seed in range(120):
        draw = draw_jitter(random.Random(seed), 0.4)
        now, left = postpone(crop, whole, draw)
        assert torch.equal(jitter_batch(now[None], left[None])[0], apply_jitter(crop, whole, draw))
        kinds.add((torch.equal(now, crop), left[3].item() == 1.0))
    assert kinds == {
        (True, False),
        (False, True),
        (False, False),
    }  # waits whole, not at all, but for saturation


def test_a_packed_draw_holds_the_grey_that_contrast_is_relative_to() -> None:
    whole = natural(60, 80)  # few enough pixels that all of them count
    for order in itertools.permutations(range(3)):
        jitter = Jitter(order, (1.3, 0.7, 0.8))
        before = Image.fromarray(whole.permute(1, 2, 0).contiguous().numpy())
        for step in order[: order.index(1)]:
            before = ENHANCERS[step](before).enhance(jitter.factors[step])
        grey = int(ImageStat.Stat(before.convert("L")).mean[0] + 0.5)
        number, *factors, mean = row(jitter, mean_grey(whole, jitter)).tolist()
        assert list(itertools.permutations(range(3)))[int(number)] == order
        assert factors == pytest.approx(jitter.factors) and mean == grey
