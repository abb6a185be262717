"""What a run would be, without running it (dry_run=true): sizes, steps, learning rates, memory.

Letters: b images of one pass on one device, L = 1 + N tokens, D width, H heads, V vocabulary, M hidden patches of
an image, r the MLP's width over D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import yaml
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from beit_pretrain import optim
from beit_pretrain.build import SUPERVISED, build_data, build_stage, build_tokenizer
from beit_pretrain.devices import accelerator, processes
from beit_pretrain.errors import DataError
from beit_pretrain.stages.base import Stage
from beit_pretrain.tokenizer import Tokenizer, TrainableTokenizer
from beit_pretrain.wording import printable, sides_of, times

Rows = list[tuple[str, str]]


class Described(Tokenizer):
    """Stands for a tokenizer whose weights would have to be fetched: no parameters, only its sizes."""

    def __init__(self, *, vocab_size: int, image_size: Sequence[int], stride: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.image_size = (image_size[0], image_size[1])
        self.stride = stride

    def encode(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor | None:
        raise NotImplementedError


class _OneLineLists(yaml.SafeDumper):
    """Yaml as the configuration is written: [32, 32] is one line."""


_OneLineLists.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


def preview(cfg: DictConfig) -> dict[str, Any]:
    """Print the resolved configuration and what follows from it; write nothing. Returns no results."""
    console = Console()
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    lines = yaml.dump(config, Dumper=_OneLineLists, sort_keys=False, width=1000).rstrip().split("\n")
    console.print("\n".join(map(printable, lines)), highlight=False, soft_wrap=True, markup=False)
    console.print()
    if cfg.stage.name == "knn":
        encoder = {k: v for k, v in config["model"].items() if k != "name"}
        with torch.device("meta"):
            parts: dict[str, nn.Module] = {"encoder": instantiate(encoder)}
        console.print(_facts(cfg, _parameter_rows(parts)))
        return {}
    data = _data(cfg)
    stage = _stage(cfg, data)
    rows = _parameter_rows(dict(stage.named_children()))
    rows += [
        *_image_rows(cfg, data),
        *_batch_rows(cfg),
        *_grid_rows(cfg, stage, data),
        *_memory_rows(cfg, stage),
    ]
    console.print(_facts(cfg, rows))
    if not isinstance(data, str):
        console.print(_schedule(stage.recipe, data.steps_per_epoch, _epochs(cfg)))
        if remark := warmup_remark(cfg, stage, data):
            console.print(remark, highlight=False, soft_wrap=True, markup=False)
    console.print(_groups(stage))
    return {}


def warmup_remark(cfg: DictConfig, stage: Stage, data: Any) -> str:
    """What to say of a warm-up as long as the training or longer; nothing of the two steps of debug=true."""
    if cfg.mode != "fit" or cfg.debug:
        return ""
    return optim.warmup_remark(stage.recipe, epochs=stage.epochs, steps_per_epoch=data.steps_per_epoch)


# --- what it is made of ------------------------------------------------------------------------------------


def _stage(cfg: DictConfig, data: Any) -> Stage:
    """The stage as it would be trained, without memory for its weights."""
    cfg = deepcopy(cfg)
    classes = None
    if cfg.stage.name in SUPERVISED:
        # A head for data that are not here yet has no size; one class stands for them.
        classes = ["unknown"] if isinstance(data, str) else data.class_names
    kind = get_class(cfg.tokenizer._target_)
    with open_dict(cfg):
        if "checkpoint" in cfg.tokenizer:
            cfg.tokenizer.checkpoint = None  # its options were taken over; its weights do not matter here
        if not issubclass(kind, TrainableTokenizer) and {"vocab_size", "stride"} <= vars(kind).keys():
            cfg.tokenizer = {
                "_target_": f"{Described.__module__}.{Described.__name__}",
                "vocab_size": vars(kind)["vocab_size"],
                "image_size": sides_of(cfg.tokenizer.image_size),
                "stride": vars(kind)["stride"],
            }
    with torch.device("meta"):
        return build_stage(cfg, classes)


def _data(cfg: DictConfig) -> Any:
    """The data module, or why it cannot be had without fetching something."""

    cfg = deepcopy(cfg)
    with open_dict(cfg):
        if "download" in cfg.data.source:
            cfg.data.source.download = False
        elif "dataset" in cfg.data:
            return f"known when {cfg.data.dataset} has been fetched"
    try:
        return build_data(cfg)
    except DataError:
        if "download" in cfg.data.source:
            return f"known when {cfg.data.dataset} has been fetched"
        raise


def _epochs(cfg: DictConfig) -> int:
    return 1 if cfg.debug else cfg.stage.epochs


# --- rows --------------------------------------------------------------------------------------------------


def _facts(cfg: DictConfig, rows: Rows) -> Table:
    title = Text(printable(f"{cfg.stage.name} in {cfg.run_dir}"))
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _parameter_rows(parts: Mapping[str, nn.Module]) -> Rows:
    rows = []
    for name, module in parts.items():
        count = sum(p.numel() for p in module.parameters())
        frozen = count and not any(p.requires_grad for p in module.parameters())
        if isinstance(module, Described):
            rows.append((f"parameters, {name}", "those of its published weights (not counted here), frozen"))
        elif count:
            rows.append((f"parameters, {name}", f"{count:,}{' frozen' if frozen else ''}"))
    return rows


def _image_rows(cfg: DictConfig, data: Any) -> Rows:
    if isinstance(data, str):
        return [("training images", data)]
    train, held_out = len(data.splits["train"]), len(data.splits.get("val", ()))
    steps, epochs = data.steps_per_epoch, _epochs(cfg)
    return [
        ("training images", f"{train:,}, and {held_out:,} held out"),
        ("updates", f"{steps:,} an epoch x {epochs:,} epochs = {steps * epochs:,}"),
    ]


def _split(cfg: DictConfig) -> tuple[int, int, int]:
    """Devices, images of a pass on each, and passes of an update; the checks saw that it divides."""
    world = processes(cfg)
    micro = cfg.micro_batch_size or cfg.batch_size // world
    return world, micro, cfg.batch_size // (world * micro)


def _batch_rows(cfg: DictConfig) -> Rows:
    world, micro, passes = _split(cfg)
    what = "CPU process" if accelerator(cfg.trainer.accelerator) == "cpu" else "GPU"
    return [
        (
            "batch",
            f"{cfg.batch_size} images an update: {_counted(world, what)}, {_counted(micro, 'image')} at a time on "
            f"each, {_counted(passes, 'pass')} summed up",
        )
    ]


def _counted(count: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{count:,} {what}{'' if count == 1 else plural}"


def _grid_rows(cfg: DictConfig, stage: Any, data: Any) -> Rows:
    if cfg.stage.name in SUPERVISED:
        grid = stage.encoder.grid
        return [
            (
                "patches",
                f"{times(grid)} = {grid[0] * grid[1]}, from {times(sides_of(cfg.image_size) or [])} pixels",
            ),
            ("classes", data if isinstance(data, str) else f"{len(stage.classes):,}"),
        ]
    tokenizer = stage.tokenizer
    tokens = f"{times(tokenizer.grid)} of {tokenizer.vocab_size:,} kinds, from {times(tokenizer.image_size)} pixels"
    if cfg.stage.name == "tokenizer":
        return [("tokens", tokens)]
    grid, mask = stage.encoder.grid, stage.views.mask
    patches = grid[0] * grid[1]
    kept = "always" if mask.exact else "at most"
    return [
        ("patches", f"{times(grid)} = {patches}, from {times(sides_of(cfg.image_size) or [])} pixels"),
        ("tokens", tokens),
        ("hidden patches", f"{kept} {mask.count} ({mask.count / patches:.0%})"),
    ]


# --- memory ------------------------------------------------------------------------------------------------


def _memory_rows(cfg: DictConfig, stage: Any) -> Rows:
    trained = sum(p.numel() for _, p in stage.trained_parameters())
    frozen = sum(p.numel() for p in stage.parameters()) - trained
    kind = accelerator(cfg.trainer.accelerator)
    precision = str(cfg.trainer.precision)
    half = precision.endswith("mixed") or (precision == "auto" and kind == "cuda")
    _, micro, _ = _split(cfg)
    if cfg.stage.name == "tokenizer":
        passing = micro * saved_for_backward(cfg)
        how = "activations, as counted on one image"
    else:
        # Frozen blocks leave nothing for the backward pass.
        blocks = 0 if cfg.stage.name == "probe" else encoder_activations(cfg, stage, plain=kind == "cpu")
        head, what = 0, "logits"
        if cfg.stage.name == "pretrain":
            head = 12 * stage.views.mask.count * stage.tokenizer.vocab_size
        elif cfg.stage.name == "segment":
            head, what = segmentation_activations(cfg, stage), "maps, as counted on two"
        passing = micro * (blocks + head)
        how = f"activations after Korthikanti et al. 2022, and the head's {what}"
    fixed = 4 * frozen + 16 * trained
    passing //= 2 if half else 1
    return [
        ("memory per device", f"about {_bytes(fixed + passing)}, an estimate without the libraries' own"),
        ("  fixed", f"{_bytes(fixed)}: weights, gradients, AdamW's moments"),
        ("  of each pass", f"{_bytes(passing)}: {how}{', in 16 bit' if half else ''}"),
    ]


def encoder_activations(cfg: DictConfig, stage: Any, *, plain: bool) -> int:
    """Float32 bytes that one image leaves in the encoder for the backward pass.

    A block keeps (8 + 2r) L D numbers (Korthikanti et al. 2022, Sec. 4.1, without dropout) and 2 L D more for
    layer scale; and H L^2 attention weights, unless its kernel computes them again. With model.checkpointing only
    its input, for all blocks but one. (A head of masked image modelling keeps 3 M V.)
    """
    m = cfg.model
    length = 1 + stage.encoder.grid[0] * stage.encoder.grid[1]
    layer_scale = 2 if m.layer_scale else 0
    block = int(length * m.width * (8 + 2 * m.mlp_ratio + layer_scale))
    if m.attention == "plain" or (plain and m.attention == "auto"):
        block += m.heads * length**2
    blocks = m.depth * length * m.width + block if m.checkpointing else m.depth * block
    return 4 * blocks


def segmentation_activations(cfg: DictConfig, stage: Any) -> int:
    """Float32 bytes that one image leaves in neck, heads and loss: counted, on two, which batch norm needs."""
    rows, columns = sides_of(cfg.image_size) or []
    with torch.device("meta"):
        maps = [torch.empty(2, cfg.model.width, *stage.encoder.grid, requires_grad=True) for _ in range(4)]
        target = torch.empty(2, rows, columns, dtype=torch.int64)
    return _kept(stage.head, lambda: stage.losses(maps, target)) // 2


def saved_for_backward(cfg: DictConfig) -> int:
    """Bytes that autograd keeps of one image in the tokenizer's loss: counted, for any tokenizer."""
    tokenizer: Any = build_tokenizer(cfg)
    return _kept(tokenizer, lambda: tokenizer.loss(torch.rand(1, 3, *tokenizer.image_size), 0))


def _kept(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward pass through a module, without its parameters."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, or their places would be used again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


# --- the optimiser -----------------------------------------------------------------------------------------


def _schedule(recipe: optim.Recipe, steps_per_epoch: int, epochs: int) -> Table:
    """Five points: the start, the peak, two on the way down, the last update."""
    total = steps_per_epoch * epochs
    warmup = min(optim.warmup_length(recipe, steps_per_epoch), total - 1)
    points = [0, warmup, warmup + (total - warmup) // 3, warmup + 2 * (total - warmup) // 3, total - 1]
    table = Table(title="schedule", title_justify="left")
    for name in ("update", "epoch", "learning rate", "weight decay"):
        table.add_column(name, justify="right")
    for step in sorted(set(points)):
        table.add_row(
            f"{step:,}",
            f"{step / steps_per_epoch:.1f}",
            f"{optim.learning_rate(recipe, step, steps_per_epoch, total):.2e}",
            f"{optim.weight_decay(recipe, step, total):.3g}",
        )
    return table


def _groups(stage: Stage) -> Table:
    table = Table(title="parameter groups (AdamW)", title_justify="left")
    table.add_column("group")
    for name in ("tensors", "parameters", "lr scale", "peak lr", "weight decay"):
        table.add_column(name, justify="right")
    for group in stage.parameter_groups():
        table.add_row(
            group["group"],
            str(len(group["params"])),
            f"{sum(p.numel() for p in group['params']):,}",
            f"{group['lr_scale']:.4g}",
            f"{group['lr']:.2e}",
            f"{group['weight_decay']:.3g}",
        )
    return table
