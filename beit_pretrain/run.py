"""From a configuration to a finished run: check, build, train or score, write down what came out."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from beit_pretrain import checks
from beit_pretrain.checkpoint import files, record
from beit_pretrain.checkpoint.saving import AtomicCheckpointIO, last_checkpoint
from beit_pretrain.compose import pair, recipe_diff
from beit_pretrain.data.transforms import RESIZE_IMPLEMENTATION
from beit_pretrain.errors import BeitError, CheckpointError
from beit_pretrain.folder import RunFolder, plain
from beit_pretrain.report import make_report
from beit_pretrain.report.mask_sheet import draw_sheet
from beit_pretrain.stages.base import Stage

Results = dict[str, Any]


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> Results:
    """Do what the configuration says and return what results.json holds.

    A run that stands unfinished in its folder goes on; a finished one is not run again.
    """
    checks.check(cfg)
    if cfg.dry_run:
        from beit_pretrain.preview import preview

        return preview(cfg)
    config = plain(cfg)
    with ExitStack() as stack:
        folder = RunFolder(Path(cfg.run_dir))
        harmless: list[str] = []
        if rank_zero_only.rank == 0:
            stack.enter_context(folder)
            if cfg.overwrite or cfg.debug:
                folder.clear()
            harmless = folder.compare(config)
        done = folder.finished()
        if done is not None and not any(line.startswith("stage.epochs") for line in harmless):
            return done
        if harmless:
            print(f"{folder.path} goes on with: {'; '.join(harmless)}")
        if rank_zero_only.rank == 0:
            folder.write_config(config)
        results = _knn(cfg) if cfg.stage.name == "knn" else _train(cfg, config, folder)
        if rank_zero_only.rank == 0:
            results |= {
                "name": cfg.name,
                "stage": cfg.stage.name,
                "status": "finished",
                "command": shlex.join(["beit-train", *overrides]),
                "recipe_diff": recipe_diff(cfg, overrides),
                "environment": {
                    **record.versions(),
                    "device": _device_name(),
                    "git_commit": record.git_commit(),
                },
            }
            files.write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
            make_report(folder.path)
    return results


def _train(cfg: DictConfig, config: dict[str, Any], folder: RunFolder) -> Results:
    """Fit, or with mode=evaluate score `init_from` on the held-out images."""
    began, earlier = time.monotonic(), _earlier_seconds(folder.path)
    resume = last_checkpoint(folder.path / "checkpoints") if cfg.mode == "fit" else None
    with open_dict(cfg):
        cfg.resume_step = int(resume.stem.removeprefix("step-")) if resume else None
    stage, data, trainer = build(cfg, config)
    if cfg.stage.name == "pretrain" and rank_zero_only.rank == 0:
        draw_sheet(stage.views.mask, path=folder.path / "pictures" / "masks.png", seed=cfg.seed)
    if cfg.mode == "fit":
        try:
            trainer.fit(stage, datamodule=data, ckpt_path=resume)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
    else:
        trainer.validate(stage, datamodule=data, verbose=False)
    return {
        "steps": trainer.global_step,
        "epochs": cfg.stage.epochs,
        "seconds": (earlier if resume else 0.0) + time.monotonic() - began,
        "parameters": sum(p.numel() for _, p in stage.trained_parameters()),
        "metrics": stage.held_out,
        **stage.results(),
    }


def build(cfg: DictConfig, config: dict[str, Any]) -> tuple[Stage, Any, Trainer]:
    """The stage, its data and its trainer."""
    stage = build_stage(cfg)
    parents = {}
    if cfg.init_from:
        parents["init_from"] = load_weights(stage, cfg.init_from)
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
        parts["encoder"] = _make(cfg.model)
    return _make(cfg.stage, **parts)


def build_data(cfg: DictConfig, *, views: Any, eval_views: Any) -> Any:
    return _make(
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
    tokenizer = _make(cfg.tokenizer, drop=("name", "checkpoint"))
    if cfg.stage.name != "tokenizer" and cfg.tokenizer.get("checkpoint"):
        key = "tokenizer.checkpoint"
        saved = record.read(Path(cfg.tokenizer.checkpoint), key=key)
        load_strictly(tokenizer, record.part(saved, "tokenizer", key=key), key)
    return tokenizer


def load_weights(stage: Stage, path: str) -> str:
    """Put the weights of `init_from` into the stage, all of them; returns the file's hash."""
    saved = record.read(Path(path), key="init_from")
    names = {name.split(".")[0] for name, _ in stage.trained_parameters()}
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


def _knn(cfg: DictConfig) -> Results:
    """kNN with the encoder of `init_from`, the same encoder untrained, and raw pixels."""
    began = time.monotonic()
    device = torch.device("cuda" if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    seed_everything(cfg.seed, verbose=False)
    encoders = {"untrained": _make(cfg.model), "trained": _make(cfg.model)}
    saved = record.read(Path(cfg.init_from), key="init_from")
    load_strictly(encoders["trained"], record.part(saved, "encoder", key="init_from"), "init_from")
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in cfg.data.normalize.values())
    with open_dict(cfg):
        cfg.batch_size, cfg.micro_batch_size = min(cfg.batch_size, 128), None  # a pass forward, no update
    data = build_data(cfg, views=None, eval_views=None)
    scores = _make(cfg.stage).score(encoders, lambda image: (image / 255 - mean) / std, data, device)
    knn = {
        **scores["trained"],
        "untrained": scores["untrained"]["accuracy"],
        "pixels": scores["pixels"]["accuracy"],
        "remark": scores["remark"],
    }
    metrics = {f"knn/{name}": scores[name]["accuracy"] for name in ("trained", "untrained", "pixels")}
    return {"seconds": time.monotonic() - began, "metrics": metrics, "knn": knn}


def _trainer(cfg: DictConfig) -> Trainer:
    t = cfg.trainer
    callbacks = [_make(node) for node in cfg.callbacks.values() if node is not None]
    return Trainer(
        accelerator=t.accelerator,
        devices=t.devices,
        num_nodes=t.num_nodes,
        precision=_precision(t.precision, t.accelerator),
        # Buffers are statistics that every rank counts for itself and merges when they are read.
        strategy=DDPStrategy(broadcast_buffers=False) if _several(t) else "auto",
        max_epochs=cfg.stage.epochs,
        check_val_every_n_epoch=t.evaluate_every,
        detect_anomaly=t.detect_anomaly,
        logger=[_make(node) for node in cfg.logger.values() if node is not None],
        callbacks=[*callbacks, _make(cfg.checkpoint)],
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


def _device_name() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )


def _make(node: DictConfig, drop: Sequence[str] = ("name",), **more: Any) -> Any:
    """Instantiate a node without the keys that only the configuration uses; its lists are plain lists."""
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return instantiate({k: v for k, v in container.items() if k not in drop and k not in more}, **more)


def _earlier_seconds(path: Path) -> float:
    """Training time of the run before this start, as far as it was logged."""
    timing = path / "timing.csv"
    if not timing.exists():
        return 0.0
    lines = timing.read_text().splitlines()
    if len(lines) < 2 or "seconds" not in lines[0].split(","):
        return 0.0
    return float(lines[-1].split(",")[lines[0].split(",").index("seconds")] or 0.0)


__all__ = ["BeitError", "Results", "build", "run"]
