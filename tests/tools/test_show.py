"""`beit-tools show`: what it says of every kind of file, and of where that comes from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import save_classifier
from lineages import ON_DIGITS, TOKENIZER, leave, leave_pretrained
from rich.console import Console
from running import one_thread
from segmenters import save_segmenter

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files, formats, record
from beit_pretrain.compose import compose
from beit_pretrain.errors import CheckpointError
from beit_pretrain.tools.app import app
from beit_pretrain.tools.load import load


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained runs that begin in one another."""
    place = tmp_path_factory.mktemp("place")
    leave_pretrained(place / "pre", place / "tok")
    leave(place / "tuned", "stage=classify", *ON_DIGITS, "stage.ema=0.9", f"init_from={place}/pre", step=1234)
    leave(place / "probe", "stage=probe", *ON_DIGITS, f"init_from={place}/pre")
    return place


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    """What the command prints of a file, where nobody looks: a line for each fact."""

    def run(source: str | Path) -> str:
        app(["show", str(source)], standalone_mode=False)
        out = capsys.readouterr().out
        assert "\x1b" not in out and all(line == line.rstrip() for line in out.splitlines())
        return out

    return run


def fact(out: str, name: str) -> str:
    """The first one of a name, which is the file's own."""
    found = re.search(rf"^\W*{name} +(.*)$", out, re.MULTILINE)
    assert found, f"no {name} in\n{out}"
    return found[1]


def edit(folder: Path, target: Path, **about: Any) -> Path:
    """A copy of a run whose checkpoint says something else of itself."""
    saved = files.read(folder / "checkpoints" / "last.ckpt")
    saved["beit_pretrain"] = {**saved["beit_pretrain"], **about}
    files.write(target / "checkpoints" / "last.ckpt", saved)
    return target


def test_a_fine_tuned_run_with_its_ancestors(place: Path, shown: Any) -> None:
    out = shown(place / "tuned")
    file = place / "tuned" / "checkpoints" / "last.ckpt"
    saved = files.read(file)
    model = load(file).model
    facts = {
        "what": "stage=classify, run tuned, step 1,234, epoch 1",
        "file": f"{file}, {file.stat().st_size / 1e6:.1f} MB",
        "sha256": files.sha256(file),
        "weights": files.weight_hash(model.state_dict()),
        "kept": "raw, ema",
        "model": "micro: 24 wide, 2 blocks, 3 heads, patches of 4 x 4",
        "positions": "a relative table for each block, absolute ones",
        "images": "32 x 32 pixels, 8 x 8 patches",
        "head": "mean pooling, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "pixels": "mean [0.5,0.5,0.5], std [0.5,0.5,0.5], crop_pct ",
        "resize": saved["beit_pretrain"]["preprocessing"]["resize"],
        "data": f"digits {saved['beit_pretrain']['preprocessing']['data']}",
        "commit": str(saved["beit_pretrain"]["lineage"]["git_commit"])[:12],
    }
    for name, said in facts.items():
        assert fact(out, name).startswith(said), name
    counts = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.head))
    assert fact(out, "parameters") == "encoder {:,}, head {:,}".format(*counts)
    optim = saved["beit_pretrain"]["config"]["stage"]["optim"]
    words = fact(out, "recipe").split()
    assert {f"lr={optim['lr']}", f"layer_decay={optim['layer_decay']}", "batch_size=64", "ema=0.9"} < set(
        words
    )
    assert "init_weights=raw" in words and len(words) == len({word.partition("=")[0] for word in words})
    assert f"torch=={torch.__version__.partition('+')[0]}" in fact(out, "versions")
    # Both ancestors, each below its child.
    lines = out.splitlines()
    pre, tok = (
        next(i for i, line in enumerate(lines) if line.endswith(f"{p}: found"))
        for p in (place / "pre", place / "tok")
    )
    assert (
        lines[pre] == f"└── init_from {place / 'pre'}: found"
        and lines[tok] == f"    └── tokenizer {place / 'tok'}: found"
    )
    for start, name, stage in ((pre, "pre", "pretrain"), (tok, "tok", "tokenizer")):
        below = "\n".join(lines[start + 1 :])
        assert fact(below, "what") == f"stage={stage}, run {name}, step 7"
        assert fact(below, "sha256") == files.sha256(place / name / "checkpoints" / "last.ckpt")[:12]
        assert fact(below, "data") == f"digits {saved['beit_pretrain']['preprocessing']['data'][:12]}"
    tokenizer = record.part(record.read(place / "tok", key="k"), "tokenizer", key="k")
    assert fact("\n".join(lines[pre:]), "frozen") == f"tokenizer, weights {files.weight_hash(tokenizer)[:12]}"
    assert "versions" not in "\n".join(lines[pre:])  # the same as above
    assert len(lines) < 40


def test_text_from_a_file_does_not_command_the_terminal(place: Path, tmp_path: Path, shown: Any) -> None:
    evil = "a\x1b[2J\x9b\u202e\nb"
    saved = files.read(place / "tuned" / "checkpoints" / "last.ckpt")["beit_pretrain"]
    lineage, made = saved["lineage"], saved["preprocessing"]
    ((role, parent),) = lineage["parents"].items()
    parent = {**parent, "path": evil, "stage": evil, "name": evil}
    lineage = {**lineage, "parents": {role: parent, evil: evil}, "git_commit": evil}
    made = {**made, "class_names": [evil, *made["class_names"][1:]], "resize": evil}
    out = shown(edit(place / "tuned", tmp_path / "x", lineage=lineage, preprocessing=made))
    assert all(line.isprintable() for line in out.split("\n")) and out.count(r"a\x1b[2J\x9b\u202e\nb") >= 6


def test_a_tokenizer(place: Path, shown: Any) -> None:
    out = shown(place / "tok")
    stage: Any = build_stage(compose(TOKENIZER))
    assert fact(out, "what").startswith("stage=tokenizer, run tok")
    assert fact(out, "tokenizer").startswith("dvae: ") and "vocab_size=16" in fact(out, "tokenizer")
    assert fact(out, "parameters") == f"tokenizer {sum(p.numel() for _, p in stage.trained_parameters()):,}"
    # The hash by which a pre-training remembers it.
    assert fact(out, "weights") == record.read(place / "pre", key="k")["beit_pretrain"]["frozen"]["tokenizer"]
    assert "model " not in out and "init_from" not in out


def test_a_pre_training_and_a_probe(place: Path, shown: Any) -> None:
    out = shown(place / "pre")
    assert fact(out, "head") == "16 visual tokens" and "masking.count=" in fact(out, "recipe")
    assert fact(out, "positions") == "one relative table, absolute ones"
    out = shown(place / "probe")
    encoder = record.part(record.read(place / "pre", key="k"), "encoder", key="k")
    assert fact(out, "frozen") == f"encoder, weights {files.weight_hash(encoder)[:12]}"
    assert fact(out, "head").startswith("linear classifiers, 10 classes: 0,")
    assert re.fullmatch(r"bank [\d,]+", fact(out, "parameters"))


def test_a_segmentation_that_is_not_square(tmp_path: Path, shown: Any) -> None:
    out = shown(save_segmenter(tmp_path / "parts"))
    model = load(tmp_path / "parts").model
    assert fact(out, "images") == "32 x 40 pixels, 8 x 10 patches"
    assert fact(out, "head") == "UPerNet of 8 channels on blocks 0, 0, 1, 1, 3 classes: wall, floor, sky"
    counts = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.head))
    assert fact(out, "parameters") == "encoder {:,}, head {:,}".format(*counts)


def test_scores_with_their_errors_and_long_lists_cut(place: Path, tmp_path: Path, shown: Any) -> None:
    about = record.read(place / "tuned", key="k")["beit_pretrain"]
    held_out = {"val/loss": 0.123456, "val/loss_se": 0.00321, "val/top1": 0.98765, "val/images": 280}
    names = [f"kind {i}" for i in range(1000)]
    many = {**about["preprocessing"], "class_names": names}
    out = shown(edit(place / "tuned", tmp_path / "many", held_out=held_out, preprocessing=many))
    assert fact(out, "score") == "val/loss=0.1235±0.0032 val/top1=0.9877 val/images=280"
    assert fact(out, "head").endswith("kind 8, kind 9, and 990 more")


def test_ancestors_that_are_gone_changed_or_known_by_less(
    place: Path, tmp_path: Path, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "pre", "pre")
    leave(tmp_path / "tuned", "stage=classify", *ON_DIGITS, "init_from=pre")
    assert "└── init_from pre: found\n" in shown("tuned")
    other = save_classifier(tmp_path / "other")
    now = shutil.copy(other / "checkpoints" / "last.ckpt", "pre/checkpoints/last.ckpt")
    assert f"└── init_from pre: changed since, now sha256 {files.sha256(Path(now))[:12]}\n" in shown("tuned")
    Path(now).unlink()
    assert "└── init_from pre: not found from here\n" in shown("tuned")
    shutil.rmtree("pre")
    out = shown("tuned")
    assert "└── init_from pre: not found from here\n" in out and "tok: found\n" in out
    lineage = record.read("tuned", key="k")["beit_pretrain"]["lineage"]
    origin = lineage["parents"]["init_from"]
    known = {
        **origin,
        "versions": {**origin["versions"], "torch": "2.11.0"},
        "git_commit": "0123456789abcdef",
        "git_dirty": True,
        "parents": {"tokenizer": {"name": "dalle"}},
    }
    out = shown(
        edit(tmp_path / "tuned", tmp_path / "dalle", lineage={**lineage, "parents": {"init_from": known}})
    )
    below = out[out.index("init_from pre") :]
    assert fact(below, "versions") == "torch==2.11.0"
    assert fact(below, "commit") == "0123456789ab, with uncommitted changes"
    assert below.endswith("    └── tokenizer dalle\n")
    address = {"path": "hf:microsoft/beit-base-patch16-224", "sha256": "f" * 64, "stage": "classify"}
    address |= {"format": "huggingface", "source": "hf:microsoft/beit-base-patch16-224"}
    parents = {"init_from": address, "tokenizer": "0123456789abcdef"}
    out = shown(edit(tmp_path / "tuned", tmp_path / "hub", lineage={**lineage, "parents": parents}))
    assert "├── init_from hf:microsoft/beit-base-patch16-224\n" in out  # nothing is fetched to look at it
    assert "what       stage=classify, Transformers' format\n" in out
    assert out.endswith("└── tokenizer sha256 0123456789ab\n")


def test_a_file_of_the_authors(tmp_path: Path, shown: Any) -> None:
    model = load(save_classifier(tmp_path / "tuned")).model
    files.write(tmp_path / "released.pth", {"model": formats.to_original(model.state_dict())})
    out = shown(tmp_path / "released.pth")
    assert fact(out, "what") == "stage=classify, the authors' format"
    assert fact(out, "sha256") == files.sha256(tmp_path / "released.pth")
    assert fact(out, "weights") == files.weight_hash(model.state_dict())
    assert fact(out, "head") == "mean pooling, 10 classes, names unknown"
    assert fact(out, "pixels").startswith("mean unknown, std unknown")
    assert not re.search(r"\b(recipe|commit|versions|data|score) ", out)


def test_weights_that_are_not_finite_are_shown_and_not_used(tmp_path: Path, shown: Any) -> None:
    folder = save_classifier(tmp_path / "tuned")
    assert " spoilt " not in shown(folder)
    saved = files.read(folder)
    saved["state_dict"]["head.head.weight"] = torch.full_like(
        saved["state_dict"]["head.head.weight"], float("nan")
    )
    files.write(tmp_path / "nan.ckpt", saved)
    assert fact(shown(tmp_path / "nan.ckpt"), "spoilt").startswith(
        "NaN or infinity in 1 tensor, first in head.head."
    )
    with pytest.raises(
        CheckpointError, match=r"nan\.ckpt: the weights hold NaN or infinity in 1 tensor, first in head"
    ):
        load(tmp_path / "nan.ckpt")


def test_eighty_columns_of_a_terminal_hold_everything(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Console, "is_terminal", True)
    app(["show", "tuned"], standalone_mode=False)
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert files.sha256(place / "tuned" / "checkpoints" / "last.ckpt") in out
    assert len(out.splitlines()) <= 50


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^SOURCE=\S+gone: there is no such file or folder"):
        app(["show", str(tmp_path / "gone")], standalone_mode=False)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match="is a web page, not weights"):
        app(["show", str(tmp_path / "page.pth")], standalone_mode=False)
