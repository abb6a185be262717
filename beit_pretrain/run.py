"""From a configuration to a finished run: check, build, train or score, write down what came out."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, open_dict

from beit_pretrain import checks
from beit_pretrain.build import SUPERVISED, build_data, build_run, make
from beit_pretrain.checkpoint import files, record
from beit_pretrain.checkpoint.adapt import Report
from beit_pretrain.checkpoint.saving import last_checkpoint
from beit_pretrain.compose import recipe_diff
from beit_pretrain.devices import devices
from beit_pretrain.folder import RunFolder, plain
from beit_pretrain.origins import encoder_weights, load_strictly
from beit_pretrain.preview import preview
from beit_pretrain.report import make_report
from beit_pretrain.report.mask_sheet import draw_sheet

Results = dict[str, Any]


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> Results:
    """Do what the configuration says and return what results.json holds.

    A run that stands unfinished in its folder goes on; a finished one is not run again.
    """
    checks.check(cfg, overrides)
    if cfg.dry_run:
        return preview(cfg)
    config = plain(cfg)
    source = _source_hash(cfg)
    with ExitStack() as stack:
        folder = RunFolder(Path(cfg.run_dir))
        if rank_zero_only.rank == 0:
            stack.enter_context(folder)
            if cfg.overwrite or cfg.debug:
                folder.clear()
            harmless = folder.compare(config)
            longer = any(line.startswith("stage.epochs") for line in harmless)
            done = folder.finished()
            if done is not None and (longer or done.get("scored") != source):
                folder.reopen()
            elif harmless and done is None:
                print(f"{folder.path} goes on with: {'; '.join(harmless)}")
        if (done := folder.finished()) is not None:
            return done
        if rank_zero_only.rank == 0:
            folder.write_config(config)
        results = _knn(cfg, cfg.stage) if cfg.stage.name == "knn" else _train(cfg, config, folder)
        if rank_zero_only.rank == 0:
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
                    "git_commit": record.git_commit(),
                },
            }
            results = _without_nan(results)
            files.write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
            make_report(folder.path)
    return results


def _source_hash(cfg: DictConfig) -> str | None:
    """Hash of the file that a score is a score of: other weights under the same path are scored anew."""
    if cfg.stage.name != "knn" and cfg.mode != "evaluate":
        return None
    return files.sha256(files.resolve(Path(cfg.init_from), key="init_from"))


def _train(cfg: DictConfig, config: dict[str, Any], folder: RunFolder) -> Results:
    """Fit, or with mode=evaluate score `init_from` on the held-out images."""
    began, earlier = time.monotonic(), _earlier_seconds(folder.path)
    resume = last_checkpoint(folder.path / "checkpoints") if cfg.mode == "fit" else None
    with open_dict(cfg):
        cfg.resume_step = int(resume.stem.removeprefix("step-")) if resume else None
    if cfg.mode == "evaluate":
        _forward_only(cfg, (devices(cfg) or 1) * cfg.trainer.num_nodes)
    stage, data, trainer, report = build_run(cfg, config)
    if report is not None and rank_zero_only.rank == 0:
        _tell_transfer(cfg, report, folder)
    if cfg.stage.name == "segment":
        stage.look = data.source.look(data.splits["train"], cfg.data.check_label_maps)
        _tell_look(stage.look)
    if cfg.stage.name == "pretrain" and rank_zero_only.rank == 0:
        draw_sheet(stage.views.mask, path=folder.path / "pictures" / "masks.png", seed=cfg.seed)
    if cfg.mode == "fit":
        try:
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
    print("\n".join([f"from {cfg.init_from}:", *(f"  {line}" for line in report.lines())]), flush=True)
    files.write_text(folder.path / "init_from.json", json.dumps(asdict(report), indent=2) + "\n")


@rank_zero_only
def _tell_look(look: dict[str, Any]) -> None:
    """Print what the label maps hold, so that labels that are off by one show before the training."""
    seen = sum(share > 0 for share in look["share"])
    print(
        f"{look['label_maps']} label maps looked at: {seen} of {len(look['share'])} classes occur, "
        f"{look['ignored']:.1%} of the pixels are ignored"
    )
    for remark in look["remarks"]:
        print(f"  {remark}")


def _knn(cfg: DictConfig, node: DictConfig) -> Results:
    """kNN (`node` describes it) with the encoder of `init_from`, the same encoder untrained, and raw pixels."""
    began = time.monotonic()
    device = torch.device("cuda" if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    seed_everything(cfg.seed, verbose=False)
    encoders = {"untrained": make(cfg.model), "trained": make(cfg.model)}
    saved = record.read(Path(cfg.init_from), key="init_from")
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
    return {"seconds": time.monotonic() - began, "metrics": metrics, "knn": knn}


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
    timing = path / "timing.csv"
    if not timing.exists():
        return 0.0
    lines = timing.read_text().splitlines()
    if len(lines) < 2 or "seconds" not in lines[0].split(","):
        return 0.0
    return float(lines[-1].split(",")[lines[0].split(",").index("seconds")] or 0.0)
