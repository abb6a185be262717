"""The fine-tuning view: timm's policy, pure in the key, without a trace in the global generators."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform

from beit_pretrain.data.augment import FineTuneView
from beit_pretrain.data.sampler import mix
from beit_pretrain.data.transforms import Item, OneView
from beit_pretrain.errors import ConfigError

POLICY = "rand-m9-mstd0.5-inc1"
FILL = (0.485, 0.456, 0.406)


def _view(**changes: Any) -> FineTuneView:
    settings: dict[str, Any] = {
        "image_size": (40, 56),
        "crop_scale": (0.08, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip": 0.5,
        "rand_augment": POLICY,
        "jitter": 0.4,
        "fill": FILL,
    }
    return FineTuneView(**(settings | changes))


def _noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def _timm(policy: str, size: tuple[int, int]) -> Any:
    """The policy as timm's own `create_transform` builds it."""
    hparams = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": (124, 116, 104),
        "interpolation": Image.Resampling.BICUBIC,
    }
    return rand_augment_transform(policy, hparams)


@pytest.mark.parametrize("policy", [POLICY, "rand-m7-n3-p0.8-inc0", "rand-m9-tweights-inc1"])
def test_the_view_is_timms_policy_on_the_plain_view(policy: str) -> None:
    plain, ours, theirs = OneView(image_size=(40, 56)), _view(rand_augment=policy), _timm(policy, (40, 56))
    image, changed = _noise(83, 97), 0
    for number in range(30):
        key = mix(number)
        before = plain(image, key).image
        seed = mix(key, 2)
        kept = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        expected = np.array(theirs(Image.fromarray(before.permute(1, 2, 0).numpy())))
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        found = ours(image, key).image
        assert found.shape == (3, 40, 56) and found.dtype == torch.uint8 and found.is_contiguous()
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
        changed += not torch.equal(found, before)
    assert changed > 15


def test_without_a_policy_the_colours_are_jittered_instead() -> None:
    image = _noise(60, 70)
    for key in range(5):
        jittered = OneView(image_size=(40, 56), jitter=0.4)(image, key).image
        assert torch.equal(_view(rand_augment=None)(image, key).image, jittered)
        none = _view(rand_augment=None, jitter=0.0)(image, key).image
        assert torch.equal(none, OneView(image_size=(40, 56), jitter=0.0)(image, key).image)
        still = "rand-n0"  # a policy of no steps: what is left is the crop, without jitter
        assert torch.equal(_view(rand_augment=still)(image, key).image, none)


def test_a_view_is_pure_in_its_key_and_leaves_the_global_generators_alone() -> None:
    view, image = _view(), _noise(80, 70)
    kept = image.clone()
    random.seed(5)
    np.random.seed(6)
    random.gauss(0, 1), np.random.standard_normal()  # both generators hold a second normal draw back
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first = [view(image, mix(number)).image for number in range(20)]
    assert random.getstate() == before[0]
    assert pickle.dumps(np.random.get_state()) == pickle.dumps(before[1])
    assert torch.equal(torch.get_rng_state(), before[2]) and torch.equal(image, kept)
    random.seed(7)
    np.random.seed(8)
    again = [view(image, mix(number)).image for number in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({picture.numpy().tobytes() for picture in first}) == 20


def test_the_state_comes_back_after_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    view, before = _view(), random.getstate()

    def fail(picture: Image.Image) -> Image.Image:
        raise RuntimeError(f"a broken policy, {picture.size}")

    monkeypatch.setattr(view, "policy", fail)
    with pytest.raises(RuntimeError, match="broken"):
        view(_noise(50, 50), 1)
    assert random.getstate() == before


def _pillow_refuses() -> bool:
    try:
        ImageOps.posterize(Image.new("RGB", (2, 2)), 0)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("increasing", [0, 1])
def test_posterizing_keeps_a_bit_at_every_magnitude(increasing: int) -> None:
    picture, failed = Image.fromarray(_noise(6, 5).permute(1, 2, 0).numpy()), 0
    for magnitude in [*range(11), 15, 20, 30]:
        text = f"rand-m{magnitude}-mmax30-p1-inc{increasing}"
        view = _view(rand_augment=text)
        assert view.policy is not None
        pairs = zip(view.policy.ops, _timm(text, (40, 56)).ops, strict=True)
        ours, raw = next(pair for pair in pairs if pair[0].name.startswith("Posterize"))
        bits, wanted = ours.level_fn(magnitude, ours.hparams)[0], raw.level_fn(magnitude, raw.hparams)[0]
        assert bits == max(1, wanted)
        posterized = ours(picture)
        if wanted >= 1:
            assert posterized.tobytes() == raw(picture).tobytes()
        elif _pillow_refuses():
            failed += 1
            with pytest.raises(ValueError, match="bits"):
                raw(picture)
    assert failed or not _pillow_refuses()


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd3-p1-inc1", "rand-m1-mstd3-n4-p1", "rand-m10-mstd101-inc1-t3a"]
)
def test_noise_on_the_magnitude_never_fails(policy: str) -> None:
    view, image = _view(rand_augment=policy, image_size=(8, 9)), _noise(12, 12)
    for key in range(1500):
        assert view(image, mix(key)).image.shape == (3, 8, 9)


def test_rotations_leave_the_fill_behind() -> None:
    view = _view(rand_augment="rand-m10-p1-n1-inc1", crop_scale=(1.0, 1.0), flip=0.0)
    white = torch.full((3, 56, 56), 255, dtype=torch.uint8)
    corners = {tuple(view(white, mix(key)).image[:, 0, 0].tolist()) for key in range(200)}
    assert (124, 116, 104) in corners


def test_a_view_travels_to_a_spawned_worker() -> None:
    view, image = _view(), _noise(50, 40)
    assert torch.equal(pickle.loads(pickle.dumps(view))(image, 3).image, view(image, 3).image)


def test_batches_hold_image_label_sample_and_view() -> None:
    view = _view()
    batch = view.collate([Item(view(_noise(50, 60), key), 10 + key, 4, key - 1) for key in range(3)])
    assert batch.image.shape == (3, 3, 40, 56) and batch.image.dtype == torch.uint8
    assert batch.label.tolist() == [-1, 0, 1] and batch.sample.tolist() == [10, 11, 12]
    assert batch.view.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "policy",
    ["", "m9", "original-mstd0.5", "rand-m", "rand-inc", "rand-m9-x3", "rand-m9.5", "rand-tfoo", "rand-m9-"],
)
def test_a_policy_that_timm_would_misread_is_refused(policy: str) -> None:
    message = (
        rf"stage\.views\.rand_augment={policy}: set a policy in timm's notation.*or null for colour jitter"
    )
    with pytest.raises(ConfigError, match=message):
        _view(rand_augment=policy)


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"crop_scale=\[1\.0, 0\.2\]: set two numbers"):
        _view(crop_scale=(1.0, 0.2))
