"""From a configuration to a finished run: check, build, train or score, write down what came out."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, open_dict

from beit_pretrain import checks
from beit_pretrain.build import SUPERVISED, build_data, build_run, make
from beit_pretrain.callbacks.without_secrets import without_secrets
from beit_pretrain.checkpoint import files, record
from beit_pretrain.checkpoint.adapt import Report
from beit_pretrain.checkpoint.saving import go_on_from, step_of
from beit_pretrain.cluster import events
from beit_pretrain.cluster.environment import from_rank_zero, process_group
from beit_pretrain.cluster.launch import launched, restarts
from beit_pretrain.cluster.signals import Signals
from beit_pretrain.compose import explicit_keys, recipe_diff, set_by_hand
from beit_pretrain.devices import accelerator, processes
from beit_pretrain.errors import BeitError
from beit_pretrain.folder import RunFolder, plain
from beit_pretrain.origins import encoder_weights, load_strictly, start_remarks
from beit_pretrain.preview import preview, warmup_remark
from beit_pretrain.report import make_report
from beit_pretrain.report.folder import read_series
from beit_pretrain.report.mask_sheet import draw_sheet
from beit_pretrain.run_files import read_config
from beit_pretrain.wording import printable

Results = dict[str, Any]
FEW = 50  # images below which a score says little: 7 points of standard error at 50%


def run(cfg: DictConfig, overrides: Sequence[str] = (), signals: Signals | None = None) -> Results:
    """Do what the configuration says and return what results.json holds.

    A run that stands unfinished in its folder goes on; a finished one is not run again. With `signals`, a signal
    ends the training with a checkpoint (Interrupted).
    """
    checks.check(cfg, overrides)
    knn = cfg.stage.name == "knn"
    if cfg.dry_run:
        _tell(start_remarks(cfg))
    if cfg.dry_run or (knn and rank_zero_only.rank):
        return preview(cfg) if rank_zero_only.rank == 0 else {}
    keep_null_blocks(cfg, overrides)
    config = plain(cfg)
    source = _source_hash(cfg)
    with ExitStack() as stack:
        folder = RunFolder(Path(cfg.run_dir))
        if not knn:
            stack.enter_context(process_group(launched(), accelerator(cfg.trainer.accelerator)))
        done, resume = from_rank_zero(lambda: _open(cfg, overrides, config, source, folder, stack))
        if done is not None:
            return done
        _tell(start_remarks(cfg))
        try:
            results = _knn(cfg, cfg.stage) if knn else _train(cfg, config, folder, resume, signals)
        except OSError:
            folder.lock.check()  # the folder may have been removed, or be another run's
            raise
        # The others wait: a chain's next link looks for what this one has written.
        from_rank_zero(lambda: _write(cfg, results, overrides, source, folder))
    return results


def keep_null_blocks(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """A run that stored stage.blocks=null goes on with the blocks that it began with, on every rank."""
    anew = cfg.overwrite or cfg.debug or "stage.blocks" in explicit_keys(overrides)
    file = RunFolder(Path(cfg.run_dir)).config_file
    if cfg.stage.name != "segment" or cfg.mode != "fit" or anew or not file.exists():
        return
    with suppress(BeitError, OSError):  # `RunFolder.compare` says what is wrong with the file
        stage = read_config(file)[1].get("stage")
        if isinstance(stage, dict) and stage.get("blocks", ()) is None:
            cfg.stage.blocks = None


def _write(
    cfg: DictConfig, results: Results, overrides: Sequence[str], source: str | None, folder: RunFolder
) -> None:
    """results.json, which makes a run a finished one, and its report; on rank 0."""
    if rank_zero_only.rank:
        return
    folder.lock.check()
    results |= {
        "name": cfg.name,
        "stage": cfg.stage.name,
        "status": "finished",
        "scored": source,
        "command": shlex.join(["beit-train", *overrides]),
        "recipe_diff": recipe_diff(cfg, overrides),
        "environment": {
            **record.versions(),
            "device": _device_name(),
            **record.checkout(),
        },
    }
    if cfg.debug:
        results.pop("remarks", None)  # they would be of two steps
    results |= _without_nan(results)
    files.write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
    make_report(folder.path)


def _open(
    cfg: DictConfig,
    overrides: Sequence[str],
    config: dict[str, Any],
    source: str | None,
    folder: RunFolder,
    stack: ExitStack,
) -> tuple[Results | None, Path | None]:
    """The results of a finished run, else the checkpoint to go on from, if any; rank 0 takes the folder."""
    if rank_zero_only.rank == 0:
        stack.enter_context(folder)
        if (cfg.overwrite or cfg.debug) and not restarts():  # not what a job has done before it was put back
            folder.clear(debug=not cfg.overwrite, needed=(cfg.init_from, cfg.tokenizer.get("checkpoint")))
        harmless = folder.compare(config, lambda: set_by_hand(cfg, overrides))
        longer = any(line.startswith("stage.epochs") for line in harmless)
        done = folder.finished()
        if done is not None and (longer or done.get("scored") != source):
            folder.reopen()
        elif harmless and done is None:
            print(printable(f"{folder.path} goes on with: {'; '.join(harmless)}"))
        elif done is not None and folder.lacks_report():
            make_report(folder.path)
    if (done := folder.finished()) is not None:
        return done, None
    main = rank_zero_only.rank == 0
    resume = go_on_from(folder.path / "checkpoints", main=main) if cfg.mode == "fit" else None
    if main:
        if resume is None and cfg.mode == "fit":
            folder.from_the_start()
        _not_for_ever(cfg, folder, step_of(resume) if resume else 0)
        folder.write_config(config)
    return None, resume


def _not_for_ever(cfg: DictConfig, folder: RunFolder, step: int) -> None:
    """Refuse a Slurm job that comes back again and again without getting on."""
    in_vain = events.starts_in_vain(folder.path, step)
    if in_vain > cfg.trainer.max_requeues:
        why = f"started {in_vain} times after step {step} without a checkpoint beyond it"
        events.record(folder.path, "stop", step=step, ranks=launched().processes, detail=why)
        raise BeitError(
            f"{folder.path}: this Slurm job was {why} (trainer.max_requeues={cfg.trainer.max_requeues}) and is not "
            "started again: give it more time (hydra.launcher.timeout_min), or write checkpoints more often "
            "(checkpoint.every_minutes); a new job of the same command goes on"
        )


def _source_hash(cfg: DictConfig) -> str | None:
    """Hash of the file that a score is a score of: other weights under the same path are scored anew."""
    if cfg.stage.name != "knn" and cfg.mode != "evaluate":
        return None
    return files.sha256(record.file_of(cfg.init_from, key="init_from")[0])


def _train(
    cfg: DictConfig, config: dict[str, Any], folder: RunFolder, resume: Path | None, signals: Signals | None
) -> Results:
    """Fit, from the checkpoint `resume` on, or with mode=evaluate score `init_from` on the held-out images."""
    began, earlier = time.monotonic(), _earlier_seconds(folder.path)
    with open_dict(cfg):
        cfg.resume_step = step_of(resume) if resume else None
    if cfg.mode == "evaluate":
        _forward_only(cfg, processes(cfg))
    stage, data, trainer, report = build_run(cfg, config, signals, folder.lock)
    folder.lock.check()  # looking at the data may take long
    if report is not None and rank_zero_only.rank == 0:
        _tell_transfer(cfg, report, folder)
    if cfg.stage.name == "segment":
        stage.look = data.source.look(data.splits["train"], cfg.data.check_label_maps)
        _tell_look(stage.look)
    if cfg.stage.name == "pretrain" and rank_zero_only.rank == 0:
        draw_sheet(stage.views.mask, path=folder.path / "pictures" / "masks.png", seed=cfg.seed)
    if data.token_cache is not None and rank_zero_only.rank == 0:
        print(data.token_cache.story(data.splits), flush=True)
    if cfg.mode == "fit":
        _tell([warmup_remark(cfg, stage, data)])
        with signals.held() if signals else nullcontext():
            try:
                for logger in trainer.loggers:
                    logger.log_hyperparams(without_secrets(config))
                trainer.fit(stage, datamodule=data, ckpt_path=resume)
            except SystemExit:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
    elif "val" in data.splits:
        trainer.validate(stage, datamodule=data, verbose=False)
    if cfg.stage.name in SUPERVISED and "test" in data.splits:
        trainer.test(stage, datamodule=data, verbose=False)
    results = {
        "steps": trainer.global_step,
        "epochs": cfg.stage.epochs,
        "seconds": (earlier if resume else 0.0) + time.monotonic() - began,
        "parameters": sum(p.numel() for _, p in stage.trained_parameters()),
        "metrics": {**stage.held_out, **stage.tested},
        **stage.results(),
    }
    if cfg.stage.name in SUPERVISED:
        results["remarks"] = _few(cfg, data)
        results["train_images"] = len(data.splits["train"])
        start = None if report is None else {"path": str(cfg.init_from), "report": report.lines()}
        results["init_from"] = start
    if cfg.stage.name == "probe" and rank_zero_only.rank == 0:
        beside = _knn(cfg, cfg.stage.knn)
        results["knn"] = beside["knn"]
        results["metrics"] = {**beside["metrics"], **results["metrics"]}
    return results


def _tell_transfer(cfg: DictConfig, report: Report, folder: RunFolder) -> None:
    """Print what became of every weight of `init_from`, and keep it whole in the run's folder."""
    print(
        "\n".join([f"from {cfg.init_from}:", *(f"  {printable(line)}" for line in report.lines())]),
        flush=True,
    )
    files.write_text(folder.path / "init_from.json", json.dumps(asdict(report), indent=2) + "\n")


@rank_zero_only
def _tell(remarks: Iterable[str]) -> None:
    """Print what one should know before a training begins."""
    for remark in filter(None, remarks):
        print(printable(remark), flush=True)


@rank_zero_only
def _tell_look(look: dict[str, Any]) -> None:
    """Print what the label maps hold, so that labels that are off by one show before the training."""
    seen = sum(share > 0 for share in look["share"])
    print(
        f"{look['label_maps']} label maps looked at: {seen} of {len(look['share'])} classes occur, "
        f"{look['ignored']:.1%} of the pixels are ignored"
    )
    for remark in look["remarks"]:
        print(f"  {printable(remark)}")


def _knn(cfg: DictConfig, node: DictConfig) -> Results:
    """kNN (`node` describes it) with the encoder of `init_from`, the same encoder untrained, and raw pixels."""
    began = time.monotonic()
    device = torch.device("cuda" if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    seed_everything(cfg.seed, verbose=False)
    encoders = {"untrained": make(cfg.model), "trained": make(cfg.model)}
    saved = record.read(cfg.init_from, key="init_from")
    load_strictly(encoders["trained"], encoder_weights(saved, cfg.init_weights), "init_from")
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in cfg.data.normalize.values())
    _forward_only(cfg, 1)
    data = build_data(cfg)
    scores = make(node).score(encoders, lambda image: (image / 255 - mean) / std, data, device)
    knn = {
        **scores["trained"],
        "untrained": scores["untrained"]["accuracy"],
        "pixels": scores["pixels"]["accuracy"],
        "remark": scores["remark"],
    }
    metrics = {f"knn/{name}": scores[name]["accuracy"] for name in ("trained", "untrained", "pixels")}
    return {
        "seconds": time.monotonic() - began,
        "metrics": metrics,
        "knn": knn,
        "remarks": _few(cfg, data),
    }


def _few(cfg: DictConfig, data: Any) -> list[str]:
    """What to say of a score of few images."""
    part = "test" if "test" in data.splits else "val"
    count = len(data.splits.get(part, ()))
    if not 0 < count < FEW:
        return []
    if part in data.source.splits:
        mend = f"put more into the {part} part of the data"
    else:
        mend = f"hold out more with a larger data.val_share (now {cfg.data.val_share:g}), such as 0.2"
    return [f"scores are of only {count} images and therefore uncertain: {mend}"]


def _forward_only(cfg: DictConfig, world: int) -> None:
    """Batches for passes without an update: small enough for any device that could train the model."""
    with open_dict(cfg):
        cfg.micro_batch_size = cfg.micro_batch_size or 64
        cfg.batch_size = world * cfg.micro_batch_size


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be worked out (an error bar of one image) is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _device_name() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )


def _earlier_seconds(path: Path) -> float:
    """Training time of the run before this start, as far as it was logged."""
    seconds = read_series(path / "timing.csv").get("seconds")
    return 0.0 if seconds is None else seconds.last
