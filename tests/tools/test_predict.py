"""`beit-tools predict`: the classes and scores of the model, of Transformers too, for whatever lies in a folder."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import save_classifier
from PIL import Image
from pretrained import save_pretrained
from rich.cells import cell_len
from segmenters import save_segmenter
from tools.interrupting import interrupt

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import BeitError, CheckpointError, ConfigError, DataError
from beit_pretrain.tools import images
from beit_pretrain.tools.app import app
from beit_pretrain.tools.convert import convert
from beit_pretrain.tools.images import batches, read_image
from beit_pretrain.tools.load import load
from beit_pretrain.tools.predict import predict
from beit_pretrain.wording import from_cell

NAMES = ["tench, Tinca tinca", "goldfish", "great white shark, white shark, man-eater", "zwölf", "虎斑猫"]
NAMES += ["f", "g", "h", "i", "j"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = [
        "model.abs_pos=false",
        "model.rel_pos=per_layer",
        "model.layer_scale=0.1",
    ]  # as the published ones
    return save_classifier(tmp_path_factory.mktemp("runs") / "run", *kind, classes=NAMES)


def picture(path: Path, height: int, width: int, mode: str = "RGB", seed: int = 0, **how: Any) -> Path:
    """Coarse and fine patterns, and a hue, of one's own seed: a pixel further to the side is another picture."""
    rng = np.random.default_rng(seed)
    hue = rng.integers(20, 256, 3)
    coarse = Image.fromarray((rng.random((5, 4, 3)) * hue).astype(np.uint8)).resize((width, height))
    noise = rng.integers(-80, 81, (height, width, 3))
    pixels = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels.quantize(64) if mode == "P" else pixels.convert(mode)).save(path, **how)
    return path


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def tool(*arguments: Any) -> int:
    return app(["predict", *map(str, arguments)], standalone_mode=False)


def direct(run: Path, images: list[Path], **other: Any) -> int:
    given: dict[str, Any] = {"top": 5, "out": None, "options": {}, "batch_size": 32, "device": "cpu"}
    return predict(str(run), images, **(given | other))


# --- against Transformers -----------------------------------------------------------------------------------


def photographs(folder: Path) -> list[Path]:
    # Left out is what differs on purpose: with transparency Transformers shows the hidden colours, here it is over
    # white; grey of 16 bits Transformers cuts off at 255, here it is scaled.
    return [
        picture(folder / "landscape.jpg", 61, 85, seed=1),  # 36 x 50 covers: an odd margin of 18
        picture(folder / "narrow.jpg", 36, 47, seed=2),  # margins of 4 and 15: from pixel 7.5
        picture(folder / "upright.jpg", 75, 58, seed=3),  # 46 x 36
        picture(folder / "tall.jpg", 151, 36, seed=4, quality=60),  # margin of 119
        picture(folder / "small.jpg", 20, 23, seed=5),  # is made larger
        picture(folder / "grey.jpg", 47, 49, "L", seed=6),
        picture(folder / "opaque.png", 41, 57, "RGBA", seed=7),
        picture(folder / "palette.png", 65, 43, "P", seed=8),
        picture(folder / "on-its-side.jpg", 53, 71, seed=9, exif=turned(6)),
        picture(folder / "mirrored.jpg", 71, 54, seed=10, exif=turned(5)),
        picture(folder / "print.jpg", 50, 67, "CMYK", seed=11),
    ]


@pytest.fixture(scope="module")
def transformers_folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder of Transformers."""
    folder = tmp_path_factory.mktemp("transformers") / "classifier"
    convert(str(run), folder, to="huggingface", weights="raw", mean=None, std=None)
    return folder


def test_top_five_and_scores_are_those_of_transformers(
    run: Path, transformers_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    paths = photographs(tmp_path / "photos")
    assert direct(run, paths, out=tmp_path / "x.csv", batch_size=4) == 0
    rows = table(tmp_path / "x.csv")
    by_pipeline: Any = pipeline("image-classification", model=str(transformers_folder))
    processor: Any = AutoImageProcessor.from_pretrained(transformers_folder)
    model: Any = AutoModelForImageClassification.from_pretrained(transformers_folder).eval()
    kinds = set()
    for path, row in zip(paths, rows, strict=True):
        ours = [(row[f"class_{rank}"], float(row[f"probability_{rank}"])) for rank in range(1, 6)]
        theirs = [(found["label"], found["score"]) for found in by_pipeline(str(path), top_k=5)]
        with Image.open(path) as file, torch.inference_mode():
            # A processor by itself does not turn what lies on its side; the pipeline does.
            pixels = read_image(path) if "exif" in file.info else file.convert("RGB")
            share = model(**processor(pixels, return_tensors="pt")).logits.softmax(1)[0]
        alone = [(model.config.id2label[int(i)], float(share[i])) for i in share.topk(5).indices]
        for reference in (theirs, alone):
            assert [name for name, _ in ours] == [name for name, _ in reference], path.name
            for (_, score), (_, expected) in zip(ours, reference, strict=True):
                assert abs(score - expected) < 1e-4, path.name
        kinds |= {ours[0][0]}
        assert 0.15 < ours[0][1] < 0.98, path.name
    assert len(kinds) > 1  # otherwise a wrong picture could pass


def test_a_crop_a_pixel_further_would_be_seen(run: Path, tmp_path: Path) -> None:
    """Guards the test above: its pictures tell a wrong crop from the right one."""
    path = picture(tmp_path / "narrow.jpg", 36, 47, seed=2)
    loaded: Any = load(run)
    pixels = read_image(path)  # covers 36 x 47: as it is
    scores = [loaded.model(loaded.preprocess.normalize(pixels[:, 2:34, x : x + 32])[None]) for x in (7, 8)]
    assert (loaded.preprocess.crop(pixels) == pixels[:, 2:34, 7:39]).all()
    assert (scores[0].softmax(1) - scores[1].softmax(1)).abs().max() > 2e-3


# --- what is written and printed ----------------------------------------------------------------------------


def test_the_table_is_the_models_own_answer_in_the_order_of_the_images(
    run: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "photos"
    given = [picture(folder / "deep" / f"{i}.png", 30 + i, 50 - i, seed=i) for i in range(5)]
    given += [picture(tmp_path / "a,b.png", 33, 44, seed=9)]
    assert (
        tool(run, folder, given[-1], "--out", tmp_path / "new" / "x.csv", "--batch-size", 4, "--top", 3) == 0
    )
    loaded: Any = load(run)
    logits = np.concatenate([loaded.model(loaded.preprocess(path)[None]).detach().numpy() for path in given])
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    rows = table(tmp_path / "new" / "x.csv")
    assert [row["file"] for row in rows] == [str(path) for path in given]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 images, 10 classes, 32 x 32 pixels"
    assert lines[-1] == f"6 images classified, written to {tmp_path / 'new' / 'x.csv'}"
    for line, row, values, path in zip(lines[1:-1], rows, share, given, strict=True):
        best = np.argsort(-values)[:3]
        assert [row[f"class_{rank}"] for rank in (1, 2, 3)] == [NAMES[i] for i in best]
        np.testing.assert_allclose(
            [float(row[f"probability_{r}"]) for r in (1, 2, 3)], values[best], rtol=1e-4
        )
        assert line.startswith(str(path)) and all(f"{values[i]:.1%} {NAMES[i][:20]}" in line for i in best)
    assert list(rows[0]) == ["file"] + [f"{c}_{r}" for r in (1, 2, 3) for c in ("class", "probability")]


def test_columns_stand_below_each_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [picture(Path(name), 40, 40, seed=i) for i, name in enumerate(["x.png", "虎.png", "longer.png"])]
    given.append(picture(Path("x" * 120, "y.png"), 40, 40, seed=4))
    assert direct(run, given, top=10) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    places = {tuple(cell_len(line[:i]) for i, c in enumerate(line) if c == "%") for line in lines[:3]}
    assert len(places) == 1 and len(next(iter(places))) == 10
    assert not [line for line in lines if line != line.rstrip()]
    assert lines[3].startswith(f"{given[3]}  ")  # whole, though its columns are further right
    assert "great white shark, whit…" in "".join(lines)
    assert "great white shark, white shark" not in "".join(lines)


def test_more_classes_than_there_are_are_cut_and_numbers_stand_for_names(tmp_path: Path, capsys) -> None:
    run = save_classifier(tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"
    saved = files.read(path)
    saved["beit_pretrain"]["preprocessing"]["class_names"] = None
    files.write(path, saved)
    assert direct(run, [picture(tmp_path / "x.png", 40, 40)], top=50, out=tmp_path / "x.csv") == 0
    (row,) = table(tmp_path / "x.csv")
    assert {row[f"class_{rank}"] for rank in range(1, 11)} == {str(number) for number in range(10)}
    assert len(row) == 21 and abs(sum(float(row[f"probability_{r}"]) for r in range(1, 11)) - 1) < 1e-4
    assert capsys.readouterr().out.splitlines()[1].count("%") == 10


def test_another_size_and_the_average_can_be_asked_for(tmp_path: Path) -> None:
    run = save_classifier(tmp_path / "run", "stage.ema=0.9")
    path = picture(tmp_path / "x.png", 60, 77)
    assert tool(run, path, "--out", tmp_path / "x.csv", "--weights", "ema", "--image-size", "[40,48]") == 0
    loaded: Any = load(run, weights="ema", image_size=[40, 48])
    best, name = loaded.model(loaded.preprocess(path)[None]).softmax(1)[0].max(0)
    (row,) = table(tmp_path / "x.csv")
    assert row["class_1"] == str(name.item()) and abs(float(row["probability_1"]) - best.item()) < 1e-4


def test_names_that_are_not_unicode_come_through(run: Path, tmp_path: Path, capsys) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4ndlich.png"))
    picture(path, 40, 40)
    assert direct(run, [path], out=tmp_path / "x.csv") == 0
    assert table(tmp_path / "x.csv")[0]["file"] == str(path)
    assert r"l\udce4ndlich.png" in capsys.readouterr().out


def test_names_that_would_command_a_terminal_or_a_spreadsheet_are_text(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ["=1+1", "\x1b]0;x\x07", "a\nb", "\u202egpj", *"efghij"]
    run = save_classifier(tmp_path / "run", classes=classes)
    monkeypatch.chdir(tmp_path)
    names = ["=cmd \x1b[2J\n.png", "-x.png", "@y.png", "z.png"]
    paths = [picture(Path(name), 40, 40) for name in names]
    (tmp_path / "\x1b[31m.png").write_bytes(b"")
    assert direct(run, [*paths, Path("\x1b[31m.png")], top=10, out=tmp_path / "x.csv") == 1
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n")) and r"=cmd \x1b[2J\n.png" in out
    rows = table(tmp_path / "x.csv")
    assert [row["file"] for row in rows] == ["'=cmd \x1b[2J\n.png", "'-x.png", "'@y.png", "z.png"]
    assert [from_cell(row["file"]) for row in rows] == names
    found = {row[f"class_{rank}"] for row in rows for rank in range(1, 11)}
    assert found == {"'=1+1", *classes[1:]}
    assert all(float(row["probability_1"]) > 0 for row in rows)


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_at_the_end_and_the_rest_is_done(
    run: Path, tmp_path: Path, capsys
) -> None:
    good = [picture(tmp_path / f"{i}.png", 40, 40, seed=i) for i in range(3)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(good[0].read_bytes()[:-900])
    given = [broken, good[0], tmp_path / "gone.png", good[1], good[2]]
    assert tool(run, *given, "--out", tmp_path / "x.csv", "--batch-size", 2) == 1
    printed = capsys.readouterr().out
    end = printed.partition("3 images classified")[2]
    assert "2 could not be read:" in end and f"  {broken}: " in end
    assert f"  {tmp_path / 'gone.png'}: No such file or directory" in end
    assert [row["file"] for row in table(tmp_path / "x.csv")] == [str(path) for path in good]


def test_nothing_is_written_over_when_nothing_could_be_read(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.csv"
    out.write_text("of before")
    assert direct(run, [tmp_path / "gone.png"], out=out) == 1
    assert out.read_text() == "of before"
    assert "0 images classified\n1 could not be read:" in capsys.readouterr().out


def test_a_failure_on_the_way_leaves_the_table_of_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [picture(tmp_path / f"{i}.png", 40, 40, seed=i) for i in range(3)]
    out = tmp_path / "results" / "x.csv"
    assert direct(run, given[:1], out=out) == 0
    before = out.read_bytes()
    done = interrupt(monkeypatch, out.parent)
    with pytest.raises(KeyboardInterrupt):
        direct(run, given, out=out, batch_size=1)
    assert done == [1, 2, 2]  # the unfinished one lay beside it
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]
    (tmp_path / "file").write_text("")
    with pytest.raises(BeitError, match=r"file/x\.csv was not written"):
        direct(run, given[:1], out=tmp_path / "file" / "x.csv")


def test_what_cannot_work_is_said_in_one_line_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    path, out = picture(tmp_path / "x.png", 40, 40), tmp_path / "out" / "x.csv"
    pretrained = save_pretrained(tmp_path / "pretrained")
    with pytest.raises(
        CheckpointError,
        match=r"^CHECKPOINT=.*pretrained is of stage=pretrain, which .*: give a run of stage=classify, .*$",
    ):
        tool(pretrained, path, "--out", out)
    with pytest.raises(CheckpointError, match="is of stage=segment, which gives no class to an image"):
        tool(save_segmenter(tmp_path / "segmenter"), path, "--out", out)
    with pytest.raises(CheckpointError, match=r"CHECKPOINT=.*gone: there is no such file or folder"):
        tool(tmp_path / "gone", path, "--out", out)
    with pytest.raises(
        ConfigError, match=r"^--out .*x\.txt: set the name of a table, which ends with \.csv$"
    ):
        tool(run, path, "--out", tmp_path / "x.txt")
    with pytest.raises(BeitError, match="--device tpu: set one of"):
        tool(run, path, "--out", out, "--device", "tpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no images"):
        tool(run, path, tmp_path / "empty", "--out", out)
    assert not out.parent.exists()


# --- the loop over images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "workers"), [(3, 1), (4, 2), (11, 0)])
def test_batches_keep_the_order_whoever_reads(
    tmp_path: Path, size: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "usable_cores", lambda: workers)
    paths = [picture(tmp_path / f"{number}.png", 12 + number, 20, seed=number) for number in range(11)]
    for number in (1, 8, 9, 10):  # with batches of four all of the last one
        paths[number].write_bytes(b"\x89PNG")
    unreadable: list[str] = []
    seen: list[Path] = []
    mine = os.getpid()
    for found, pixels in batches(paths, corner, size=size, unreadable=unreadable):
        assert pixels.shape == (len(found), 3, 9, 8) and 1 <= len(found) <= size
        for path, crop in zip(found, pixels, strict=True):
            assert (crop[:, :8] == read_image(path)[:, :8, :8]).all()
        reader = pixels[0, 0, 8].numpy().tobytes().decode().strip()
        assert (int(reader) == mine) == (workers == 0)
        seen += found
    assert seen == [paths[number] for number in (0, 2, 3, 4, 5, 6, 7)]
    assert [line.partition(":")[0] for line in unreadable] == [str(paths[n]) for n in (1, 8, 9, 10)]


def corner(pixels: torch.Tensor) -> torch.Tensor:
    """Eight by eight pixels, and below them the number of the process that cut them."""
    crop = torch.cat([pixels[:, :8, :8], torch.zeros(3, 1, 8, dtype=torch.uint8)], 1)
    crop[:, 8] = torch.tensor(list(f"{os.getpid():8}".encode()), dtype=torch.uint8)
    return crop
