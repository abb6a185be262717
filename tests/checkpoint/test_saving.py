"""Which checkpoints stay, and what a kill between two of their names leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit_pretrain.checkpoint import files
from beit_pretrain.checkpoint.finite import not_finite
from beit_pretrain.checkpoint.saving import SaveCheckpoints, go_on_from, last_good
from beit_pretrain.errors import CheckpointError, ConfigError, TrainingError
from beit_pretrain.stages.base import Stage


def trainer(step: int, loss: float | None, *, refused: int = 0, weight: float = 1.0) -> Any:
    """Stands after `step` of 1000 updates, the last `refused` of which were refused."""

    def save(path: Path) -> None:
        path.write_text(str(step))

    stage = SimpleNamespace(
        bad_steps=torch.tensor([9, refused]),
        total_steps=1000,
        state_dict=lambda: {"first": torch.ones(2), "second": torch.tensor([1.0, weight])},
        own_state=lambda state: state,
    )

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
        lightning_module=stage,
        optimizers=[],
    )


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt*"))


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    saver = SaveCheckpoints(folder=tmp_path, keep=2)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, float("nan")), (50, 1.5)):
        saver.on_train_epoch_end(trainer(step, loss), Stage)  # pyright: ignore[reportArgumentType]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step-00000040.ckpt", "step-00000050.ckpt"]
    assert (tmp_path / "best.ckpt").read_text() == "20" and (tmp_path / "last.ckpt").read_text() == "50"
    assert saver.state_dict() == {"best_value": 1.0, "best_step": 20}


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
    saved: list[Path] = []
    now.save_checkpoint = lambda path: (saved.append(path), path.write_text(""))
    assert (saver.save(now), saver.save(now)) == (7, 7)
    assert [path.name for path in saved] == ["step-00000007.ckpt"]
    going_on, now.ckpt_path = SaveCheckpoints(folder=tmp_path), saved[0]
    going_on.on_train_start(now, Stage)  # pyright: ignore[reportArgumentType]
    assert going_on.save(now) == 7
    assert len(saved) == 1, "the checkpoint that a run goes on from is there"


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


# --- what is not worth keeping ------------------------------------------------------------------------------


def test_while_updates_are_refused_none_is_written_and_the_next_good_one_is(tmp_path: Path) -> None:
    saver = SaveCheckpoints(folder=tmp_path, every_steps=None, every_minutes=None)
    assert saver.save(trainer(3, None, refused=1)) == 0  # a signal: the run goes on from where it began
    saver.on_train_epoch_end(trainer(5, 1.0), Stage)  # pyright: ignore[reportArgumentType]
    saver.on_train_epoch_end(trainer(10, 0.1, refused=2), Stage)  # pyright: ignore[reportArgumentType]
    assert saver.save(trainer(11, None, refused=3)) == 5
    assert written(tmp_path) == ["best.ckpt", "last.ckpt", "step-00000005.ckpt"]
    assert saver.state_dict() == {"best_value": 1.0, "best_step": 5}
    for step, refused in ((12, 4), (13, 0), (14, 0)):
        at = trainer(step, None, refused=refused)
        saver.on_train_batch_end(at, None, None, None, 1)  # pyright: ignore[reportArgumentType]
    assert written(tmp_path)[2:] == ["step-00000005.ckpt", "step-00000013.ckpt"]


def test_the_end_of_a_training_is_saved_whatever_became_of_its_last_update(tmp_path: Path) -> None:
    saver = SaveCheckpoints(folder=tmp_path)
    saver.on_train_epoch_end(trainer(1000, 1.0, refused=2), Stage)  # pyright: ignore[reportArgumentType]
    assert written(tmp_path) == ["best.ckpt", "last.ckpt", "step-00001000.ckpt"]
    nan = trainer(1000, 1.0, refused=2, weight=float("nan"))
    with pytest.raises(TrainingError):
        SaveCheckpoints(folder=tmp_path).save(nan)


def test_a_buffer_may_hold_infinity_and_no_weight_nor_any_nan() -> None:
    infinite = torch.tensor([1.0, -float("inf")])
    state = {
        "mask": infinite,
        "weight": infinite,
        "mean": torch.tensor([float("nan")]),
        "good": torch.ones(2),
    }
    assert not_finite(state, {"weight", "good"}) == ["weight", "mean"]
    assert not_finite(state) == ["mask", "weight", "mean"]


@pytest.mark.parametrize("where", ["weights", "moments"])
def test_what_is_not_finite_ends_the_run_and_is_not_written(tmp_path: Path, where: str) -> None:
    saver = SaveCheckpoints(folder=tmp_path)
    spoilt = trainer(7, None, weight=float("inf") if where == "weights" else 1.0)
    parameter = torch.nn.Parameter(torch.ones(3))
    name = {"weights": "second", "moments": "head.weight"}[where]
    optimizer = torch.optim.AdamW([{"params": [parameter], "names": [name]}])
    parameter.sum().backward()
    optimizer.step()
    if where == "moments":
        optimizer.state[parameter]["exp_avg_sq"][1] = float("nan")
    spoilt.optimizers = [optimizer]
    named = {"weights": "second", "moments": "exp_avg_sq of head.weight"}[where]
    with pytest.raises(
        TrainingError, match=rf"step 7: .*1 tensor, first in {named}\) .*no good checkpoint in"
    ):
        saver.save(spoilt)
    assert written(tmp_path) == []
    keep(tmp_path, 5)
    with pytest.raises(
        TrainingError, match=r"The last good checkpoint is .*step-00000005\.ckpt; try a lower"
    ):
        saver.save(spoilt)


def test_ranks_agree_on_what_is_spoilt(tmp_path: Path) -> None:
    asked: list[bool] = []

    def one_of_them(mine: bool, all: bool) -> bool:
        asked.append(mine)
        assert not all
        return True

    two = trainer(7, None)
    two.world_size, two.strategy = 2, SimpleNamespace(reduce_boolean_decision=one_of_them)
    with pytest.raises(TrainingError, match=r"step 7: .*on another rank"):
        SaveCheckpoints(folder=tmp_path).save(two)
    assert asked == [False] and written(tmp_path) == []


# --- going on -----------------------------------------------------------------------------------------------


def keep(folder: Path, step: int, *, weight: float = 1.0, moment: float = 1.0) -> Path:
    path = folder / f"step-{step:08d}.ckpt"
    optimizer = {
        "state": {0: {"exp_avg": torch.tensor(moment)}},
        "param_groups": [{"params": [0], "names": ["weight"]}],
    }
    files.write(path, {"state_dict": {"weight": torch.full((9,), weight)}, "optimizer_states": [optimizer]})
    return path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_run_goes_on_from_the_newest_and_without_any_from_the_start(tmp_path: Path) -> None:
    assert go_on_from(tmp_path / "none", main=True) is None
    for step in (99_999_999, 100_000_000):
        keep(tmp_path, step)
    (tmp_path / "step-foo.ckpt").write_text("not one of ours")
    assert go_on_from(tmp_path, main=True) == tmp_path / "step-100000000.ckpt"
    assert written(tmp_path) == ["step-100000000.ckpt", "step-99999999.ckpt", "step-foo.ckpt"]


@pytest.mark.parametrize("fault", ["flipped", "cut", "empty", "nan", "moments", "other"])
def test_one_that_is_not_good_is_passed_over_in_one_line(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = keep(tmp_path, 10)
    bad = keep(
        tmp_path,
        20,
        weight=float("nan") if fault == "nan" else 1.0,
        moment=float("inf") if fault == "moments" else 1.0,
    )
    if fault == "flipped":
        flip(bad, bad.read_bytes().index(b"\0\0\x80\x3f" * 9))
    if fault in ("cut", "empty"):
        bad.write_bytes(bad.read_bytes()[: 500 if fault == "cut" else 0])
    if fault == "other":
        files.write(bad, {"weight": torch.ones(3)})
    (tmp_path / "best.ckpt").hardlink_to(bad)
    (tmp_path / "last.ckpt").symlink_to(bad.name)
    assert go_on_from(tmp_path, main=False) == good and capsys.readouterr().out == ""
    assert go_on_from(tmp_path, main=True) == good
    says = {"flipped": "data/0 is not", "cut": "truncated", "empty": "is empty", "other": "is not the"}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{says.get(fault, 'NaN or infinity in 1 tensor')}" in said
    assert said.startswith(str(bad)) and "goes on from step-00000010.ckpt" in said
    assert written(tmp_path) == ["last.ckpt", "step-00000010.ckpt", "step-00000020.ckpt.bad"]
    assert (tmp_path / "last.ckpt").samefile(good)
    assert last_good(tmp_path, main=True).endswith("step-00000010.ckpt")


def test_none_that_is_good_is_an_error_and_no_new_start(tmp_path: Path) -> None:
    for step in (10, 20):
        keep(tmp_path, step, weight=float("nan"))
    before = written(tmp_path)
    with pytest.raises(CheckpointError, match=r"none of the 2 .*20\.ckpt: NaN .* overwrite=true") as caught:
        go_on_from(tmp_path, main=True)
    assert "\n" not in str(caught.value) and written(tmp_path) == before
