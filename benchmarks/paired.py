"""Many small trainings for a comparison in pairs: run them quietly, several at a time, and say how far to trust it."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats


def work(arguments: list[str]) -> dict[str, Any]:
    """Run one command on one thread; its metrics."""
    import lightning.pytorch  # which sets its loggers' levels
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for library in (lightning.pytorch.__name__, "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from beit_pretrain.compose import compose
    from beit_pretrain.run import run

    cfg = compose(arguments)
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = run(cfg, arguments)["metrics"]
    for checkpoint in (Path(cfg.run_dir) / "checkpoints").glob("*.ckpt"):
        checkpoint.unlink()  # hundreds of them are of no further use
    return metrics


def measure(commands: Mapping[Any, list[str]], jobs: int, shown: str) -> dict[Any, dict[str, Any]]:
    """The metrics of each command, of which `shown` is printed; what is finished is not run again."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for (task, arguments), metrics in zip(
            commands.items(), pool.map(work, commands.values()), strict=True
        ):
            found[task] = metrics
            name = next(a.removeprefix("name=") for a in arguments if a.startswith("name="))
            print(f"{name}: {shown} {metrics[shown]:.4f}", flush=True)
    return found


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95% interval of a mean paired difference (Student's t)."""
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean() - half), float(differences.mean() + half)
