"""What a run is spread over: which devices, how many, and how the global batch falls to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from beit_pretrain.wording import around, either, is_whole, nearest, show

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
DIGITS_TO_TRAIN = 1120  # images in the training part of the embedded digits


def accelerator(asked: str) -> str:
    """cpu, cuda or mps: what Lightning will take."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if asked == "gpu":
        return "mps" if torch.backends.mps.is_available() else "cuda"
    return asked


def devices(cfg: DictConfig) -> int | None:
    """Devices of one node that the configuration asks for; None if it does not make sense."""
    asked: Any = OmegaConf.select(cfg, "trainer.devices")
    kind = accelerator(cfg.trainer.accelerator)
    if OmegaConf.is_list(asked) and kind != "cpu":
        whole = all(is_whole(number, 0) for number in asked)
        return len(asked) if whole and len(set(asked)) == len(asked) > 0 else None
    if asked == "auto" or (asked == -1 and kind != "cpu"):
        return torch.cuda.device_count() if kind == "cuda" else 1
    return asked if is_whole(asked, 1) else None


def device_faults(cfg: DictConfig) -> Iterator[str]:
    t = cfg.trainer
    if t.accelerator not in ACCELERATORS:
        return
    kind = accelerator(t.accelerator)
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind)
    asked = devices(cfg)
    if there == 0:
        yield f"trainer.accelerator={t.accelerator}, but there is no GPU here: set it to auto or cpu"
    if asked is None:
        also = "" if kind == "cpu" else ", a list of different ones such as [0,2]"
        yield f"trainer.devices={show(t.devices)}: set a number from 1{also}, or auto"
    elif there and (asked > there or (OmegaConf.is_list(t.devices) and max(t.devices) >= there)):
        yield f"trainer.devices={show(t.devices)}, but there are {there} here: set at most that, or auto"
    if kind == "cpu" and t.precision == "16-mixed":
        yield "trainer.precision=16-mixed needs a GPU: set trainer.precision=32, bf16-mixed or auto on a CPU"


def batch_faults(cfg: DictConfig) -> Iterator[str]:
    if cfg.stage.name == "knn" or cfg.mode == "evaluate":
        return  # passes without an update have a size of their own
    batch, micro, nodes = cfg.batch_size, cfg.micro_batch_size, cfg.trainer.num_nodes
    here = devices(cfg) if cfg.trainer.accelerator in ACCELERATORS else None
    if not here or not all(is_whole(n, 1) for n in (batch, nodes, 1 if micro is None else micro)):
        return
    world = here * nodes
    unit = world * (micro or 1)
    if batch % unit:
        advice = [f"batch_size={either(nearest(batch, unit))}"]
        if micro is not None and batch % world == 0:
            share = [n for n in range(1, batch // world + 1) if batch // world % n == 0]
            advice.append(f"micro_batch_size={either(around(micro, share))}")
        times = f" x micro_batch_size={micro}" if micro is not None else ""
        yield (
            f"batch_size={batch} (over all devices) is no multiple of {world} devices (trainer.devices x "
            f"trainer.num_nodes){times} = {unit}: set {', or '.join(advice)}"
        )
    if cfg.data.name == "digits" and batch > DIGITS_TO_TRAIN:
        yield (
            f"batch_size={batch} is more than the {DIGITS_TO_TRAIN} training images of data=digits: "
            f"set batch_size={DIGITS_TO_TRAIN // unit * unit or unit} or less, such as 64"
        )
