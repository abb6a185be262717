"""The commands around a trained model, as they are typed: values are checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from beit_pretrain.errors import ConfigError
from beit_pretrain.tools.app import app
from beit_pretrain.tools.app_models import numbers


def call(*words: str) -> None:
    app(list(words), standalone_mode=False)


@pytest.mark.parametrize("text", ["0.5,0.4,0.3", "[0.5, 0.4, 0.3]", "(.5,.4,.3)"])
def test_numbers_are_read_with_and_without_brackets(text: str) -> None:
    assert numbers(text) == [0.5, 0.4, 0.3] and numbers(None) is None


@pytest.mark.parametrize("size", ["1,2,3", "0", "22.5", "wide"])
def test_a_size_that_is_none_is_said_before_anything_is_read(size: str, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=size.replace(".", r"\.")):
        call("predict", str(tmp_path / "gone"), str(tmp_path), "--image-size", size)


@pytest.mark.parametrize("command", ["embed", "reconstruct", "attention", "predict", "export", "convert"])
def test_colours_that_are_no_numbers_are_said_before_anything_is_read(command: str, tmp_path: Path) -> None:
    more = {"export": ["--to", "onnx"], "convert": ["--to", "timm"]}.get(command, [])
    with pytest.raises(typer.BadParameter, match="give numbers with commas between them"):
        call(command, str(tmp_path / "gone"), str(tmp_path / "x"), "--mean", "red,green,blue", *more)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["predict", "", "photo.jpg"], "CHECKPOINT"),
        (["predict", "runs/a", ""], "IMAGES"),
        (["predict", "runs/a", "a.jpg", "", "b.jpg"], "IMAGES"),
        (["predict", "runs/a", "a.jpg", "--out", ""], "--out"),
        (["predict", "runs/a", "a.jpg", "--out="], "--out"),
        (["show", ""], "SOURCE"),
        (["convert", "runs/a", "", "--to", "timm"], "OUT"),
        (["report", ""], "FOLDER"),
        (["compare", "runs/a", ""], "RUNS"),
        (["drill", "stage=pretrain", "--out", ""], "--out"),
        (["shards", "write", "", "out"], "SRC"),
        (["shards", "verify", ""], "ROOT"),
        (["tokens", "show", ""], "FOLDER"),
        (["knn", "runs/a", ""], "OVERRIDES"),
    ],
)
def test_an_empty_argument_is_no_place(words: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} of .*{words[0]}.* is an empty text .*: give a value"):
        call(*words)
