"""Pre-training with kept ids: the same run bit for bit, without the tokenizer once the ids are there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parallel_ranks import fit
from running import SMALL_PRETRAIN, assert_same_end, kill, one_thread, start, train
from runs import DIGITS_TOKENIZER, save_run, save_tokenizer

from beit_pretrain.build import add_token_cache, build_data, build_stage
from beit_pretrain.checks import check
from beit_pretrain.compose import compose
from beit_pretrain.data import tokens, transforms
from beit_pretrain.data.tokens import TokenCache
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.folder import differences, plain
from beit_pretrain.run import run
from beit_tokenizers.dvae import DVae

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Found .* module.s. in eval mode",  # the frozen tokenizer
    "ignore:.*GPU available but not used",
)
LEAN = ["~callbacks.knn", "~callbacks.pictures", "~callbacks.throughput", "data.workers=0"]
RUN = [
    *SMALL_PRETRAIN,
    *LEAN,
    "~callbacks.progress",
    "stage.epochs=3",
    "batch_size=120",
    "+data.train_limit=240",
    "trainer.evaluate_every=3",
    "model.width=16",
    "model.depth=1",
    "stage.log_every=1",
    "stage.views.crop_scale=[0.3,1.0]",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("runs") / "tok")


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


def given(tokenizer: Path, views: int, *more: str) -> list[str]:
    return [
        *RUN,
        f"tokenizer.checkpoint={tokenizer}",
        "tokenizer.cache=ids",
        f"tokenizer.views={views}",
        *more,
    ]


def go(overrides: list[str], name: str) -> Path:
    fit(name, overrides, None)
    return Path("runs") / name


def forbid_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may neither run nor have its view cut."""

    def encode(self: Any, image: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the tokenizer ran")

    def resize(image: torch.Tensor, size: Any, interpolation: str, **more: Any) -> torch.Tensor:
        assert interpolation == "bicubic", "the tokenizer's view was cut"
        return real(image, size, interpolation, **more)

    real: Any = transforms.resize
    monkeypatch.setattr(DVae, "encode", encode)
    monkeypatch.setattr(transforms, "resize", resize)


@pytest.mark.parametrize("views", [1, 2])
def test_a_run_is_the_same_with_ids_that_are_kept_and_with_ids_made_anew(
    tokenizer: Path, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = given(tokenizer, views)
    cold = go(overrides, "cold")  # makes ids, and uses some of them again
    with monkeypatch.context() as patch:
        nothing = np.zeros((200, 64), np.uint16), np.zeros(200, bool)
        patch.setattr(
            TokenCache, "read", lambda _, samples, views: [part[: len(samples)] for part in nothing]
        )
        patch.setattr(TokenCache, "write", lambda *_: None)
        online = go(overrides, "online")
    forbid_the_tokenizer(monkeypatch)
    warm = go(overrides, "warm")
    assert_same_end(cold, online)
    assert_same_end(warm, online)
    losses = [line.split(",") for line in (warm / "metrics.csv").read_text().splitlines()]
    assert len(losses) == 7  # 6 steps


def test_without_a_cache_every_epoch_has_crops_of_its_own(tokenizer: Path) -> None:
    """The first round is the run that there would be without a cache."""
    plain_run = [o for o in given(tokenizer, 3) if not o.startswith(("tokenizer.cache", "tokenizer.views"))]
    alone, cached = go(plain_run, "alone"), go(given(tokenizer, 3), "cached")
    assert_same_end(cached, alone)


@pytest.mark.slow
def test_a_run_killed_while_it_stores_ids_goes_on_to_the_same_end(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = given(tokenizer, 1, "checkpoint.every_steps=3")
    process = start([*overrides, "name=killed"], Path.cwd())
    deadline = time.monotonic() + 120
    while sum(path.stat().st_size for path in Path("ids").rglob("*.ids")) < 5_000:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)
    kill(process)
    run(compose([*overrides, "name=killed"]), overrides)
    killed = Path("runs") / "killed"
    Path("ids").rename("old")
    assert_same_end(killed, go(overrides, "alone"))
    Path("ids").rename("new")
    Path("old").rename("ids")
    forbid_the_tokenizer(monkeypatch)
    go(overrides, "again")


@pytest.mark.slow
def test_two_ranks_store_what_one_can_use(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = given(tokenizer, 2)
    asked = [o for o in overrides if o != "~callbacks.progress"]
    train([*asked, "trainer.devices=2", "name=two"], Path.cwd())
    writers = {path.name.split("-")[-2] for path in Path("ids").rglob("view-0000/*.ids")}
    assert len(writers) == 2
    # The ranks' halves of the held-out batches are other batches, but each image's ids are the same.
    forbid_the_tokenizer(monkeypatch)
    go(overrides, "one")


def cache_of(*overrides: str) -> Path:
    """The folder of the cache that a run would use."""
    cfg = compose(overrides)
    stage: Any = build_stage(cfg)
    data = build_data(cfg)
    add_token_cache(cfg, stage, data)
    return data.token_cache.folder


def test_the_name_of_a_cache_follows_what_its_ids_depend_on_and_nothing_else(
    tokenizer: Path, tmp_path: Path
) -> None:
    base = given(tokenizer, 2)
    one = cache_of(*base)
    assert one.parent == Path("ids")
    same = ["batch_size=32", "micro_batch_size=16", "data.workers=1", "masking.count=30", "stage.optim.lr=1"]
    assert cache_of(*base, *same, "model.depth=2", "stage.epochs=9", "tokenizer.views=7") == one
    others = {
        cache_of(*base, other)
        for other in (
            "seed=1",
            "stage.views.crop_scale=[0.5,1.0]",
            "stage.views.jitter=0.1",
            "stage.views.flip=0.5",
            "stage.views.token_interpolation=bicubic",
            "stage.eval_views.crop_scale=[0.5,1.0]",
        )
    }
    trained = save_run(tmp_path / "other", [*DIGITS_TOKENIZER, "seed=3"])
    others.add(cache_of(*base, f"tokenizer.checkpoint={trained}"))
    assert len(others | {one}) == 8


def test_a_cache_that_cannot_hold_the_ids_is_refused_before_training(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda _: type("", (), {"free": 100_000}))
    with pytest.raises(
        ConfigError, match=r"tokenizer.views=2 views take 0.000106 GB more, and 0.0001 GB are free"
    ):
        run(compose(given(tokenizer, 2)))
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["tokenizer.cache=ids"], "tokenizer.cache=ids and tokenizer.views=null: set both"),
        (["tokenizer.views=2"], "tokenizer.cache=null and tokenizer.views=2: set both"),
        (
            ["tokenizer.cache=ids", "tokenizer.views=0"],
            "tokenizer.views=0: set a whole number from 1, or null",
        ),
        (["tokenizer.cache=3", "tokenizer.views=1"], "tokenizer.cache=3: set a folder"),
    ],
)
def test_half_of_what_a_cache_needs_is_a_fault(tokenizer: Path, overrides: list[str], fault: str) -> None:
    asked = [*RUN, f"tokenizer.checkpoint={tokenizer}", *overrides]
    with pytest.raises(BeitError) as raised:
        check(compose(asked))
    assert str(raised.value).startswith(fault) and "\n" not in str(raised.value)


def test_training_a_tokenizer_passes_over_the_cache_of_its_ids() -> None:
    check(compose([*DIGITS_TOKENIZER, "trainer.accelerator=cpu", "tokenizer.cache=ids", "tokenizer.views=2"]))
    build_stage(compose([*DIGITS_TOKENIZER, "tokenizer.cache=ids", "tokenizer.views=2"]))


def test_a_run_goes_on_with_its_cache_elsewhere_but_not_with_other_views(tokenizer: Path) -> None:
    before = plain(compose(given(tokenizer, 2)))
    assert before["tokenizer"]["cache"] == "ids" and before["tokenizer"]["views"] == 2  # not the checkpoint's
    harmless, harmful = differences(before, plain(compose(given(tokenizer, 2, "tokenizer.cache=there"))))
    assert harmless == ["tokenizer.cache: ids -> there"] and not harmful
    _, harmful = differences(before, plain(compose(given(tokenizer, 3))))
    assert harmful == ["tokenizer.views: 2 -> 3"]
