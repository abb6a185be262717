"""Which checkpoints stay, and what a kill between two of their names leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit_pretrain.checkpoint.saving import SaveCheckpoints, last_checkpoint
from beit_pretrain.errors import ConfigError
from beit_pretrain.stages.base import Stage


def trainer(step: int, loss: float | None) -> Any:
    def save(path: Path) -> None:
        path.write_text(str(step))

    metrics = {} if loss is None else {"val/loss": torch.tensor(loss)}
    return SimpleNamespace(
        global_step=step,
        callback_metrics=metrics,
        is_global_zero=True,
        save_checkpoint=save,
        accumulate_grad_batches=2,
        num_training_batches=10,
        world_size=1,
        ckpt_path=None,
    )


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    saver = SaveCheckpoints(folder=tmp_path, keep=2)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, float("nan")), (50, 1.5)):
        saver.on_train_epoch_end(trainer(step, loss), Stage)  # pyright: ignore[reportArgumentType]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step-00000040.ckpt", "step-00000050.ckpt"]
    assert (tmp_path / "best.ckpt").read_text() == "20" and (tmp_path / "last.ckpt").read_text() == "50"
    assert saver.state_dict() == {"best_value": 1.0, "best_step": 20}
    assert last_checkpoint(tmp_path) == tmp_path / "step-00000050.ckpt"


def test_a_stage_says_which_score_makes_the_best(tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(monitor=("val/top1", "max"))
    saver = SaveCheckpoints(folder=tmp_path, keep=1)
    for step, top1 in ((10, float("nan")), (20, 0.5), (30, 0.7), (40, 0.6)):
        at = trainer(step, 1.0 / step)
        at.callback_metrics["val/top1"] = torch.tensor(top1)
        saver.on_train_epoch_end(at, stage)
    assert (tmp_path / "best.ckpt").read_text() == "30"
    by_loss = SaveCheckpoints(folder=tmp_path / "other", monitor="val/loss")
    for step, loss in ((10, 1.0), (20, 2.0)):
        by_loss.on_train_epoch_end(trainer(step, loss), stage)
    assert by_loss.best_step == 10


def test_asked_to_save_it_does_so_once_for_a_step(tmp_path: Path) -> None:
    saver, now = SaveCheckpoints(folder=tmp_path), trainer(7, None)
    written: list[Path] = []
    now.save_checkpoint = lambda path: (written.append(path), path.write_text(""))
    saver.save(now)
    saver.save(now)
    assert [path.name for path in written] == ["step-00000007.ckpt"]
    going_on, now.ckpt_path = SaveCheckpoints(folder=tmp_path), written[0]
    going_on.on_train_start(now, Stage)  # pyright: ignore[reportArgumentType]
    going_on.save(now)
    assert len(written) == 1, "the checkpoint that a run goes on from is there"


def test_within_an_epoch_it_saves_by_step_after_whole_updates_only(tmp_path: Path) -> None:
    saver = SaveCheckpoints(folder=tmp_path, every_steps=2, every_minutes=None)
    for batch in range(10):
        at = trainer((batch + 1) // 2, None)
        saver.on_train_batch_end(at, None, None, None, batch)  # pyright: ignore[reportArgumentType]
    names = sorted(p.name for p in tmp_path.glob("step-*"))
    assert names == [
        "step-00000002.ckpt",
        "step-00000004.ckpt",
    ]  # the end of the epoch saves after its evaluation


def test_a_best_checkpoint_that_was_not_named_before_a_kill_is_named_on_going_on(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").write_text("10")
    (tmp_path / "step-00000020.ckpt").write_text("20")
    saver = SaveCheckpoints(folder=tmp_path)
    saver.load_state_dict({"best_value": 1.0, "best_step": 20})
    saver.on_train_start(trainer(20, None), None)  # pyright: ignore[reportArgumentType]
    saver.on_train_start(trainer(20, None), None)  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "best.ckpt").read_text() == "20"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "step-00000020.ckpt"]


def test_no_checkpoint_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep=0: set 1 or more"):
        SaveCheckpoints(folder=tmp_path, keep=0)
