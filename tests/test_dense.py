"""Dense prediction against the whole image at full size, and its score against loops and torchmetrics."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_ranks import CLASSES, labelled_images, work
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex
from torchvision.transforms.v2 import functional

from beit_pretrain import dense
from beit_pretrain.dense import SegmentationScore, Sliding, image_score
from beit_pretrain.errors import ConfigError, DataError

Model = Callable[[Tensor], Tensor]


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth image with noise, (3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 6 + 2, width // 6 + 2, generator=generator) * 255
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    noise = 8 * torch.randn(3, height, width, generator=generator)
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def convolution(classes: int = 7, stride: int = 4) -> Model:
    """Logits from the pixels alone."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, 3, stride, stride, generator=generator) / stride

    def model(batch: Tensor) -> Tensor:
        assert batch.dtype == torch.uint8
        return F.conv2d(batch.float() / 64 - 2, weight, stride=stride)

    return model


def lopsided(classes: int = 7) -> Model:
    """Logits that hang on the place in the window, differently in each direction."""
    pixels = convolution(classes)

    def model(batch: Tensor) -> Tensor:
        logits = pixels(batch)  # (B, C, s, s')
        y = torch.arange(logits.shape[2])[:, None] / logits.shape[2]
        x = torch.arange(logits.shape[3])[None] / logits.shape[3]
        return (
            torch.sin(2 * logits) * (0.5 + x**2)
            + (3 * y - 1).tanh() * torch.arange(classes)[:, None, None] / 3
        )

    return model


def plain_size(size: tuple[int, int], crop: tuple[int, int], scale: float) -> tuple[int, int]:
    """The working size, in exact fractions."""
    short = Fraction(min(crop), min(size)) * Fraction(scale)
    factor = max(short, Fraction(crop[0], size[0]), Fraction(crop[1], size[1]))
    height, width = (math.floor(side * factor + Fraction(1, 2)) for side in size)
    return max(height, crop[0]), max(width, crop[1])


def plain_logits(
    model: Model, working: Tensor, size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Logits (C, H, W) of sliding windows, everything at full size and one window at a time."""
    height, width = working.shape[1:]
    total, count = torch.zeros(()), torch.zeros(1, height, width)
    bottoms = [*range(crop[0], height, stride[0]), height]
    rights = [*range(crop[1], width, stride[1]), width]
    for bottom in bottoms:
        for right in rights:
            top, left = bottom - crop[0], right - crop[1]
            window = model(working[None, :, top:bottom, left:right])
            window = F.interpolate(window, crop, mode="bilinear", align_corners=False)[0]
            border = (left, width - right, top, height - bottom)
            total = total + F.pad(window, border)
            count = count + F.pad(torch.ones(1, *crop), border)
    return F.interpolate((total / count)[None], size, mode="bilinear", align_corners=False)[0]


def plain_scores(
    model: Model,
    image: Tensor,
    sizes: list[tuple[int, int]],
    crop: tuple[int, int] | None,
    stride: tuple[int, int],
    flip: bool,
) -> Tensor:
    """Scores (C, H, W) of all sizes and flips; without a crop the window is the working image."""
    size = (image.shape[1], image.shape[2])
    found: list[Tensor] = []
    for height, width in sizes:
        working = functional.resize(image, [height, width], antialias=True)
        window = crop or (height, width)
        found.append(plain_logits(model, working, size, window, stride))
        if flip:
            found.append(plain_logits(model, working.flip(2), size, window, stride).flip(2))
    return found[0] if len(found) == 1 else torch.stack([logits.softmax(0) for logits in found]).mean(0)


def assert_equal_labels(found: Tensor, scores: Tensor, atol: float) -> None:
    """The best class everywhere, or one whose score is not told apart from the best."""
    assert found.dtype == torch.uint8 and found.shape == scores.shape[1:]
    chosen = scores.gather(0, found[None].long())[0]
    assert (scores.amax(0) - chosen).max() <= 2 * atol
    assert (found == scores.argmax(0)).double().mean() > 0.999


@pytest.mark.parametrize("model", [convolution(), lopsided()], ids=["pixels", "lopsided"])
@pytest.mark.parametrize(
    ("size", "scales", "flip"),
    [
        ((37, 53), [1.0], False),
        ((53, 37), [1.0], True),
        ((37, 53), [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], True),
        ((41, 30), [1.3, 2.2], False),
        ((9, 13), [1.0, 1.5], False),  # below the crop
        ((16, 24), [1.0], False),  # the crop itself
        ((140, 33), [0.5, 1.0], True),
    ],
)
def test_scores_are_those_of_the_whole_image_at_full_size(
    model: Model, size: tuple[int, int], scales: list[float], flip: bool
) -> None:
    image = picture(*size)
    sliding = Sliding(crop=[16, 24], patch_size=4, stride=[11, 15], scales=scales, flip=flip, windows=3)
    sizes = [plain_size(size, (16, 24), scale) for scale in scales]
    expected = plain_scores(model, image, sizes, (16, 24), (11, 15), flip)
    found = torch.cat(list(sliding.scores(model, image)), dim=1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert_equal_labels(sliding.predict(model, image), expected, 1e-5)
    assert len(expected.argmax(0).unique()) >= 4


@pytest.mark.parametrize("flip", [False, True])
def test_a_whole_image_is_one_window_in_whole_patches(flip: bool) -> None:
    image, model = picture(37, 53), lopsided()
    sliding = Sliding(crop=[16, 24], patch_size=4, mode="whole", scales=[0.5, 1.0, 1.6, 0.1], flip=flip)
    # The short side is 8, 16, 25.6 and 1.6, the long one 11.5, 22.9, 36.7 and 2.3.
    sizes = [(8, 12), (16, 24), (24, 36), (4, 4)]
    assert list(sliding.working_sizes(37, 53)) == sizes
    expected = plain_scores(model, image, sizes, None, (1, 1), flip)
    found = torch.cat(list(sliding.scores(model, image)), dim=1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert_equal_labels(sliding.predict(model, image), expected, 1e-5)


def test_scales_below_the_crop_are_one_pass_worth_as_many() -> None:
    scales = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    sliding = Sliding(crop=[512, 512], patch_size=16, scales=scales)
    found = sliding.working_sizes(2000, 1500)
    assert list(found) == [(683, 512), (853, 640), (1024, 768), (1195, 896)]
    assert list(found.values()) == pytest.approx([3 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert list(sliding.working_sizes(512, 683)) == [(512, 683), (640, 854), (768, 1025), (896, 1195)]
    # 512 x 1024 windows: the width decides, and 1.25 times the short side is not enough to.
    wide = Sliding(crop=[512, 1024], patch_size=16, scales=[1.0, 1.25, 2.0])
    assert wide.working_sizes(600, 800) == pytest.approx({(768, 1024): 2 / 3, (1024, 1365): 1 / 3})
    calls: Counter[tuple[int, ...]] = Counter()

    def model(batch: Tensor) -> Tensor:
        calls[tuple(batch.shape)] += 1
        return convolution()(batch)

    Sliding(crop=[16, 16], patch_size=4, scales=[0.5, 1.0], windows=4).predict(model, picture(16, 61))
    assert calls == {(4, 3, 16, 16): 1, (2, 3, 16, 16): 1}  # at 0, 10, 20, 30, 40 and 45


def test_logits_of_any_resolution_and_precision_will_do() -> None:
    image = picture(37, 53)
    sliding = Sliding(crop=[16, 24], patch_size=4, windows=2)
    for stride in (1, 2, 8):
        model = convolution(stride=stride)
        assert sliding.working_sizes(37, 53) == {(17, 24): 1.0}
        expected = plain_scores(model, image, [(17, 24)], (16, 24), (10, 16), flip=False)
        assert_equal_labels(sliding.predict(model, image), expected, 1e-5)
    model = convolution()
    found = torch.cat(list(sliding.scores(lambda batch: model(batch).bfloat16(), image)), dim=1)
    expected = plain_scores(
        lambda b: model(b).bfloat16().float(), image, [(17, 24)], (16, 24), (10, 16), False
    )
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_prediction_keeps_no_gradient() -> None:
    layer = torch.nn.Conv2d(3, 5, 4, 4)
    strips = Sliding(crop=[16, 16], patch_size=4).scores(lambda batch: layer(batch.float()), picture(20, 20))
    assert not any(strip.requires_grad for strip in strips)
    assert torch.is_grad_enabled()


class Largest(TorchDispatchMode):
    """The largest tensor of scores of `classes` that any operation gave, in bytes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor) and self.classes in tensor.shape:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return found


@pytest.mark.parametrize("size", [(90, 61), (11, 15)], ids=["above the crop", "below it"])
@pytest.mark.parametrize("flip", [False, True])
def test_strips_of_any_height_agree(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], flip: bool
) -> None:
    image, model = picture(*size), lopsided()
    sliding = Sliding(crop=[16, 24], patch_size=4, scales=[1.0, 1.7] if flip else [1.0], flip=flip)
    heights: dict[int, set[int]] = {}
    whole = next(sliding.scores(model, image))
    assert whole.shape == (7, *size)
    labels = sliding.predict(model, image)
    for budget in (1, 12_000, 30_000, 100_000):
        monkeypatch.setattr(dense, "STRIP_BYTES", budget)
        strips = list(sliding.scores(model, image))
        heights[budget] = {strip.shape[1] for strip in strips[:-1]}
        assert torch.allclose(torch.cat(strips, dim=1), whole, rtol=0, atol=1e-6)
        assert (sliding.predict(model, image) == labels).double().mean() > 0.999
    assert heights[1] == {1}
    assert heights[30_000] != heights[1] and all(len(h) <= 1 for h in heights.values())


@pytest.mark.parametrize("width", [60, 400], ids=["small image, large windows", "large image, small windows"])
def test_no_tensor_is_larger_than_the_budget_however_high_the_image(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    budget = 600_000
    monkeypatch.setattr(dense, "STRIP_BYTES", budget)
    sliding = Sliding(crop=[32, 120], patch_size=4, scales=[1.0, 2.0], flip=True)
    for height in (100, 700):
        image = picture(height, width)
        with Largest(classes=61) as seen:
            sliding.predict(convolution(classes=61, stride=8), image)
        assert budget / 2 < seen.bytes <= budget


MEMORY = """
import resource, torch
from beit_pretrain.dense import Sliding

torch.set_num_threads(1)
layer = torch.nn.Conv2d(3, 150, 4, 4)
model = lambda batch: layer(batch.float() / 255)
resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
Sliding(crop=[256, 256], patch_size=16).predict(model, torch.zeros(3, 256, 256, dtype=torch.uint8))
before = resident()
image = torch.randint(256, (3, 1600, 1000), dtype=torch.uint8)
Sliding(crop=[512, 512], patch_size=16).predict(model, image)
several = Sliding(crop=[256, 256], patch_size=16, scales=[0.5, 1.0, 1.5], flip=True)
several.predict(model, image[:, :600, :700])
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_a_large_image_takes_a_fraction_of_its_scores() -> None:
    """The scores alone are 0.9 GiB, those of the smaller image 0.2 GiB for each of four passes."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400


def test_an_image_of_thousands_of_windows_is_refused_before_the_first() -> None:
    def model(batch: Tensor) -> Tensor:
        raise AssertionError(batch.shape)

    for mode in ("slide", "whole"):
        for shape in ((1, 10_000), (10_000, 1), (3, 769)):
            with pytest.raises(DataError, match=rf"^{shape[1]} x {shape[0]} pixels: .* at most 256 times"):
                Sliding(crop=[512, 512], patch_size=16, mode=mode).predict(model, torch.zeros(3, *shape))


def test_the_way_is_told_in_one_line() -> None:
    def told(**options: Any) -> str:
        return Sliding(**{"crop": [512, 512], "patch_size": 16, **options}).describe()

    assert told() == "sliding windows of 512 x 512, stride 341 x 341; one scale"
    assert told(scales=[0.5, 1, 1.75], flip=True, stride=[256, 512]) == (
        "sliding windows of 512 x 512, stride 256 x 512; scales 0.5, 1, 1.75, flipped too"
    )
    assert told(crop=[640, 640]).startswith("sliding windows of 640 x 640, stride 426 x 426;")
    assert (
        told(mode="whole", crop=[512, 640], flip=True)
        == "whole images, short side 512; one scale, flipped too"
    )
    assert told(scales=[1.5]).endswith("; scale 1.5")


def test_all_faults_of_the_options_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Sliding(crop=[512], patch_size=0, mode="tile", stride=[0, 1], scales=[], flip="yes", windows=0)  # pyright: ignore
    assert caught.value.faults == [
        "stage.predict.patch_size=0: set a whole number from 1",
        "stage.predict.crop=[512]: set two whole numbers from 1, rows and columns",
        "stage.predict.mode=tile: set slide or whole",
        "stage.predict.stride=[0, 1]: set two whole numbers from 1, rows and columns, or null",
        "stage.predict.scales=[]: set a list of one or more numbers above 0",
        "stage.predict.flip=yes: set true or false",
        "stage.predict.windows=0: set a whole number from 1",
    ]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"crop": 512}, r"crop=512: set two whole numbers"),
        ({"crop": [512, 500]}, r"crop=\[512, 500\] is no whole number of patches: set multiples of 16"),
        ({"stride": [341, 513]}, r"stride=\[341, 513\] leaves gaps between windows of \[512, 512\]"),
        ({"stride": 341}, r"stride=341: set two whole numbers"),
        (
            {"stride": [341, 341], "mode": "whole"},
            r"stride=\[341, 341\], but .*mode=whole has a single window: set .*stride=null",
        ),
        ({"scales": [1.0, 0.0]}, r"scales=\[1.0, 0.0\]: set a list"),
        ({"scales": [1.0, math.inf]}, r"scales=\[1.0, inf\]: set a list"),
        ({"scales": 1.0}, r"scales=1.0: set a list"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"^stage\.predict\.{fault}"):
        Sliding(**{"crop": [512, 512], "patch_size": 16, **options})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one scale", "two scales"])
def test_beit_b_on_2000_x_1500_pixels_takes_at_most_four_gigabytes(how: str) -> None:
    """The real encoder and head with 150 classes, in a process of its own; one scale also against plain float32."""
    script = Path(__file__).parents[1] / "benchmarks" / "dense.py"
    plain = ["--plain"] if how == "one scale" else []
    done = subprocess.run(
        [sys.executable, str(script), "--only", how, *plain], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak_gb"] <= 4.0
    assert found.get("differ", 0.0) < 1e-4


# --- the score ----------------------------------------------------------------------------------------------


def counted(images: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The score of images, pixel by pixel."""
    both, true, predicted, wrong, ignored = Counter(), Counter(), Counter(), Counter(), 0
    for guess, label_map in images:
        for p, t in zip(guess.flatten().tolist(), label_map.flatten().tolist(), strict=True):
            if t == 255:
                ignored += 1
                continue
            true[t] += 1
            predicted[p] += 1
            both[t] += p == t
            wrong[t, p] += p != t
    every = range(CLASSES)
    iou = [both[c] / (true[c] + predicted[c] - both[c]) if true[c] + predicted[c] else None for c in every]
    accuracy = [both[c] / true[c] if true[c] else None for c in every]
    known = [[value for value in values if value is not None] for values in (iou, accuracy)]
    order = sorted((pair for pair in wrong if wrong[pair]), key=lambda pair: (-wrong[pair], pair))
    return {
        "miou": pytest.approx(sum(known[0]) / len(known[0]), rel=1e-12),
        "macc": pytest.approx(sum(known[1]) / len(known[1]), rel=1e-12),
        "aacc": sum(both.values()) / sum(true.values()),
        "iou": iou,
        "accuracy": accuracy,
        "pixels": [true[c] for c in every],
        "mistakes": [[*pair, wrong[pair]] for pair in order[:20]],
        "ignored": ignored / (ignored + sum(true.values())),
        "images": len(images),
    }


def test_segmentations_are_scored_as_pixel_by_pixel_and_by_torchmetrics() -> None:
    images = labelled_images(0)
    score = SegmentationScore(CLASSES)
    for image in images:
        score.update(*image)
    found = score.result()
    assert found == counted(images)
    assert found["iou"][7] == 0 and found["accuracy"][7] is None  # predicted, never there
    assert found["iou"][8] is None and found["accuracy"][8] is None
    predicted, labels = (
        torch.cat([part.flatten() for part in parts]).long() for parts in zip(*images, strict=True)
    )
    options: dict[str, Any] = {"num_classes": CLASSES, "ignore_index": 255}
    pairs = MulticlassConfusionMatrix(**options)(predicted, labels)
    assert found["pixels"] == pairs.sum(1).tolist()
    assert len(found["mistakes"]) == 20 and all(pairs[t, p] == n for t, p, n in found["mistakes"])
    iou = MulticlassJaccardIndex(average=None, **options)(predicted, labels)
    accuracy = MulticlassAccuracy(average=None, **options)(predicted, labels)
    # torchmetrics has 0 where there is nothing to score, and counts that in its means.
    assert [value or 0.0 for value in found["iou"]] == pytest.approx(iou.tolist(), rel=1e-6)
    assert [value or 0.0 for value in found["accuracy"]] == pytest.approx(accuracy.tolist(), rel=1e-6)
    assert found["miou"] == pytest.approx(iou[:8].mean().item(), rel=1e-6)
    assert found["macc"] == pytest.approx(accuracy[:7].mean().item(), rel=1e-6)
    score.reset()
    score.update(*images[1])
    assert score.result() == counted(images[1:2])


def test_a_score_of_nothing_is_no_number() -> None:
    score = SegmentationScore(3)
    for images in (0, 1):
        found = score.result()
        assert all(math.isnan(found[name]) for name in ("miou", "macc", "aacc"))
        assert found["iou"] == found["accuracy"] == [None] * 3 and found["mistakes"] == []
        assert found["images"] == images
        nothing = torch.full((4, 5), 255, dtype=torch.uint8)
        score.update(torch.zeros_like(nothing), nothing)
    assert score.result()["ignored"] == 1
    assert all(map(math.isnan, image_score(torch.zeros_like(nothing), nothing, 3)))


def test_the_score_of_one_image_is_over_what_it_shows_or_was_seen_in_it() -> None:
    for predicted, label_map in labelled_images(0):
        expected = counted([(predicted, label_map)])
        assert image_score(predicted, label_map, CLASSES) == (expected["miou"], expected["aacc"])
    label_map = torch.tensor([[0, 0, 0, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 2, 1]], dtype=torch.uint8)
    # Class 0: 2 of 3. Class 2 was seen where it is not. Class 1 was seen where nobody looks.
    assert image_score(predicted, label_map, 3) == pytest.approx(((2 / 3 + 0) / 2, 2 / 3))


def test_the_score_counts_beyond_what_single_precision_can() -> None:
    score = SegmentationScore(2)
    label_map = torch.zeros(4100, 4100, dtype=torch.uint8)  # just above 2^24 pixels
    label_map[0, 0] = 1
    score.update(torch.zeros_like(label_map), label_map)
    assert score.result()["pixels"] == [4100**2 - 1, 1]


def test_a_prediction_of_another_size_is_refused() -> None:
    predicted, label_map = (torch.zeros(size, dtype=torch.uint8) for size in ((4, 6), (6, 4)))
    with pytest.raises(ValueError, match=r"predicted \(4, 6\) and label map \(6, 4\) differ in size"):
        SegmentationScore(3).update(predicted, label_map)


def test_the_score_of_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    spawn(work, args=(tmp_path,), nprocs=2)
    expected = counted([*labelled_images(0), *labelled_images(1)])
    for rank in range(2):
        once, again = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert once == again == expected
