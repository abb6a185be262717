"""What an earlier release wrote still opens: runs go on, checkpoints give the same numbers, files hold the same.

The files lie in `stored/`, whose README says what they are.
"""

from __future__ import annotations

import csv
import json
import lzma
import shlex
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import one_thread, train_here

from beit_pretrain import build, load
from beit_pretrain.compose import compose
from beit_pretrain.data.shards import ShardSource
from beit_pretrain.data.tokens import HELD_OUT, TokenCache
from beit_pretrain.run import run
from beit_pretrain.tools.app import app

STORED = Path(__file__).with_name("stored")
EXPECTED = json.loads((STORED / "expected.json").read_text())
TOLD: dict[str, list[str]] = EXPECTED["commands"]
LINKS = ("tokenizer", "pretrain", "probe", "finetune")
UNFINISHED = sorted(EXPECTED["ends"])
# Both processors and versions of torch round otherwise.
CLOSE: dict[str, Any] = {"rel": 1e-3, "abs": 1e-4}

CPU = ["trainer.accelerator=cpu", "logger=csv", "~callbacks.progress", "~callbacks.pictures"]
ONCE = ["stage.epochs=1", "stage.optim.warmup_epochs=0", "data.workers=0", *CPU]
ON_SHARDS = ["data=shards", "data.root=shards", "batch_size=4", *ONCE]
ON_SCENES = ["stage=segment", "data=image_masks", "data.root=scenes", "batch_size=3", "image_size=[16,20]"]
ON_SCENES += ["stage.channels=4", "stage.optim.warmup_steps=0", *ONCE]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Found .* module.s. in eval mode",  # the frozen tokenizer
    "ignore:.*GPU available but not used",
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files in a folder of their own, unpacked."""
    folder = tmp_path / "work"
    shutil.copytree(STORED, folder)
    for packed in folder.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    for checkpoint in folder.rglob("step-*.ckpt"):
        checkpoint.with_name("last.ckpt").symlink_to(checkpoint.name)
    monkeypatch.chdir(folder)
    with one_thread():
        yield folder


def go(*overrides: str) -> dict[str, Any]:
    return run(compose(overrides), overrides)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as text:
        return list(csv.DictReader(text))


def tool(*arguments: str | Path) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def logits(path: str) -> torch.Tensor:
    """The model's outputs for a picture that is made of arithmetic; of a pre-training, the encoder's."""
    loaded = load(path)
    height, width = loaded.preprocess.image_size
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    pixels = torch.stack([(rows * 7 + columns * (3 + c)) % 256 for c in range(3)]).to(torch.uint8)
    image = loaded.preprocess.normalize(pixels[None])
    with torch.inference_mode():
        model: Any = loaded.encoder if loaded.stage == "pretrain" else loaded.model
        return model(image).double().flatten()


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_unfinished_run_goes_on_to_the_same_end(name: str, place: Path) -> None:
    folder = place / "unfinished" / name
    begun = rows(folder / "metrics.csv")
    (checkpoint,) = (folder / "checkpoints").glob("step-*.ckpt")
    stopped = int(checkpoint.stem.removeprefix("step-"))
    train_here(TOLD[name], place)
    ends = json.loads((folder / "results.json").read_text())["metrics"]
    assert ends == pytest.approx(EXPECTED["ends"][name], **CLOSE)
    starts = [int(row["step"]) for row in rows(folder / "events.csv") if row["event"] == "start"]
    assert starts == [0, stopped]  # and not anew
    for before, after in zip(begun, rows(folder / "metrics.csv"), strict=False):
        assert before.items() <= after.items()
    assert (folder / "report.html").is_file()


def test_a_finished_run_is_not_run_again(place: Path) -> None:
    """Nor refused for options that it did not know."""
    runs = [place / "trained" / "chain" / link for link in LINKS]
    runs += [place / "trained" / name for name in EXPECTED["scored"]]
    for folder in runs:
        file = folder / "results.json"
        before = file.read_text(), file.stat().st_mtime_ns
        program, *overrides = shlex.split(json.loads(before[0])["command"])
        assert program == "beit-train"
        assert go(*overrides) == json.loads(before[0])
        assert (file.read_text(), file.stat().st_mtime_ns) == before


@pytest.mark.parametrize("name", sorted(EXPECTED["scored"]))
def test_a_checkpoint_is_scored_as_before(name: str) -> None:
    again = go(*TOLD[name], "name=again")
    assert again["metrics"] == pytest.approx(EXPECTED["scored"][name], **CLOSE)


@pytest.mark.parametrize(
    "overrides",
    [
        ["stage=classify", *ON_SHARDS, "init_from=unfinished/pretrain", "image_size=24"],
        ["stage=classify", *ON_SHARDS, "init_from=trained/chain/finetune", "init_weights=ema"],
        [*ON_SCENES, "init_from=trained/chain/pretrain"],
        [*ON_SCENES, "init_from=unfinished/segment"],
        ["stage=classify", *ON_SHARDS, "init_from=converted/original-finetune/checkpoint.pth"],
        ["stage=classify", *ON_SHARDS, "init_from=converted/timm-finetune"],
    ],
    ids=lambda overrides: next(o for o in overrides if o.startswith("init_from")).replace("/", "-"),
)
def test_training_starts_from_it(overrides: list[str]) -> None:
    sizes = [] if any(o.startswith("image_size") for o in overrides) else ["image_size=16"]
    results = go(*overrides, *sizes, "runs=new", "name=new")
    assert results["init_from"]["report"][0].startswith("loaded: ")


@pytest.mark.parametrize(
    "start", ["trained/chain/finetune", "unfinished/classify", "converted/huggingface-finetune"]
)
def test_frozen_features_come_from_it(start: str) -> None:
    results = go("stage=knn", f"init_from={start}", "data.train_limit=64", *CPU, "runs=new", "name=new")
    assert 0.05 < results["metrics"]["knn/trained"] < 0.6


def test_the_tokenizer_trains_another_model_and_its_ids_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    (cache,) = (place / "ids").iterdir()
    # A cache is of one version of torchvision, on purpose.
    monkeypatch.setattr(
        build, "RESIZE_IMPLEMENTATION", json.loads((cache / "cache.json").read_text())["resize"]
    )
    go(*EXPECTED["cached"], "stage.epochs=1", "runs=new", "name=new")
    assert "2 of 2 views complete, 408 of 408 images are there" in capsys.readouterr().out
    assert list((place / "ids").iterdir()) == [cache]


def test_a_token_cache_holds_the_same_ids(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = (place / "ids").iterdir()
    made_of = json.loads((folder / "cache.json").read_text())
    sizes = {key: made_of.pop(key) for key in ("samples", "tokens", "vocabulary")}
    cache = TokenCache(root=place / "ids", made_of=made_of, views=2, **sizes)
    assert cache.folder == folder
    for view in (0, 1, HELD_OUT):
        ids, known = cache.read(np.arange(cache.samples), np.full(cache.samples, view))
        assert f"{known.sum()} {sha256(ids[known].tobytes()).hexdigest()}" == EXPECTED["ids"][str(view)]
    tool("tokens", "show", "ids")
    assert folder.name in capsys.readouterr().out


def test_shards_hold_the_same_images(capsys: pytest.CaptureFixture[str]) -> None:
    source = ShardSource(root="shards")
    assert source.labels is not None and source.class_names == ["ant", "bee"]
    held = {
        source.name(index): f"{source.labels[index]} {sha256(source.read(index)).hexdigest()}"
        for index in range(len(source))
    }
    assert held == EXPECTED["shards"]
    tool("shards", "show", "shards")
    assert "ant" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXPECTED["logits"]))
def test_a_model_gives_the_same_logits(path: str) -> None:
    file = next(Path(path).glob("checkpoint.pth"), None)  # of the authors' format
    found, expected = logits(str(file or path)), EXPECTED["logits"][path]
    assert len(found) == expected["shape"]
    assert found[:8].tolist() == pytest.approx(expected["first"], rel=1e-4, abs=1e-6)
    assert found.norm().item() == pytest.approx(expected["norm"], rel=1e-4)


def test_the_tools_read_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [file.parents[1] for file in place.rglob("last.ckpt")]
    models += [path for path in (place / "converted").iterdir() if path.name != "original-finetune"]
    for path in [*models, place / "converted" / "original-finetune" / "checkpoint.pth"]:
        tool("show", path)
    for config in place.rglob("config.yaml"):
        tool("report", config.parent)
        assert (config.parent / "report.html").stat().st_size > 10_000
    tool("report", "trained/chain")
    capsys.readouterr()
    tool("compare", "trained", "unfinished", "--csv", "compare.csv")
    assert "left out" not in capsys.readouterr().err
    assert len(rows(Path("compare.csv"))) == len(list(place.rglob("config.yaml")))


def test_a_search_is_finished_and_shows_its_trials(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    tool("sweep", *EXPECTED["search"])
    shown = capsys.readouterr().out
    assert "trial-0000" in shown and "trial-0001" in shown


def test_a_refused_step_is_replayed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (place / "unfinished" / "exploding" / "bad_steps").iterdir()
    with pytest.raises(SystemExit) as ended:
        app(["replay", str(file)])
    assert ended.value.code == 0
    assert "first output that is not finite: " in capsys.readouterr().out
