"""A sheet of masks beside the statistics that tell one kind from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from beit_pretrain.masking import Block, BlockwiseMask, MaskGenerator

SAMPLES = 2000  # masks behind the statistics: a patch's share of being hidden is then good to about 1 %

_INK, _FAINT = "#1f2933", "#7b8794"
_VISIBLE, _BLOCK, _SINGLE = "#e6eaef", "#34557a", "#d98e32"
_PALETTE = ListedColormap([_VISIBLE, _BLOCK, _SINGLE])
_HEIGHT, _SIDE, _CAPTION = 6.2, 3.4, 0.3  # inches: height and width of the statistics, number below a mask


def draw_sheet(generator: MaskGenerator, *, path: Path, masks: int = 24, seed: int = 0) -> Path:
    """Writes `mask_sheet` as a PNG to `path`, whose folder is made, and gives the path back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask_sheet(generator, masks, seed=seed).savefig(path, dpi=150, format="png")
    return path


def mask_sheet(generator: MaskGenerator, masks: int = 24, *, seed: int = 0) -> Figure:
    """`masks` masks of the generator; at the side a heat map, what the blocks hide, and their sizes.

    The statistics are over `SAMPLES` masks, of which the drawn ones are the first.
    """
    rng = Random(seed)
    keys = [rng.getrandbits(64) for _ in range(max(SAMPLES, masks))]
    hidden = np.stack([generator(key) for key in keys])  # (samples, rows, cols)
    rows, cols = generator.grid
    columns = min(masks, max(1, round(math.sqrt(1.4 * masks * rows / cols))))
    lines = math.ceil(masks / columns)
    cell = min(6.0, max(1.3, (_HEIGHT / lines - _CAPTION) * cols / rows))  # few masks are drawn larger
    sheet_width, sheet_height = columns * cell, lines * (cell * rows / cols + _CAPTION)

    figure = Figure(figsize=(sheet_width + _SIDE, max(sheet_height, _HEIGHT) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(generator), x=0.012, ha="left", color=_INK, fontsize=13, fontweight="bold")
    sheet, side = figure.subfigures(1, 2, squeeze=False, width_ratios=[sheet_width, _SIDE])[0]
    cells = sheet.subplots(lines, columns, squeeze=False).flatten()
    for axes, key, mask in zip(cells[:masks], keys, hidden, strict=False):
        _draw_mask(axes, generator, key, mask)
    for axes in cells[masks:]:
        axes.set_axis_off()
    _legend(sheet, generator)
    _draw_statistics(side, generator, keys, hidden)
    return figure


def _title(generator: MaskGenerator) -> str:
    rows, cols = generator.grid
    kind = "Blockwise" if isinstance(generator, BlockwiseMask) else "Random"
    bound = "exactly" if generator.exact else "at most"
    share = generator.count / (rows * cols)
    return f"{kind} masks: {bound} {generator.count} of {rows} × {cols} patches hidden ({share:.0%})"  # noqa: RUF001


def _draw_mask(axes: Axes, generator: MaskGenerator, key: int, mask: np.ndarray) -> None:
    """One mask, its blocks outlined, the number of hidden patches below."""
    rows, cols = mask.shape
    kind = mask.astype(int)  # 0 visible, 1 in a block (or any, without blocks), 2 single
    if isinstance(generator, BlockwiseMask):
        kind *= 2
        for top, left, height, width in generator.blocks(key):
            kind[top : top + height, left : left + width] = 1
            corner = (left - 0.5, top - 0.5)
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.1))
    axes.imshow(kind, cmap=_PALETTE, vmin=0, vmax=2, interpolation="nearest")
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, cols - 0.5, color="white", linewidth=0.25)
    axes.vlines(np.arange(cols - 1) + 0.5, -0.5, rows - 0.5, color="white", linewidth=0.25)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    axes.set_xlabel(str(int(mask.sum())), color=_FAINT, fontsize=9, labelpad=2)


def _legend(sheet: SubFigure, generator: MaskGenerator) -> None:
    entries = [Patch(color=_VISIBLE, label="visible"), Patch(color=_BLOCK, label="hidden")]
    if isinstance(generator, BlockwiseMask):
        entries[1].set_label("hidden by a block")
        if generator.exact:
            entries.append(Patch(color=_SINGLE, label="hidden singly, to reach the count"))
    sheet.legend(
        handles=entries,
        loc="outside lower left",
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=1.0,
        handleheight=1.0,
    )


def _draw_statistics(
    side: SubFigure, generator: MaskGenerator, keys: Sequence[int], hidden: np.ndarray
) -> None:
    heat, counts, *rest = side.subplots(3 if isinstance(generator, BlockwiseMask) else 2, 1)
    _heat_map(heat, hidden.mean(0))
    side.supxlabel(f"statistics over {len(keys):,} masks", fontsize=8, color=_FAINT)
    if not isinstance(generator, BlockwiseMask):
        _histogram(counts, hidden.sum((1, 2)).tolist())
        _dress(counts, "Hidden patches of a mask")
        return
    laid = [generator.blocks(key) for key in keys]
    covered = [_covered(generator.grid, blocks) for blocks in laid]
    _histogram(counts, covered)
    _dress(counts, "Patches hidden by the blocks of a mask")
    sizes = [block.height * block.width for blocks in laid for block in blocks]
    _histogram(rest[0], sizes)
    _dress(rest[0], f"Size of a block ({len(sizes) / len(laid):.1f} blocks per mask)")


def _covered(grid: tuple[int, int], blocks: Sequence[Block]) -> int:
    """The number of patches under the blocks."""
    mask = np.zeros(grid, dtype=bool)
    for top, left, height, width in blocks:
        mask[top : top + height, left : left + width] = True
    return int(mask.sum())


def _heat_map(axes: Axes, share: np.ndarray) -> None:
    rows, cols = share.shape
    picture = axes.imshow(share, cmap="cividis", interpolation="nearest", vmin=0.0)
    axes.set(xticks=[0, cols - 1], yticks=[0, rows - 1], xticklabels=[1, cols], yticklabels=[1, rows])
    axes.spines[:].set_visible(False)
    scale = axes.inset_axes((1.05, 0.0, 0.06, 1.0))
    axes.figure.colorbar(picture, cax=scale, format=PercentFormatter(1.0, decimals=0))
    scale.spines[:].set_visible(False)
    scale.tick_params(labelsize=8, colors=_FAINT, length=0)
    _dress(axes, "How often a patch is hidden")


def _histogram(axes: Axes, values: Sequence[int]) -> None:
    """The share of each whole number; it leaves room beside a single bar."""
    found, times = np.unique(values, return_counts=True)
    axes.bar(found, times / len(values), width=0.8, color=_BLOCK)
    axes.set_xlim(min(found[0], found[-1] - 4) - 1, found[-1] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.grid(axis="y", color=_VISIBLE, linewidth=0.8)
    axes.set_axisbelow(True)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=10)
    axes.tick_params(labelsize=8, colors=_FAINT, length=0)
