"""Dense prediction: a class for every pixel of an image of any size, and how well it agrees with a label map.

Legend: C classes, (H, W) an image's own size, (h, w) the working size that the model sees it at, (S, S') a
window of the working image, (s, s') the model's logits of a window, n rows of a strip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from beit_pretrain.errors import ConfigError
from beit_pretrain.evaluation import sum_over_ranks
from beit_pretrain.label_maps import IGNORED, check_aspect

Model = Callable[[Tensor], Tensor]  # (B, 3, S, S') uint8 -> logits (B, C, s, s'); it normalises for itself

STRIP_BYTES = 2**24  # the largest tensor behind a strip of scores; strips that fit a cache are faster


class Sliding:
    """The class of every pixel from logits of overlapping windows, at one or more sizes of the image.

    At scale r the image keeps its aspect, its short side is r times the crop's and no side is below the crop:
    mmsegmentation's test of BEiT. Windows lie `stride` apart, the last ones end at the border. A window's
    logits are brought to its size, averaged where windows overlap, and the average is brought to the image's
    own size, bilinearly throughout. Of several passes (scales, mirrored) the probabilities are averaged.

    crop: (rows, cols) of a window, the encoder's training crop.
    patch_size: pixels along a patch's side.
    mode: `whole` is one window as large as the image at each scale, in whole patches; crop is then its scale.
    stride: (rows, cols) between windows; None is two thirds of the crop.
    flip: mirrored passes too.
    windows: windows per forward pass.
    Raises ConfigError, all faults at once.
    """

    def __init__(
        self,
        *,
        crop: Sequence[int],
        patch_size: int,
        mode: Literal["slide", "whole"] = "slide",
        stride: Sequence[int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        windows: int = 1,
    ) -> None:
        faults = [*_crop_faults(crop, patch_size, mode, stride), *_pass_faults(scales, flip, windows)]
        if faults:
            raise ConfigError(faults)
        self.crop = (crop[0], crop[1])
        self.patch_size = patch_size
        self.mode = mode
        # At least 1: a crop of a single pixel has no two thirds.
        self.stride = tuple(max(1, side * 2 // 3) for side in crop) if stride is None else tuple(stride)
        self.scales = tuple(scales)
        self.flip = flip
        self.windows = windows

    def predict(self, model: Model, image: Tensor) -> Tensor:
        """The label map (H, W) uint8 of an image (3, H, W) uint8, on its device; of equal scores the lowest class.

        Memory holds the logits of all windows as the model gave them, and strips of a few rows of the rest: it
        does not grow with the image's height.
        """
        # On the CPU max is twice as fast as argmax.
        return torch.cat([scores.max(0).indices.to(torch.uint8) for scores in self.scores(model, image)])

    @torch.no_grad()
    def scores(self, model: Model, image: Tensor) -> Iterator[Tensor]:
        """Strips (C, n, W) of the image's rows from the top: logits of one pass, mean probabilities of several."""
        height, width = image.shape[1:]
        check_aspect(height, width)
        passes = [
            _Pass(self._windows(model, image, size, mirrored), size, weight / (1 + self.flip))
            for size, weight in self.working_sizes(height, width).items()
            for mirrored in ([False, True] if self.flip else [False])
        ]
        rows = min(one.strip_rows(height, width) for one in passes)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            strips = (one.resized_rows((height, width), start, stop) for one in passes)
            if len(passes) == 1:
                yield next(strips)
                continue
            total = next(strips).softmax(0).mul_(passes[0].weight)
            for one, strip in zip(passes[1:], strips, strict=True):
                total.add_(strip.softmax(0), alpha=one.weight)
            yield total

    def working_sizes(self, height: int, width: int) -> dict[tuple[int, int], float]:
        """The sizes (h, w) that an image of (height, width) is seen at, each with its share of the scales.

        Below the crop all scales come to the same size, which is then worth as many.
        """
        found: dict[tuple[int, int], float] = {}
        sides = (height, width)
        for scale in self.scales:
            factor = scale * min(self.crop) / min(sides)
            if self.mode == "whole":
                patch = self.patch_size
                h, w = (max(1, _half_up(side * factor / patch)) * patch for side in sides)
            else:
                factor = max(factor, self.crop[0] / height, self.crop[1] / width)
                h, w = (max(_half_up(side * factor), self.crop[i]) for i, side in enumerate(sides))
            found[h, w] = found.get((h, w), 0.0) + 1 / len(self.scales)
        return found

    def describe(self) -> str:
        """One line on how pixels get their class, for reports."""
        rows, cols = self.crop
        how = (
            f"sliding windows of {rows} x {cols}, stride {self.stride[0]} x {self.stride[1]}"
            if self.mode == "slide"
            else f"whole images, short side {min(self.crop)}"
        )
        several = f"scales {', '.join(f'{scale:g}' for scale in self.scales)}"
        one = "one scale" if self.scales == (1.0,) else f"scale {self.scales[0]:g}"
        return f"{how}; {several if len(self.scales) > 1 else one}{', flipped too' if self.flip else ''}"

    def _windows(self, model: Model, image: Tensor, size: tuple[int, int], mirrored: bool) -> list[_Window]:
        """The windows of an image at `size`; those of a mirrored one are mirrored back, and so are their places."""
        working = functional.resize(image, list(size), antialias=True)  # (3, h, w)
        if mirrored:
            working = working.flip(-1)
        window = self.crop if self.mode == "slide" else size
        places = [
            (top, left)
            for top in _starts(size[0], window[0], self.stride[0])
            for left in _starts(size[1], window[1], self.stride[1])
        ]
        found: list[_Window] = []
        for some in (places[i : i + self.windows] for i in range(0, len(places), self.windows)):
            batch = torch.stack([working[:, y : y + window[0], x : x + window[1]] for y, x in some])
            for (top, left), logits in zip(some, model(batch).float(), strict=True):
                if mirrored:
                    logits, left = logits.flip(-1), size[1] - window[1] - left
                found.append(_Window(logits, window, top, left))
        return found


class _Window:
    """The logits of a window, (C, s, s') float32, its size (S, S') and where it lies in the working image."""

    def __init__(self, logits: Tensor, size: tuple[int, int], top: int, left: int) -> None:
        self.logits = logits
        self.rows = range(top, top + size[0])
        self.cols = slice(left, left + size[1])
        self.size = size

    def resized_rows(self, start: int, stop: int) -> Tensor:
        """The window's own rows [start, stop) at its full size, (C, n, S')."""
        return _resized_rows(lambda a, b: self.logits[:, a:b], self.logits.shape[1], self.size, start, stop)


class _Pass:
    """One look at the image: its windows at one working size, and what they count among all passes."""

    def __init__(self, windows: Sequence[_Window], size: tuple[int, int], weight: float) -> None:
        self.windows = windows
        self.size = size
        self.weight = weight
        self.classes = len(windows[0].logits)
        self._overlap = windows[0].logits.new_zeros(size)  # (h, w), windows over each pixel
        for window in windows:
            self._overlap[window.rows.start : window.rows.stop, window.cols] += 1

    def strip_rows(self, height: int, width: int) -> int:
        """Rows of an image (height, width) of which no tensor on the way is larger than STRIP_BYTES; at least 1."""
        room = STRIP_BYTES // (4 * self.classes * max(width, self.size[1]))
        # n rows of the image hang on fewer than (n - 1) h / H + 3 of the working image.
        return max(1, min(room, 1 + int((room - 3) * height / self.size[0])))

    def resized_rows(self, size: tuple[int, int], start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the averaged logits at `size`, (C, n, W)."""
        return _resized_rows(self.rows, self.size[0], size, start, stop)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the averaged logits at the working size, (C, n, w)."""
        total = self._overlap.new_zeros(self.classes, stop - start, self.size[1])
        for window in self.windows:
            first, last = max(start, window.rows.start), min(stop, window.rows.stop)
            if first < last:
                part = window.resized_rows(first - window.rows.start, last - window.rows.start)
                total[:, first - start : last - start, window.cols] += part
        return total.div_(self._overlap[start:stop])


def _resized_rows(
    read: Callable[[int, int], Tensor], height: int, size: tuple[int, int], start: int, stop: int
) -> Tensor:
    """Rows [start, stop) of F.interpolate(x, size, mode="bilinear", align_corners=False), (C, n, W).

    read(a, b) gives rows [a, b) of x, (C, b - a, w), which has `height` rows: only those needed are asked for.
    """
    # In float32 as F.interpolate does it: at 1000 pixels from the border its rounding is 3e-5 of a pixel.
    centre = torch.arange(start, stop, dtype=torch.float32) + 0.5
    place = (centre * (height / size[0]) - 0.5).clamp_(min=0)
    upper = place.long().clamp_(max=height - 1)
    lower = (upper + 1).clamp_(max=height - 1)
    first = int(upper[0])
    part = read(first, int(lower[-1]) + 1)
    upper, lower, weight = (t.to(part.device) for t in (upper - first, lower - first, place - upper))
    mixed = torch.lerp(part.index_select(1, upper), part.index_select(1, lower), weight[:, None])
    # What is left is the other direction: the rows stay as they are.
    return F.interpolate(mixed[None], (stop - start, size[1]), mode="bilinear", align_corners=False)[0]


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side; the last one is moved back so that it ends at the border."""
    count = -(-(length - window) // stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


def _half_up(number: float) -> int:
    return int(number + 0.5)


class SegmentationScore:
    """mIoU, mean class accuracy and pixel accuracy from one table of (true, predicted) pixels over all ranks.

    Pixels without a class are left out of the table. Counts are whole numbers: ranks and order change nothing.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._pairs = torch.zeros(self.classes, self.classes, dtype=torch.int64)  # (true, predicted)
        self._seen = torch.zeros(2, dtype=torch.int64)  # images, ignored pixels

    def update(self, predicted: Tensor, label_map: Tensor) -> None:
        """Adds an image: predicted (H, W) uint8, label_map (H, W) uint8 with 255 = ignored."""
        pairs = _pairs(predicted, label_map, self.classes)
        self._pairs += pairs
        self._seen += torch.tensor([1, label_map.numel() - int(pairs.sum())])

    def result(self) -> dict[str, Any]:
        """`miou`, `macc`, `aacc`, `iou`, `accuracy`, `pixels`, `mistakes`, `ignored`, `images`; all ranks must ask.

        `iou` and `accuracy` are lists over the classes: None for one that is neither labelled nor predicted, or not
        labelled. `miou` and `macc` are means over the others, NaN without any. `mistakes` are the at most 20 most
        frequent, each [true class, predicted class, pixels]; `ignored` is the share of all pixels.
        """
        pairs = sum_over_ranks(self._pairs)
        images, ignored = sum_over_ranks(self._seen).tolist()
        iou, accuracy = _class_scores(pairs)
        labelled = int(pairs.sum())
        wrong = pairs.clone().fill_diagonal_(0).flatten()
        places = wrong.argsort(descending=True, stable=True)[:20].tolist()
        return {
            "miou": _mean(iou),
            "macc": _mean(accuracy),
            "aacc": _ratio(int(pairs.trace()), labelled),
            "iou": iou,
            "accuracy": accuracy,
            "pixels": pairs.sum(1).tolist(),
            "mistakes": [[*divmod(p, self.classes), int(wrong[p])] for p in places if wrong[p]],
            "ignored": _ratio(ignored, ignored + labelled),
            "images": images,
        }


def image_score(predicted: Tensor, label_map: Tensor, classes: int) -> tuple[float, float]:
    """mIoU and pixel accuracy of one image, NaN where every pixel is ignored.

    The mean is over the classes that are labelled or predicted in this image: a class that is not there, but was
    seen, counts as 0.
    """
    pairs = _pairs(predicted, label_map, classes)
    iou, _ = _class_scores(pairs)
    return _mean(iou), _ratio(int(pairs.trace()), int(pairs.sum()))


def _pairs(predicted: Tensor, label_map: Tensor, classes: int) -> Tensor:
    """How many pixels of each true class were given each class, (C, C) int64 on the CPU; ignored ones left out."""
    if predicted.shape != label_map.shape:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and label map {tuple(label_map.shape)} differ in size"
        )
    label_map = label_map.to(predicted.device)
    there = label_map != IGNORED
    entries = label_map[there].long() * classes + predicted[there]
    return entries.bincount(minlength=classes**2).view(classes, classes).cpu()


def _class_scores(pairs: Tensor) -> tuple[list[float | None], list[float | None]]:
    """IoU and accuracy of each class; None for a class that has none."""
    right, true, predicted = pairs.diagonal().tolist(), pairs.sum(1).tolist(), pairs.sum(0).tolist()
    iou = [r / (t + p - r) if t + p else None for r, t, p in zip(right, true, predicted, strict=True)]
    return iou, [r / t if t else None for r, t in zip(right, true, strict=True)]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return _ratio(math.fsum(known), len(known))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _crop_faults(crop: Any, patch_size: Any, mode: Any, stride: Any) -> Iterator[str]:
    key = "stage.predict"
    if not _is_whole(patch_size):
        yield f"{key}.patch_size={patch_size}: set a whole number from 1"
    if not _is_pair(crop):
        yield f"{key}.crop={crop}: set two whole numbers from 1, rows and columns"
    elif _is_whole(patch_size) and any(side % patch_size for side in crop):
        yield f"{key}.crop={crop} is no whole number of patches: set multiples of {patch_size}"
    if mode not in ("slide", "whole"):
        yield f"{key}.mode={mode}: set slide or whole"
    if stride is None:
        return
    if mode == "whole":
        yield f"{key}.stride={stride}, but {key}.mode=whole has a single window: set {key}.stride=null"
    elif not _is_pair(stride):
        yield f"{key}.stride={stride}: set two whole numbers from 1, rows and columns, or null"
    elif _is_pair(crop) and any(step > side for step, side in zip(stride, crop, strict=True)):
        yield f"{key}.stride={stride} leaves gaps between windows of {crop}: set at most that"


def _pass_faults(scales: Any, flip: Any, windows: Any) -> Iterator[str]:
    key = "stage.predict"
    numbers = isinstance(scales, Sequence) and all(type(s) in (int, float) for s in scales)
    if not numbers or not scales or not all(0 < s < math.inf for s in scales):
        yield f"{key}.scales={scales}: set a list of one or more numbers above 0"
    if not isinstance(flip, bool):
        yield f"{key}.flip={flip}: set true or false"
    if not _is_whole(windows):
        yield f"{key}.windows={windows}: set a whole number from 1"


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_whole, value))
