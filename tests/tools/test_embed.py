"""`beit-tools embed`: the tokens of any block, pooled, as numbers in a file, whatever the model was trained for."""

from __future__ import annotations

import builtins
import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from classifiers import save_classifier
from oracles import difference, hugging_face_twin
from PIL import Image
from pretrained import save_pretrained
from segmenters import save_segmenter
from tools.interrupting import interrupt

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import BeitError, CheckpointError, ConfigError, DataError
from beit_pretrain.tools import embeddings
from beit_pretrain.tools.app import app
from beit_pretrain.tools.embed import POOLINGS, embed
from beit_pretrain.tools.load import load


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, 10 x 8 patches of four pixels."""
    sizes = ["model.depth=3", "image_size=[40,32]"]
    return save_classifier(tmp_path_factory.mktemp("runs") / "run", *sizes)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return [picture(tmp_path / "photos" / f"{i}.png", 50 - i, 40 + 3 * i, seed=i) for i in range(5)]


def picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 3, width // 3, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((width, height)).save(path)
    return path


def direct(run: Path, images: list[Path], out: Path, **other: Any) -> int:
    given: dict[str, Any] = {
        "block": None,
        "pooling": "mean",
        "options": {},
        "batch_size": 2,
        "device": "cpu",
    }
    return embed(str(run), images, out=out, **(given | other))


def tool(*arguments: Any) -> int:
    return app(["embed", *map(str, arguments)], standalone_mode=False)


def pooled(tokens: np.ndarray, pooling: str) -> np.ndarray:
    """One image's tokens (1 + N, D), by the words of the option."""
    patches = [tokens[i] for i in range(1, len(tokens))]
    mean = sum(patches) / len(patches)
    if pooling == "both":
        return np.array([*tokens[0], *mean])
    return {"mean": mean, "cls": tokens[0], "patches": np.array(patches)}[pooling]


def expected(run: Path, paths: list[Path], block: int, pooling: str, **options: Any) -> np.ndarray:
    loaded = load(run, **options)
    tokens = [
        loaded.encoder.features(loaded.preprocess(path)[None], [block])[0][0].detach().numpy()
        for path in paths
    ]
    return np.stack([pooled(one, pooling) for one in tokens])


def read(out: Path) -> tuple[np.ndarray, list[str], dict[str, Any]]:
    """Features, files and facts of either kind of file."""
    if out.suffix == ".npz":
        with np.load(out) as content:
            facts = {name: content[name].tolist() for name in content if name not in ("features", "files")}
            return content["features"], content["files"].tolist(), facts
    table = parquet.read_table(out)
    facts = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    facts |= {name: json.loads(facts[name]) for name in ("block", "image_size")}
    return np.array(table["feature"].to_pylist(), np.float32), table["file"].to_pylist(), facts


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_features_are_those_of_the_block_in_the_order_of_the_images(
    run: Path, pictures: list[Path], tmp_path: Path, ending: str, pooling: str
) -> None:
    out = tmp_path / "new" / f"x{ending}"
    assert direct(run, pictures, out, block=1, pooling=pooling) == 0
    features, names, facts = read(out)
    reference = expected(run, pictures, 1, pooling)
    assert features.dtype == np.float32 and features.shape == reference.shape
    assert features.shape[1:] == {"both": (48,), "patches": (80, 24)}.get(pooling, (24,))
    np.testing.assert_allclose(features, reference, atol=1e-5 * abs(reference).max())
    assert names == [str(path) for path in pictures]
    encoder = load(run).encoder.state_dict()
    assert facts == {
        "block": 1,
        "pooling": pooling,
        "checkpoint": files.weight_hash(encoder),
        "image_size": [40, 32],
    }
    assert list(out.parent.iterdir()) == [out]


def test_parquet_has_lists_of_a_fixed_length(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    assert direct(run, pictures, tmp_path / "x.parquet", pooling="patches") == 0
    schema = parquet.read_schema(tmp_path / "x.parquet")
    assert str(schema.field("file").type) == "string"
    assert (
        str(schema.field("feature").type).replace("element", "item")
        == "fixed_size_list<item: fixed_size_list<item: float>[24]>[80]"
    )


@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_features_do_not_hold_on_to_the_tokens_they_come_from(
    run: Path, pictures: list[Path], tmp_path: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view would keep all tokens of a batch alive for as long as its row waits to be written."""
    seen = []

    @contextmanager
    def writer(*_: Any) -> Iterator[Any]:
        yield lambda names, values: seen.append(values.flags.c_contiguous)

    monkeypatch.setitem(embeddings.WRITERS, ".npz", writer)
    direct(run, pictures, tmp_path / "x.npz", pooling=pooling, batch_size=2)
    assert seen == [True] * 3


@pytest.mark.parametrize(("block", "number"), [(None, 2), (0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_blocks_count_from_either_end(
    run: Path, pictures: list[Path], tmp_path: Path, block: int | None, number: int
) -> None:
    direct(run, pictures[:2], tmp_path / "x.npz", block=block)
    features, _, facts = read(tmp_path / "x.npz")
    reference = expected(run, pictures[:2], number, "mean")
    assert facts["block"] == number
    np.testing.assert_allclose(features, reference, atol=1e-5 * abs(reference).max())
    others = [expected(run, pictures[:2], other, "mean") for other in range(3) if other != number]
    assert all(abs(features - other).max() > 1e-2 for other in others)  # a wrong block would show


def test_features_are_transformers_hidden_states(pictures: list[Path], tmp_path: Path) -> None:
    run = save_pretrained(
        tmp_path / "run", "model.abs_pos=false", "model.rel_pos=shared", "model.layer_scale=0.1"
    )
    loaded: Any = load(run)
    twin = hugging_face_twin(loaded.encoder, loaded.model.head, (32, 32))
    direct(run, pictures, tmp_path / "x.npz", block=0, pooling="patches")
    features, _, _ = read(tmp_path / "x.npz")
    image = torch.stack([loaded.preprocess(path) for path in pictures])
    with torch.no_grad():
        states: Any = twin.beit(image, output_hidden_states=True).hidden_states  # the first is the embedding
    assert difference(torch.from_numpy(features), states[1][:, 1:]) < 1e-5


def test_every_stage_has_features_at_another_size_too(pictures: list[Path], tmp_path: Path, capsys) -> None:
    runs = [save_pretrained(tmp_path / "pretrained"), save_segmenter(tmp_path / "segmenter")]
    for run in runs:
        size = ["--image-size", "[48,24]", "--pooling", "both", "--block", 0, "--batch-size", 3]
        assert tool(run, tmp_path / "photos", "--out", tmp_path / "x.npz", *size) == 0
        features, names, facts = read(tmp_path / "x.npz")
        reference = expected(run, pictures, 0, "both", image_size=[48, 24])
        np.testing.assert_allclose(features, reference, atol=1e-5 * abs(reference).max())
        assert names == [str(path) for path in pictures] and facts["image_size"] == [48, 24]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        "5 images, block 0 of 0..1, 48 x 24 pixels",
        f"5 images embedded as 48 float32, written to {tmp_path / 'x.npz'}",
    ]


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_what_cannot_be_read_is_left_out_and_named_at_the_end(
    run: Path, pictures: list[Path], tmp_path: Path, ending: str, capsys
) -> None:
    pictures[2].write_bytes(b"no picture")
    odd = picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4ndlich.png")), 40, 40)
    given = [*pictures, tmp_path / "gone.png", odd]
    assert tool(run, *given, "--out", tmp_path / f"x{ending}", "--batch-size", 2) == 1
    features, names, _ = read(tmp_path / f"x{ending}")
    good = [path for path in given if path not in (pictures[2], tmp_path / "gone.png")]
    told = [str(path) for path in good]
    if ending == ".parquet":  # whose text is Unicode
        told[-1] = told[-1].replace("\udce4", "\\udce4")
    assert names == told
    np.testing.assert_allclose(features, expected(run, good, 2, "mean"), rtol=1e-4, atol=1e-4)
    end = capsys.readouterr().out.partition("5 images embedded as 24 float32")[2]
    assert "2 could not be read:" in end and f"  {pictures[2]}: no image format known" in end
    assert f"  {tmp_path / 'gone.png'}: No such file or directory" in end


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_nothing_half_written_stays(
    run: Path, pictures: list[Path], tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / f"x{ending}"
    out.parent.mkdir()
    out.write_text("of before")
    assert direct(run, [tmp_path / "gone.png"], out) == 1  # nothing to write
    assert out.read_text() == "of before"
    done = interrupt(monkeypatch, out.parent)
    with pytest.raises(KeyboardInterrupt):
        direct(run, pictures, out, batch_size=1)
    assert done == [1, 2, 2] and out.read_text() == "of before" and list(out.parent.iterdir()) == [out]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(BeitError, match=r"file/x\.\w+ was not written"):
        direct(run, pictures, tmp_path / "file" / out.name)


@pytest.mark.parametrize("kind", [embeddings.npz, embeddings.parquet])
def test_memory_does_not_hold_all_features(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "BUFFER", 2**18)
    rng = np.random.default_rng(0)
    given = [rng.random((100, 32, 16), np.float32) for _ in range(3)]  # 200 KiB each
    out = tmp_path / f"x.{kind.__name__}"
    facts = {"block": 3, "pooling": "patches", "checkpoint": "f00", "image_size": [32, 64]}
    tracemalloc.start()
    with kind(out, (32, 16), facts) as write:
        for part in range(30):  # 6 MiB in all
            write([f"{part}/{i}{'x' * (part % 3)}.png" for i in range(100)], given[part % 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21
    features, names, told = read(out)
    np.testing.assert_array_equal(features.reshape(30, 100, 32, 16), [given[part % 3] for part in range(30)])
    assert names[-1] == "29/99xx.png" and len(names) == 3000 and told == facts
    if out.suffix == ".parquet":
        groups = parquet.ParquetFile(out).metadata
        assert 10 <= groups.num_row_groups <= 15  # of two parts each: not one for each batch


def test_what_cannot_work_is_said_in_one_line_before_anything_is_written(
    run: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "x.npz"
    for name in ("x.csv", "x"):
        with pytest.raises(
            ConfigError, match=rf"^--out .*/{name}: set a name that ends with \.npz or \.parquet$"
        ):
            tool(run, *pictures, "--out", out.with_name(name))
    with pytest.raises(ConfigError, match=r"^--pooling max: set mean, cls, both or patches$"):
        tool(run, *pictures, "--out", out, "--pooling", "max")
    for block in (3, -4):
        with pytest.raises(
            ConfigError, match=rf"^--block {block}: this encoder has 3; set 0 to 2, or -3 to -1 from the end$"
        ):
            tool(run, *pictures, "--out", out, "--block", block)
    with pytest.raises(CheckpointError, match=r"CHECKPOINT=.*gone: there is no such file or folder"):
        tool(tmp_path / "gone", *pictures, "--out", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        tool(run, tmp_path / "empty", "--out", out)
    real = builtins.__import__

    def without(name: str, *others: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *others, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError,
        match=r"^--out .*x\.parquet needs pyarrow: pip install 'beit-pretrain\[parquet\]', or set",
    ):
        tool(run, *pictures, "--out", out.with_suffix(".parquet"))
    assert not out.parent.exists()
