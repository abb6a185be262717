"""A trained model as a graph that other runtimes execute: an ONNX file, or one of torch.export."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from beit_pretrain.checkpoint import files, record
from beit_pretrain.errors import BeitError, CheckpointError, ConfigError
from beit_pretrain.tools.load import Loaded, load

Run = Callable[[Mapping[str, Tensor]], Tensor]  # inputs by name -> logits

FACTS = "beit_pretrain"  # the entry of a file that says how pictures become its input, as JSON
TRACED = 3  # images that the graph is traced with; not a size that it is checked with
CHECKED = (1, 2, 5)  # images at a time
TOLERANCE = 1e-4  # of max(1, the largest logit)
ONNX_LIMIT = 2**31 - 2**26  # bytes of weights: protobuf's limit for a file, less the graph itself


class Target(NamedTuple):
    """One value of `to`: its files' ending, the packages it needs, and the library that runs its files."""

    ending: str
    needs: tuple[str, ...]
    library: str
    content: Callable[[ExportedProgram, str], bytes]  # of a file with the graph and the facts
    run: Callable[[Path], Run]


def export(checkpoint: str, out: Path, *, to: str, options: dict[str, Any]) -> str:
    """Write the model of a checkpoint as a graph; returns what there is to say.

    The graph takes `image` (B, 3, H, W) float32, normalised, for any B and one size, in pre-training `mask` (B, N) bool
    too, and gives `logits` as the model does. `options` go to `load`. The file takes its place only after its logits on
    real pictures were found to be the model's.
    Raises ConfigError or BeitError before the model is loaded, CheckpointError if the graph cannot be made or differs.
    """
    target = _target(out, to)
    loaded = load(checkpoint, **options)
    # The kernel for the CPU, whatever the training used: plain operations, which every runtime has.
    loaded.encoder.attention = "plain"
    _refuse_size(loaded, to, checkpoint)
    with _quietly(f"--to {to}: the exporter failed"):
        library = f"{target.library} {import_module(target.library).__version__}"
        program = _graph(loaded)
        content = target.content(program, json.dumps(_facts(loaded)))
    with files.atomic(out) as file:
        file.write(content)
        file.flush()
        with _quietly(f"{out} was not written: {library} cannot run it"):
            difference, largest = _compare(target.run(Path(file.name)), loaded, out, library)
    *several, last = map(str, CHECKED)
    return (
        f"{out}: {len(content) / 1e6:,.1f} MB, for {_described(loaded)}\n"
        f"checked with {library} on batches of {', '.join(several)} and {last} photographs: logits of up to "
        f"{largest:.3g} differ by {difference:.1g} at most"
    )


def _target(out: Path, to: str) -> Target:
    """What `to` stands for; refuses what cannot be written here."""
    if to not in TARGETS:
        raise ConfigError(f"--to {to} is unknown: set one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    if out.suffix != target.ending:
        fitting = [name for name, other in TARGETS.items() if other.ending == out.suffix]
        raise ConfigError(
            f"{out} does not end with {target.ending}, as files of --to {to} do: rename it"
            + "".join(f", or set --to {name}" for name in fitting)
        )
    if out.is_dir():
        raise ConfigError(
            f"{out} is a folder: give the name of a file in it, such as {out / 'model'}{out.suffix}"
        )
    if missing := [name for name in target.needs if find_spec(name) is None]:
        raise BeitError(f"--to {to} needs {', '.join(missing)}: pip install 'beit-pretrain[onnx]'")
    return target


def _refuse_size(loaded: Loaded, to: str, checkpoint: str) -> None:
    """Weights that are too many for one file; a graph in several files is not offered."""
    weights = sum(value.nbytes for value in loaded.model.state_dict().values())
    if to == "onnx" and weights > ONNX_LIMIT:
        raise CheckpointError(
            f"{checkpoint} has {weights / 1e9:,.1f} GB of weights, and an ONNX file holds {ONNX_LIMIT / 1e9:,.1f}: "
            "set --to torch"
        )


def _graph(loaded: Loaded) -> ExportedProgram:
    """The model traced, with the number of images left open."""
    example = _inputs(loaded, TRACED)
    images = Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(
            loaded.model, tuple(example.values()), dynamic_shapes=tuple({0: images} for _ in example)
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # would tell where on this machine the code lies
    return program


def _inputs(loaded: Loaded, images: int) -> dict[str, Tensor]:
    """Zeros of what the graph takes."""
    rows, columns = loaded.encoder.grid
    inputs = {"image": torch.zeros(images, 3, *loaded.preprocess.image_size)}
    if loaded.stage == "pretrain":
        inputs["mask"] = torch.zeros(images, rows * columns, dtype=torch.bool)
    return inputs


def _described(loaded: Loaded) -> str:
    shapes = {name: ", ".join(map(str, value.shape[1:])) for name, value in _inputs(loaded, 1).items()}
    return " and ".join(f"{name} (B, {shape})" for name, shape in shapes.items())


def _facts(loaded: Loaded) -> dict[str, Any]:
    """What a user of the file must know: how a picture becomes `image`, what the logits stand for."""
    preprocess = loaded.preprocess
    return {
        "stage": loaded.stage,
        "image_size": list(preprocess.image_size),
        "crop_pct": preprocess.crop_pct,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "labels": loaded.labels,
        "weights": files.weight_hash(loaded.model.state_dict()),
        "versions": record.versions(),
    }


def _onnx(program: ExportedProgram, facts: str) -> bytes:
    """A graph with its weights in one file."""
    import onnx

    names = [node.name for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=tuple({0: "batch"} for _ in names),
    )
    assert made is not None
    # Not made.save: above 1.5 GB it would put the weights into a second file.
    proto = made.model_proto
    onnx.helper.set_model_props(proto, {FACTS: facts})
    return proto.SerializeToString()


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(logits)

    return run


def _torch(program: ExportedProgram, facts: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{FACTS}.json": facts})
    return buffer.getvalue()


def _run_torch(path: Path) -> Run:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda inputs: module(*inputs.values())


TARGETS = {
    "onnx": Target(".onnx", ("onnx", "onnxscript", "onnxruntime"), "onnxruntime", _onnx, _run_onnx),
    "torch": Target(".pt2", (), "torch", _torch, _run_torch),
}


@torch.inference_mode()
def _compare(run: Run, loaded: Loaded, out: Path, library: str) -> tuple[float, float]:
    """The largest difference between the graph's logits and the model's, and the largest logit."""
    pictures = torch.stack([loaded.preprocess(picture) for picture in _photographs()])
    patches = math.prod(loaded.encoder.grid)
    hidden = torch.rand(len(pictures), patches, generator=torch.Generator().manual_seed(0)) < 0.5
    largest_difference = largest = 0.0
    for images in CHECKED:
        inputs = {"image": pictures[-images:], "mask": hidden[-images:]}
        inputs = {name: inputs[name] for name in _inputs(loaded, images)}
        ours, theirs = loaded.model(**inputs), run(inputs)
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{out} was not written: {library} makes logits {tuple(theirs.shape)} of it, the model "
                f"{tuple(ours.shape)}"
            )
        difference, scale = (ours - theirs).abs().max().item(), ours.abs().max().item()
        allowed = TOLERANCE * max(1.0, scale)
        if not difference <= allowed:  # NaN is no agreement
            raise CheckpointError(
                f"{out} was not written: {library} makes logits of it that differ from the model's by {difference:.2g} "
                f"in a batch of {images}, and {allowed:.2g} is allowed ({TOLERANCE:g} of up to {scale:.3g})"
            )
        largest_difference, largest = max(largest_difference, difference), max(largest, scale)
    return largest_difference, largest


def _photographs() -> list[np.ndarray]:
    """Five real pictures: both of scikit-learn's photographs, and three parts of them."""
    from sklearn.datasets import load_sample_images  # a second of import time

    temple, flower = load_sample_images().images
    return [temple, flower, temple[:, :320], flower[100:, 200:], temple[200:, 100:]]


@contextlib.contextmanager
def _quietly(failure: str) -> Iterator[None]:
    """Another library at work: nothing that it says is seen, and an error of any kind becomes one line."""
    level = logging.root.manager.disable
    logging.disable()
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    except BeitError:
        raise
    except Exception as error:  # exporters and runtimes raise nearly anything
        raise CheckpointError(f"{failure}: {_reason(error)}") from error
    finally:
        logging.disable(level)


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error, in its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0]
