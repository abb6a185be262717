"""A run's folder: one writer at a time, and going on only with what is the same run."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_pretrain.build import build_stage
from beit_pretrain.checkpoint import files
from beit_pretrain.compose import compose, set_by_hand
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.folder import ADDED, RunFolder, differences, plain
from beit_pretrain.run import keep_null_blocks


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


def test_an_option_that_came_may_have_its_default_and_nothing_else(config: dict[str, Any]) -> None:
    more = changed(config, stage__novel=3)
    assert differences(config, more) == (["stage.novel: (new option) -> 3"], [])
    assert differences(config, more, lambda: {"stage.novel"}) == ([], ["stage.novel: None -> 3"])
    assert differences(config, changed(config, stage__novel={"a": 3}), lambda: {"stage.novel"})[1] != []
    assert differences(config, changed(config, stage__novel=None)) == ([], [])
    assert differences(more, config) == ([], ["stage.novel: 3 -> None"])  # nobody can ask for it any more


@pytest.mark.parametrize("key", ["stage.optim.decay_rel_pos", *ADDED])
def test_a_run_that_was_begun_before_an_option_came_goes_on(tmp_path: Path, key: str) -> None:
    command = ["stage=pretrain", "tokenizer=dalle", "experiment=pretrain_base_1k", "data.root=/images"]

    def goes_on(*overrides: str) -> list[str]:
        cfg = compose([*command, *overrides])
        return folder.compare(plain(cfg), lambda: set_by_hand(cfg, [*command, *overrides]))

    before = plain(compose(command))
    *path, last = key.split(".")
    node = before
    for part in path:
        node = node[part]
    default = node.pop(last)
    folder = begun(tmp_path / "run", before)
    was = ADDED.get(key, default)
    told = [] if key in ADDED and default == was else [f"{key}: (new option) -> {default}"]
    assert goes_on() == told
    if key != "model.mask_token":  # is worked out from the stage
        assert goes_on(f"{key}={default}") == told
        other = {"True": "false", "False": "true", "1": "2", "raw": "ema"}[str(was)]
        with pytest.raises(ConfigError, match=rf"{key}: .* -> "):
            goes_on(f"{key}={other}")
    if key in ADDED:
        assert differences(before, changed(before, **{key.replace(".", "__"): was})) == ([], [])


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


# --- throwing away ------------------------------------------------------------------------------------------


def test_a_folder_that_this_run_starts_from_is_not_thrown_away(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = begun(tmp_path / "run", config)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for start in (
        tmp_path / "run",
        tmp_path / "link",
        tmp_path / "run" / "checkpoints" / "step-00000001.ckpt",
    ):
        with pytest.raises(ConfigError, match=r"which this run starts from.* name="):
            folder.clear(debug=False, needed=(None, str(start)))
    folder.clear(debug=False, needed=(None, str(tmp_path / "other"), "hf:owner/name", str(tmp_path)))
    assert list(folder.path.iterdir()) == []


def test_a_debug_run_throws_away_what_one_has_left_and_no_other(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"not made with debug=true.* name=.* overwrite=true"):
        begun(tmp_path / "real", config).clear(debug=True)
    begun(tmp_path / "tried", changed(config, debug=True)).clear(debug=True)
    RunFolder(tmp_path / "real").clear(debug=False)
    for name in ("real", "tried"):
        assert list((tmp_path / name).iterdir()) == []


# --- the folder ---------------------------------------------------------------------------------------------


def test_a_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / ".lock").exists()


def test_an_error_leaves_the_folder_of_a_run_that_took_it_over(tmp_path: Path) -> None:
    other = json.dumps({"host": "elsewhere", "pid": 1, "started": "1"})
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path) as folder:
        folder.write_config({"seed": 1})
        folder.lock.file.write_text(other)
        raise ZeroDivisionError
    assert folder.lock.file.read_text() == other and folder.config_file.exists()


def test_a_folder_that_was_removed_is_no_second_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run") as folder:
        shutil.rmtree(folder.path)
        raise ZeroDivisionError


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run cannot be written .*: set runs or name"):
        RunFolder(tmp_path / "file" / "run").__enter__()


@pytest.mark.parametrize(
    "text", ["a: [", "- 5\n", "a: !!python/object/apply:os.getcwd []\n", "\udcff\udcfe", "[" * 5000]
)
def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path: Path, text: str) -> None:
    folder = begun(tmp_path / "run", {})
    folder.config_file.write_text(text, errors="surrogateescape")
    with pytest.raises(BeitError, match=r"run/config\.yaml .*: mend or move the file away") as raised:
        folder.compare({"seed": 1})
    assert "\n" not in str(raised.value)


def test_nothing_in_a_configuration_of_a_folder_is_resolved(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = begun(tmp_path / "run", changed(config, data__name="${oc.env:HOME}", seed="${"))
    with pytest.raises(ConfigError, match=r"data.name: \$\{oc.env:HOME\} -> .*seed: \$\{ -> 0"):
        folder.compare(config)


@pytest.mark.parametrize("text", ["{", "[5]", "5", "\udcff", "[" * 100000])
def test_results_that_cannot_be_read_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text, errors="surrogateescape")
    with pytest.raises(BeitError, match=r"results\.json .*: mend or move the file away") as raised:
        RunFolder(tmp_path).finished()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "what"), [("chain.json", "a chain"), ("sweep.json", "a search")])
def test_the_folder_of_several_runs_is_not_that_of_one(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"holds {what}, not a run: .*name="):
        RunFolder(tmp_path).compare({"seed": 1})
    with pytest.raises(ConfigError, match=f"holds {what}"):
        RunFolder(tmp_path).clear(debug=False)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_in_silence(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path / "run", config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    folder.from_the_start()
    assert capsys.readouterr().out == ""
    table = tmp_path / "run" / "metrics.csv"
    table.write_text("step,epoch,train/loss\n3,0.6,2.0\n5,1.0,1.0\n")  # killed before the first was written
    folder.from_the_start()
    assert "no checkpoint after 5 steps; the run begins anew" in capsys.readouterr().out
    refused = pytest.raises(ConfigError, match=r"checkpoints are gone: .*overwrite=true or another name=")
    table.write_text("step,epoch,train/loss\n5,1.0,1.0\n6,1.2,1.0\n")
    with refused:
        folder.from_the_start()
    table.unlink()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").symlink_to("step-00000005.ckpt")
    with refused:
        folder.from_the_start()


def test_a_report_that_is_missing_or_half_written_is_noticed(tmp_path: Path) -> None:
    folder, report = RunFolder(tmp_path), tmp_path / "report.html"
    assert folder.lacks_report()
    (tmp_path / ".report.html.5").touch()
    report.touch()
    assert folder.lacks_report()
    (tmp_path / ".report.html.5").unlink()
    assert not folder.lacks_report()


def test_a_start_that_failed_at_once_leaves_nothing(tmp_path: Path) -> None:
    for made in ((), ("metrics.csv",)):
        with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run") as folder:
            folder.write_config({"seed": 1})
            for name in made:
                (folder.path / name).touch()
            _ = 1 / 0
        left = sorted(p.name for p in (tmp_path / "run").iterdir()) if (tmp_path / "run").exists() else []
        assert left == (["config.yaml", "metrics.csv"] if made else [])
