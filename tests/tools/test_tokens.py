"""`beit-tools tokens`: ids made ahead are those that training would make, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import one_thread
from runs import pretrain, save_tokenizer
from typer.testing import CliRunner

from beit_pretrain.build import add_token_cache, build_data, build_stage
from beit_pretrain.compose import compose
from beit_pretrain.data.dataset import ViewDataset
from beit_pretrain.data.sampler import Key
from beit_pretrain.data.tokens import HELD_OUT
from beit_pretrain.errors import BeitError, ConfigError, DataError
from beit_pretrain.tools.app import app
from beit_pretrain.tools.tokens import build, show
from beit_tokenizers.dvae import DVae

SMALL = ["+data.train_limit=90", "batch_size=40", "model.depth=1", "model.width=24", "data.workers=0"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("runs") / "tok")


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


@pytest.fixture
def asked(tokenizer: Path) -> list[str]:
    return [
        *pretrain(tokenizer)[1:],
        *SMALL,
        "trainer.accelerator=cpu",
        "tokenizer.cache=ids",
        "tokenizer.views=2",
    ]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the tokenizer is given."""
    sizes: list[int] = []
    encode = DVae.encode

    def noted(self: DVae, image: torch.Tensor) -> torch.Tensor:
        sizes.append(len(image))
        return encode(self, image)

    monkeypatch.setattr(DVae, "encode", noted)
    return sizes


def test_ids_made_ahead_are_the_online_ones_bit_for_bit(
    asked: list[str], encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    build(asked)
    lines = capsys.readouterr().out.splitlines()
    assert "0 of 2 views complete, 0 of 460 images are there (0 GB)" in lines[0]
    assert lines[1].startswith("view-0000: 90 of 90 images of this process, ")
    assert "2 of 2 views complete, 460 of 460 images are there" in lines[-1]
    assert encoded == [40] * (3 + 3 + 7)  # all of the size that training has
    cfg = compose(["stage=pretrain", *asked])
    stage: Any = build_stage(cfg)
    data = build_data(cfg)
    data.views, data.eval_views = stage.views, stage.eval_views
    add_token_cache(cfg, stage, data)
    for split, views in (("train", [0, 1]), ("val", [HELD_OUT])):
        samples = data.splits[split][:40]
        for view in views:
            plain = ViewDataset(
                source=data.source,
                indices=samples,
                view=stage.views if split == "train" else stage.eval_views,
                seed=cfg.seed,
                held_out=split == "val",
                max_bad=0.0,
                bad_log=None,
            )
            online = plain.collate([plain[Key(int(sample), view)] for sample in samples])
            ids = stage.tokenizer.encode(online.token_image.float() / 255)
            stored, known = data.token_cache.read(samples, np.full(40, view))
            assert known.all() and (stored == ids.numpy()).all()
            assert len(ids.unique()) > 2  # the tokenizer is not trained


def test_it_goes_on_with_what_is_missing_or_damaged(asked: list[str], encoded: list[int]) -> None:
    build(asked)
    (ids,) = Path("ids").glob("*/view-0001/*.ids")
    content = bytearray(ids.read_bytes())
    content[7] ^= 1  # in the first record
    ids.write_bytes(content[:-300])  # and the last three
    encoded.clear()
    build(asked)
    assert encoded == [40]  # filled up with the same four
    build(asked)
    assert encoded == [40]
    for folder in Path("ids").glob("*/held-out"):
        shutil.rmtree(folder)
    build([*asked, "tokenizer.views=3"])
    assert encoded == [40] * (1 + 3 + 7)  # the third view, and the held-out one


def test_processes_of_one_start_take_a_share_each(
    asked: list[str], encoded: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    for rank in (1, 0):
        for name, value in (launch | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, str(value))
        encoded.clear()
        build(asked)
        assert encoded == [20] * (3 + 3 + 7)  # 45 images of 90, 140 of 280, half a batch at a time
    assert "2 of 2 views complete, 460 of 460 images" in capsys.readouterr().out.splitlines()[-1]


def test_the_commands(asked: list[str]) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["tokens", "build", *asked], catch_exceptions=False).exit_code == 0
    output = runner.invoke(app, ["tokens", "show", "ids"], catch_exceptions=False).output
    assert "64 ids below 16 of each image, seed 0, cpu, tokenizer " in output
    assert "view-0001: 90 of 1,797 images, 1.26e-05 GB" in output and "held-out: 280 of 1,797" in output


def test_what_is_no_cache_is_told_in_one_line(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"^stage=classify learns no tokens: leave stage out"):
        build(["stage=classify"])
    with pytest.raises(ConfigError, match=r"^there is no cache to fill: set tokenizer.cache=FOLDER"):
        build([o for o in asked if not o.startswith(("tokenizer.cache", "tokenizer.views"))])
    with pytest.raises(ConfigError, match=r"^tokenizer.cache=ids and tokenizer.views=null: set both"):
        build([o for o in asked if not o.startswith("tokenizer.views")])
    with pytest.raises(DataError, match=r"holds no token cache: give the folder that tokenizer.cache names$"):
        show(tmp_path)
    (tmp_path / "x").mkdir()
    whole = {
        "tokens": 3,
        "vocabulary": 8,
        "samples": 10**15,
        "seed": 0,
        "device": "cpu",
        "weights": "a",
        "images": "b",
    }
    forged = [
        whole | change for change in ({"tokens": "3"}, {"samples": -1}, {"vocabulary": []}, {"weights": 5})
    ]
    for text in ('{"tokens": 3', "[" * 100_000, "5", *map(json.dumps, forged)):
        (tmp_path / "x" / "cache.json").write_text(text)
        with pytest.raises(BeitError, match=r"^.*cache.json is damaged: remove "):
            show(tmp_path)
    (tmp_path / "x" / "cache.json").write_text(json.dumps(whole | {"device": "\x1b[2J"}))
    (tmp_path / "x" / "view-0000").mkdir()
    (tmp_path / "x" / "view-0000" / "a.ids").write_bytes(bytes(30))
    np.array([5, 10**15, 5]).tofile(tmp_path / "x" / "view-0000" / "a.samples")
    show(tmp_path)
    out = capsys.readouterr().out
    assert r"seed 0, \x1b[2J, tokenizer" in out and "view-0000: 1 of 1,000,000,000,000,000 images" in out
