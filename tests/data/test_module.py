"""The data module: splits, batch arithmetic, loaders, and a run that goes on inside an epoch."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from data.label_pairs import write_pair
from data.shades import Shades, Strategy, flat, make_module
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from beit_pretrain.data import shapes
from beit_pretrain.data.module import BatchPlan, DataModule
from beit_pretrain.data.sampler import mix
from beit_pretrain.data.sources import Digits, SceneSource
from beit_pretrain.data.transforms import EvalView, ImageBatch, OneView, PretrainBatch
from beit_pretrain.errors import ConfigError, DataError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
FORK = "ignore:This process .* is multi-threaded:DeprecationWarning"
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
}


def test_a_source_keeps_its_own_splits_and_gets_what_it_lacks() -> None:
    own = {"train": range(50), "val": range(50, 60), "test": range(60, 80)}
    assert {k: len(v) for k, v in make_module(Shades(80, splits=own)).splits.items()} == {
        "train": 50,
        "val": 10,
        "test": 20,
    }
    parts = make_module(
        Shades(200, splits={"train": range(150), "test": range(150, 200)}), val_share=0.1
    ).splits
    assert {k: len(v) for k, v in parts.items()} == {"train": 135, "test": 50, "val": 15}
    assert np.array_equal(np.sort(np.concatenate([parts["train"], parts["val"]])), np.arange(150))
    parts = make_module(Shades(200)).splits
    assert {k: len(v) for k, v in parts.items()} == {"train": 196, "val": 4}
    assert set(make_module(Shades(200), val_share=0.0).splits) == {"train"}
    assert make_module(Shades(200), val_share=0.0).val_dataloader() == []
    assert {
        k: len(v)
        for k, v in make_module(Shades(30, splits={"test": range(10)}), val_share=0.0).splits.items()
    } == {
        "test": 10,
        "train": 20,
    }


def test_held_out_samples_are_stratified_and_independent_of_the_seed() -> None:
    labels = np.repeat([0, 1], [300, 100])
    parts = [make_module(Shades(400, labels), val_share=0.1, seed=seed).splits for seed in (0, 1)]
    assert np.array_equal(parts[0]["val"], parts[1]["val"])
    assert np.bincount(labels[parts[0]["val"]]).tolist() == [30, 10]
    # Without labels a place depends on the index alone: more images do not reshuffle the old ones.
    small, large = (make_module(Shades(n), val_share=0.2).splits["val"] for n in (100, 130))
    assert len(set(small) - set(large)) <= 8


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [None, 1, 2, 3, 12])
@pytest.mark.parametrize("batch", [1, 12, 24, 25])
def test_a_plan_multiplies_to_the_global_batch_or_says_what_would(
    world: int, micro: int | None, batch: int
) -> None:
    divides = batch % (world * (micro or 1)) == 0
    module = make_module(Shades(100), batch_size=batch, micro_batch_size=micro)
    if divides:
        plan = module.plan(world)
        assert plan.world * plan.micro * plan.accumulate == batch and plan.world == world
        assert plan.micro == micro if micro else plan.accumulate == 1
        return
    with pytest.raises(
        ConfigError, match=rf"batch_size={batch} .*{world} devices .*micro_batch_size="
    ) as caught:
        module.plan(world)
    advice = str(caught.value).split("; set ")[1]
    for name, values in re.findall(r"(batch_size|micro_batch_size|nodes) ?= ?(\d+(?: or \d+)?)", advice):
        for value in map(int, values.split(" or ")):
            fixed = {"batch": batch, "micro": micro, "world": world}
            fixed[{"batch_size": "batch", "micro_batch_size": "micro", "nodes": "world"}[name]] = value
            good = make_module(Shades(100), batch_size=fixed["batch"], micro_batch_size=fixed["micro"])
            assert good.plan(fixed["world"] or 1).world == fixed["world"]


def test_the_nearest_good_values_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        make_module(Shades(300), batch_size=100, micro_batch_size=8).plan(4)
    assert str(caught.value) == (
        "batch_size=100 (global) does not divide into 4 devices (trainer.devices x trainer.num_nodes) with "
        "micro_batch_size=8; set batch_size=96 or 128, or micro_batch_size=5 or 25"
    )
    assert make_module(Shades(300), batch_size=96, micro_batch_size=8).plan(4) == BatchPlan(4, 8, 3)


def test_impossible_numbers_are_refused_together() -> None:
    wrong: dict[str, Any] = {"workers": -1, "val_share": 1.0, "max_bad": 2.0, "train_limit": 0, "repeats": 0}
    wrong |= {"epoch_steps": 0}
    with pytest.raises(ConfigError) as caught:
        make_module(Shades(9), batch_size=0, micro_batch_size=0, **wrong)
    keys = ["batch_size=0", "micro_batch_size=0", *(f"data.{key}={value}" for key, value in wrong.items())]
    assert [fault.split(":")[0] for fault in caught.value.faults] == keys
    with pytest.raises(
        ConfigError, match="batch_size=64 is more than the 49 training images; set batch_size to 49"
    ):
        _ = make_module(Shades(50), batch_size=64).steps_per_epoch


def test_an_epoch_has_whole_batches_only_or_as_many_as_were_asked_for() -> None:
    assert make_module(Shades(100), val_share=0.0).steps_per_epoch == 12
    assert make_module(Shades(100), val_share=0.0, limit_steps=5).steps_per_epoch == 5
    assert make_module(Shades(100), val_share=0.0, limit_steps=50).steps_per_epoch == 12
    assert len(list(make_module(Shades(100), limit_steps=2, micro_batch_size=4).train_dataloader())) == 4


def test_an_epoch_can_be_shorter_and_still_meets_every_image_in_time() -> None:
    def module(steps: int | None, **changes: Any) -> DataModule:
        return make_module(Shades(100), val_share=0.0, epoch_steps=steps, **changes)

    assert module(7).steps_per_epoch == 7 and module(12).steps_per_epoch == 12
    assert module(7, limit_steps=2).steps_per_epoch == 2 and module(2, limit_steps=7).steps_per_epoch == 2
    with pytest.raises(
        ConfigError,
        match=r"data\.epoch_steps=13 is more than the 12 batches of 8 that 100 .*set it to 12 or less",
    ):
        _ = module(13).steps_per_epoch
    short = module(3)
    now = SimpleNamespace(global_step=0, global_rank=0, world_size=1, strategy=Strategy())
    short.trainer = now  # pyright: ignore[reportAttributeAccessIssue]
    seen = []
    for now.global_step in range(0, 60, 3):
        seen.append(torch.cat([batch.sample for batch in short.train_dataloader()]).tolist())
        assert len(set(seen[-1])) == 24
    assert len({sample for epoch in seen for sample in epoch}) == 100


@pytest.mark.filterwarnings(FORK)
def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    runs = []
    for workers in (0, 2):
        module = make_module(Digits(), batch_size=128, micro_batch_size=64, workers=workers, limit_steps=3)
        runs.append((flat(module.train_dataloader()), flat(module.val_dataloader())))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == 6 and sum(len(batch[0]) for batch in runs[0][1]) == 280


def test_loaders_leave_the_global_generator_alone() -> None:
    module = make_module(Shades(60, np.arange(60) % 3), val_share=0.2)
    before = torch.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.labelled("val", (8, 8), None)):
        assert loader is not None
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_views_are_the_same_in_every_epoch_and_training_views_are_not() -> None:
    module = make_module(Shades(60), val_share=0.2)
    assert flat(module.val_dataloader()) == flat(module.val_dataloader())
    now = SimpleNamespace(global_step=0, global_rank=0, world_size=1, strategy=Strategy())
    module.trainer = now  # pyright: ignore[reportAttributeAccessIssue]
    first = next(iter(module.train_dataloader()))
    now.global_step = module.steps_per_epoch
    second = next(iter(module.train_dataloader()))
    assert isinstance(first, PretrainBatch)
    assert first.view.unique().tolist() == [0] and second.view.unique().tolist() == [1]
    assert first.sample.tolist() != second.sample.tolist()


def test_ranks_share_the_held_out_samples() -> None:
    module = make_module(Shades(60), val_share=0.25, batch_size=12)
    seen: list[int] = []
    for rank in range(3):
        module.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
            global_step=0, global_rank=rank, world_size=3, strategy=Strategy()
        )
        batches: Any = module.val_dataloader()
        seen += [sample for batch in batches for sample in batch.sample.tolist()]
    assert sorted(seen) == module.splits["val"].tolist()


def test_labelled_subsets_are_stratified_sorted_whole_and_leave_out_the_unknown() -> None:
    labels = np.tile([0, 0, 1, -1], 50)
    module = make_module(Shades(200, labels), val_share=0.0, batch_size=16)
    loader = module.labelled("train", (8, 6), 30)
    assert loader is not None
    batches = list(loader)
    assert isinstance(batches[0], ImageBatch) and batches[0].image.shape[1:] == (3, 8, 6)
    samples = torch.cat([batch.sample for batch in batches])
    found = torch.cat([batch.label for batch in batches])
    assert np.array_equal(found, labels[samples]) and (samples.diff() > 0).all()
    assert torch.bincount(found).tolist() == [20, 10]
    whole = EvalView(image_size=(8, 6), crop_pct=1.0)(module.source.read(int(samples[0])), 0).image  # pyright: ignore
    assert torch.equal(batches[0].image[0], whole)
    everything = module.labelled("train", (8, 6), None)
    assert everything is not None and sum(len(batch.label) for batch in everything) == 150
    assert module.labelled("test", (8, 6), 30) is None
    assert make_module(Shades(20)).labelled("train", (8, 8), None) is None
    assert make_module(Shades(20, np.full(20, -1))).labelled("train", (8, 8), None) is None


class Recorder(pl.LightningModule):
    """Notes which samples and views a training step is given, and after how many steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int], list[int], int]] = []
        self.held_out: list[int] = []

    def training_step(self, batch: PretrainBatch, batch_idx: int) -> Tensor:
        total = int(batch.image.long().sum())
        self.seen.append((self.global_step, batch.sample.tolist(), batch.view.tolist(), total))
        return self.weight.sum()

    def validation_step(self, batch: PretrainBatch, batch_idx: int) -> None:
        self.held_out += batch.sample.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings(
    FORK,
    "ignore:The .*_dataloader. does not have many workers",
    "ignore:The dirpath has changed",
    "ignore:Checkpoint directory",
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_inside_an_epoch_sees_exactly_what_was_left(workers: int, tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None) -> Recorder:
        module = make_module(Shades(60), batch_size=8, micro_batch_size=4, workers=workers, val_share=0.2)
        keep = ModelCheckpoint(
            tmp_path / str(checkpoint is None), every_n_train_steps=1, save_top_k=-1, filename="{step}"
        )
        trainer = pl.Trainer(**QUIET, max_steps=steps, accumulate_grad_batches=2, callbacks=[keep])
        recorder = Recorder()
        trainer.fit(recorder, module, ckpt_path=checkpoint)
        return recorder

    whole = fit(15, None)  # 6 steps an epoch: two epochs and a half
    assert [step for step, *_ in whole.seen] == [step for step in range(15) for _ in range(2)]
    assert [views[0] for _, _, views, _ in whole.seen] == [0] * 12 + [1] * 12 + [2] * 6
    assert sorted(whole.held_out) == sorted(2 * make_module(Shades(60), val_share=0.2).splits["val"].tolist())
    for position in (4, 6, 9) if workers == 0 else (9,):
        rest = fit(15, tmp_path / f"True/step={position}.ckpt")
        assert rest.seen == whole.seen[2 * position :]


def _config(name: str, **changes: Any) -> Any:
    """A data configuration as the assembling code gives it to Hydra."""
    group = OmegaConf.merge(OmegaConf.load(CONFIGS / f"{name}.yaml"), changes)
    config = OmegaConf.to_container(OmegaConf.create({"data": group}), resolve=True)
    assert isinstance(config, dict)
    node = config["data"]
    assert node["name"] and set(node["normalize"]) == {"mean", "std"}
    return {key: value for key, value in node.items() if key not in ("name", "normalize", "root", "dataset")}


def _assemble(node: Any) -> DataModule:
    view = OneView(image_size=(8, 8))
    return instantiate(
        node,
        views=view,
        eval_views=view,
        batch_size=4,
        micro_batch_size=2,
        seed=0,
        bad_log=None,
        limit_steps=None,
    )


def test_the_digits_configuration_builds() -> None:
    module = _assemble(_config("digits"))
    assert {k: len(v) for k, v in module.splits.items()} == {"train": 1120, "val": 280, "test": 397}
    assert mix(0) and module.plan(1) == BatchPlan(1, 2, 2)


@pytest.mark.parametrize("several", [False, True])
def test_the_folder_configuration_builds_from_one_root_or_several(several: bool, tmp_path: Path) -> None:
    for number in range(9):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    root = [f"{tmp_path}/[0-4].png", f"{tmp_path}/[5-9].png"] if several else str(tmp_path)
    module = _assemble(_config("folder", root=root, workers=0))
    assert len(module.source) == 9 and len(next(iter(module.train_dataloader())).image) == 2


@pytest.mark.parametrize("name", ["class_folders", "imagenet", "imagenet22k"])
def test_the_configurations_of_class_folders_build(name: str, tmp_path: Path) -> None:
    below = "" if name == "imagenet22k" else "train/"
    for label in range(3):
        for number in range(5):
            path = tmp_path / f"{below}n{label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 8), (label, 0, 0)).save(path)
    node = _config(name, root=str(tmp_path), workers=0)
    if name != "class_folders":
        expected = {"imagenet": "1000", "imagenet22k": "21841"}[name]
        with pytest.raises(Exception, match=f"not the {expected} of data.source.classes"):
            _assemble(node)
        node["source"]["classes"] = None
    module = _assemble(node | {"train_limit": 6, "repeats": 2})
    assert module.class_names == ["n0", "n1", "n2"] and len(module.splits["val"]) == 1
    batch = next(iter(module.train_dataloader()))
    assert batch.label.tolist() == [int(value) for value in batch.image[:, 0, 0, 0]]
    assert batch.view.tolist() == [0, 1] and len(batch.sample.unique()) == 1


@pytest.mark.parametrize("name", ["ade20k", "image_masks"])
def test_the_configurations_of_label_maps_build(name: str, tmp_path: Path) -> None:
    for split, count in (("training", 6), ("validation", 3)):
        for number in range(count):
            write_pair(tmp_path, f"{number}", np.full((9, 8), number % 2), split)
    given = {"ade20k": "objectInfo150.txt", "image_masks": "classes.txt"}[name]
    (tmp_path / given).write_text("odd\neven")
    node = _config(name, root=str(tmp_path), workers=0, check_label_maps=5)
    assert node.pop("check_label_maps") == 5
    if name == "ade20k":
        with pytest.raises(Exception, match=r"has 2 names, not the 150 of data\.source"):
            _assemble(node)
        node["source"]["class_count"] = None
    module = _assemble(node | {"train_limit": 5, "epoch_steps": 1})
    assert {k: len(v) for k, v in module.splits.items()} == {"train": 5, "val": 3}
    assert module.class_names == ["odd", "even"] and module.steps_per_epoch == 1
    assert next(iter(module.train_dataloader())).image.shape == (2, 3, 8, 8)  # the images alone
    assert isinstance(module.source, SceneSource)
    expected = {"ade20k": [255, 0], "image_masks": [0, 1]}[name]  # 0 in the files is ADE20k's unlabelled
    assert [int(module.source.label_map(i)[0, 0]) for i in (0, 1)] == expected


def test_the_configuration_of_the_drawn_scenes_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shapes, "SCENES", {"training": 5, "validation": 2})
    node = _config("shapes", root=str(tmp_path / "scenes"), workers=0)
    assert node.pop("check_label_maps") == 200
    module = _assemble(node)
    assert {k: len(v) for k, v in module.splits.items()} == {"train": 5, "val": 2}
    assert module.class_names[:2] == ["sky", "ground"]


@pytest.mark.parametrize("name", ["torchvision", "huggingface"])
def test_the_other_configurations_reach_their_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"data\.dataset=none|beit-pretrain\[huggingface\]") as caught:
        _assemble(_config(name, dataset="none", root=str(tmp_path)))
    assert isinstance(caught.value, DataError) or isinstance(caught.value.__cause__, DataError)
