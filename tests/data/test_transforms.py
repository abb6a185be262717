"""Views: one box for both, the distribution of boxes, and purity in the key."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from beit_pretrain.data import transforms
from beit_pretrain.data.jitter import apply_jitter, draw_jitter
from beit_pretrain.data.sampler import mix
from beit_pretrain.data.transforms import Crops, EvalView, Item, OneView, TwoViews, crop_box
from beit_pretrain.errors import ConfigError
from beit_pretrain.masking import BlockwiseMask

MASK = BlockwiseMask(grid=(4, 6), count=10, min_block=4)


def _gradient(height: int, width: int) -> torch.Tensor:
    """Red tells the column, green the row, as shares of 255; (3, height, width) uint8."""
    y, x = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    return torch.stack([x, y, (x + y) / 2]).round().to(torch.uint8)


def _noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def _p(ours: np.ndarray, theirs: np.ndarray) -> float:
    result: Any = ks_2samp(ours, theirs, method="asymp")
    return float(result.pvalue)


@pytest.mark.parametrize("size", [(300, 400), (64, 64), (500, 60), (30, 400)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    ratio, count = (3 / 4, 4 / 3), 2000
    rng = random.Random(1)
    ours = np.array([crop_box(rng, size, scale, ratio) for _ in range(count)])
    with torch.random.fork_rng():
        torch.manual_seed(2)
        image = torch.empty(3, *size)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
        )
    top, left, height, width = ours.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
    for mine, reference in zip(ours.T, theirs.T, strict=True):
        assert _p(mine, reference) > 1e-4
    assert _p(height * width, theirs[:, 2] * theirs[:, 3]) > 1e-4


def test_a_picture_of_one_pixel_still_has_a_box() -> None:
    for size in [(1, 1), (1, 50), (50, 1)]:
        top, left, height, width = crop_box(random.Random(0), size, (0.08, 1.0), (3 / 4, 4 / 3))
        assert 0 < height <= size[0] - top and 0 < width <= size[1] - left


@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic"])
def test_both_views_show_the_same_box_at_two_sizes(interpolation: transforms.Interpolation) -> None:
    view = TwoViews(
        image_size=(48, 72),
        token_image_size=(24, 36),
        mask=MASK,
        jitter=0.0,
        token_interpolation=interpolation,
    )
    image = _gradient(211, 317)
    spans, mirrored = [], 0
    for key in range(60):
        crops = view(image, mix(key))
        large, small = crops.image, crops.token_image
        assert large.shape == (3, 48, 72) and small is not None and small.shape == (3, 24, 36)
        halved = large.float().unflatten(1, (24, 2)).unflatten(3, (36, 2)).mean((2, 4))
        assert (halved - small).abs().max() <= 3  # levels; another box would be off by tens
        step = large[0, 24, -1].int() - large[0, 24, 0].int()
        mirrored += int(step < 0)
        assert large[1, -1, 36] > large[1, 0, 36]  # never upside down
        spans.append(int(step.abs()))
    assert 15 < mirrored < 45
    assert min(spans) < 110 and max(spans) > 200  # boxes differ in size


def test_each_view_is_resized_by_its_own_kernel() -> None:
    image = _noise(90, 110)
    for kernel in ("lanczos", "bicubic"):
        view = TwoViews(image_size=(24, 36), token_image_size=(12, 18), mask=MASK, token_interpolation=kernel)
        crop, crops = view.cut(image, 3), view(image, 3)
        assert crops.token_image is not None
        assert torch.equal(crops.image, transforms.resize(crop, (24, 36), "bicubic"))
        assert torch.equal(crops.token_image, transforms.resize(crop, (12, 18), kernel))
    assert torch.equal(OneView(image_size=(24, 36), jitter=0.4)(image, 3).image, crops.image)


def test_flip_is_a_mirror_image_of_the_same_box() -> None:
    plain = OneView(image_size=(20, 31), flip=0.0, jitter=0.4)
    always = OneView(image_size=(20, 31), flip=1.0, jitter=0.4)
    image = _noise(77, 91)
    for key in range(5):
        assert (always(image, key).image.flip(-1).int() - plain(image, key).image).abs().max() <= 1


def test_jitter_leaves_box_and_flip_as_they_are() -> None:
    image = _gradient(100, 140)
    for key in range(5):
        plain = OneView(image_size=(32, 32), jitter=0.0)(image, key).image.float()
        coloured = OneView(image_size=(32, 32), jitter=0.1)(image, key).image.float()
        assert torch.corrcoef(torch.stack([plain[0].flatten(), coloured[0].flatten()]))[0, 1] > 0.98
        assert not torch.equal(plain, coloured)


def test_a_view_is_pure_in_its_key_and_draws_nothing_global() -> None:
    view = TwoViews(image_size=(32, 48), token_image_size=(16, 24), mask=MASK)
    image = _noise(80, 70)
    kept = image.clone()
    before = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
    )
    first = [view(image, key) for key in (1, 2, 1)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[2]
    assert torch.equal(image, kept)
    assert first[0].label_map is None and first[2].label_map is None
    for a, b in zip(first[0][:3], first[2][:3], strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    assert not torch.equal(first[0].image, first[1].image)
    assert first[0].mask is not None and first[0].mask.dtype == torch.bool
    assert torch.equal(first[0].mask, torch.from_numpy(MASK(mix(1, 1))).flatten())


@pytest.mark.parametrize("source", [(40, 61), (201, 150), (33, 47)])
def test_resizing_is_pillows_to_the_level(source: tuple[int, int]) -> None:
    image = _noise(*source)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    kernels: dict[transforms.Interpolation, Image.Resampling] = {
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }
    expected = np.empty(0)
    for name, kernel in kernels.items():
        expected = np.array(picture.resize((28, 24), kernel)).astype(int)
        ours = transforms.resize(image, (24, 28), name)
        assert ours.dtype == torch.uint8
        difference = np.abs(ours.permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 1 and difference.mean() < 0.05
    by_pillow = transforms._resize_pillow(image, (24, 28))
    assert np.array_equal(by_pillow.permute(1, 2, 0).numpy(), expected)


def test_an_older_torchvision_resizes_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_LANCZOS_TENSORS", False)
    image = _noise(50, 40)
    resized = transforms.resize(image, (9, 8), "lanczos")
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 9), Image.Resampling.LANCZOS)
    assert np.array_equal(resized.permute(1, 2, 0), np.array(picture)) and resized.is_contiguous()
    assert transforms.RESIZE_IMPLEMENTATION.endswith(f"lanczos by {transforms.LANCZOS}")


@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic"])
def test_how_an_image_lies_in_memory_changes_no_pixel(interpolation: transforms.Interpolation) -> None:
    planes = _noise(70, 91)
    pixels = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for image in (planes, pixels, pixels[:, 3:60, 5:80], planes[:, 3:60, 5:80]):
        for size in ((24, 36), tuple(image.shape[1:])):
            expected = transforms.resize(image.contiguous(), (size[0], size[1]), interpolation)
            resized = transforms.resize(image, (size[0], size[1]), interpolation)
            assert torch.equal(resized, expected) and resized.is_contiguous()
    for key in range(6):
        assert torch.equal(
            OneView(image_size=(24, 36), jitter=0.4)(planes, key).image,
            OneView(image_size=(24, 36), jitter=0.4)(pixels, key).image,
        )


def test_jitter_left_to_the_device_is_the_same_draw_on_both_views() -> None:
    sizes: dict[str, Any] = {"image_size": (48, 72), "token_image_size": (24, 36), "mask": MASK}
    here, later = TwoViews(**sizes), TwoViews(**sizes, defer_jitter=True)
    plain = TwoViews(**sizes, jitter=0.0)
    images, strong = [_photo(key % 2) for key in range(12)], 0
    batch = later.collate([Item(later(image, key), key, 0, -1) for key, image in enumerate(images)])
    assert batch.jitter is not None and batch.jitter.shape == (12, 5) and batch.token_image is not None
    large, small = later.coloured(batch.image, batch.jitter), later.coloured(batch.token_image, batch.jitter)
    for key, image in enumerate(images):
        without, now = plain(image, key), here(image, key)
        assert now.jitter is None and now.mask is not None and without.token_image is not None
        assert torch.equal(batch.mask[key], now.mask)
        jitter = draw_jitter(_after_the_box(image, key), 0.4)
        if batch.jitter[key, 1:3].tolist() == [
            1,
            1,
        ]:  # a draw that does not wait, but for a saturation at its end
            strong += 1
            continue
        assert torch.equal(batch.image[key], without.image)
        assert torch.equal(batch.token_image[key], without.token_image)
        for coloured, view in ((large, without.image), (small, without.token_image)):
            assert torch.equal(
                coloured[key], apply_jitter(view, image, jitter)
            )  # grey is that of the whole image
    assert 0 < strong < 12
    assert here.coloured(batch.image, None) is batch.image
    still = TwoViews(**sizes, jitter=0.0, defer_jitter=True)
    assert still.collate([Item(still(images[0], 0), 0, 0, -1)]).jitter is None


def test_a_mask_of_its_own_key_and_no_view_for_the_tokenizer() -> None:
    view = TwoViews(image_size=(32, 48), token_image_size=(16, 24), mask=MASK)
    image = _noise(60, 70)
    both = view(image, 3)
    other = view(image, 3, mask_key=8, token_view=False)
    assert other.token_image is None and torch.equal(other.image, both.image)
    assert other.mask is not None and torch.equal(other.mask, torch.from_numpy(MASK(8)).flatten())


def _photo(number: int) -> torch.Tensor:
    """One of scikit-learn's two photographs, (3, 427, 640) uint8."""
    return torch.from_numpy(load_sample_images().images[number].copy()).permute(2, 0, 1)


def _after_the_box(image: torch.Tensor, key: int) -> random.Random:
    """The key's generator after box and flip."""
    rng = random.Random(key)
    crop_box(rng, (image.shape[1], image.shape[2]), (0.08, 1.0), (3 / 4, 4 / 3))
    rng.random()
    return rng


def _original(image: torch.Tensor, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Both views in the order of the BEiT authors, by Pillow: jitter the whole, flip, cut, resize twice."""
    rng = random.Random(key)
    box = crop_box(rng, (image.shape[1], image.shape[2]), (0.08, 1.0), (3 / 4, 4 / 3))
    flipped, jitter = rng.random() < 0.5, draw_jitter(rng, 0.4)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for step in jitter.order:
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
        picture = enhancer(picture).enhance(jitter.factors[step])
    left = box.left
    if flipped:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = picture.width - box.left - box.width
    crop = picture.crop((left, box.top, left + box.width, box.top + box.height))
    return (
        np.array(crop.resize((224, 224), Image.Resampling.BICUBIC)),
        np.array(crop.resize((112, 112), Image.Resampling.LANCZOS)),
    )


@pytest.mark.parametrize("photo", [0, 1], ids=["temple", "flower"])
@pytest.mark.parametrize("deferred", [False, True], ids=["in the worker", "on the device"])
def test_views_are_faithful_to_the_original_augmentation(photo: int, deferred: bool) -> None:
    view = TwoViews(image_size=(224, 224), token_image_size=(112, 112), mask=MASK, defer_jitter=deferred)
    off: list[list[torch.Tensor]] = [[], []]
    image = _photo(photo)
    for key in range(30):
        batch = view.collate([Item(view(image, key), 0, 0, -1)])
        assert batch.token_image is not None
        for n, (ours, theirs) in enumerate(
            zip((batch.image, batch.token_image), _original(image, key), strict=True)
        ):
            pixels = view.coloured(ours, batch.jitter)[0].permute(1, 2, 0)
            off[n].append((pixels.int() - torch.from_numpy(theirs).int()).abs().float())
    for differences in map(torch.stack, off):
        assert differences.mean() <= 0.7 and (differences > 4).float().mean() <= 0.015


@pytest.mark.parametrize("source", [(300, 400), (400, 300), (256, 256), (57, 333), (224, 224)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_the_evaluation_view_is_torchvisions_resize_and_centre_crop(
    source: tuple[int, int], crop_pct: float
) -> None:
    image = _noise(*source)
    resize = v2.Resize(int(224 / crop_pct), interpolation=InterpolationMode.BICUBIC, antialias=True)
    expected = v2.CenterCrop(224)(resize(image))
    assert torch.equal(EvalView(image_size=(224, 224), crop_pct=crop_pct)(image, 0).image, expected)


@pytest.mark.parametrize("source", [(300, 400), (90, 70), (40, 500)])
def test_a_wide_evaluation_view_covers_its_size(source: tuple[int, int]) -> None:
    image = _gradient(*source)
    crop = EvalView(image_size=(48, 112), crop_pct=1.0)(image, 0).image
    assert crop.shape == (3, 48, 112)
    for axis in (0, 1):  # centred: as much is missing on one side as on the other
        line = crop[axis].float().mean(axis).sort().values
        assert abs((line[0] + line[-1]).item() - 255) < 6


@pytest.mark.parametrize("rounding", [round, int])
@pytest.mark.parametrize("size", [(224, 224), (47, 112)])
def test_an_ordinary_picture_is_resized_whole_and_cut(size: tuple[int, int], rounding: Any) -> None:
    for crop_pct in (0.875, 1.0):
        view = EvalView(image_size=size, crop_pct=crop_pct, rounding=rounding)
        rows, cols = (int(side / crop_pct + 1e-6) for side in size)
        for height, width in (
            (37, 53),
            (480, 640),
            (333, 501),
            (5, 200),
            (700, 31),
            (224, 224),
            (1, 1),
            (90, 9000),
        ):
            image = _noise(height, width)
            whole = [max(rows, cols * height // width), max(cols, rows * width // height)]
            resized = v2.functional.resize(image, whole, InterpolationMode.BICUBIC, antialias=True)
            top, left = (rounding((full - side) / 2) for full, side in zip(whole, size, strict=True))
            expected = resized[:, top : top + size[0], left : left + size[1]]
            assert torch.equal(view(image, 0).image, expected), (height, width)


@pytest.mark.parametrize("rounding", [round, int])
def test_the_centre_made_alone_is_that_of_the_whole(rounding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = EvalView(image_size=(24, 37), crop_pct=0.9, rounding=rounding)
    for height, width in ((9, 900), (901, 7), (1, 700), (400, 1), (100, 9001), (2, 3000)):
        image = v2.functional.resize(_noise(max(1, height // 3), max(1, width // 3)), [height, width])
        whole = view(image, 0).image
        with monkeypatch.context() as patched:
            patched.setattr(transforms, "_LARGEST", 0)
            alone = view(image, 0).image
        difference = (alone.int() - whole.int()).abs()
        assert alone.shape == (3, 24, 37) and difference.max() <= 2 and difference.float().mean() < 0.5


def test_batches_stack_what_the_items_hold() -> None:
    view = TwoViews(image_size=(32, 48), token_image_size=(16, 24), mask=MASK)
    items = [Item(view(_noise(50, 60), key), 10 + key, 7, -1) for key in range(3)]
    batch = view.collate(items)
    assert batch.image.shape == (3, 3, 32, 48) and batch.token_image is not None
    assert batch.token_image.shape == (3, 3, 16, 24) and batch.mask.shape == (3, 24)
    assert batch.sample.tolist() == [10, 11, 12] and batch.view.tolist() == [7, 7, 7]
    assert batch.ids is None and batch.jitter is None
    assert torch.equal(batch.image[1], items[1].crops.image)
    alone = TwoViews(image_size=(32, 48), token_image_size=None, mask=MASK)
    assert alone.collate([Item(alone(_noise(50, 60), 0), 0, 0, -1)]).token_image is None
    plain = OneView(image_size=(8, 9)).collate(
        [Item(Crops(_noise(8, 9)), 4, 0, 2), Item(Crops(_noise(8, 9)), 5, 0, -1)]
    )
    assert plain.label.tolist() == [2, -1] and plain.label.dtype == torch.int64
    assert plain.image.shape == (2, 3, 8, 9)


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"crop_scale=\[1\.0, 0\.2\]: set two numbers, lower one first"):
        OneView(image_size=(8, 8), crop_scale=(1.0, 0.2))
    with pytest.raises(
        ConfigError, match=r"crop_ratio=\[0, 1\].*\nflip=1\.5: set a prob.*\njitter=-1: set 0"
    ):
        OneView(image_size=(8, 8), crop_ratio=(0, 1), flip=1.5, jitter=-1)
    with pytest.raises(ConfigError, match=r"crop_pct=1\.2: set a share"):
        EvalView(image_size=(8, 8), crop_pct=1.2)
    with pytest.raises(ConfigError, match="token_interpolation=nearest: set lanczos or bicubic"):
        TwoViews(image_size=(8, 8), token_image_size=None, mask=MASK, token_interpolation="nearest")  # pyright: ignore
    with pytest.raises(ConfigError, match=r"stage\.views\.defer_jitter=never: set auto, true or false"):
        TwoViews(image_size=(8, 8), token_image_size=None, mask=MASK, defer_jitter="never")  # pyright: ignore
