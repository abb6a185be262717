"""`beit-tools export`: the written file gives the model's logits for any number of images, or there is no file."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import oracles
import pytest
import torch
from classifiers import DIGITS, save_classifier
from PIL import Image
from pretrained import save_pretrained
from segmenters import PARTS, save_segmenter
from sklearn.datasets import load_sample_images
from torch import Tensor

import beit_pretrain
from beit_pretrain.checkpoint import files
from beit_pretrain.errors import BeitError, CheckpointError, ConfigError
from beit_pretrain.tools import export as tool
from beit_pretrain.tools.app import app
from beit_pretrain.tools.load import Loaded, load

ROOT = Path(__file__).resolve().parents[2]
TRACE = torch.export.export
TOLERANCE = 1e-5  # of max(1, the largest logit); the tool allows ten times as much


def write(run: Path, out: Path, **options: Any) -> str:
    """`export` to what the file's ending says."""
    to = {".onnx": "onnx", ".pt2": "torch"}[out.suffix]
    return tool.export(str(run), out, to=to, options={"key": "CHECKPOINT", **options})


def inputs_of(loaded: Loaded, images: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(images)
    inputs = {"image": torch.randn(images, 3, *loaded.preprocess.image_size, generator=generator)}
    if loaded.stage == "pretrain":
        rows, columns = loaded.encoder.grid
        inputs["mask"] = torch.rand(images, rows * columns, generator=generator) < 0.4
    return inputs


def facts_of(path: Path) -> dict[str, Any]:
    """What a file says of itself, read without this project."""
    if path.suffix == ".onnx":
        return json.loads(
            onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["beit_pretrain"]
        )
    found = {"beit_pretrain.json": ""}
    torch.export.load(path, extra_files=found)
    return json.loads(found["beit_pretrain.json"])


def logits_of(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What a file makes of inputs, run without this project."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(logits)
    return torch.export.load(path).module()(*inputs.values())


def assert_same(path: Path, run: Path, **options: Any) -> None:
    """The file's logits are the model's, for numbers of images that nothing was made with."""
    loaded = load(run, **options)
    for images in (1, 4, 7):
        inputs = inputs_of(loaded, images)
        expected = loaded.model(**inputs)
        found = logits_of(path, inputs)
        assert found.shape == expected.shape
        assert oracles.difference(found, expected) <= TOLERANCE, images
    others = inputs["image"].flip(-1)
    assert oracles.difference(logits_of(path, {**inputs, "image": others}), expected) > 1000 * TOLERANCE


# --- what is written ----------------------------------------------------------------------------------------


def test_a_classifier_becomes_an_onnx_file_that_says_how_to_use_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = (
        save_classifier(tmp_path / "run", "image_size=[32,40]", "stage.eval_views.crop_pct=0.8"),
        tmp_path / "m.onnx",
    )
    app(["export", str(run), str(out), "--to", "onnx"], standalone_mode=False)
    said, errors = capfd.readouterr()
    first, second = said.splitlines()
    assert first == f"{out}: {out.stat().st_size / 1e6:,.1f} MB, for image (B, 3, 32, 40)"
    assert second.startswith(
        f"checked with onnxruntime {version('onnxruntime')} on batches of 1, 2 and 5 photographs: logits of up to "
    )
    assert errors == ""
    assert_same(out, run)
    session = onnxruntime.InferenceSession(out)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 3, 32, 40])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    loaded = load(run)
    assert facts_of(out) == {
        "stage": "classify",
        "image_size": [32, 40],
        "crop_pct": 0.8,
        "mean": list(loaded.preprocess.mean),
        "std": list(loaded.preprocess.std),
        "labels": DIGITS,
        "weights": files.weight_hash(loaded.model.state_dict()),
        "versions": loaded.about["lineage"]["versions"],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "run"]
    assert str(Path(beit_pretrain.__file__).parent).encode() not in out.read_bytes()


def test_a_pre_trained_model_becomes_a_program_of_torch_that_takes_a_mask(tmp_path: Path) -> None:
    options = ["image_size=[32,24]", "masking.count=10", "model.attention=sdpa", "model.checkpointing=true"]
    run, out = save_pretrained(tmp_path / "run", *options), tmp_path / "m.pt2"
    assert "for image (B, 3, 32, 24) and mask (B, 48)\nchecked with torch " in write(run, out)
    assert_same(out, run)
    facts = facts_of(out)
    assert (facts["stage"], facts["image_size"], facts["labels"]) == ("pretrain", [32, 24], None)
    inputs = inputs_of(load(run), 2)
    program = torch.export.load(out)
    assert not [node for node in program.graph.nodes if "attention" in str(node.target)], "the plain kernel"
    unmasked = logits_of(out, {**inputs, "mask": torch.zeros_like(inputs["mask"])})
    assert oracles.difference(logits_of(out, inputs), unmasked) > 1000 * TOLERANCE
    assert str(Path(beit_pretrain.__file__).parent).encode() not in out.read_bytes()


MODELS: dict[str, tuple[Callable[..., Path], list[str], dict[str, Any]]] = {
    "square": (save_classifier, [], {}),
    "cls": (save_classifier, ["stage.pooling=cls", "model.layer_scale=0"], {}),
    "shared": (
        save_classifier,
        ["model.rel_pos=shared", "model.attention=sdpa", "model.checkpointing=true"],
        {},
    ),
    "positions": (
        save_classifier,
        ["model.rel_pos=none", "model.abs_pos=true", "image_size=[32,24]"],
        {"image_size": [48, 40]},
    ),
    "average": (save_classifier, ["stage.ema=0.9"], {"weights": "ema"}),
    "larger": (save_classifier, ["model.rel_pos=per_layer"], {"image_size": [44, 56]}),
    "pre-trained": (save_pretrained, [], {}),
    "pre-trained-smaller": (save_pretrained, ["model.abs_pos=true"], {"image_size": [24, 28]}),
    "segmenter": (save_segmenter, [], {}),
    "segmenter-larger": (save_segmenter, [], {"image_size": [44, 52]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_at_every_size(tmp_path: Path, name: str, ending: str) -> None:
    save, overrides, options = MODELS[name]
    run, out = save(tmp_path / "run", *overrides), tmp_path / f"m.{ending}"
    write(run, out, **options)
    assert_same(out, run, **options)
    facts = facts_of(out)
    assert facts["image_size"] == list(options.get("image_size", load(run).preprocess.image_size))
    assert facts["labels"] == {"segmenter": PARTS, "pre": None}.get(name.partition("-")[0], DIGITS)
    if ending == "onnx":
        graph = onnx.load(out).graph
        assert [entry.name for entry in graph.output] == ["logits"]
        assert len(graph.input) == (2 if name.startswith("pre") else 1)
        # The numbers of images apart, no operator's shape depends on what the pixels are.
        assert not {"NonZero", "Loop", "If", "Unique"} & {node.op_type for node in graph.node}


@pytest.mark.slow
def test_the_lines_of_the_document_use_a_file_without_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_classifier(tmp_path / "run", "image_size=[32,40]", "stage.eval_views.crop_pct=0.8")
    for name in ("model.onnx", "model.pt2"):
        write(run, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    document = (ROOT / "docs" / "weights.md").read_text()
    with_onnx, with_torch = re.findall(
        r"```python\n(.*?)```", document.partition("## Use it elsewhere")[2], re.DOTALL
    )[:2]
    loaded = load(run)
    for photograph in load_sample_images().images:
        Image.fromarray(photograph).save("photo.jpg")
        names: dict[str, Any] = {}
        exec(with_onnx, names)
        image = loaded.preprocess("photo.jpg")[None]
        expected = loaded.model(image)
        # Pillow and torchvision round a few pixels differently.
        assert oracles.difference(torch.from_numpy(names["logits"]), expected) < 1e-3
        assert capsys.readouterr().out == f"{DIGITS[expected.argmax()]}\n"
    exec(with_torch, names)
    assert names["logits"].shape == (4, 10) and names["facts"] == facts_of(tmp_path / "model.onnx")
    assert oracles.difference(names["model"](image), expected) <= TOLERANCE
    assert "beit_pretrain" not in "".join(re.findall(r"import .*", with_onnx + with_torch))


# --- what is noticed ----------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Every traced program gets another classifier than the model has."""

    def trace(*args: Any, **options: Any) -> Any:
        program = TRACE(*args, **options)
        weight = program.state_dict["head.head.weight"]
        program.state_dict["head.head.weight"] = torch.nn.Parameter(weight * factor, requires_grad=False)
        return program

    monkeypatch.setattr(torch.export, "export", trace)


@pytest.mark.parametrize(
    ("ending", "factor"),
    [
        ("pt2", 1.01),
        pytest.param("pt2", float("nan"), marks=pytest.mark.slow),
        pytest.param("onnx", 1.01, marks=pytest.mark.slow),
        pytest.param("onnx", float("nan"), marks=pytest.mark.slow),
    ],
)
def test_a_graph_that_differs_is_noticed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, factor: float
) -> None:
    run, out = save_classifier(tmp_path / "run"), tmp_path / "out" / f"m.{ending}"
    out.parent.mkdir()
    out.write_text("earlier")
    spoil(monkeypatch, factor)
    found = r"nan" if factor != factor else r"0\.\d+"
    said = rf"m\.{ending} was not written: \w+ [\w.+]+ makes logits of it that differ from the model's by {found} in "
    said += r"a batch of 1, and 0\.000\d+ is allowed \(0\.0001 of up to \d"
    with pytest.raises(CheckpointError, match=said):
        write(run, out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_text() == "earlier"


def test_a_graph_for_one_number_of_images_only_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = save_classifier(tmp_path / "run"), tmp_path / "m.pt2"
    monkeypatch.setattr(torch.export, "export", lambda *args, dynamic_shapes: TRACE(*args))
    with pytest.raises(CheckpointError, match=r"m\.pt2 was not written: torch [^ ]+ cannot run it: [^\n]+$"):
        write(run, out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_logits_of_another_shape_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = save_classifier(tmp_path / "run"), tmp_path / "m.pt2"

    def trace(model: Any, *args: Any, **options: Any) -> Any:
        model.head.head = torch.nn.Linear(model.encoder.width, 1)  # would be broadcast
        program = TRACE(model, *args, **options)
        model.head.head = torch.nn.Linear(model.encoder.width, 10)
        return program

    monkeypatch.setattr(torch.export, "export", trace)
    with pytest.raises(CheckpointError, match=r"makes logits \(1, 1\) of it, the model \(1, 10\)$"):
        write(run, out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_an_exporter_says_is_not_seen_and_its_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def trace(*args: Any, **options: Any) -> Any:
        print("chatter")
        print("chatter", file=sys.stderr)
        warnings.warn("chatter", stacklevel=1)
        logging.getLogger("torch.onnx").critical("chatter")
        try:
            raise ValueError("cannot trace this\nand a long explanation")
        except ValueError as error:
            raise RuntimeError("step 2/3 failed\nreport it") from error

    run = save_classifier(tmp_path / "run")
    handler = logging.StreamHandler(os.fdopen(os.dup(2), "w"))  # knows standard error from before
    logging.getLogger("torch.onnx").addHandler(handler)
    monkeypatch.setattr(torch.export, "export", trace)
    try:
        with pytest.raises(CheckpointError, match=r"^--to torch: the exporter failed: cannot trace this$"):
            write(run, tmp_path / "m.pt2")
        assert capfd.readouterr() == ("", "")
        logging.getLogger("torch.onnx").critical("heard")  # as before
        assert "heard" in capfd.readouterr().err
    finally:
        logging.getLogger("torch.onnx").removeHandler(handler)
        handler.stream.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint may be looked at."""
    monkeypatch.setattr(tool, "load", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("out", "to", "message"),
    [
        ("m.onnx", "tflite", r"^--to tflite is unknown: set one of onnx, torch$"),
        (
            "m.pt2",
            "onnx",
            r"m\.pt2 does not end with \.onnx, as files of --to onnx do: rename it, or set --to torch$",
        ),
        (
            "m.onnx",
            "torch",
            r"m\.onnx does not end with \.pt2, as files of --to torch do: rename it, or set --to onnx$",
        ),
        ("m", "onnx", r"m does not end with \.onnx, as files of --to onnx do: rename it$"),
        (
            "f.pt2",
            "torch",
            r"f\.pt2 is a folder: give the name of a file in it, such as .*f\.pt2/model\.pt2$",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_first(tmp_path: Path, out: str, to: str, message: str) -> None:
    (tmp_path / "f.pt2").mkdir()
    with pytest.raises(ConfigError, match=message):
        tool.export("nowhere", tmp_path / out, to=to, options={})
    assert [path.name for path in tmp_path.iterdir()] == ["f.pt2"]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(BeitError, match=rf"^--to onnx needs {name}: pip install 'beit-pretrain\[onnx\]'$"):
        write(tmp_path, tmp_path / "m.onnx")


def test_weights_beyond_what_one_onnx_file_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_classifier(tmp_path / "run")
    monkeypatch.setattr(tool, "ONNX_LIMIT", 50_000)
    with pytest.raises(
        CheckpointError, match=r"run has 0\.0 GB of weights, and an ONNX file holds 0\.0: set --to torch$"
    ):
        write(run, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
