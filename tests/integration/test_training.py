"""What a training run promises, on the embedded digits."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import SMALL_PRETRAIN, assert_equal, train, train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from beit_pretrain.compose import compose
from beit_pretrain.errors import CheckpointError, ConfigError, TrainingError
from beit_pretrain.run import run
from beit_pretrain.stages.base import StepResult
from beit_pretrain.stages.pretrain import Pretrain
from beit_pretrain.tools.replay import replay

# In this process, and therefore fast: one epoch, nothing but the csv files.
FAST = [
    *SMALL_PRETRAIN,
    "stage.epochs=1",
    "stage.optim.warmup_epochs=0.2",
    "data.workers=0",
    "~callbacks.progress",
]
LEAN = ["~callbacks.knn", "~callbacks.pictures", "~callbacks.throughput"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Found .* module.s. in eval mode",  # the frozen tokenizer
    "ignore:.*GPU available but not used",
)


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def go(tokenizer: Path, name: str, *more: str, base: Sequence[str] = (*FAST, *LEAN)) -> Path:
    overrides = [*base, f"tokenizer.checkpoint={tokenizer}", f"name={name}", *more]
    run(compose(overrides), overrides)
    return Path("runs") / name


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")


def metrics(folder: Path, column: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoint(folder)["state_dict"]


def test_the_loggers_have_the_configuration_also_when_the_run_goes_on(tokenizer_run: Path) -> None:
    base = [option for option in (*FAST, *LEAN) if not option.startswith(("logger=", "stage.epochs="))]
    for epochs in (1, 2):
        options = ["logger=default", "data.train_limit=64", f"stage.epochs={epochs}"]
        folder = go(tokenizer_run, "told", *options, base=base)
        kept = yaml.safe_load((folder / "tensorboard" / "hparams.yaml").read_text())
        assert kept["stage"]["epochs"] == epochs
        assert kept == yaml.safe_load((folder / "config.yaml").read_text())
    steps = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert "_hparams_/session_start_info" in steps.PluginTagToContent("hparams")
    assert [point.step for point in steps.Scalars("val/loss")] == [1, 2]


def test_accumulation_averages_over_hidden_patches_and_not_over_batches(tokenizer_run: Path) -> None:
    # Without the exact count images hide different numbers of patches; without drop path nothing else differs.
    same = ["masking.exact=false", "model.drop_path=0.0", "stage.log_every=1"]
    whole = go(tokenizer_run, "whole", *same)
    parts = go(tokenizer_run, "parts", *same, "micro_batch_size=8")
    losses = metrics(whole, "train/loss")
    assert len(losses) == 17 and max(losses) - min(losses) > 0.1
    assert metrics(parts, "train/loss") == pytest.approx(losses, abs=1e-5)
    assert metrics(parts, "train/grad_norm") == pytest.approx(metrics(whole, "train/grad_norm"), rel=1e-4)
    assert metrics(parts, "train/accuracy") == pytest.approx(metrics(whole, "train/accuracy"), abs=1e-3)


@pytest.mark.slow
def test_two_ranks_train_as_one_device_does(tokenizer_run: Path) -> None:
    same = [
        *(o for o in [*FAST, *LEAN] if o != "~callbacks.progress"),
        f"tokenizer.checkpoint={tokenizer_run}",
        "masking.exact=false",
        "model.drop_path=0.0",
        "stage.log_every=1",
    ]
    train([*same, "name=one"], Path.cwd())
    train([*same, "name=two", "trainer.devices=2"], Path.cwd())
    one, two = Path("runs/one"), Path("runs/two")
    for column in ("train/loss", "train/baseline_loss", "val/loss", "val/loss_se", "val/accuracy"):
        assert metrics(two, column) == pytest.approx(metrics(one, column), abs=1e-5), column
    assert metrics(two, "val/images") == [280.0]
    assert_equal(weights(two)["unigram.counts"], weights(one)["unigram.counts"], "counts")


def test_callbacks_do_not_touch_the_weights(tokenizer_run: Path) -> None:
    watched = go(tokenizer_run, "watched", base=FAST)
    alone = go(tokenizer_run, "alone")
    assert list(watched.glob("pictures/step-*.png")) and not list(alone.glob("pictures/step-*.png"))
    assert metrics(watched, "knn/best")
    assert_equal(weights(watched), weights(alone), "weights")


def test_activation_checkpointing_gives_the_same_bits(tokenizer_run: Path) -> None:
    plain = go(tokenizer_run, "plain")
    again = go(tokenizer_run, "again", "model.checkpointing=true")
    assert_equal(weights(again), weights(plain), "weights")


def test_bfloat16_follows_float32(tokenizer_run: Path) -> None:
    full = metrics(go(tokenizer_run, "full", "stage.log_every=1"), "train/loss")
    half = metrics(
        go(tokenizer_run, "half", "stage.log_every=1", "trainer.precision=bf16-mixed"), "train/loss"
    )
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


@pytest.mark.slow
def test_a_compiled_encoder_follows_the_plain_one(tokenizer_run: Path) -> None:
    base = [*FAST, *LEAN, f"tokenizer.checkpoint={tokenizer_run}", "stage.log_every=1"]
    base.remove("~callbacks.progress")
    train([*base, "name=plain"], Path.cwd())
    train([*base, "name=compiled", "trainer.compile=true"], Path.cwd())
    plain, compiled = Path("runs/plain"), Path("runs/compiled")
    assert metrics(compiled, "train/loss") == pytest.approx(metrics(plain, "train/loss"), abs=1e-3)
    assert weights(compiled).keys() == weights(plain).keys()


def test_a_step_with_nan_leaves_no_trace_but_the_place_moves_on(
    tokenizer_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, Tensor] = {}
    compute = Pretrain.compute

    def poisoned(self: Pretrain, batch: Any, step: int) -> StepResult:
        result = compute(self, batch, step)
        if self.trainer.global_step == 16:
            before.update({k: v.clone() for k, v in self.state_dict().items()})
            before["moment"] = next(iter(self.optimizers().optimizer.state.values()))["exp_avg"].clone()  # pyright: ignore
            result.loss = result.loss * float("nan")
        return result

    monkeypatch.setattr(Pretrain, "compute", poisoned)
    with pytest.warns(UserWarning, match="step 16: loss or gradient is not finite"):
        folder = go(tokenizer_run, "nan", "checkpoint.every_steps=1")
    saved = checkpoint(folder)
    assert saved["global_step"] == 17
    moment = saved["optimizer_states"][0]["state"][0]["exp_avg"]
    assert_equal(moment, before.pop("moment"), "moment")
    bad = before.pop("bad_steps"), saved["state_dict"].pop("bad_steps")
    assert bad[0].tolist() == [0, 0] and bad[1].tolist() == [1, 1]
    own = {k: v for k, v in before.items() if not k.startswith("tokenizer.")}
    counts = own.pop("unigram.counts"), saved["state_dict"].pop("unigram.counts")
    assert int(counts[1].sum()) == 16 * 64 * 64  # steps x images x patches: the refused ids are not counted
    assert_equal(saved["state_dict"], own, "weights")
    assert metrics(folder, "train/bad_steps")[-1] == 1


def test_a_run_that_stays_nan_stops_and_its_step_can_be_replayed(
    tokenizer_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exploding = ["stage.optim.lr=1e30", "stage.optim.clip=null", "stage.max_bad_steps=3"]
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(TrainingError, match=r"3 steps in a row.*stage\.max_bad_steps=3"),
    ):
        go(tokenizer_run, "exploding", *exploding, "checkpoint.every_steps=1")
    kept = sorted(Path("runs/exploding/bad_steps").glob("*.pt"))
    assert len(kept) == 3
    assert replay(kept[0]) == 0
    output = capsys.readouterr().out
    assert "first output that is not finite: " in output and "micro-batch 0: loss nan" in output
    assert all(torch.isfinite(v).all() for v in weights(Path("runs/exploding")).values())


def test_a_step_that_was_fine_is_not_replayed(tokenizer_run: Path, pretrain_run: Path) -> None:
    with pytest.raises(CheckpointError, match="no kept step"):
        replay(pretrain_run / "checkpoints" / "last.ckpt")


def test_a_checkpoint_describes_itself_without_this_project(pretrain_run: Path) -> None:
    saved = checkpoint(pretrain_run)
    record = saved["beit_pretrain"]
    assert record["config"]["model"]["width"] == 32
    assert record["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert record["preprocessing"]["class_names"] == [str(i) for i in range(10)]
    assert set(record["lineage"]["parents"]) == {"tokenizer"}
    assert not any(k.startswith("tokenizer.") for k in saved["state_dict"])
    assert set(record["frozen"]) == {"tokenizer"}


def test_the_same_command_prints_results_and_a_changed_one_is_refused(
    workplace: Path, pretrain_run: Path, tokenizer_run: Path
) -> None:
    command = [*SMALL_PRETRAIN, f"tokenizer.checkpoint={tokenizer_run}", "name=pre"]
    stamp = (pretrain_run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert "held-out loss" in train_here(command, workplace)
    assert (pretrain_run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == stamp
    output = train_here([*command, "stage.optim.lr=0.5"], workplace, code=2)
    assert "stage.optim.lr: 0.002 -> 0.5" in output and "overwrite=true" in output
    assert "Traceback" not in output and len(output.splitlines()) == 1


def test_another_tokenizer_is_refused_when_a_run_goes_on(tokenizer_run: Path) -> None:
    saved = torch.load(tokenizer_run / "checkpoints" / "best.ckpt", weights_only=True)
    path = Path("tokenizer.ckpt")
    torch.save(saved, path)
    folder = go(path, "own")
    (folder / "results.json").unlink()
    name = next(k for k in saved["state_dict"] if k.endswith("weight"))
    saved["state_dict"][name] += 1
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"the tokenizer's weights .* are not those"):
        go(path, "own")
    torch.save(saved, "other.ckpt")
    with pytest.raises(ConfigError, match=r"tokenizer\.checkpoint: tokenizer.ckpt -> other.ckpt"):
        go(Path("other.ckpt"), "own")


def test_results_hold_baselines_in_standard_errors(pretrain_run: Path) -> None:
    results = json.loads((pretrain_run / "results.json").read_text())
    val, base = results["metrics"], results["baseline"]
    assert base["loss_z"] == pytest.approx((base["loss_position"] - val["val/loss"]) / val["val/loss_se"])
    assert results["status"] == "finished" and results["steps"] == 34
    assert (pretrain_run / "report.html").exists()
