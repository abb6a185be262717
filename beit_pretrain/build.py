"""From a configuration to the objects it names. Nothing else in the house instantiates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from torch import nn

from beit_pretrain.checkpoint import files, record
from beit_pretrain.checkpoint.saving import AtomicCheckpointIO
from beit_pretrain.compose import pair
from beit_pretrain.data.transforms import RESIZE_IMPLEMENTATION
from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.stages.base import Stage


def build_run(cfg: DictConfig, config: dict[str, Any]) -> tuple[Stage, Any, Trainer]:
    """The stage, its data and its trainer."""
    stage = build_stage(cfg)
    parents = {}
    if cfg.init_from:
        parents["init_from"] = load_weights(stage, cfg.init_from, statistics=cfg.mode == "evaluate")
    if cfg.stage.name == "pretrain" and cfg.tokenizer.get("checkpoint"):
        found = files.resolve(Path(cfg.tokenizer.checkpoint), key="tokenizer.checkpoint")
        parents["tokenizer"] = files.sha256(found)
    data = build_data(cfg, views=stage.views, eval_views=stage.eval_views)
    stage.record = record.make_record(config, _preprocessing(cfg, data), parents)
    trainer = _trainer(cfg)
    trainer.accumulate_grad_batches = data.plan(trainer.world_size).accumulate
    return stage, data, trainer


def build_stage(cfg: DictConfig) -> Stage:
    """The stage with its models; fresh weights are a function of the seed."""
    seed_everything(cfg.seed, verbose=False)
    parts: dict[str, Any] = {"tokenizer": build_tokenizer(cfg)}
    if cfg.stage.name != "tokenizer":
        parts["encoder"] = make(cfg.model)
    return make(cfg.stage, **parts)


def build_data(cfg: DictConfig, *, views: Any, eval_views: Any) -> Any:
    return make(
        cfg.data,
        drop=("name", "normalize", "root", "dataset"),
        views=views,
        eval_views=eval_views,
        batch_size=cfg.batch_size,
        micro_batch_size=cfg.micro_batch_size,
        seed=cfg.seed,
        bad_log=Path(cfg.run_dir) / "bad_samples.csv",
        limit_steps=2 if cfg.debug else None,
        **({"workers": 0} if cfg.debug else {}),
    )


def _preprocessing(cfg: DictConfig, data: Any) -> dict[str, Any]:
    """What images and labels were turned into before the model saw them."""
    return {
        **{name: list(values) for name, values in cfg.data.normalize.items()},
        "image_size": pair(cfg.image_size),
        "resize": RESIZE_IMPLEMENTATION,
        "data": data.source.fingerprint(),
        "class_names": data.source.class_names,
    }


def build_tokenizer(cfg: DictConfig) -> nn.Module:
    """The tokenizer; with `tokenizer.checkpoint`, the trained one (its shape was taken over on composing)."""
    tokenizer = make(cfg.tokenizer, drop=("name", "checkpoint"))
    if cfg.stage.name != "tokenizer" and cfg.tokenizer.get("checkpoint"):
        key = "tokenizer.checkpoint"
        saved = record.read(Path(cfg.tokenizer.checkpoint), key=key)
        load_strictly(tokenizer, record.part(saved, "tokenizer", key=key), key)
    return tokenizer


def load_weights(stage: Stage, path: str, *, statistics: bool) -> str:
    """Put the weights of `init_from` into the stage, all of them; returns the file's hash.

    With `statistics` also what the run counted on the way, for a score that is compared with it.
    """
    saved = record.read(Path(path), key="init_from")
    names = {name.split(".")[0] for name, _ in stage.trained_parameters()}
    names.update(stage.statistics if statistics else ())
    for name in sorted(names):
        load_strictly(getattr(stage, name), record.part(saved, name, key="init_from"), "init_from")
    return files.sha256(files.resolve(Path(path), key="init_from"))


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], key: str) -> None:
    """`load_state_dict`, with every key that does not fit named in one line."""
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own.keys() - state.keys()]
    faults += [f"{name} has no place" for name in state.keys() - own.keys()]
    faults += [
        f"{name} is {tuple(state[name].shape)}, needed {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if faults:
        raise CheckpointError(f"{key}: the weights do not fit: {'; '.join(sorted(faults))}")
    module.load_state_dict(state)


def _trainer(cfg: DictConfig) -> Trainer:
    t = cfg.trainer
    callbacks = [make(node) for node in cfg.callbacks.values() if node is not None]
    return Trainer(
        accelerator=t.accelerator,
        devices=t.devices,
        num_nodes=t.num_nodes,
        precision=_precision(t.precision, t.accelerator),
        # Buffers are statistics that every rank counts for itself and merges when they are read.
        strategy=DDPStrategy(broadcast_buffers=False) if _several(t) else "auto",
        max_epochs=cfg.stage.epochs,
        check_val_every_n_epoch=_evaluate_every(cfg.stage.epochs, t.evaluate_every),
        detect_anomaly=t.detect_anomaly,
        logger=[make(node) for node in cfg.logger.values() if node is not None],
        callbacks=[*callbacks, make(cfg.checkpoint)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=cfg.run_dir,
        use_distributed_sampler=False,
        # What a model caches during an evaluation (an index, a resized table) must stay usable in training.
        inference_mode=False,
        num_sanity_val_steps=0,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def _evaluate_every(epochs: int, asked: int) -> int:
    """Epochs between evaluations: as asked, or fewer, so that the last epoch is among them."""
    return max(n for n in range(1, asked + 1) if epochs % n == 0)


def _several(t: DictConfig) -> bool:
    """Whether more than one process trains."""
    if t.num_nodes > 1 or (OmegaConf.is_list(t.devices) and len(t.devices) > 1):
        return True
    if t.devices == "auto":
        return t.accelerator != "cpu" and torch.cuda.device_count() > 1
    return isinstance(t.devices, int) and (
        t.devices > 1 or (t.devices == -1 and torch.cuda.device_count() > 1)
    )


def _precision(asked: Any, accelerator: str) -> Any:
    if asked != "auto":
        return asked
    if accelerator == "cpu" or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def make(node: DictConfig, drop: Sequence[str] = ("name",), **more: Any) -> Any:
    """Instantiate a node without the keys that only the configuration uses; its lists are plain lists."""
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    try:
        return instantiate({k: v for k, v in container.items() if k not in drop and k not in more}, **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, TypeError) and "unexpected keyword argument" in str(error.__cause__):
            raise ConfigError(f"{container['_target_']}: {error.__cause__}; leave that option out") from error
        raise
