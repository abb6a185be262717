"""The refused step of a run once more, on the CPU, watching every module."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from beit_pretrain.build import SUPERVISED, UNBUILT, build_stage, flat
from beit_pretrain.checkpoint import files, record
from beit_pretrain.errors import CheckpointError
from beit_pretrain.origins import load_strictly
from beit_pretrain.stages.base import step_seed
from beit_pretrain.tools.known import known_run
from beit_pretrain.wording import printable


def replay(path: Path) -> int:
    """Print loss, first non-finite output and non-finite gradients; 0 if the fault shows again, 1 if not."""
    saved = files.read(path)
    if "batches" not in saved:
        raise CheckpointError(f"{path} is no kept step: give a file of a run's bad_steps folder")
    record.check(saved, str(path))
    cfg = known_run(saved["beit_pretrain"]["config"], str(path))
    if cfg.stage.name == "probe":
        raise CheckpointError(
            f"{path} is a step of linear classifiers, whose frozen encoder is not in the file"
        )
    names = saved["beit_pretrain"]["preprocessing"]["class_names"]
    try:
        stage = build_stage(cfg, names if cfg.stage.name in SUPERVISED else None)
    except UNBUILT as error:
        raise CheckpointError(
            f"{path} has a stage that cannot be built ({flat(error)}): give another file"
        ) from error
    load_strictly(stage, {**stage.state_dict(), **saved["state_dict"]}, str(path))
    stage.train()
    seen: list[str] = []
    for name, module in stage.named_modules():
        module.register_forward_hook(_watch(name, seen))
    where = f"step {saved['step']}, rank {saved['rank']}, on the CPU in float32"
    print(f"{where}; the run: {printable(saved['precision'])}")
    faulty = False
    for micro, fields in enumerate(saved["batches"]):
        batch = SimpleNamespace(**{"ids": None, "token_image": None, "jitter": None, **fields})
        torch.manual_seed(step_seed(cfg.seed, saved["step"], micro, saved["rank"]))
        result = stage.compute(batch, saved["step"])
        loss = result.loss / stage.expected_count(batch)
        loss.backward()
        print(f"  micro-batch {micro}: loss {loss.item():.6g}, samples {fields['sample'].tolist()}")
        faulty |= not bool(torch.isfinite(loss))
    stage.drop_pending()
    gradients = [
        name
        for name, p in stage.named_parameters()
        if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    weights = [n for n, p in stage.named_parameters() if not bool(torch.isfinite(p).all())]
    print(f"  not finite among the weights: {', '.join(weights) or 'none'}")
    print(f"  first output that is not finite: {seen[0] if seen else 'none'}")
    print(f"  gradients that are not finite: {len(gradients)}; {', '.join(gradients[:5])}")
    if faulty or gradients:
        return 0
    print("  all is finite here: the step left the range of the run's precision, not of float32")
    return 1


def _watch(name: str, seen: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if (
            isinstance(output, Tensor)
            and output.is_floating_point()
            and not bool(torch.isfinite(output).all())
        ):
            seen.append(name or type(module).__name__)

    return hook
