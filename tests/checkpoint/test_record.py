"""What every checkpoint remembers of where it comes from, and that it does not forget it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lineages import CPU, ON_DIGITS, PRETRAIN, TOKENIZER, leave, leave_pretrained
from running import one_thread
from segmentation import SMALL_SEGMENT, draw_scenes

from beit_pretrain import build
from beit_pretrain.checkpoint import files, formats, record
from beit_pretrain.compose import compose
from beit_pretrain.errors import BeitError
from beit_pretrain.folder import plain
from beit_pretrain.run import run

VERSIONS = {"python", "beit-pretrain", "torch", "torchvision", "lightning", "timm", "numpy", "pillow"}
PARENT = {"path", "sha256", "stage", "name", "data_name", "data", "step", "frozen", "parents"}
PARENT |= {"versions", "git_commit", "git_dirty"}
LEAN = ["~callbacks.knn", "~callbacks.pictures", "~callbacks.throughput", "stage.views.rand_augment=null"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:The number of training batches"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in which each stage begins in the one before; none of them has trained."""
    place = tmp_path_factory.mktemp("place")
    leave_pretrained(place / "pre", place / "tok")
    leave(place / "tuned", "stage=classify", *ON_DIGITS, f"init_from={place}/pre", step=9)
    leave(place / "probe", "stage=probe", *ON_DIGITS, f"init_from={place}/pre")
    draw_scenes(place / "scenes", train=2, val=1)
    scenes = [
        o
        for o in SMALL_SEGMENT
        if not o.startswith(("data.root", "~", "logger", "data.workers", "trainer.acc"))
    ]
    leave(place / "parts", *scenes, f"data.root={place}/scenes", f"init_from={place}/tuned")
    return place


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


def about(folder: Path) -> dict[str, Any]:
    """Read as somebody would who has nothing but torch and the file."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    return saved["beit_pretrain"]


@pytest.mark.parametrize("name", ["tok", "pre", "tuned", "probe", "parts"])
def test_every_stage_says_how_and_with_what_it_was_made(place: Path, name: str) -> None:
    saved = about(place / name)
    lineage = saved["lineage"]
    assert saved["config"]["name"] == name and saved["config"]["batch_size"] > 0
    assert "${" not in str(saved["config"])  # resolved
    assert len(saved["preprocessing"]["data"]) == 64
    assert lineage["versions"].keys() == VERSIONS
    assert lineage.keys() == {"parents", "versions", "git_commit", "git_dirty"}


def test_the_whole_ancestry_is_in_the_file(place: Path) -> None:
    parts, tuned, pre, tok = (about(place / name) for name in ("parts", "tuned", "pre", "tok"))
    child = parts
    for saved, role, name, stage, step in (
        (tuned, "init_from", "tuned", "classify", 9),
        (pre, "init_from", "pre", "pretrain", 7),
        (tok, "tokenizer", "tok", "tokenizer", 7),
    ):
        parents = child.get("lineage", child)["parents"]
        assert parents.keys() == {role}
        child = parents[role]
        assert child.keys() == PARENT
        assert child["path"] == str(place / name)
        assert child["sha256"] == files.sha256(place / name / "checkpoints" / "last.ckpt")
        assert (child["stage"], child["name"], child["step"]) == (stage, name, step)
        assert (child["data_name"], child["data"]) == ("digits", saved["preprocessing"]["data"])
        assert child["versions"] == saved["lineage"]["versions"]
        assert child["git_commit"] == saved["lineage"]["git_commit"]
        assert child["parents"] == saved["lineage"]["parents"]
    assert child["parents"] == {}
    weights = files.weight_hash(record.part(record.read(place / "tok", key="k"), "tokenizer", key="k"))
    assert about(place / "tuned")["lineage"]["parents"]["init_from"]["frozen"] == {"tokenizer": weights}
    assert parts["preprocessing"]["data"] != tuned["preprocessing"]["data"]


def test_a_tokenizer_without_a_checkpoint_is_remembered_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    small = build.build_tokenizer(compose(TOKENIZER))
    monkeypatch.setattr(build, "build_tokenizer", lambda _: small)
    cfg = compose([*PRETRAIN, "tokenizer=dalle", *CPU])
    stage, _, _, _ = build.build_run(cfg, plain(cfg))
    assert stage.record["lineage"]["parents"] == {"tokenizer": {"name": "dalle"}}


def test_of_a_file_of_others_the_format_is_remembered(place: Path, tmp_path: Path) -> None:
    released = tmp_path / "released.pth"
    state = record.read(place / "pre", key="k")["state_dict"]
    weights = {k: v for k, v in state.items() if k.startswith(("encoder.", "head."))}
    files.write(released, {"model": formats.to_original(weights)})
    saved = leave(tmp_path / "tuned", "stage=classify", *ON_DIGITS, f"init_from={released}")
    parent = saved["lineage"]["parents"]["init_from"]
    known = {name: parent[name] for name in ("path", "sha256", "stage", "format", "source")}
    assert known == {
        "path": str(released),
        "sha256": files.sha256(released),
        "stage": "pretrain",
        "format": "original",
        "source": str(released),
    }


# --- going on -----------------------------------------------------------------------------------------------------


def train(*overrides: str) -> None:
    every = ["stage=classify", *ON_DIGITS, "data.train_limit=64", *LEAN, *CPU, "name=tuned", *overrides]
    run(compose(every), every)


def test_a_run_that_goes_on_keeps_the_parents_it_was_started_with(place: Path, tmp_path: Path) -> None:
    def last() -> tuple[int, dict[str, Any]]:
        saved = files.read(tmp_path / "runs" / "tuned" / "checkpoints" / "last.ckpt")
        return saved["epoch"], saved["beit_pretrain"]["lineage"]["parents"]

    shutil.copytree(place / "pre", tmp_path / "pre")
    train("init_from=pre", "stage.epochs=1")
    epoch, parents = last()
    assert epoch == 1 and parents["init_from"]["path"] == "pre"
    assert parents["init_from"]["parents"].keys() == {"tokenizer"}
    moved = (tmp_path / "pre").rename(tmp_path / "elsewhere")
    with pytest.raises(BeitError, match=r"^init_from=pre: there is no such file or folder; set init_from"):
        train("init_from=pre", "stage.epochs=2")
    assert last() == (1, parents)
    train(f"init_from={moved}", "stage.epochs=2")
    assert last() == (2, parents)
    # Nor does it take over what lies there by now: its weights are from the old file.
    shutil.rmtree(moved)
    shutil.copytree(place / "tuned", tmp_path / "pre")
    train("init_from=pre", "stage.epochs=3")
    assert last() == (3, parents)


# --- the code -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout from which this package seems to run."""
    module = tmp_path / "clone" / "beit_pretrain" / "checkpoint" / "record.py"
    module.parent.mkdir(parents=True)
    module.write_text("FORMAT = 1\n")
    monkeypatch.setattr(record, "__file__", str(module))
    git(tmp_path / "clone", "init", "-q")
    git(tmp_path / "clone", "add", ".")
    git(tmp_path / "clone", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return tmp_path / "clone"


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_commit_is_not_the_whole_truth_where_code_was_changed(clone: Path) -> None:
    commit = git(clone, "rev-parse", "HEAD")
    assert record.checkout() == {"git_commit": commit, "git_dirty": False}
    (clone / "runs").mkdir()
    (clone / "runs" / "results.json").write_text("{}")  # no code
    assert record.checkout()["git_dirty"] is False
    (clone / "configs").mkdir()
    (clone / "configs" / "new.yaml").write_text("a: 1\n")
    assert record.checkout() == {"git_commit": commit, "git_dirty": True}
    shutil.rmtree(clone / "configs")
    (clone / "beit_pretrain" / "checkpoint" / "record.py").write_text("FORMAT = 2\n")
    assert record.checkout()["git_dirty"] is True


def test_outside_of_a_checkout_and_without_an_answer_nothing_is_claimed(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"git_commit": None, "git_dirty": None}

    def slow(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", slow)
        assert record.checkout() == nothing
        patch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("git")))
        assert record.checkout() == nothing
    shutil.rmtree(clone / ".git")
    assert record.checkout() == nothing
