"""The yaml of callbacks and loggers builds what it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from beit_pretrain.callbacks import wandb_log
from beit_pretrain.callbacks.csv_log import CsvLog
from beit_pretrain.callbacks.online_eval import OnlineKnn
from beit_pretrain.callbacks.pictures import Pictures
from beit_pretrain.callbacks.progress import Progress
from beit_pretrain.callbacks.tensorboard_log import TensorBoardLog
from beit_pretrain.callbacks.throughput import Throughput
from beit_pretrain.callbacks.wandb_log import WandbLog

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ROOT = """
defaults:
  - callbacks: default
  - logger: default
  - _self_
hydra: {{searchpath: ["file://{configs}"]}}
name: toy
run_dir: {run_dir}
image_size: [8, 6]
resume_step: 30
"""


def composed(folder: Path, *overrides: str) -> DictConfig:
    (folder / "root.yaml").write_text(ROOT.format(configs=CONFIGS, run_dir=folder / "run"))
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        return compose("root", overrides=list(overrides))


def test_callbacks_by_name(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "callbacks.knn.every_epochs=7")
    built = {str(name): instantiate(node) for name, node in cfg.callbacks.items()}
    kinds = {"progress": Progress, "throughput": Throughput, "pictures": Pictures, "knn": OnlineKnn}
    assert {name: type(callback) for name, callback in built.items()} == kinds
    assert built["knn"].image_size == (8, 6) and built["knn"].every_epochs == 7


def test_a_callback_can_be_switched_off(tmp_path: Path) -> None:
    assert "knn" not in composed(tmp_path, "~callbacks.knn").callbacks


@pytest.mark.parametrize(
    ("choice", "kinds"),
    [
        ("default", [CsvLog, TensorBoardLog]),
        ("csv", [CsvLog]),
        ("tensorboard", [TensorBoardLog]),
        ("wandb", [CsvLog, TensorBoardLog, WandbLog]),
    ],
)
def test_loggers_by_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str, kinds: list[type]
) -> None:
    if choice == "wandb":
        pytest.importorskip("wandb")
        monkeypatch.setattr(wandb_log, "_logged_in", lambda: True)
    built = [instantiate(node) for node in composed(tmp_path, f"logger={choice}").logger.values()]
    assert [type(logger) for logger in built] == kinds


def test_every_file_opens_with_its_command_and_explains_each_option() -> None:
    for path in [*(CONFIGS / "callbacks").glob("*.yaml"), *(CONFIGS / "logger").glob("*.yaml")]:
        text = path.read_text()
        assert "beit-train" in "".join(line for line in text.splitlines()[:2] if line.startswith("#")), path
        assert OmegaConf.create(text) is not None
        for line in text.splitlines():
            option = line.strip().partition(":")
            plain = option[1] and option[2].strip() and not option[0].startswith(("_target_", "#", "-"))
            known = option[0] in ("run_dir",)
            assert not plain or known or "#" in line, f"{path.name}: {line}"
