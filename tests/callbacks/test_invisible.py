"""Callbacks watch a run; they must not change it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from callbacks.toy import KNOWN_WARNINGS, Data, Toy, fit
from lightning.pytorch import Callback, Trainer

from beit_pretrain.callbacks.isolation import due, isolated
from beit_pretrain.callbacks.online_eval import OnlineKnn
from beit_pretrain.callbacks.pictures import Pictures
from beit_pretrain.callbacks.progress import Progress
from beit_pretrain.callbacks.throughput import Throughput

pytestmark = pytest.mark.filterwarnings(*KNOWN_WARNINGS)


def every_callback(folder: Path) -> list[Callback]:
    return [
        Progress(title="toy", line_every=0.0),
        Throughput(folder, every_steps=2),
        Pictures(folder, every_epochs=1, count=3),
        OnlineKnn(every_epochs=1, image_size=(8, 6), limit=None, k=5),
    ]


def test_a_run_with_and_without_callbacks_ends_with_equal_weights(tmp_path: Path) -> None:
    plain, watched = Toy(), Toy()
    torch.manual_seed(9)
    plain.load_state_dict({k: torch.rand_like(v.float()).to(v.dtype) for k, v in plain.state_dict().items()})
    watched.load_state_dict(plain.state_dict())
    fit(plain, Data(), tmp_path, [])
    rng = torch.get_rng_state()
    data = Data()
    trainer = fit(watched, data, tmp_path, every_callback(tmp_path))
    assert trainer.global_step == 18 and len(data.asked) == 6 and len(watched.modes) == 3  # they did act
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name
    assert not any(watched.modes)  # evaluation mode, no gradients


def test_modes_come_back_one_by_one_even_after_an_error(tmp_path: Path) -> None:
    stage = Toy()
    stage.train()
    stage.encoder.norm.eval()
    before = [module.training for module in stage.modules()]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="broken"), isolated(trainer, stage):
        assert not any(module.training for module in stage.modules())
        raise RuntimeError("broken")
    assert [module.training for module in stage.modules()] == before


def test_epochs_that_are_due() -> None:
    def at(step: int) -> bool:
        return due(step=step, steps_per_epoch=10, total_steps=75, every_epochs=3)

    assert [step for step in range(0, 76) if at(step) and step % 10 in (0, 5)] == [30, 35, 60, 65, 75]
