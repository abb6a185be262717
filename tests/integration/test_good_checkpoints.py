"""Only good checkpoints are written, and a run goes on from a good one, to the bits of a run that was left alone."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SMALL_PRETRAIN, assert_same_end

from beit_pretrain.cluster import events
from beit_pretrain.cluster.signals import Interrupted, Signals
from beit_pretrain.compose import compose
from beit_pretrain.errors import CheckpointError, TrainingError
from beit_pretrain.run import run
from beit_pretrain.stages.base import StepResult
from beit_pretrain.stages.pretrain import Pretrain

BASE = [
    *SMALL_PRETRAIN,
    "stage.epochs=2",  # of 17 updates
    "stage.optim.warmup_epochs=0.2",
    "stage.max_bad_steps=9",
    "stage.log_every=1",
    "data.workers=0",
    "checkpoint.every_minutes=null",
    "~callbacks.progress",
    "~callbacks.knn",
    "~callbacks.pictures",
    "~callbacks.throughput",
]
POISONED = (7, 8)  # updates without a finite loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Found .* module.s. in eval mode",  # the frozen tokenizer
    "ignore:.*GPU available but not used",
    "ignore:.*loss or gradient is not finite",
)


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def go(tokenizer_run: Path) -> Callable[..., Path]:
    def train(name: str, *more: str, signals: Signals | None = None) -> Path:
        overrides = [*BASE, f"tokenizer.checkpoint={tokenizer_run}", f"name={name}", *more]
        run(compose(overrides), overrides, signals)
        return Path("runs") / name

    return train


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def poison(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], None] = lambda step: None) -> None:
    compute = Pretrain.compute

    def poisoned(self: Pretrain, batch: Any, step: int) -> StepResult:
        result = compute(self, batch, step)
        at(step)
        if step in POISONED:
            result.loss = result.loss * float("nan")
        return result

    monkeypatch.setattr(Pretrain, "compute", poisoned)


def test_a_signal_and_damage_cost_steps_and_no_bits(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch)
    whole = go("whole", "checkpoint.every_steps=3")
    assert names(whole) == ["step-00000033.ckpt", "step-00000034.ckpt"]

    signals = Signals()

    def ask(step: int) -> None:
        if step == POISONED[-1]:
            signals.received = signal.SIGUSR1

    with monkeypatch.context() as patch, signals, pytest.raises(Interrupted) as stopped:
        poison(patch, ask)
        go("stopped", "checkpoint.every_steps=3", signals=signals)
    assert stopped.value.step == 6, "none was written while updates were refused"
    assert names(Path("runs/stopped")) == ["step-00000003.ckpt", "step-00000006.ckpt"]
    assert [row["step"] for row in events.read(Path("runs/stopped"))] == ["0", "9"]
    go("stopped", "checkpoint.every_steps=3")
    assert_same_end(whole, Path("runs/stopped"))

    shutil.copytree(whole, "runs/damaged", symlinks=True)
    (Path("runs/damaged") / "results.json").unlink()
    newest, before = (Path("runs/damaged/checkpoints") / name for name in reversed(names(whole)))
    best = newest.with_name("best.ckpt")
    best.unlink()
    best.hardlink_to(newest)  # as it was before it was copied
    newest.write_bytes(newest.read_bytes()[:9000])
    go("damaged", "checkpoint.every_steps=3")
    assert f"{newest}: " in (said := capsys.readouterr().out) and "goes on from step-00000033.ckpt" in said
    assert_same_end(whole, Path("runs/damaged"))
    assert names(Path("runs/damaged")) == [*names(whole), "step-00000034.ckpt.bad"]
    assert best.samefile(newest) and newest.with_name("last.ckpt").samefile(newest)

    (Path("runs/damaged") / "results.json").unlink()
    for path in (newest, before):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*34\.ckpt: is empty"):
        go("damaged", "checkpoint.every_steps=3")


@pytest.mark.parametrize(
    ("spoilt", "every_steps", "says"),
    [
        ("weights", "1", r"step 9: .*first in encoder\.cls_token.* good checkpoint is .*step-00000008\.ckpt"),
        ("moments", "1", r"step 9: .*first in exp_avg of .* good checkpoint is .*step-00000008\.ckpt"),
        # With all moments at once the next update is accepted and spoils the weights.
        (
            "moments",
            "null",
            r"9 steps in a row .* at step 18\. There is no good checkpoint in .*checkpoints;",
        ),
    ],
)
def test_nothing_spoilt_is_saved_and_the_last_good_checkpoint_is_named(
    go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, spoilt: str, every_steps: str, says: str
) -> None:
    after = Pretrain.after_step

    def spoil(self: Pretrain, step: int) -> None:
        after(self, step)
        if step == 8 and spoilt == "weights":
            self.encoder.cls_token.data[0, 0, 3] = float("nan")
        elif step == 8:
            for state in self.optimizers().optimizer.state.values():  # pyright: ignore
                state["exp_avg"].fill_(float("nan"))

    monkeypatch.setattr(Pretrain, "after_step", spoil)
    with pytest.raises(TrainingError, match=says):
        go("spoilt", f"checkpoint.every_steps={every_steps}")
    assert names(Path("runs/spoilt")) == (
        ["step-00000007.ckpt", "step-00000008.ckpt"] if every_steps == "1" else []
    )
