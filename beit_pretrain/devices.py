"""What a run is spread over: which devices, how many, and how the global batch falls to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from beit_pretrain.cluster.launch import idle_tasks, launched
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


def defers_jitter(cfg: DictConfig) -> bool:
    """Whether colour jitter is left to the device: as asked, or with auto where that is no CPU."""
    asked = cfg.stage.views.get("defer_jitter", False)  # a refused step of an earlier version has no such key
    return accelerator(cfg.trainer.accelerator) != "cpu" if asked == "auto" else asked


def devices(cfg: DictConfig) -> int | None:
    """Devices of one node that the configuration asks for; None if it does not make sense."""
    asked: Any = OmegaConf.select(cfg, "trainer.devices")
    kind = accelerator(cfg.trainer.accelerator)
    if OmegaConf.is_list(asked) and kind != "cpu":
        whole = all(is_whole(number, 0) for number in asked)
        return len(asked) if whole and len(set(asked)) == len(asked) > 0 else None
    if asked == "auto" and (launch := launched()).kind != "alone":
        return launch.per_node or None
    if asked == "auto" or (asked == -1 and kind != "cpu"):
        return torch.cuda.device_count() if kind == "cuda" else 1
    return asked if is_whole(asked, 1) else None


def nodes(cfg: DictConfig) -> int:
    """Machines that train together."""
    return launched().nodes if cfg.trainer.num_nodes == "auto" else cfg.trainer.num_nodes


def processes(cfg: DictConfig) -> int:
    """Devices of all nodes, each with a process of its own; at least 1."""
    return (devices(cfg) or 1) * nodes(cfg)


def launch_faults(cfg: DictConfig) -> Iterator[str]:
    """Whether the processes that were started are those the configuration asks for."""
    t, launch = cfg.trainer, launched()
    if (t.num_nodes != "auto" and not is_whole(t.num_nodes, 1)) or cfg.dry_run:
        return
    tasks = idle_tasks()
    if tasks > 1 and "auto" in (t.devices, t.num_nodes):
        yield (
            f"this Slurm allocation is for {tasks} tasks, but srun has not started this process, which would train by "
            "itself: write `srun beit-train ...`; for one process on purpose set trainer.devices and trainer.num_nodes"
        )
    elif launch.kind == "alone" and t.allocation == "slurm":
        yield (
            "trainer=slurm, but srun has not started this process: write `srun beit-train ...` in the job "
            "(`beit-tools sbatch` writes one), or leave trainer=slurm out"
        )
    if launch.kind == "alone":
        if nodes(cfg) > 1 and "MASTER_ADDR" not in os.environ:
            yield (
                f"trainer.num_nodes={t.num_nodes}, but this process was started by itself: start one per device on "
                "each node with srun or torchrun, or leave trainer.num_nodes out"
            )
        return
    starter = "srun" if launch.kind == "slurm" else "torchrun"
    if not launch.per_node:
        yield (
            f"srun has started different numbers of tasks on the nodes ({os.environ['SLURM_STEP_TASKS_PER_NODE']}): "
            "set --ntasks-per-node (hydra.launcher.tasks_per_node) instead of --ntasks"
        )
        return
    if (asked := devices(cfg)) and asked != launch.per_node:
        flag = "--ntasks-per-node" if launch.kind == "slurm" else "--nproc-per-node"
        yield (
            f"trainer.devices={show(t.devices)}, but {starter} has started {launch.per_node} processes on each node: "
            f"leave trainer.devices out, or set {flag}={asked}"
        )
    if nodes(cfg) != launch.nodes:
        yield (
            f"trainer.num_nodes={t.num_nodes}, but {starter} has started processes on {launch.nodes} nodes: leave "
            f"trainer.num_nodes out, or set --nodes={t.num_nodes}"
        )


def device_faults(cfg: DictConfig) -> Iterator[str]:
    yield from launch_faults(cfg)
    t = cfg.trainer
    if t.accelerator not in ACCELERATORS:
        return
    kind = accelerator(t.accelerator)
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind)
    asked = devices(cfg)
    if there == 0:
        yield f"trainer.accelerator={t.accelerator}, but there is no GPU here: set it to auto or cpu"
    if asked is None and launched().per_node:
        also = "" if kind == "cpu" else ", a list of different ones such as [0,2]"
        yield f"trainer.devices={show(t.devices)}: set a number from 1{also}, or auto"
    elif asked and there and asked > there and t.devices == "auto":
        yield (
            f"{asked} processes were started on this node, which shows them {there} GPUs: give the job --gpus-per-node="
            f"{asked} and no --gpus-per-task, or start as many processes as there are GPUs"
        )
    elif asked and there and (asked > there or (OmegaConf.is_list(t.devices) and max(t.devices) >= there)):
        yield f"trainer.devices={show(t.devices)}, but there are {there} here: set at most that, or auto"
    if kind == "cpu" and t.precision == "16-mixed":
        yield "trainer.precision=16-mixed needs a GPU: set trainer.precision=32, bf16-mixed or auto on a CPU"


def batch_faults(cfg: DictConfig) -> Iterator[str]:
    if cfg.stage.name == "knn" or cfg.mode == "evaluate":
        return  # passes without an update have a size of their own
    batch, micro = cfg.batch_size, cfg.micro_batch_size
    here = devices(cfg) if cfg.trainer.accelerator in ACCELERATORS else None
    if not here or not all(is_whole(n, 1) for n in (batch, nodes(cfg), 1 if micro is None else micro)):
        return
    world = here * nodes(cfg)
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


def job_faults(cfg: DictConfig, node: Mapping[str, Any]) -> list[str]:
    """Whether the batch falls evenly to the processes of a Slurm job, before it has waited in the queue for hours."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.trainer.devices, cfg.trainer.num_nodes = node["tasks_per_node"] or 1, node["nodes"] or 1
        cfg.trainer.accelerator = "cpu"  # of which there are as many as one asks for: here need be no GPU
    return list(batch_faults(cfg))
