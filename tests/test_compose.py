"""From overrides to a configuration: a mistake in the writing is one line with the nearest known name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from runs import DIGITS_TOKENIZER, pretrain, save_pretrained, save_tokenizer

from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import choices, compose, name_fault, recipe_diff, set_by_hand
from beit_pretrain.errors import CheckpointError, ConfigError
from beit_pretrain.folder import plain


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("runs") / "tok")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return save_pretrained(tmp_path_factory.mktemp("runs") / "pre", tokenizer)


@contextmanager
def refused(says: str) -> Iterator[None]:
    """A ConfigError of one line that contains `says`."""
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        yield
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            "stage=pretrian",
            "stage=pretrian: there is no such choice; did you mean pretrain? (known: classify, knn, pretrain",
        ),
        (
            "data=foldr",
            "data=foldr: there is no such choice; did you mean folder? (known: ade20k, class_folders, digits",
        ),
        ("stage=3", "stage=3: there is no such choice (known: "),
        ("stage=null", "stage=null: there is no such choice (known: "),
        ("modl=base", "modl: there is no such option; did you mean model?"),
        (
            "stage=pretrain stage.optim.lrr=1",
            "stage.optim.lrr: there is no such option; did you mean stage.optim.lr?",
        ),
        ("stage=pretrain lr=1e-3", "lr: there is no such option; did you mean stage.optim.lr?"),
        (
            "stage=pretrain wieght_decay=1",
            "wieght_decay: there is no such option; did you mean stage.optim.weight",
        ),
        ("stage=pretrain modle.depth=3", "modle.depth: there is no such option; did you mean model.depth?"),
        ("stage=pretrain zzz=3 lr=1", "zzz: there is no such option"),
        (
            "stage=pretrain ~callbacks.knnn",
            "callbacks.knnn: there is no such option; did you mean callbacks.knn?",
        ),
        (
            "stage.optim.lr=1",
            "stage.optim.lr is an option of a stage: set stage=classify, stage=knn, stage=pretrain, stage=",
        ),
        ("stage=pretrain stage.epochs", "stage.epochs: an option is written key=value"),
        ("stage", "stage: an option is written key=value, such as stage=classify"),
        ("=3", "=3: an option is written key=value"),
        (
            "stage=pretrain stage.epochs=[1",
            "stage.epochs=[1: the value cannot be read; quote one with spaces",
        ),
        ("stage=pretrain name=a=b", "name=a=b: the value cannot be read; quote one with spaces, commas"),
        (
            "stage=pretrain stage.epochs=1,2",
            "stage.epochs=1,2: several values; write 'stage.epochs=[1,2]' for a",
        ),
        ("stage=pretrain ~model", "model is needed: set model=base, large, micro, small or tiny"),
        ("stage=pretrain name=${nope}", "name: Interpolation key 'nope' not found"),
        (
            "experiment=digits_pretrain",
            "experiment=digits_pretrain changes the options of a stage and chooses none",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(overrides: str, says: str) -> None:
    with refused(says):
        compose(overrides.split(" "))


def test_what_is_advised_works() -> None:
    assert compose(["stage=pretrain", 'name="a=b"']).name == "a=b"
    assert list(compose(["stage=pretrain", "image_size=[192,160]"]).model.image_size) == [192, 160]


@pytest.mark.parametrize("group", ["model", "masking", "data", "tokenizer", "logger", "experiment"])
def test_every_choice_of_a_group_composes(group: str) -> None:
    for choice in choices(group):
        cfg = compose(["stage=pretrain", f"{group}={choice}"])
        # A data set's address is for the user to give; everything else resolves.
        cfg.data.update({key: "x" for key in ("root", "dataset") if OmegaConf.is_missing(cfg.data, key)})
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], None),
        (["debug=true"], None),
        (["stage=tokenizer"], "tokenizer-digits-dvae"),
        (["stage=pretrain", "model=tiny"], "pretrain-digits-tiny"),
        (["stage=pretrain", "debug=true"], "pretrain-digits-base-debug"),
        (["stage=pretrain", "name=3", "debug=true"], "3-debug"),
        (["stage=pretrain", "data=torchvision"], "pretrain-CIFAR10-base"),
        (["stage=classify", "data=digits", "mode=evaluate"], "evaluate-classify-digits-base"),
        (["chain=quickstart"], "quickstart"),
    ],
)
def test_a_run_has_a_name(overrides: list[str], name: str | None) -> None:
    cfg = compose(overrides)
    assert cfg.name == name
    assert name is None or cfg.run_dir == f"runs/{name}"


def test_watchers_can_all_be_taken_away() -> None:
    cfg = compose(["stage=pretrain", "~callbacks", "~logger"])
    assert cfg.callbacks == {} and cfg.logger == {}
    assert "knn" not in compose(["stage=pretrain", "~callbacks.knn"]).callbacks


def test_composing_leaves_an_outer_hydra_as_it_was() -> None:
    state = GlobalHydra.instance()
    compose([])
    assert state.hydra is None
    outer = object()
    state.hydra = outer  # pyright: ignore[reportAttributeAccessIssue]
    try:
        compose(["stage=pretrain"])
        with refused("stage.epochs"):
            compose(["stage=pretrain", "stage.epochs=1,2"])
        assert state.hydra is outer
    finally:
        state.hydra = None


# --- what a checkpoint decides ------------------------------------------------------------------------------


def test_a_tokenizers_shape_comes_from_its_checkpoint(tokenizer: Path) -> None:
    cfg = compose(pretrain(tokenizer))
    made = compose(DIGITS_TOKENIZER).tokenizer
    assert {k: v for k, v in cfg.tokenizer.items() if k != "checkpoint"} == {
        k: v for k, v in made.items() if k != "checkpoint"
    }
    assert cfg.tokenizer.checkpoint == str(tokenizer)
    assert list(cfg.stage.views.token_image_size) == [32, 32]


def test_no_option_of_the_default_tokenizer_stays_beside_an_adopted_one(tmp_path: Path) -> None:
    """Of a tokenizer of one's own, whose yaml has to be named: no class is taken from a checkpoint."""
    own = {
        "_target_": "mine.Bits",
        "name": "bits",
        "image_size": 112,
        "bits": 8,
        "net": {"_target_": "mine.Net"},
    }
    places = {"checkpoint": None, "cache": None, "views": None}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "bits.yaml").write_text(yaml.safe_dump({**own, **places}))
    config = plain(compose(["stage=tokenizer"])) | {
        "tokenizer": {**own, "bits": 13, "checkpoint": "elsewhere"}
    }
    about = record.make_record(config, {}, {})
    files.write(tmp_path / "mine.ckpt", {"beit_pretrain": about, "state_dict": {}})
    command = ["stage=pretrain", f"tokenizer.checkpoint={tmp_path}/mine.ckpt"]
    cfg = compose([*command, f"hydra.searchpath=[file://{tmp_path}]", "tokenizer=bits"])
    assert cfg.tokenizer == {**own, **places, "bits": 13, "checkpoint": f"{tmp_path}/mine.ckpt"}
    with refused(
        "tokenizer.checkpoint was made with tokenizer._target_=mine.Bits, which tokenizer= does not"
    ):
        compose(command)


def test_agreeing_with_the_checkpoint_is_fine(tokenizer: Path, pretrained: Path) -> None:
    compose([*pretrain(tokenizer), "tokenizer=dvae", "tokenizer.vocab_size=16", "tokenizer.image_size=32"])
    compose(["stage=knn", f"init_from={pretrained}", "model=micro", "image_size=32", "model.image_size=32"])


def test_disagreeing_with_the_checkpoint_is_refused(tokenizer: Path, pretrained: Path) -> None:
    with refused("tokenizer.vocab_size=99, but tokenizer.checkpoint was made with 16: leave tokenizer.vocab"):
        compose([*pretrain(tokenizer), "tokenizer.vocab_size=99"])
    knn = ["stage=knn", f"init_from={pretrained}"]
    with refused("model=base, but init_from was made with micro: leave model= out"):
        compose([*knn, "model=base"])
    with refused("image_size=48, but init_from was made with [32, 32]: leave image_size out"):
        compose([*knn, "image_size=48"])
    with refused("data.normalize.mean=[0.4,0.4,0.4], but init_from was made with [0.5, 0.5, 0.5]: leave"):
        compose([*knn, "data.normalize.mean=[0.4,0.4,0.4]"])


def test_knn_takes_encoder_size_and_normalisation_from_the_checkpoint(pretrained: Path) -> None:
    cfg = compose(["stage=knn", f"init_from={pretrained}", "data=torchvision"])
    assert (cfg.model.width, cfg.model.depth, cfg.model.name) == (24, 1, "micro")
    assert list(cfg.image_size) == list(cfg.model.image_size) == [32, 32]
    assert list(cfg.data.normalize.mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("key", ["tokenizer.checkpoint", "init_from"])
def test_a_checkpoint_that_is_not_there_is_named(key: str) -> None:
    stage = "pretrain" if key.startswith("tokenizer") else "knn"
    with pytest.raises(CheckpointError, match=f"{key}=/no/where: there is no such"):
        compose([f"stage={stage}", f"{key}=/no/where"])


# --- what a run changed -------------------------------------------------------------------------------------


def test_a_recipes_diff_lists_what_was_changed_once_and_nothing_else() -> None:
    overrides = [
        "stage=pretrain",
        "experiment=digits_pretrain",
        "model=tiny",
        "image_size=48",
        "stage.epochs=3",
    ]
    overrides += ["~callbacks.pictures"]
    rows = {key: (theirs, ours) for key, theirs, ours in recipe_diff(compose(overrides), overrides)}
    assert rows.pop("image_size") == ("32", "48")
    assert rows.pop("stage.epochs") == ("55", "3")
    assert {key.rpartition(".")[0] for key in rows} == {"callbacks.pictures"}
    assert {ours for _, ours in rows.values()} == {"None"}


def test_a_recipe_as_published_has_no_diff() -> None:
    overrides = ["stage=pretrain", "model=large", "name=mine"]
    assert recipe_diff(compose(overrides), overrides) == []


@pytest.mark.parametrize(
    "override",
    [
        "init_from=",
        "init_from=' '",
        "name=",
        "runs=",
        "run_dir=",
        "tokenizer.cache=",
        "tokenizer.weights=",
        "data.root=",
        "data.root=[/a,'']",
        "data.source.train=",
        "data.source.cache=",
        "checkpoint.folder=",
    ],
)
def test_an_empty_text_is_no_place(override: str) -> None:
    key = override.partition("=")[0]
    data = {"data.source.cache": "shards", "data.source.train": "class_folders"}.get(key, "folder")
    root = [] if key == "data.root" else ["data.root=/images"]
    with pytest.raises(
        ConfigError, match=rf"^{key}= is an empty text .*: give a value, or leave {key}= out$"
    ):
        compose(["stage=pretrain", "tokenizer=dalle", f"data={data}", *root, override])


def test_an_empty_text_is_no_place_of_a_trained_tokenizer_or_a_chain_either() -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer.checkpoint= is an empty text"):
        compose(["stage=pretrain", "tokenizer.checkpoint="])
    with pytest.raises(ConfigError, match=r"^name= is an empty text"):
        compose(["chain=quickstart", "name="])


@pytest.mark.parametrize(
    "name",
    [
        ".",
        "..",
        "./.",
        "../other",
        "a/../..",
        "a/..",
        "/tmp/a",
        "/",
        "a/wandb/b",
        "a/checkpoints",
        "é" * 128,
        "a\0b",
    ],
)
@pytest.mark.parametrize("what", ["stage=pretrain", "chain=quickstart"])
def test_a_name_is_that_of_a_folder_below_runs(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=r"^name=.*: set (one|another|a) "):
        compose([what, f'name="{name}"'])


@pytest.mark.parametrize(
    "name", ["a", "a/b", "a/lr=1e-3,seed=5", "5", "1e-3", "wandb", "..a", "a..b/...", "é" * 127]
)
def test_other_names_are(name: str) -> None:
    assert str(compose(["stage=pretrain", f'name="{name}"']).name) == name


def test_the_name_of_a_debug_run_is_measured_with_its_ending() -> None:
    compose(["stage=pretrain", f"name={'a' * 255}"])
    with pytest.raises(ConfigError, match="255 bytes"):
        compose(["stage=pretrain", f"name={'a' * 255}", "debug=true"])


def test_what_was_set_by_hand_is_told_from_what_groups_say() -> None:
    overrides = [
        "stage=pretrain",
        "data=digits",
        "experiment=digits_pretrain",
        "+stage.novel=1",
        "seed=0",
        "batch_size=8",
    ]
    found = set_by_hand(compose(overrides), overrides)
    assert {"stage.novel", "batch_size", "masking.count"} <= found  # the recipe too
    assert not {"seed", "stage.optim.eps", "data.name"} & found


def test_a_job_of_a_sweep_may_be_named_after_the_path_of_a_checkpoint() -> None:
    name = "knn-digits-tiny/init_from=runs/a/checkpoints/best.ckpt"
    assert "checkpoints" in name_fault(name) and not name_fault(name, by_hand=False)


def test_an_own_option_may_be_an_empty_text() -> None:
    assert (
        compose(
            ["stage=pretrain", "tokenizer=dalle", "data=digits", "+data.source.prefix=''"]
        ).data.source.prefix
        == ""
    )
