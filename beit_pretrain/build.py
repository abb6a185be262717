"""From a configuration to the objects it names. Nothing else in the house instantiates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ProgressBar
from omegaconf import DictConfig, OmegaConf
from torch import nn

from beit_pretrain.checkpoint import record
from beit_pretrain.checkpoint.adapt import Report
from beit_pretrain.checkpoint.saving import AtomicCheckpointIO
from beit_pretrain.cluster.environment import environment
from beit_pretrain.cluster.holding import Holding
from beit_pretrain.cluster.interruption import Interruption
from beit_pretrain.cluster.launch import launched
from beit_pretrain.cluster.lock import Lock
from beit_pretrain.cluster.parallel import strategy
from beit_pretrain.cluster.signals import Signals
from beit_pretrain.data.tokens import TokenCache
from beit_pretrain.data.transforms import LANCZOS, RESIZE_IMPLEMENTATION
from beit_pretrain.devices import accelerator, defers_jitter, nodes, processes
from beit_pretrain.errors import BeitError, CheckpointError, ConfigError
from beit_pretrain.origins import check_fit, load_strictly, load_weights
from beit_pretrain.stages.base import Stage
from beit_pretrain.tokenizer import TrainableTokenizer
from beit_pretrain.wording import pair

LABELLED = ("classify", "probe")  # stages that learn from a label for each image
SUPERVISED = (*LABELLED, "segment")  # and from one for each pixel
# Of a tokenizer's options, those that say where things are: no id depends on them.
PLACES = ("name", "checkpoint", "cache", "views", "weights", "files", "offline")


# What classes raise for options that are of a wrong kind.
UNBUILT = (InstantiationException, TypeError, ValueError, ArithmeticError, RuntimeError)


def flat(error: BaseException) -> str:
    """An error's text, without the lines that Hydra puts around it."""
    cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
    return " ".join(str(cause).split())


def build_run(
    cfg: DictConfig, config: dict[str, Any], signals: Signals | None = None, lock: Lock | None = None
) -> tuple[Stage, Any, Trainer, Report | None]:
    """The stage, its data and its trainer; and what became of the weights of `init_from`, if they were adapted.

    With `signals`, a signal ends the training in order (`cluster/interruption`); with `lock`, that of the run folder,
    a run that has lost it ends before it writes.
    """
    data = build_data(cfg)
    classes = data.class_names if cfg.stage.name in SUPERVISED else None
    stage = build_stage(cfg, classes)
    data.views, data.eval_views = stage.views, stage.eval_views
    if cfg.stage.name == "pretrain":
        add_token_cache(cfg, stage, data)
    parents, report = {}, None
    if cfg.init_from:
        parents["init_from"], report = load_weights(stage, cfg, classes)
    if cfg.stage.name == "pretrain":
        parents["tokenizer"] = _tokenizer_parent(cfg)
    stage.record = record.make_record(config, _preprocessing(cfg, data), parents)
    trainer = _trainer(cfg, signals, lock)
    if lock is not None:
        stage.before_writing = lock.check
    trainer.accumulate_grad_batches = data.plan(trainer.world_size).accumulate
    return stage, data, trainer, report


def build_stage(cfg: DictConfig, classes: Sequence[str] | None = None) -> Stage:
    """The stage with its models; fresh weights are a function of the seed.

    `classes` are the names that a stage which learns from labels tells apart.
    """
    seed_everything(cfg.seed, verbose=False)
    parts: dict[str, Any] = {}
    if cfg.stage.name in ("tokenizer", "pretrain"):
        parts["tokenizer"] = build_tokenizer(cfg)
    if cfg.stage.name != "tokenizer":
        parts["encoder"] = make(cfg.model)
    if classes is not None:
        parts["classes"] = list(classes)
    node = cfg.stage.copy()
    if cfg.stage.name == "pretrain":
        node.views.defer_jitter = defers_jitter(cfg)
    return make(node, drop=("name", "encoder", "knn"), **parts)


def build_data(cfg: DictConfig) -> Any:
    """The data module, still without views: those are the stage's."""
    return make(
        cfg.data,
        drop=("name", "normalize", "root", "dataset", "check_label_maps"),
        views=None,
        eval_views=None,
        labelled=cfg.stage.name in LABELLED,
        scenes=cfg.stage.name == "segment",
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
        **(
            {"lanczos": LANCZOS}
            if OmegaConf.select(cfg, "stage.views.token_interpolation") == "lanczos"
            else {}
        ),
        "data": data.source.fingerprint(),
        "class_names": data.source.class_names,
        **({"reduce_zero_label": data.source.reduce_zero_label} if data.scenes else {}),
    }


def build_tokenizer(cfg: DictConfig, key: str = "tokenizer.checkpoint") -> nn.Module:
    """The tokenizer; with `tokenizer.checkpoint`, the trained one (its shape was taken over on composing).

    `key` is what messages call the checkpoint.
    """
    drop = ("name", "checkpoint", "cache", "views")
    if cfg.stage.name == "tokenizer" or not cfg.tokenizer.get("checkpoint"):
        return make(cfg.tokenizer, drop)
    weights = record.part(record.read(Path(cfg.tokenizer.checkpoint), key=key), "tokenizer", key=key)
    if issubclass(get_class(cfg.tokenizer._target_), TrainableTokenizer):
        # Options from a file do not decide how much memory is taken before its weights are seen to fit.
        try:
            with torch.device("meta"):
                check_fit(make(cfg.tokenizer, drop), weights, key)
        except UNBUILT as error:
            raise CheckpointError(
                f"{key} has options of a tokenizer that cannot be built ({flat(error)})"
            ) from error
    tokenizer = make(cfg.tokenizer, drop)
    load_strictly(tokenizer, weights, key)
    return tokenizer


def _tokenizer_parent(cfg: DictConfig) -> dict[str, Any]:
    """What the record keeps of the tokenizer; of a published one its name, the hash of its weights is there anyway."""
    if path := cfg.tokenizer.get("checkpoint"):
        key = "tokenizer.checkpoint"
        return record.parent(path, record.read(path, key=key), key=key)
    return {"name": cfg.tokenizer.name}


def add_token_cache(cfg: DictConfig, stage: Any, data: Any) -> None:
    """With `tokenizer.cache`: let stage and data keep the tokenizer's ids, under a name of all that they depend on.

    ConfigError if they cannot: ids of more than 16 bits, images that have no numbers.
    """
    if cfg.tokenizer.get("cache") is None:
        return
    if data.source.streamed:
        raise ConfigError(
            "tokenizer.cache keeps ids by the image's number, which a stream does not have: set data.source.cache too, "
            "or tokenizer.cache=null tokenizer.views=null"
        )
    options = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(options, dict)
    cuts = {
        name: {k: v for k, v in options["stage"][name].items() if k not in ("image_size", "mask")}
        for name in ("views", "eval_views")
    }
    made_of = {
        "tokenizer": {k: v for k, v in options["tokenizer"].items() if k not in PLACES},
        "weights": stage.frozen_hash("tokenizer"),
        "device": accelerator(cfg.trainer.accelerator),
        "compiled": cfg.stage.compile,
        "images": data.source.fingerprint(),
        "resize": RESIZE_IMPLEMENTATION,
        "seed": cfg.seed,
        **cuts,
    }
    tokenizer = stage.tokenizer
    stage.token_cache = data.token_cache = TokenCache(
        root=Path(cfg.tokenizer.cache),
        made_of=made_of,
        samples=len(data.source),
        tokens=tokenizer.grid[0] * tokenizer.grid[1],
        vocabulary=tokenizer.vocab_size,
        views=cfg.tokenizer.views,
    )


def _trainer(cfg: DictConfig, signals: Signals | None, lock: Lock | None) -> Trainer:
    t = cfg.trainer
    callbacks: list[Callback] = [] if lock is None else [Holding(lock)]  # first, before one that writes
    callbacks += [make(node) for node in cfg.callbacks.values() if node is not None]
    if signals is not None:
        callbacks.append(Interruption(signals, run_dir=cfg.run_dir))
    return Trainer(
        accelerator=t.accelerator,
        devices=t.devices if launched().kind == "alone" else launched().per_node,
        num_nodes=nodes(cfg),
        precision=_precision(t.precision, t.accelerator),
        strategy=strategy(t.strategy, processes(cfg)),
        max_epochs=cfg.stage.epochs,
        check_val_every_n_epoch=_evaluate_every(cfg.stage.epochs, t.evaluate_every),
        detect_anomaly=t.detect_anomaly,
        logger=[make(node) for node in cfg.logger.values() if node is not None],
        callbacks=[*callbacks, make(cfg.checkpoint)],
        plugins=[AtomicCheckpointIO(*([] if lock is None else [lock.check])), environment(launched())],
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
    options = {k: v for k, v in container.items() if k not in drop and k not in more}
    try:
        # `more` is not for Hydra: it would resolve texts such as a class's name, and build what looks like a node.
        return instantiate({**options, "_partial_": True})(**more)
    except (InstantiationException, TypeError) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, BeitError):
            raise cause from error
        if isinstance(cause, TypeError) and "unexpected keyword argument" in str(cause):
            raise ConfigError(f"{container['_target_']}: {cause}; leave that option out") from error
        raise
