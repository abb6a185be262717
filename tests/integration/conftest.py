"""A small trained tokenizer and pre-training run, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import SMALL_PRETRAIN, SMALL_TOKENIZER, train_here


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def tokenizer_run(workplace: Path) -> Path:
    train_here([*SMALL_TOKENIZER, "name=tok"], workplace)
    return workplace / "runs" / "tok"


@pytest.fixture(scope="session")
def pretrain_run(workplace: Path, tokenizer_run: Path) -> Path:
    train_here([*SMALL_PRETRAIN, f"tokenizer.checkpoint={tokenizer_run}", "name=pre"], workplace)
    return workplace / "runs" / "pre"
