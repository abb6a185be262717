"""Real `beit-train` processes for tests: run, kill, compare."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from beit_pretrain.cli import main

HERE = Path(__file__).resolve().parent

# Small enough for a test: 8 x 8 patches of 32 x 32 digits, two blocks of 32, 32 kinds of tokens.
SMALL_TOKENIZER = [
    "stage=tokenizer",
    "experiment=digits_tokenizer",
    "tokenizer.vocab_size=32",
    "tokenizer.hidden=16",
    "tokenizer.code_dim=16",
    "stage.epochs=2",
    "trainer.accelerator=cpu",
    "logger=csv",
]
SMALL_PRETRAIN = [
    "stage=pretrain",
    "experiment=digits_pretrain",
    "batch_size=64",
    "masking.count=26",
    "trainer.evaluate_every=1",
    "callbacks.pictures.every_epochs=1",
    "model.width=32",
    "model.heads=2",
    "model.depth=2",
    "model.drop_path=0.2",
    "stage.epochs=2",
    "stage.optim.warmup_epochs=1",
    "callbacks.knn.every_epochs=1",
    "trainer.accelerator=cpu",
    "logger=csv",
]


class RecordSamples(Callback):
    """Writes which samples each micro-batch held; lines of repeated steps are appended."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        place = [trainer.global_step, batch_idx, trainer.global_rank]
        line = json.dumps([*place, batch.sample.tolist(), batch.view.tolist()])
        with self.path.open("a") as file:
            file.write(line + "\n")


class Slow(Callback):
    """Makes each step take about half a second longer."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        time.sleep(0.5)


class Fail(Callback):
    """Raises on one rank, after some steps."""

    def __init__(self, rank: int, step: int = 10) -> None:
        self.rank = rank
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            raise RuntimeError(f"rank {self.rank} has had enough")


class LoseFolder(Callback):
    """Another machine takes the run's folder over, or somebody removes it; what is in it then is written beside it."""

    def __init__(self, run_dir: str, how: str, step: int) -> None:
        self.run_dir = Path(run_dir)
        self.how = how
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step != self.step:
            return
        if self.how == "removed":
            shutil.rmtree(self.run_dir)
            return
        (self.run_dir / ".lock").write_text(json.dumps({"host": "node8", "pid": 5, "started": "1"}))
        (self.run_dir / "metrics.csv").write_text("step,epoch\n1,0.1\n")
        then = {
            str(path.relative_to(self.run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.run_dir.rglob("*")
            if path.is_file() and path.name != ".lock"
        }
        (self.run_dir.parent / "then.json").write_text(json.dumps(then))


@contextmanager
def hearing_ctrl_c() -> Iterator[None]:
    """Where the tests run in a shell's background, Ctrl-C is ignored, and a child would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def one_thread() -> Iterator[None]:
    """What runs in this process is as exact, and as modest, as a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def environment() -> dict[str, str]:
    """One thread, so that sums are added in the same order on any machine, and `running` importable."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def record(run: Path) -> list[str]:
    """What a run has to be told so that `assert_same_run` can compare its samples."""
    return [
        "+callbacks.record._target_=running.RecordSamples",
        f"+callbacks.record.path={run.parent}/{run.name}-samples.jsonl",
    ]


def start(arguments: Sequence[str], cwd: Path, by: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`beit-train`, with another module `by` which it is started."""
    return subprocess.Popen(
        [sys.executable, *by, "-m", "beit_pretrain", *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(arguments: Sequence[str], cwd: Path, code: int = 0) -> str:
    """Run to the end and return what was printed."""
    process = start(arguments, cwd)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def train_here(arguments: Sequence[str], cwd: Path, code: int = 0) -> str:
    """As `train`, within this process: it saves the seconds that a process needs to begin and to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    printed, ended = io.StringIO(), 0
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        with chdir(cwd), one_thread(), redirect_stdout(printed), redirect_stderr(printed), catch_warnings():
            simplefilter("default")  # told, and no errors
            main(arguments)
    except SystemExit as exit_:
        ended = exit_.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert ended == code, printed.getvalue()
    return printed.getvalue()


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and its workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def train_with_kills(arguments: Sequence[str], cwd: Path, run: Path, *, kills: int, seed: int) -> None:
    """Kill a run `kills` times, at random times or while it writes, then finish it."""
    rng = random.Random(seed)
    for number in range(kills):
        process = start(arguments, cwd)
        newest = max((p.name for p in (run / "checkpoints").glob("step-*.ckpt")), default="")
        deadline = time.monotonic() + 120
        # Every second kill falls into the writing of a checkpoint, the others anywhere.
        writing = number % 2 == 1
        until = None
        while process.poll() is None:
            assert time.monotonic() < deadline, "the run made no progress"
            checkpoints = run / "checkpoints"
            if until is None and any(p.name > newest for p in checkpoints.glob("step-*.ckpt")):
                until = time.monotonic() + rng.uniform(0, 0.5)
            if until is not None and not writing and time.monotonic() >= until:
                break
            if until is not None and writing and any(checkpoints.glob(".*.tmp")):
                break
            time.sleep(0.001)
        assert process.poll() is None, process.communicate()[0]
        kill(process)
    train(arguments, cwd)


def assert_same_run(one: Path, other: Path) -> None:
    """Equal bits: weights, optimiser, schedule, callback states, position, metrics, samples of every step."""
    assert_same_end(one, other)
    assert samples(one) == samples(other)


def assert_same_end(one: Path, other: Path) -> None:
    """Equal bits of what two runs leave behind."""
    left, right = (
        torch.load((run / "checkpoints" / "last.ckpt"), weights_only=True, map_location="cpu")
        for run in (one, other)
    )
    assert left["global_step"] == right["global_step"]
    for key in ("state_dict", "optimizer_states", "callbacks", "lr_schedulers", "epoch"):
        assert_equal(left[key], right[key], key)
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def samples(run: Path) -> dict[tuple[int, int, int], Any]:
    """(step, micro-batch, rank) to samples and views; a step done twice must have held the same ones."""
    seen: dict[tuple[int, int, int], Any] = {}
    for line in (run.parent / f"{run.name}-samples.jsonl").read_text().splitlines():
        step, micro, rank, *content = json.loads(line)
        assert seen.setdefault((step, micro, rank), content) == content
    return seen


def assert_equal(left: Any, right: Any, where: str) -> None:
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{where}.{i}")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    else:
        assert left == right, where
