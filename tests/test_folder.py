"""A run's folder: one writer at a time, and going on only with what is the same run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files
from beit_pretrain.compose import compose
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.folder import STALE, RunFolder, _started, differences, plain
from beit_pretrain.run import keep_null_blocks

SILENT = "import time; time.sleep(60)"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return plain(compose(["stage=pretrain", "tokenizer=dalle"]))


def changed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The configuration with other values under dotted keys (written with __)."""
    config = deepcopy(config)
    for key, value in values.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def begun(path: Path, config: dict[str, Any]) -> RunFolder:
    """A folder in which a run has saved something."""
    folder = RunFolder(path)
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints" / "step-00000001.ckpt").touch()
    folder.write_config(config)
    return folder


# --- going on -----------------------------------------------------------------------------------------------


def test_the_same_configuration_goes_on_without_a_word(tmp_path: Path, config: dict[str, Any]) -> None:
    # Through the file: what yaml makes of tuples, floats and nulls must not count as a difference.
    assert begun(tmp_path / "run", config).compare(config) == []


@pytest.mark.parametrize(
    "override",
    [
        "trainer.devices=2",
        "trainer.num_nodes=4",
        "trainer.compile=true",
        "micro_batch_size=8",
        "data.workers=3",
        "logger=csv",
        "~callbacks.knn",
        "checkpoint.every_minutes=1",
        "model.checkpointing=true",
        "tokenizer.offline=true",
        "stage.epochs=151",
    ],
)
def test_where_and_how_a_run_goes_may_change(config: dict[str, Any], override: str) -> None:
    harmless, harmful = differences(config, plain(compose(["stage=pretrain", "tokenizer=dalle", override])))
    assert harmless and harmful == []
    assert any(line.startswith(override.lstrip("~").partition("=")[0]) for line in harmless)


def test_how_a_segmentation_is_watched_and_how_fast_it_predicts_may_change_but_not_what() -> None:
    segment = ["stage=segment", "data=shapes"]
    before = plain(compose(segment))

    def now(*overrides: str) -> tuple[list[str], list[str]]:
        return differences(before, plain(compose([*segment, *overrides])))

    assert now("data.check_label_maps=50", "stage.predict.windows=9") == (
        ["data.check_label_maps: 200 -> 50", "stage.predict.windows: 4 -> 9"],
        [],
    )
    for override in ("stage.predict.flip=true", "stage.channels=9", "data.epoch_steps=5"):
        harmless, harmful = now(override)
        assert not harmless and harmful[0].startswith(override.partition("=")[0])


SCENES = ["stage=segment", "data=image_masks", "data.root=scenes", "model=micro"]


@pytest.mark.parametrize(
    ("depth", "new", "old"), [(4, [0, 1, 2, 3], [1, 1, 2, 3]), (12, [3, 5, 7, 11], [3, 5, 7, 11])]
)
def test_a_segmentation_that_stored_no_blocks_goes_on_with_those_of_then(
    tmp_path: Path, depth: int, new: list[int], old: list[int]
) -> None:
    given = [*SCENES, f"model.depth={depth}", f"runs={tmp_path}", "name=run"]
    cfg = compose(given)
    stored = changed(plain(cfg), stage__blocks=None)
    assert plain(cfg)["stage"]["blocks"] == new  # what a new run stores
    folder = begun(tmp_path / "run", stored)
    keep_null_blocks(cfg, given)
    stage: Any = build_stage(cfg, ["a", "b"])
    assert stage.blocks == old and folder.compare(plain(cfg)) == []
    anew = compose([*given, "overwrite=true"])
    keep_null_blocks(anew, [*given, "overwrite=true"])
    assert list(anew.stage.blocks) == new
    same, asked = ([*given, f"stage.blocks={blocks}"] for blocks in (old, [0, 0, 0, depth - 1]))
    assert differences(stored, plain(compose(same))) == ([], [])
    other = compose(asked)
    keep_null_blocks(other, asked)
    with pytest.raises(ConfigError, match=r"stage\.blocks: .* -> \[0, 0, 0"):
        folder.compare(plain(other))


@pytest.mark.parametrize("content", ["", "[1]", "stage: 3", "{", "stage: {name: segment}"])
def test_a_configuration_that_cannot_be_read_says_nothing_of_blocks(tmp_path: Path, content: str) -> None:
    cfg = compose([*SCENES, f"runs={tmp_path}", "name=run"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    keep_null_blocks(cfg, [])
    assert list(cfg.stage.blocks) == [0, 1, 2, 3]


@pytest.mark.parametrize("override", ["name=other", "runs=elsewhere", "overwrite=true", "dry_run=true"])
def test_where_a_folder_lies_is_no_part_of_a_run(config: dict[str, Any], override: str) -> None:
    now = plain(compose(["stage=pretrain", "tokenizer=dalle", override]))
    # The watchers are told where to write.
    harmless, harmful = differences(config, now)
    assert harmful == [] and all(
        line.split(".")[0] in ("logger", "callbacks", "checkpoint") for line in harmless
    )


@pytest.mark.parametrize(
    "override",
    ["stage.epochs=149", "seed=1", "batch_size=64", "stage.optim.lr=1", "model=tiny", "trainer.precision=32"],
)
def test_what_changes_the_weights_may_not_change(
    tmp_path: Path, config: dict[str, Any], override: str
) -> None:
    folder = begun(tmp_path / "run", config)
    key = override.partition("=")[0]
    key = {"model": "model.width"}.get(key, key)
    with pytest.raises(ConfigError, match=rf"run holds a run with .*{key}: .* -> .*name=, or overwrite=true"):
        folder.compare(plain(compose(["stage=pretrain", "tokenizer=dalle", override])))


def test_all_differences_are_named(config: dict[str, Any]) -> None:
    now = changed(config, seed=1, stage__optim__betas=[0.9, 0.98], trainer__devices=2)
    assert differences(config, now) == (
        ["trainer.devices: auto -> 2"],
        ["seed: 0 -> 1", "stage.optim.betas: [0.9, 0.999] -> [0.9, 0.98]"],
    )


def test_an_option_that_came_or_went_is_a_difference(config: dict[str, Any]) -> None:
    more = changed(config, stage__novel=3)
    assert differences(config, more) == ([], ["stage.novel: None -> 3"])
    assert differences(more, config) == ([], ["stage.novel: 3 -> None"])
    assert differences(config, changed(config, stage__novel=None)) == ([], [])


def test_shards_may_be_kept_elsewhere_but_not_streamed_instead(config: dict[str, Any]) -> None:
    def harmful(before: str | None, now: str | None, **more: Any) -> list[str]:
        old, new = (changed(config, data__source={"cache": cache}) for cache in (before, now))
        return differences(old, {**new, "data": {**new["data"], **more}})[1]

    assert harmful("/a", "/b", timeout=5) == []
    assert harmful("/a", None) == ["data.source.cache: /a -> None"]
    assert harmful(None, "/a") == ["data.source.cache: None -> /a"]


def test_a_start_that_failed_at_once_binds_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(config)
    assert folder.compare(changed(config, seed=1)) == []
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        folder.compare(changed(config, seed=1))


@pytest.mark.parametrize("key", ["tokenizer__checkpoint", "init_from"])
def test_weights_that_only_moved_are_the_same(tmp_path: Path, config: dict[str, Any], key: str) -> None:
    for name, value in (("a", 1.0), ("copy", 1.0), ("b", 2.0)):
        files.write(tmp_path / name, {"w": torch.tensor(value)})

    def refused(before: str, now: str, **more: Any) -> bool:
        old, new = (changed(config, **{key: str(tmp_path / name)}, **more) for name in (before, now))
        return differences(old, new)[1] != []

    assert not refused("a", "copy")
    assert refused("a", "b")
    assert refused("a", "gone")
    assert not refused("gone", "b")  # resumed weights are their own, and a tokenizer's hash is compared
    # A score is one of the weights it names: those of another file are another run.
    assert refused("gone", "b", mode="evaluate")
    assert refused("a", "b", mode="evaluate")
    assert not refused("a", "copy", mode="evaluate")
    assert differences(config, changed(config, **{key: str(tmp_path / "a")}))[1] != []


def test_only_a_finished_run_has_results(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.finished() is None
    (tmp_path / "results.json").write_text('{"status": "stopped"}')
    assert folder.finished() is None
    (tmp_path / "results.json").write_text('{"status": "finished", "steps": 3}')
    assert folder.finished() == {"status": "finished", "steps": 3}


def test_clearing_keeps_the_lock_and_what_links_point_to(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "precious").touch()
    with RunFolder(tmp_path / "run") as folder:
        (folder.path / "checkpoints").mkdir()
        (folder.path / "checkpoints" / "last.ckpt").touch()
        (folder.path / "link").symlink_to(kept)
        folder.clear()
        assert list(folder.path.iterdir()) == [folder.lock_file]
    assert (kept / "precious").exists()


# --- the lock -----------------------------------------------------------------------------------------------


def hold(path: Path, **holder: Any) -> Path:
    path.mkdir(exist_ok=True)
    lock = path / ".lock"
    lock.write_text(json.dumps(holder))
    return lock


def test_a_second_writer_is_refused_and_the_folder_is_free_afterwards(tmp_path: Path) -> None:
    refused = pytest.raises(BeitError, match=rf"run is being written by process {os.getpid()} on .* name=")
    with RunFolder(tmp_path / "run"), refused, RunFolder(tmp_path / "run"):
        pass
    with RunFolder(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / ".lock").exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", SILENT])
    hold(tmp_path, host=socket.gethostname(), pid=other.pid, started=_started(other.pid))
    with pytest.raises(BeitError, match=f"process {other.pid}"), RunFolder(tmp_path):
        pass
    other.kill()
    other.wait()
    with RunFolder(tmp_path) as folder:
        assert json.loads(folder.lock_file.read_text())["pid"] == os.getpid()


def test_a_later_process_of_the_same_number_holds_nothing(tmp_path: Path) -> None:
    hold(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="1")
    with RunFolder(tmp_path):
        pass


def test_a_lock_of_another_machine_counts_while_it_is_touched(tmp_path: Path) -> None:
    lock = hold(tmp_path, host="elsewhere", pid=1, started="1")
    with pytest.raises(BeitError, match="process 1 on elsewhere"), RunFolder(tmp_path):
        pass
    long_ago = time.time() - STALE - 1
    os.utime(lock, (long_ago, long_ago))
    with RunFolder(tmp_path):
        pass


def test_half_a_lock_counts_while_it_is_fresh(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    lock.write_text('{"host"')
    with pytest.raises(BeitError, match=r"process \? on \?"), RunFolder(tmp_path):
        pass
    long_ago = time.time() - STALE - 1
    os.utime(lock, (long_ago, long_ago))
    with RunFolder(tmp_path):
        pass


def test_a_run_that_lost_its_folder_leaves_the_new_owners_lock(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        hold(tmp_path, host="elsewhere", pid=1, started="1")
    assert folder.lock_file.exists()


def test_of_many_that_find_a_stale_lock_one_gets_the_folder(tmp_path: Path) -> None:
    writers, rounds = 8, 10
    start, end = Barrier(writers), Barrier(writers)

    def write(path: Path) -> bool:
        start.wait()
        folder = RunFolder(path)
        try:
            folder.__enter__()
        except BeitError:
            end.wait()
            return False
        end.wait()
        folder.__exit__()
        return True

    with ThreadPoolExecutor(writers) as pool:
        for number in range(rounds):
            path = tmp_path / str(number)
            hold(path, host=socket.gethostname(), pid=2**22 + 1, started="1")  # beyond the largest pid
            assert sum(pool.map(write, [path] * writers)) == 1


def test_a_slow_finder_of_a_stale_lock_leaves_the_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(tmp_path, host=socket.gethostname(), pid=2**22 + 1, started="1")
    fast, slow = RunFolder(tmp_path), RunFolder(tmp_path)
    remove = slow._remove_stale

    def overtaken() -> None:
        with fast:
            remove()
            assert fast.lock_file.read_text() == fast._mine
            with pytest.raises(BeitError, match="is being written by"):
                RunFolder(tmp_path).__enter__()

    monkeypatch.setattr(slow, "_remove_stale", overtaken)
    with slow:
        assert slow.lock_file.read_text() == slow._mine


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run cannot be written .*: set runs or name"):
        RunFolder(tmp_path / "file" / "run").__enter__()


def test_a_start_that_failed_at_once_leaves_nothing(tmp_path: Path) -> None:
    for made in ((), ("metrics.csv",)):
        with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run") as folder:
            folder.write_config({"seed": 1})
            for name in made:
                (folder.path / name).touch()
            _ = 1 / 0
        left = sorted(p.name for p in (tmp_path / "run").iterdir()) if (tmp_path / "run").exists() else []
        assert left == (["config.yaml", "metrics.csv"] if made else [])
