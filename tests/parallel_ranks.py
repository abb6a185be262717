"""Small trainings on several processes of this machine, many in one start; what each process does, and its start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import open_dict
from torch import Tensor, nn
from torch.nn import functional as F

from beit_pretrain.build import build_run
from beit_pretrain.checkpoint import files
from beit_pretrain.compose import compose
from beit_pretrain.folder import plain
from beit_pretrain.run import run
from beit_pretrain.stages.base import StepResult

HERE = Path(__file__).resolve().parent
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
)


class Job:
    """A training: overrides, and the checkpoint it goes on from."""

    def __init__(self, name: str, overrides: Sequence[str], resume: Path | None = None) -> None:
        self.name, self.overrides, self.resume = name, list(overrides), resume


def on_ranks(world: int, folder: Path, jobs: Sequence[Job], *, watched: Sequence[str] = ()) -> None:
    """Train all jobs on `world` processes below `folder`, and `watched` as a whole run whose writing is noted."""
    told = [[job.name, job.overrides, None if job.resume is None else str(job.resume)] for job in jobs]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([told, list(watched)]))
    paths = os.pathsep.join(map(str, [HERE, HERE / "integration", HERE.parent, HERE.parent / "tokenizers"]))
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TORCHELASTIC_RUN_ID": "test"}
    common |= {"GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0", "WORLD_SIZE": str(world)}
    common |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    logs = [folder / f"rank-{rank}.log" for rank in range(world)]
    with ExitStack() as stack:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__],
                cwd=folder,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=500) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-4000:] for log in logs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fit(name: str, overrides: Sequence[str], resume: Path | None) -> None:
    """Train into runs/<name> of the working folder, and score the test part where a stage has one."""
    cfg = compose([*overrides, f"name={name}"])
    with open_dict(cfg):
        cfg.resume_step = int(resume.stem.removeprefix("step-")) if resume else None
    stage, data, trainer, _ = build_run(cfg, plain(cfg))
    trainer.fit(stage, datamodule=data, ckpt_path=resume)
    if cfg.stage.name in ("classify", "segment") and "test" in data.splits:
        trainer.test(stage, datamodule=data, verbose=False)
        files.write_text(Path(cfg.run_dir) / "test.json", json.dumps(stage.tested))


class Still(Callback):
    """Takes chance out that differs between ranks: dropout of channels, and the noise of the Gumbel softmax."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.Dropout2d):
                module.p = 0.0
        self._gumbel = F.gumbel_softmax
        F.gumbel_softmax = lambda logits, tau, hard, dim: (logits / tau).softmax(dim)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        F.gumbel_softmax = self._gumbel


class Poison(Callback):
    """Makes the loss of one step NaN, on the last rank only."""

    def __init__(self, step: int) -> None:
        self.step = step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stage_: Any = pl_module
        compute = stage_.compute

        def poisoned(batch: Any, step: int) -> StepResult:
            result = compute(batch, step)
            if step == self.step and trainer.global_rank == trainer.world_size - 1:
                result.loss = result.loss * float("nan")
            return result

        stage_.compute = poisoned


class Notes(Callback):
    """Writes down what this rank starts from and draws, to notes-<rank>.json beside the runs."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.notes: list[dict[str, Any]] = []
        self._dropped: list[list[bool]] = []
        self.weights = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = files.weight_hash(trainer.strategy.lightning_module_state_dict())
        stage: Any = pl_module

        def note(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            self._dropped.append((made.flatten(1) == 0).all(1).tolist())

        stage.encoder.blocks[-1].drop_path.register_forward_hook(note)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._dropped.clear()
        self._now = {"step": trainer.global_step, "batch": batch_idx, "samples": batch.sample.tolist()}
        self._now["masks"] = [mask.nonzero().flatten().tolist() for mask in batch.mask]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.notes.append({**self._now, "seed": torch.initial_seed(), "dropped": list(self._dropped)})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        said = json.dumps({"weights": self.weights, "steps": self.notes})
        (self.folder / f"notes-{trainer.global_rank}.json").write_text(said)


@contextmanager
def noted_writing(folder: Path) -> Iterator[list[str]]:
    """Names below `folder` that this process opens for writing, makes, moves or removes."""
    names: list[str] = []
    here, on = os.path.realpath(folder) + os.sep, [True]

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if not on[0] or not (event in CHANGES or (event == "open" and given[2] & WRITES)):
            return
        for path in given[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if isinstance(path, str | bytes | os.PathLike):
                name = os.path.abspath(os.fsdecode(path))
                if name.startswith(here):
                    names.append(name.removeprefix(here))

    sys.addaudithook(hook)  # for good, so it is switched off
    yield names
    on[0] = False


def main() -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    jobs, watched = json.loads(Path("jobs.json").read_text())
    if watched:
        with noted_writing(Path("runs")) as names:
            run(compose(watched), watched)
        Path(f"written-{rank}.json").write_text(json.dumps(names))
    # Lightning takes the group that it finds.
    dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/meet", rank=rank, world_size=world)
    for name, overrides, resume in jobs:
        fit(name, overrides, None if resume is None else Path(resume))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
