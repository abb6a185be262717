"""A tool that is interrupted while it works on its images."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from beit_pretrain.tools.load import Preprocess


def interrupt(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[int]:
    """Ctrl-C at the third batch; how many files were in `folder` at each of them."""
    real, seen = Preprocess.normalize, []

    def interrupted(self: Preprocess, pixels: Tensor) -> Tensor:
        seen.append(len(list(folder.iterdir())))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(Preprocess, "normalize", interrupted)
    return seen
