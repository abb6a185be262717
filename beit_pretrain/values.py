"""Options one by one, before they are compared with each other: is each of the kind and in the range it must be?

Every check yields its faults, one line each: what was given, under which key, what to set.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from beit_pretrain.devices import ACCELERATORS
from beit_pretrain.origins import WEIGHTS
from beit_pretrain.wording import either, is_whole, show, sides_of

MODES = ("fit", "evaluate")
SIGNALS = ("USR1", "USR2", "TERM")
STRATEGIES = ("auto", "ddp", "fsdp")
PRECISIONS = ("auto", "32", "32-true", "bf16-mixed", "16-mixed")
Faults = Iterator[str]


def sizes(cfg: DictConfig) -> Faults:
    example = {"image_size": "224 or [192,160]", "tokenizer.image_size": "112 or [96,80]"}
    for key, sizes in example.items():
        value = OmegaConf.select(cfg, key)
        if sides_of(value) is None:
            yield f"{key}={show(value)} is no size in pixels: set {key}={sizes}"
    if not is_whole(cfg.model.patch_size, 1):
        yield f"model.patch_size={show(cfg.model.patch_size)}: set a whole number from 1"


def numbers(cfg: DictConfig) -> Faults:
    yield from sizes(cfg)
    keys = ["batch_size", "trainer.evaluate_every", "trainer.max_requeues"]
    trained = ["stage.epochs", "stage.log_every", "stage.max_bad_steps"]
    keys += ["stage.k"] if cfg.stage.name == "knn" else trained
    for key in keys:
        if not is_whole(value := OmegaConf.select(cfg, key), 1):
            yield f"{key}={show(value)}: set a whole number from 1"
    if cfg.micro_batch_size is not None and not is_whole(cfg.micro_batch_size, 1):
        yield f"micro_batch_size={show(cfg.micro_batch_size)}: set a whole number from 1, or null"
    if cfg.trainer.num_nodes != "auto" and not is_whole(cfg.trainer.num_nodes, 1):
        yield f"trainer.num_nodes={show(cfg.trainer.num_nodes)}: set a whole number from 1, or auto"
    grace = cfg.trainer.signal_grace
    if isinstance(grace, bool) or not isinstance(grace, int | float) or grace <= 0:
        yield f"trainer.signal_grace={show(grace)}: set seconds above 0"
    for key in ("data.workers", "seed"):
        if not is_whole(value := OmegaConf.select(cfg, key), 0):
            yield f"{key}={show(value)}: set a whole number from 0"
    looked_at = OmegaConf.select(cfg, "data.check_label_maps")
    if looked_at is not None and not is_whole(looked_at, 1):
        yield f"data.check_label_maps={show(looked_at)}: set a whole number from 1, or null for all"
    if cfg.stage.name == "pretrain":
        yield from _token_cache(cfg.tokenizer.get("cache"), cfg.tokenizer.get("views"))
    limit = cfg.data.get("timeout")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 0):
        yield f"data.timeout={show(limit)}: set seconds, or 0 for no limit"
    mixed = cfg.data.get("shuffle_shards")
    if mixed is not None and not is_whole(mixed, 1):
        yield f"data.shuffle_shards={show(mixed)}: set a whole number from 1, or null for all (a full shuffle)"
    for key in ("val_share", "max_bad"):
        if not isinstance(value := cfg.data[key], int | float) or not 0 <= value < 1:
            yield f"data.{key}={show(value)} is no share: set a number from 0 to below 1"
    for name, least in (("mean", "from 0"), ("std", "above 0")):
        value = cfg.data.normalize[name]
        triple = list(value) if OmegaConf.is_list(value) else []
        if len(triple) != 3 or not all(isinstance(v, int | float) and 0 <= v < 2 for v in triple):
            yield f"data.normalize.{name}={show(value)}: set three numbers {least}, one per RGB channel"
        elif name == "std" and not all(triple):
            yield f"data.normalize.std={show(value)}: set three numbers above 0, one per RGB channel"


def _token_cache(cache: Any, views: Any) -> Faults:
    if cache is not None and (not isinstance(cache, str) or not cache):
        yield f"tokenizer.cache={show(cache)}: set a folder for the ids, or null"
    if views is not None and not is_whole(views, 1):
        yield f"tokenizer.views={show(views)}: set a whole number from 1, or null"
    if (cache is None) != (views is None):
        yield (
            f"tokenizer.cache={show(cache)} and tokenizer.views={show(views)}: set both to keep the ids of so many "
            "views of each image, or neither (where a tokenizer's own weights are kept is tokenizer.weights)"
        )


def choices(cfg: DictConfig) -> Faults:
    yield from _choice("mode", cfg.mode, MODES)
    yield from _choice("init_weights", cfg.init_weights, WEIGHTS)
    yield from _choice("trainer.precision", cfg.trainer.precision, PRECISIONS)
    yield from _choice("trainer.accelerator", cfg.trainer.accelerator, ACCELERATORS)
    yield from _choice("trainer.strategy", cfg.trainer.strategy, STRATEGIES)
    if cfg.trainer.strategy == "fsdp" and cfg.trainer.precision == "16-mixed":
        yield (
            "trainer.precision=16-mixed scales the loss by what it sees of the gradients, of which a device has only "
            "its share with trainer.strategy=fsdp: set trainer.precision=bf16-mixed or 32, or trainer.strategy=ddp"
        )
    listened = cfg.trainer.signals
    if not OmegaConf.is_list(listened) or any(name not in SIGNALS for name in listened):
        yield f"trainer.signals={show(listened)}: set a list of {either(SIGNALS)}; [] for none"
    if cfg.trainer.allocation not in (None, "slurm"):
        yield f"trainer.allocation={show(cfg.trainer.allocation)}: set slurm, or null"
    flags = ["overwrite", "debug", "dry_run", "trainer.compile", "trainer.requeue"]
    flags += ["model.abs_pos", "model.checkpointing"] if cfg.stage.name != "tokenizer" else []
    for key in flags:
        if not isinstance(value := OmegaConf.select(cfg, key), bool):
            yield f"{key}={show(value)}: set true or false"


def _choice(key: str, value: Any, known: Sequence[str]) -> Faults:
    if str(value) not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{key}={show(value)}: there is no such choice{hint} (known: {', '.join(known)})"
