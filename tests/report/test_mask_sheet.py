"""The mask sheet: what is drawn is what the generator makes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from beit_pretrain.masking import BlockwiseMask, MaskGenerator, RandomMask
from beit_pretrain.report.mask_sheet import SAMPLES, draw_sheet, mask_sheet

GENERATORS: list[MaskGenerator] = [
    BlockwiseMask(grid=(14, 14), count=75),
    BlockwiseMask(grid=(5, 11), count=20, min_block=4, exact=False),
    RandomMask(grid=(7, 3), count=9),
]


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_sheet_shows_as_many_masks_as_asked_with_their_counts(generator: MaskGenerator) -> None:
    sheet, side = mask_sheet(generator, 5, seed=3).subfigs
    drawn = [axes for axes in sheet.axes if axes.images]
    assert len(drawn) == 5
    keys = Random(3)
    for axes in drawn:
        pixels = np.asarray(axes.images[0].get_array())
        mask = generator(key := keys.getrandbits(64))
        assert axes.get_xlabel() == str(mask.sum())
        assert np.array_equal(pixels > 0, mask)
        if isinstance(generator, BlockwiseMask):
            covered = np.zeros_like(mask)
            for top, left, height, width in generator.blocks(key):
                covered[top : top + height, left : left + width] = True
            assert np.array_equal(pixels == 1, covered)
    assert [axes.get_xlabel() for axes in sheet.axes[5:]] == [""] * (len(sheet.axes) - 5)
    heat = np.asarray(side.axes[0].images[0].get_array())
    assert heat.sum() == pytest.approx(generator.count, rel=0.05)


def test_the_histograms_are_shares_of_all_masks() -> None:
    _, side = mask_sheet(BlockwiseMask(grid=(9, 9), count=30, min_block=6), 2).subfigs
    for axes in side.axes[1:3]:
        heights = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
        assert sum(heights) == pytest.approx(1.0)
    assert f"{SAMPLES:,} masks" in side.get_supxlabel()


def test_title_and_legend_tell_the_kind() -> None:
    exact, loose = (
        mask_sheet(BlockwiseMask(grid=(6, 6), count=9, min_block=4, exact=exact), 1)
        for exact in (True, False)
    )
    assert "Blockwise masks: exactly 9 of 6" in exact.get_suptitle()
    assert "at most 9 of 6" in loose.get_suptitle()
    assert [len(figure.subfigs[0].legends[0].get_texts()) for figure in (exact, loose)] == [3, 2]
    assert "Random" in mask_sheet(RandomMask(grid=(6, 6), count=9), 1).get_suptitle()


def test_the_sheet_is_written_as_a_png_and_equal_for_equal_seeds(tmp_path: Path) -> None:
    generator = RandomMask(grid=(4, 6), count=9)
    first = draw_sheet(generator, path=tmp_path / "new" / "a.png", masks=3, seed=1)
    again = draw_sheet(generator, path=tmp_path / "b.png", masks=3, seed=1)
    other = draw_sheet(generator, path=tmp_path / "c.png", masks=3, seed=2)
    assert first == tmp_path / "new" / "a.png"
    assert np.array_equal(imread(first), imread(again))
    assert not np.array_equal(imread(first), imread(other))
    assert imread(first).std() > 0.05
