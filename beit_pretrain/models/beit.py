"""The BEiT encoder (BEiT paper, Sec. 2.1-2.3).

Letters: B images, N patches, L = 1 + N tokens, D width, H heads. Parameters are named as in the published
checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.models.blocks import Block, KernelChoice, OwnBias, choose_kernel
from beit_pretrain.models.rel_pos import BiasLookup, RelativePositionBias, resize_positions, table_rows

RelPos = Literal["shared", "per_layer", "none"]


@torch.no_grad()
def truncated_normal(parameter: Tensor, std: float, cut: float) -> None:
    """Draw from N(0, std) given that the value is within +-`cut`, in place.

    Through the inverse of the distribution function: torch's own draws again and again what falls outside,
    which takes the base model from 1 to 8 seconds when the cut is at one standard deviation.
    """
    if cut > 5 * std:  # concerns one value in two million, and the inverse comes to the edge of float32
        parameter.normal_(std=std).clamp_(-cut, cut)
        return
    edge = math.erf(cut / std / math.sqrt(2))
    parameter.uniform_(-edge, edge).erfinv_().mul_(std * math.sqrt(2)).clamp_(-cut, cut)


@torch.no_grad()
def initialise(module: nn.Module, std: float, cut: float) -> None:
    """Draw linear and convolution weights from N(0, std) cut at +-`cut`; biases to 0, norms to 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            truncated_normal(part.weight, std, cut)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.Conv2d | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)


class PatchEmbed(nn.Module):
    """Each patch of an image as one token."""

    def __init__(self, *, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, N, D), row-major."""
        return self.proj(image).flatten(2).transpose(1, 2)


class Beit(nn.Module):
    """BEiT's encoder without a final norm: every head brings its own.

    Runs on any image that the patch divides; tables and positions are then resized from the built grid.

    - `image_size`: (height, width) in pixels that tables and positions are built for.
    - `layer_scale`: first value of the gammas; 0 for none. `drop_path`: rate of the last block, linear from
      0.
    - `rel_pos`: "shared" is one table for all blocks (pre-training), "per_layer" one each (fine-tuning).
    - `checkpointing`: forget activations within blocks and compute them again in the backward pass.
    - `init_std`, `init_cut`: standard deviation of the initial weights, and where their normal is truncated,
      in units of the weight: pre-training cuts at 0.02, one standard deviation; fine-tuning cuts at 2, which
      is never reached.

    Raises ConfigError with all faults at once if the sizes do not fit.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int = 16,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.1,
        drop_path: float = 0.0,
        rel_pos: RelPos = "shared",
        abs_pos: bool = False,
        mask_token: bool = True,
        attention: KernelChoice = "auto",
        checkpointing: bool = False,
        init_std: float = 0.02,
        init_cut: float = 0.02,
    ) -> None:
        super().__init__()
        faults = _faults(image_size, patch_size, width, depth, heads, drop_path, rel_pos, attention)
        if faults:
            raise ConfigError(faults)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_size = patch_size
        self.width = width
        self.depth = depth
        self.attention: KernelChoice = attention
        self.checkpointing = checkpointing

        own_rows = table_rows(self.grid) if rel_pos == "per_layer" else None
        length = 1 + self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(patch_size=patch_size, width=width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if mask_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, length, width)) if abs_pos else None
        self.rel_pos_bias = RelativePositionBias(grid=self.grid, heads=heads) if rel_pos == "shared" else None
        self.lookup = BiasLookup(grid=self.grid) if rel_pos == "per_layer" else None
        self.blocks = nn.ModuleList(
            Block(
                width=width,
                heads=heads,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                drop_path=drop_path * i / max(depth - 1, 1),
                table_rows=own_rows,
            )
            for i in range(depth)
        )
        self.init_std = init_std
        self.init_cut = init_cut
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        initialise(self, self.init_std, self.init_cut)
        for token in (self.cls_token, self.mask_token, self.pos_embed):
            if token is not None:
                truncated_normal(token, self.init_std, self.init_cut)
        for number, block in enumerate(self._blocks(), start=1):
            # Keeps the residual stream from growing with depth; BEiT paper, Sec. 2.5.
            block.attn.proj.weight.div_(math.sqrt(2 * number))
            block.mlp.fc2.weight.div_(math.sqrt(2 * number))

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, L, D) after the last block, of normalised images (B, 3, height, width).

        Patches where `mask` (B, N) is True are hidden: `mask_token` stands in their place.
        Raises BeitError if the patch does not divide the image or the mask has not one entry per patch.
        """
        return self.features(image, [self.depth - 1], mask)[0]

    def features(self, image: Tensor, blocks: Sequence[int], mask: Tensor | None = None) -> list[Tensor]:
        """Tokens (B, L, D) after each of the given 0-based blocks, in that order; none above them runs."""
        unknown = [i for i in blocks if not 0 <= i < self.depth]
        if unknown:
            raise BeitError(
                f"blocks {unknown} asked of an encoder of {self.depth}: set numbers in 0..{self.depth - 1}"
            )
        grid = self.grid_of(image)
        kernel = choose_kernel(self.attention, image.device)
        tokens = self.embed(image, mask)  # (B, L, D)
        bias = self.bias(grid)
        after: dict[int, Tensor] = {}
        for i, block in enumerate(self._blocks()[: max(blocks, default=-1) + 1]):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, bias, kernel, use_reentrant=False)
            else:
                tokens = block(tokens, bias, kernel)
            after[i] = tokens
        return [after[i] for i in blocks]

    def grid_of(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (..., height, width); BeitError if the patch does not divide them."""
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise BeitError(
                f"an image of {height} x {width} pixels cannot be cut into patches of {self.patch_size}: "
                f"set image_size to multiples of model.patch_size={self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def bias(self, grid: tuple[int, int]) -> Tensor | OwnBias | None:
        """What blocks add to their logits on a grid: (H, L, L), what makes it of a block's own table, or nothing."""
        if self.rel_pos_bias is not None:
            return self.rel_pos_bias(grid)
        # Made within the block: checkpointing forgets it too, and a table in shares is whole there.
        return None if self.lookup is None else partial(self.lookup, grid=grid)

    def embed(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """What enters the first block: CLS and patches, hidden ones replaced, positions added if there are any."""
        grid = self.grid_of(image)
        patches = self.patch_embed(image)  # (B, N, D)
        if mask is not None:
            if self.mask_token is None:
                raise BeitError(
                    "a mask was given to an encoder without a mask token: set model.mask_token=true"
                )
            if mask.shape != patches.shape[:2]:
                raise BeitError(
                    f"a mask of shape {tuple(mask.shape)} for {len(patches)} images of {grid[0]} x {grid[1]} "
                    f"patches: needed is {tuple(patches.shape[:2])}; set masking.grid to the encoder's grid"
                )
            patches = torch.where(mask[..., None], self.mask_token, patches)
        # Not len(patches), which would fix the number of images in an exported graph.
        cls_tokens = self.cls_token.expand(patches.shape[0], -1, -1)  # (B, 1, D)
        tokens = torch.cat([cls_tokens, patches], dim=1)  # (B, L, D)
        if self.pos_embed is not None:
            tokens = tokens + resize_positions(self.pos_embed, self.grid, grid)
        return tokens  # (B, L, D)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def _faults(
    image_size: tuple[int, int],
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    drop_path: float,
    rel_pos: str,
    attention: str,
) -> list[str]:
    faults = []
    if any(side <= 0 or side % patch_size for side in image_size):
        faults.append(
            f"image_size={tuple(image_size)} cannot be cut into patches of model.patch_size={patch_size}: "
            "set both sides to multiples of it"
        )
    if width % heads:
        faults.append(f"model.width={width} cannot be shared by model.heads={heads}: set a width they divide")
    if depth < 1:
        faults.append(f"model.depth={depth}: set at least 1 block")
    if not 0 <= drop_path < 1:
        faults.append(f"model.drop_path={drop_path} is no rate: set it from 0 to below 1")
    for key, given, known in (("rel_pos", rel_pos, RelPos), ("attention", attention, KernelChoice)):
        if given not in get_args(known):
            faults.append(f"model.{key}={given} is unknown: set one of {', '.join(get_args(known))}")
    return faults
