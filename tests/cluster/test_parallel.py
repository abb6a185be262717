"""Ranks train as one process does, with whole weights (DDP) or shares of them (FSDP), and write the same files."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from parallel_ranks import Job, fit, on_ranks
from running import one_thread
from runs import save_run, save_tokenizer
from segmentation import draw_scenes
from torch import Tensor

from beit_pretrain.build import build_data
from beit_pretrain.checks import check
from beit_pretrain.cluster.parallel import Replicated, Sharded, strategy
from beit_pretrain.compose import compose
from beit_pretrain.data.dataset import BadImages
from beit_pretrain.errors import ConfigError
from beit_pretrain.folder import differences, plain

FSDP = "trainer.strategy=fsdp"
STEPS = 20
LEAN = [
    "trainer.accelerator=cpu",
    "logger=csv",
    "data.workers=0",
    "batch_size=12",
    "stage.log_every=1",
    "stage.optim.clip=0.5",
    "~callbacks.progress",
    "~callbacks.knn",
    "~callbacks.pictures",
    "~callbacks.throughput",
    "+callbacks.still._target_=parallel_ranks.Still",
]
SMALL = ["model.width=32", "model.heads=2", "model.depth=2", "model.drop_path=0"]
DIGITS = [*LEAN, "data.train_limit=240", "stage.epochs=1", "stage.optim.warmup_epochs=0.2"]
TOKENIZER = ["stage=tokenizer", "experiment=digits_tokenizer", "tokenizer.vocab_size=16", *DIGITS]
TOKENIZER += ["tokenizer.code_dim=4", "tokenizer.hidden=8", "tokenizer.use_window=5"]
PRETRAIN = ["stage=pretrain", "experiment=digits_pretrain", "masking.count=26", *SMALL, *DIGITS]
UNEVEN = [*PRETRAIN, "masking.exact=false"]
CLASSIFY = [
    "stage=classify",
    "experiment=digits_finetune",
    *SMALL,
    *DIGITS,
    "stage.ema=0.9",
    "stage.optim.lr=4e-3",
]
CLASSIFY += ["stage.mixup=0", "stage.cutmix=0", "stage.erasing=0", "model.checkpointing=true"]
SEGMENT = ["stage=segment", "data=image_masks", "data.source.reduce_zero_label=true", "image_size=[32,48]"]
SEGMENT += ["model=micro", *SMALL, *LEAN, "stage.epochs=10", "trainer.evaluate_every=10", "stage.channels=16"]
SEGMENT += ["stage.views.resize=[48,192]", "stage.optim.lr=2e-3", "stage.optim.warmup_steps=2"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Found .* module.s. in eval mode",  # the frozen tokenizer
    "ignore:.*GPU available but not used",
    "ignore:The `srun` command is available",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def tokens(place: Path) -> str:
    return f"tokenizer.checkpoint={save_tokenizer(place / 'tok')}"


@pytest.fixture(scope="module")
def start(place: Path, tokens: str) -> str:
    return f"init_from={save_run(place / 'pre', [*PRETRAIN, tokens])}"


def alone(folder: Path, jobs: list[Job]) -> None:
    """The same in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with chdir(folder), one_thread():
        for job in jobs:
            fit(job.name, job.overrides, job.resume)


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def saved(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True, map_location="cpu")


def assert_alike(
    run: Path, expected: Path, scores: float = 1e-5, apart: str = "none", losses: float = 1e-5
) -> None:
    """Losses of every step within `losses`, other metrics and what a checkpoint holds close, and of the same form."""
    left, right = rows(run), rows(expected)
    assert [row.keys() for row in left] == [row.keys() for row in right] and left[-1]["step"] == STEPS
    for a, b in zip(left, right, strict=True):
        for name, value in b.items():
            if name.endswith(apart):
                continue
            close = (
                losses if name == "train/loss" else scores if name.startswith("val") else max(scores, 1e-4)
            )
            if name == "train/grad_norm":
                close = 1e-3  # of segmentation: its batch norm sees few values
            assert a[name] == pytest.approx(value, abs=close, nan_ok=True), (
                f"{name} after step {b['step']:.0f}"
            )
    one, other = saved(run), saved(expected)
    assert one.keys() == other.keys()
    for key in ("state_dict", "optimizer_states", "callbacks", "global_step", "epoch"):
        # A bias before batch norm has no gradient but rounding, of which AdamW makes whole steps.
        assert_same_form(one[key], other[key], key, 2e-5 if losses == 1e-5 else math.inf)
    sizes = [(folder / "checkpoints" / "last.ckpt").stat().st_size for folder in (run, expected)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)  # nothing beside the values is written


def assert_same_form(one: Any, other: Any, where: str, near: float) -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same_form(one[key], other[key], f"{where}.{key}", near)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_form(a, b, f"{where}.{number}", near)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and type(one) is Tensor, where
        rough = "running" in where  # statistics of a few values
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=1e-2 if rough else near, msg=lambda m: f"{where}: {m}"
        )
    else:
        assert (
            one == pytest.approx(other, abs=1e-5 if near < 1 else 1e-3)
            if isinstance(one, float)
            else one == other
        ), where


def continued(run: Path, folder: Path, name: str) -> Path:
    """A checkpoint of the middle, with what was logged up to it, as the start of another run."""
    source, target = run / "checkpoints" / "step-00000010.ckpt", folder / "runs" / name
    (target / "checkpoints").mkdir(parents=True)
    copy = target / "checkpoints" / source.name
    copy.write_bytes(source.read_bytes())
    (target / "metrics.csv").write_bytes((run / "metrics.csv").read_bytes())
    return copy


HALFWAY = ["checkpoint.every_steps=10", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def ran(place: Path, tokens: str, start: str) -> tuple[Path, Path]:
    """Folders of trainings in one process, and on two ranks with shares; each start of processes takes its time."""
    one, two = place / "one", place / "two"
    drawn = [*PRETRAIN, tokens, "model.drop_path=0.5", "data.train_limit=48", "+callbacks.notes.folder=notes"]
    drawn += ["+callbacks.notes._target_=parallel_ranks.Notes"]
    poisoned = [
        *UNEVEN,
        tokens,
        "+callbacks.poison._target_=parallel_ranks.Poison",
        "+callbacks.poison.step=5",
    ]
    jobs = [
        Job("pre", [*UNEVEN, tokens, *HALFWAY]),
        Job("class", [*CLASSIFY, start]),
        Job("drawn", drawn),
        Job("poisoned", poisoned),
    ]
    with pytest.warns(UserWarning, match="step 5: loss or gradient is not finite"):
        alone(one, jobs)
    jobs[0].overrides.append("micro_batch_size=3")
    resumed = continued(one / "runs/pre", two, "from-one")
    jobs.append(Job("from-one", [*UNEVEN, tokens, *HALFWAY], resumed))
    for job in jobs:
        job.overrides += [FSDP]
    whole = [o for o in [*PRETRAIN, tokens, "data.train_limit=48", FSDP] if not o.startswith("~callbacks")]
    whole += ["checkpoint.every_steps=2", "callbacks.knn.every_epochs=1", "name=watched"]
    on_ranks(2, two, jobs, watched=whole)
    return one, two


@pytest.mark.parametrize(("name", "expected"), [("pre", "pre"), ("class", "class"), ("from-one", "pre")])
def test_two_ranks_with_shares_train_as_one_process(ran: tuple[Path, Path], name: str, expected: str) -> None:
    """With accumulation, with a running average, and from the middle of a run in one process."""
    one, two = ran
    assert_alike(two / "runs" / name, one / "runs" / expected)
    if name == "class":
        left, right = (json.loads((folder / "runs/class/test.json").read_text()) for folder in ran)
        assert left == pytest.approx(right, abs=1e-5)


def test_one_process_goes_on_from_shares(ran: tuple[Path, Path], tokens: str) -> None:
    one, two = ran
    start = continued(two / "runs/pre", one, "from-two")
    alone(one, [Job("from-two", [*UNEVEN, tokens, *HALFWAY], start)])
    assert_alike(one / "runs/from-two", one / "runs/pre")


def test_nan_on_one_rank_is_refused_by_all(ran: tuple[Path, Path]) -> None:
    one, two = (folder / "runs/poisoned" for folder in ran)
    assert rows(two)[-1]["train/bad_steps"] == 1
    assert_alike(two, one)
    for rank in (0, 1):
        kept = torch.load(two / f"bad_steps/step-00000005-rank{rank}.pt", weights_only=True)
        assert kept["state_dict"].keys() == saved(one)["state_dict"].keys() and kept["rank"] == rank
        assert all(type(value) is Tensor for value in kept["state_dict"].values())


def test_only_rank_zero_writes(ran: tuple[Path, Path]) -> None:
    two = ran[1]
    first, second = (json.loads((two / f"written-{rank}.json").read_text()) for rank in (0, 1))
    assert second == []
    run = two / "runs" / "watched"
    assert json.loads((run / "results.json").read_text())["status"] == "finished"
    for path in run.rglob("*"):  # all of it was seen being written
        assert path.is_dir() or path.relative_to(two / "runs").as_posix() in first, path


def test_ranks_draw_for_themselves_and_agree_on_everything_else(ran: tuple[Path, Path]) -> None:
    alone = json.loads((ran[0] / "notes/notes-0.json").read_text())
    ranks = [json.loads((ran[1] / f"notes/notes-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["weights"] == ranks[1]["weights"] == alone["weights"]
    steps = list(zip(*(rank["steps"] for rank in ranks), alone["steps"], strict=True))
    assert len(steps) == 4
    for one, other, whole in steps:
        assert one["samples"] + other["samples"] == whole["samples"]
        assert one["masks"] + other["masks"] == whole["masks"]
        assert one["seed"] == whole["seed"] != other["seed"]
    assert len({rank["steps"][n]["seed"] for rank in ranks for n in range(4)}) == 8
    assert [s["dropped"] for s in ranks[0]["steps"]] != [s["dropped"] for s in ranks[1]["steps"]]


def test_what_the_trainer_is_given() -> None:
    assert strategy("auto", 1) == strategy("ddp", 1) == strategy("fsdp", 1) == "auto"
    assert type(strategy("auto", 2)) is type(strategy("ddp", 2)) is Replicated
    assert type(strategy("fsdp", 2)) is Sharded


def test_how_a_run_is_spread_may_change_when_it_goes_on(tokens: str) -> None:
    now = ["trainer.strategy=fsdp", "trainer.devices=4", "trainer.num_nodes=2", "trainer.requeue=false"]
    now += [
        "trainer.signals=[TERM]",
        "trainer.signal_grace=9",
        "trainer.max_requeues=9",
        "trainer.allocation=slurm",
    ]
    harmless, harmful = differences(
        plain(compose([*PRETRAIN, tokens])), plain(compose([*PRETRAIN, tokens, *now]))
    )
    assert len(harmless) == 8 and not harmful


def test_what_cannot_be_is_one_line(tokens: str) -> None:
    given = [*PRETRAIN, tokens, "trainer.strategy=fspd", "stage.epochs=0"]
    with pytest.raises(ConfigError) as caught:
        check(compose(given))
    (line,) = [fault for fault in caught.value.faults if "strategy" in fault]
    assert line == (
        "trainer.strategy=fspd: there is no such choice; did you mean fsdp? (known: auto, ddp, fsdp)"
    )
    with pytest.raises(ConfigError) as caught:
        check(compose([*PRETRAIN, tokens, FSDP, "trainer.precision=16-mixed"]))
    assert any(
        "trainer.strategy=fsdp: set trainer.precision=bf16-mixed or 32" in f for f in caught.value.faults
    )


def test_devices_without_a_held_out_image_are_refused_before_the_training() -> None:
    data: Any = build_data(compose([*PRETRAIN, "tokenizer=dalle"]))
    data.trainer = Mock(global_rank=0, world_size=len(data.splits["val"]))
    data.setup("fit")
    data.trainer.world_size += 1
    with pytest.raises(
        ConfigError, match=r"281 devices .* cannot share 280 val images: set trainer\.devices"
    ):
        data.setup("fit")


def test_processes_note_unreadable_images_in_one_file_without_mixing_lines(tmp_path: Path) -> None:
    """Workers of all ranks do; here four processes, all of them starting 25 files at the same moment."""
    context = multiprocessing.get_context("fork")
    meet = context.Barrier(4)
    writers = [context.Process(target=_note, args=(tmp_path, number, meet)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for file in range(25):
        with (tmp_path / f"{file}.csv").open(newline="") as log:
            header, *lines = csv.reader(log)
        assert header == ["sample", "name", "reason"]
        assert sorted(int(line[0]) for line in lines) == list(range(40))
        assert all(line[1:] == [f"image {line[0]}", "broken " * 50 + "end"] for line in lines)


def _note(folder: Path, number: int, meet: Any) -> None:
    for file in range(25):
        bad = BadImages(indices=np.arange(100), max_bad=0.5, log=folder / f"{file}.csv")
        meet.wait()
        for sample in range(number, 40, 4):
            bad.note(sample, f"image {sample}", "broken " * 50 + "end")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_stage_trains_on_ranks_as_on_one_process(
    place: Path, tokens: str, start: str, world: int
) -> None:
    draw_scenes(place / f"scenes{world}", val=world + 1, test=world)
    segment = [*SEGMENT, f"data.root={place / f'scenes{world}'}"]
    jobs = [
        Job("exact", [*PRETRAIN, tokens]),
        Job("uneven", [*UNEVEN, tokens, *HALFWAY]),
        Job("class", [*CLASSIFY, start]),
        Job("tokens", TOKENIZER),
        Job("segment", segment),
    ]
    one, many = place / f"all-one-{world}", place / f"all-{world}"
    alone(one, jobs)
    spread: list[Job] = []
    for job in jobs:
        # Batch norm is worked out over what the devices see at a time.
        micro = [] if job.name == "segment" else ["micro_batch_size=2"]
        spread.append(Job(f"{job.name}-ddp", [*job.overrides, *micro]))
        spread.append(Job(f"{job.name}-fsdp", [*job.overrides, FSDP]))
    for name, more in (("ddp", []), ("fsdp", [FSDP])):
        copy = continued(one / "runs/uneven", many, f"uneven-from-{name}")
        spread.append(Job(f"uneven-from-{name}", [*UNEVEN, tokens, *HALFWAY, *more], copy))
    on_ranks(world, many, spread)
    for job in spread:
        # A pixel in thousands may fall to another class.
        scores = 1e-3 if job.name.startswith("segment") else 1e-5
        # Batch norm divides by the spread of a few values, which passes rounding on from step to step.
        losses = 5e-5 if job.name.startswith("segment") else 1e-5
        # How evenly codes are used is asked of each micro-batch.
        apart = "perplexity" if job.name.startswith("tokens") else "none"
        assert_alike(many / "runs" / job.name, one / "runs" / job.name.split("-")[0], scores, apart, losses)
