"""A data module over shards that are streamed: restarts by position, and what a stream cannot do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data.shades import make_module
from torch import Tensor

from beit_pretrain.data.shards import ShardSource
from beit_pretrain.errors import ConfigError
from beit_pretrain.tools.app import app

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of 16 shards of 70 digits."""
    folder = tmp_path_factory.mktemp("streamed") / "shards"
    with pytest.raises(SystemExit):
        app(["shards", "write", "digits", str(folder), "--samples", "70", "--workers", "1"])
    return f"pipe:cat {folder}/train-{{000000..000015}}.tar"


def _module(root: str, step: int = 0, **changes: Any) -> Any:
    source = ShardSource(root=root, samples=1120)
    module = make_module(source, **({"batch_size": 64, "val_share": 0.0} | changes))
    module.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        global_step=step, global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=Tensor().device)
    )
    return module


def _samples(module: Any) -> list[list[int]]:
    return [batch.sample.tolist() for batch in module.train_dataloader()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_reads_up_to_its_step_and_goes_on_with_what_was_left(root: str, workers: int) -> None:
    whole = _samples(_module(root, workers=workers))
    assert len(whole) == 17 and all(len(batch) == 64 for batch in whole)
    assert len({sample for batch in whole for sample in batch}) > 1000
    assert _samples(_module(root, step=11, workers=workers)) == whole[11:]
    assert _samples(_module(root, step=17, workers=workers)) != whole  # the next epoch


def test_what_needs_images_by_number_is_refused(root: str) -> None:
    for changes, said in (
        ({"val_share": 0.1}, r"data\.val_share=0\.1"),
        ({"train_limit": 5}, r"data\.train_limit=5"),
        ({"repeats": 2}, r"data\.repeats=2"),
        ({"labelled": True}, "labels"),
    ):
        with pytest.raises(ConfigError, match=f"{said}.*data.source.cache"):
            _module(root, **changes)


def test_a_cache_too_small_for_the_shards_that_are_mixed_is_refused(root: str, tmp_path: Path) -> None:
    source = ShardSource(root=root, cache=str(tmp_path), cache_gb=0.001)
    largest = max(shard.bytes for shard in source.index.shards)
    assert source.room == 1_000_000 // largest < 16
    for mixed, good in ((source.room - 1, True), (source.room, False), (None, False)):
        if good:
            make_module(source, shuffle_shards=mixed)
            continue
        with pytest.raises(
            ConfigError, match=rf"room for {source.room}.*shuffle_shards={source.room - 1} or less"
        ):
            make_module(source, shuffle_shards=mixed)
    assert ShardSource(root=root, cache=str(tmp_path), cache_gb=1).room is None
