"""TensorBoard and W&B as the run folder sees them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from callbacks.fake_wandb import FakeWandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from beit_pretrain.callbacks import wandb_log
from beit_pretrain.callbacks.tensorboard_log import TensorBoardLog
from beit_pretrain.callbacks.wandb_log import WandbLog
from beit_pretrain.callbacks.without_secrets import without_secrets
from beit_pretrain.errors import ConfigError


def test_tensorboard_takes_back_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    for resume_step, steps in ((None, range(10, 60, 10)), (30, range(40, 80, 10))):
        log = TensorBoardLog(tmp_path, resume_step)
        for step in steps:
            log.log_metrics({"train/loss": float(step if resume_step is None else -step)}, step)
        log.finalize("success")
        log.experiment.close()
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(s.step, s.value) for s in scalars] == [
        *((10, 10.0), (20, 20.0), (30, 30.0)),
        *((40, -40.0), (50, -50.0), (60, -60.0), (70, -70.0)),
    ]


CONFIG = {
    "stage": {"optim": {"lr": 1.5e-3, "betas": [0.9, 0.98], "clip": None}, "views": {"mask_token": True}},
    "data": {
        "root": "s3://me:hunter2@host/photos?X-Signature=abc#part",
        "val": ["pipe:curl -H 'Authorization: xyz' https://host/a.tar", "val.tar"],
        "source": {"aws_secret_access_key": "hunter2", "Authorization": "hunter2", "timeout": 600},
    },
}
SHOWN = {
    "stage": CONFIG["stage"],
    "data": {
        "root": "s3://host/photos?...",
        "val": ["pipe:...", "val.tar"],
        "source": {"aws_secret_access_key": "...", "Authorization": "...", "timeout": 600},
    },
}


@pytest.mark.parametrize(
    "value",
    ["runs/tok", "hf:owner/name@main", "/a b/@x?.png", "https://host/train-{000..146}.tar", 0.5, None, True],
)
def test_what_is_no_secret_is_shown_as_it_is(value: Any) -> None:
    config = {"init_from": value, "roots": [value], "keys": value, "tokens": value, "token_image_size": value}
    assert without_secrets(config) == config


def test_tensorboard_has_the_options_of_a_run_and_keeps_them_up_to_date(tmp_path: Path) -> None:
    for resume_step, lr in ((None, 1.5e-3), (10, 2e-3)):
        config = {**CONFIG, "stage": {"optim": {"lr": lr, "betas": [0.9, 0.98], "clip": None}}}
        log = TensorBoardLog(tmp_path, resume_step)
        log.log_hyperparams(config)
        log.log_metrics({"val/loss": lr}, resume_step or 10)
        log.finalize("success")
        kept = yaml.safe_load((tmp_path / "tensorboard" / "hparams.yaml").read_text())
        assert kept == {**SHOWN, "stage": config["stage"]}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (content,) = events.PluginTagToContent("hparams").items()
    options = parse_session_start_info_plugin_data(content[1]).hparams
    assert options["stage.optim.lr"].number_value == 1.5e-3 and options["data.root"].string_value
    assert options["stage.optim.betas"].string_value == "[0.9, 0.98]" and "stage.optim.clip" not in options
    assert not any("hunter2" in path.read_bytes().decode("latin1") for path in tmp_path.rglob("*.*"))


def test_wandb_keeps_one_id_per_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(wandb_log, "_logged_in", lambda: True)
    first, again = WandbLog(tmp_path / "a", "p"), WandbLog(tmp_path / "a", "p")
    other = WandbLog(tmp_path / "b", "p", title="mine", tags=["x"])
    assert first.version == again.version == (tmp_path / "a" / "wandb_id").read_text().strip()
    assert other.version != first.version
    assert first._wandb_init["resume"] == "allow" and "mode" not in first._wandb_init  # online


def test_without_credentials_wandb_goes_offline_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(wandb_log, "_logged_in", lambda: False)
    with pytest.warns(
        UserWarning, match=r"no W&B credentials.*logged offline; upload it later with `wandb sync "
    ) as caught:
        log = WandbLog(tmp_path, "p")
    assert len(caught) == 1 and log._wandb_init["mode"] == "offline"
    _, *arguments = upload(str(caught[0].message))
    assert arguments == ["sync", f"{tmp_path}/wandb/offline-run-*"]
    from wandb.cli.cli import cli

    assert "paths" in {parameter.name for parameter in cli.commands["sync"].params}


def upload(warning: str) -> list[str]:
    """The command that a warning names."""
    return shlex.split(warning.split("`")[-2])


def test_wandb_gets_the_configuration_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    config = SimpleNamespace(update=lambda *given, **how: kept.append((*given, how)))
    monkeypatch.setattr(wandb, "init", lambda **how: SimpleNamespace(id=how["id"], config=config))
    monkeypatch.setattr(wandb_log, "_logged_in", lambda: True)
    WandbLog(tmp_path, "p").log_hyperparams(CONFIG)
    assert kept == [(SHOWN, {"allow_val_change": True})]  # of a run that goes on with other workers, say


def test_when_wandb_cannot_be_reached_the_run_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.errors import CommError

    calls: list[dict[str, Any]] = []

    def init(**how: Any) -> Any:
        calls.append(how)
        if how.get("mode") != "offline":
            raise CommError("timed out")
        return SimpleNamespace(id=how["id"])

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_log, "_logged_in", lambda: True)
    log = WandbLog(tmp_path, "p")
    with pytest.warns(UserWarning, match="could not be reached: timed out"):
        run = log.experiment
    assert log.experiment is run and len(calls) == 2 and run.id == calls[0]["id"] == log.version


def test_without_the_package_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_log, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger=wandb needs .*pip install beit-pretrain\[wandb\]"):
        WandbLog(tmp_path, "p")


REAL_RUN = """
import sys, warnings
import wandb
from PIL import Image
from beit_pretrain.callbacks.wandb_log import WandbLog

for start in (0, 10):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = WandbLog(sys.argv[1], "toy")
        log.log_hyperparams({"stage": {"optim": {"lr": 1.5e-3}}, "data": {"workers": start}})
        log.log_metrics({"train/loss": 1.0}, start + 5)
        log.log_image("pictures", [Image.new("RGB", (8, 8))], start + 5)
        wandb.finish()
    print("warnings:", [str(w.message)[:40] for w in caught])
"""


@pytest.mark.slow
def test_a_real_offline_run_asks_nothing_and_keeps_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", REAL_RUN, str(tmp_path / "run")],
        env={**clean, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stdout.splitlines() if line.startswith("warnings:")]
    assert warned == ["warnings: ['no W&B credentials found (`wandb login`,']"] * 2
    assert "WARNING" not in done.stderr
    run_id = (tmp_path / "run" / "wandb_id").read_text().strip()
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(run_id) for run in runs)
    for run in runs:
        (record,) = run.glob("*.wandb")
        assert b'{"optim":{"lr":0.0015}}' in record.read_bytes().replace(b" ", b"")


# --- with a server ------------------------------------------------------------------------------------------

SERVED_RUN = """
import sys
from beit_pretrain.callbacks import wandb_log

wandb_log.BEGIN, wandb_log.FINISH = 5.0, 5.0
folder, first, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
log = wandb_log.WandbLog(folder, "toy", group="sweep")
for step in range(first, last + 1, 10):
    log.log_metrics({"train/loss": float(step)}, step)
    if end == "slow":
        print(step, flush=True)
        sys.stdin.readline()
if end == "kill":
    sys.stdin.readline()
log.finalize("success" if end == "done" else "failed")
sys.exit(0 if end in ("done", "slow") else int(end))
"""


def served(folder: Path, url: str, *arguments: object) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.Popen(
        [sys.executable, "-c", SERVED_RUN, str(folder), *map(str, arguments)],
        env={**clean, "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "HOME": str(folder.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_restarted_run_goes_on_in_wandb_without_steps_twice(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with FakeWandb() as server:
        # Ended by a signal, then killed ten steps after its checkpoint, then to its end.
        for first, last, end, code in ((10, 50, 138, 138), (60, 100, "kill", -9), (80, 120, "done", 0)):
            process = served(tmp_path / "run", server.url, first, last, end)
            while end == "kill" and sum(map(len, server.rows.values())) < 10:
                assert process.poll() is None
                time.sleep(0.1)  # W&B is told every few seconds
            if end == "kill":
                process.kill()
            output, _ = process.communicate(timeout=120)
            assert process.returncode == code, output
        ((run_id, rows),) = server.rows.items()
    assert run_id == (tmp_path / "run" / "wandb_id").read_text().strip()
    steps = [row["trainer/global_step"] for row in rows]
    assert steps == [*range(10, 110, 10), 100, 110, 120]  # the last one before a kill may be there in part
    assert [row["train/loss"] for row in rows] == steps and [row["_step"] for row in rows] == list(range(13))
    assert server.exits[run_id][-1] == 0 and server.groups[run_id] == "sweep"


@pytest.mark.slow
def test_losing_the_network_does_not_stop_or_hold_up_a_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with FakeWandb() as server:
        process = served(tmp_path / "run", server.url, 10, 300, "slow")
        assert process.stdin is not None and process.stdout is not None
        while "10" not in process.stdout.readline().split():
            pass
    output, _ = process.communicate("\n" * 30, timeout=60)
    assert process.returncode == 0, output
    assert "300" in output.split()
    (kept,) = (tmp_path / "run" / "wandb").glob("run-*/*.wandb")  # for `wandb sync`
    assert kept.stat().st_size > 0


@pytest.mark.slow
def test_without_a_server_the_run_is_logged_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with FakeWandb() as server:
        pass
    process = served(tmp_path / "run", server.url, 10, 30, "done")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "W&B could not be reached" in output, output
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
