"""The worst images of an evaluation, kept small, as pictures beside their label maps."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from beit_pretrain.dense import image_score
from beit_pretrain.label_maps import panels

KEPT = 8
SIDE = 480  # pixels of a kept picture's longer side at most
FOLDER = Path("pictures") / "worst"


class Scene(NamedTuple):
    """One image and what became of it, shrunk; of several the best comes first."""

    badness: float  # 1 - mIoU
    order: int  # the sample's number, negative: of equals the earlier one is worse
    accuracy: float
    image: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray  # (H, W) uint8
    predicted: np.ndarray  # (H, W) uint8


class WorstImages:
    """The `KEPT` images of lowest mean IoU over all ranks."""

    def __init__(self) -> None:
        self._scenes: list[Scene] = []  # a heap, the best of them on top

    def offer(self, sample: int, image: Tensor, truth: Tensor, predicted: Tensor, classes: int) -> None:
        """Image (3, H, W), label map and prediction (H, W), all uint8; one without a labelled pixel is left out."""
        miou, accuracy = image_score(predicted, truth, classes)
        place = (1 - miou, -sample)
        full = len(self._scenes) == KEPT
        if math.isnan(miou) or (full and place <= self._scenes[0][:2]):
            return
        pixels = _shrunk(image).transpose(1, 2, 0)
        scene = Scene(*place, accuracy, pixels, *(_shrunk(part[None])[0] for part in (truth, predicted)))
        if full:
            heapq.heapreplace(self._scenes, scene)
        else:
            heapq.heappush(self._scenes, scene)

    def write(self, run_dir: Path, classes: list[str], name: Callable[[int], str]) -> list[dict[str, Any]]:
        """Draw them into the run's folder, on rank 0, and forget them; all ranks must ask.

        Returns for each, worst first, its `name`, `miou`, `accuracy` and `picture` (below `run_dir`).
        """
        mine, self._scenes = self._scenes, []
        scenes = sorted(_of_all_ranks(mine), key=lambda scene: scene[:2], reverse=True)[:KEPT]
        told, writes = [], not dist.is_initialized() or dist.get_rank() == 0
        for number, scene in enumerate(scenes):
            path = FOLDER / f"{number}.png"
            told.append(
                {
                    "name": name(-scene.order),
                    "miou": 1 - scene.badness,
                    "accuracy": scene.accuracy,
                    "picture": path.as_posix(),
                }
            )
            if writes:
                title = f"{Path(told[-1]['name']).name}: mIoU {100 * told[-1]['miou']:.1f}%"
                _save(panels(scene.image, scene.truth, scene.predicted, classes, title), run_dir / path)
        if writes:
            for number in range(len(scenes), KEPT):  # of an evaluation with more images
                (run_dir / FOLDER / f"{number}.png").unlink(missing_ok=True)
        return told


def _shrunk(part: Tensor) -> np.ndarray:
    """(c, H, W) uint8 with a longer side of at most `SIDE`; by nearest, as label maps have to be."""
    factor = min(1.0, SIDE / max(part.shape[-2:]))
    size = [max(1, round(side * factor)) for side in part.shape[-2:]]
    return F.interpolate(part[None], size=size, mode="nearest-exact")[0].cpu().numpy()


def _of_all_ranks(scenes: list[Scene]) -> list[Scene]:
    if not dist.is_initialized():
        return scenes
    gathered: list[list[Scene]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, scenes)
    return [scene for part in gathered for scene in part]


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    picture.save(draft, format="PNG")
    draft.replace(path)
