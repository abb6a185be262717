"""What a stranger wrote into a checkpoint or a run folder is data: nothing in it is called, imported or resolved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from classifiers import save_classifier
from omegaconf import DictConfig
from PIL import Image
from pretrained import save_pretrained
from segmenters import save_segmenter

import beit_pretrain
from beit_pretrain import checks
from beit_pretrain.build import make
from beit_pretrain.checkpoint import files
from beit_pretrain.checkpoint.stored import unlike
from beit_pretrain.compose import compose
from beit_pretrain.errors import BeitError, CheckpointError
from beit_pretrain.folder import differences, plain
from beit_pretrain.tools.app import app
from beit_pretrain.tools.replay import replay

LAST = Path("checkpoints") / "last.ckpt"
SECRET = "a-password-that-nobody-may-see"
KNN = ["stage=knn", "data=digits"]
SMALL = "batch_size=64"
PROBE = ["stage=probe", "data=digits", SMALL]
CLASSIFY = ["stage=classify", "data=digits", SMALL, "mode=evaluate"]
SEGMENT = ["stage=segment", "data=image_masks", "data.root=scenes", "mode=evaluate"]
PRETRAIN = ["stage=pretrain", "data=digits", "model=micro", "image_size=32", "masking.count=26", SMALL]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind, the file of a refused step, and a picture."""
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "pretrain": save_pretrained(folder / "pre"),
        "tokenizer": folder / "pre-tokenizer",
        "classify": save_classifier(folder / "cls"),
        "segment": save_segmenter(folder / "seg"),
        "step": folder / "step",
        "image": folder / "image.png",
    }
    saved = files.read(made["pretrain"] / LAST)
    step = {"batches": [], "step": 0, "rank": 0, "precision": "32-true"}
    files.write(made["step"] / LAST, {**saved, **step})
    Image.new("RGB", (40, 32), (10, 200, 30)).save(made["image"])
    return made


class Stranger:
    """Writes into copies of checkpoints, and knows whether something was called for it."""

    def __init__(self, runs: dict[str, Path], place: Path) -> None:
        self.runs = runs
        self.place = place
        self.mark = place / "mark"

    @property
    def call(self) -> dict[str, Any]:
        """A node that, built by Hydra, leaves a mark."""
        return {"_target_": "webdataset.gopen", "url": f"pipe:touch {self.mark}", "mode": "rb"}

    def tampered(self, kind: str, key: str, value: Any) -> Path:
        """A copy of a run whose checkpoint says something else of itself."""
        saved = files.read(self.runs[kind] / LAST)
        saved["beit_pretrain"] = deepcopy(saved["beit_pretrain"])
        *above, last = key.split(".")
        node = saved["beit_pretrain"]
        for name in above:
            node = node[name]
        node[last] = value
        folder = self.place / f"{kind}-{len(list(self.place.iterdir()))}"
        files.write(folder / LAST, saved)
        return folder


@pytest.fixture
def stranger(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    return Stranger(runs, tmp_path)


def tool(name: str, *arguments: Any) -> Any:
    return app([name, *map(str, arguments)], standalone_mode=False)


def composed(*overrides: str) -> None:
    cfg = compose(overrides)
    checks.check(cfg, overrides)


Door = Callable[[Path, dict[str, Path]], Any]
DOORS: dict[str, Door] = {
    "load": lambda run, runs: beit_pretrain.load(run),
    "show": lambda run, runs: tool("show", run),
    "embed": lambda run, runs: tool("embed", run, runs["image"], "--out", "e.npz", "--device", "cpu"),
    "attention": lambda run, runs: tool("attention", run, runs["image"], "--out", "a", "--device", "cpu"),
    "convert": lambda run, runs: tool("convert", run, "out", "--to", "original"),
    "export": lambda run, runs: tool("export", run, "m.pt2", "--to", "torch"),
    "predict": lambda run, runs: tool("predict", run, runs["image"], "--device", "cpu"),
    "segment": lambda run, runs: tool("segment", run, runs["image"], "--out", "s", "--device", "cpu"),
    "reconstruct": lambda run, runs: tool("reconstruct", run, runs["image"], "--out", "r", "--device", "cpu"),
    "reconstruct with": lambda run, runs: tool(
        "reconstruct", runs["pretrain"], runs["image"], "--tokenizer", run, "--out", "r", "--device", "cpu"
    ),
    "replay": lambda run, runs: replay(run / LAST),
    "knn": lambda run, runs: composed(*KNN, f"init_from={run}"),
    "probe": lambda run, runs: composed(*PROBE, f"init_from={run}"),
    "fine-tune": lambda run, runs: composed(*CLASSIFY[:3], f"init_from={run}"),
    "score": lambda run, runs: composed(*CLASSIFY, f"init_from={run}"),
    "score a segmentation": lambda run, runs: composed(*SEGMENT, f"init_from={run}"),
    "pretrain": lambda run, runs: composed(*PRETRAIN, f"tokenizer.checkpoint={run}"),
    "plan": lambda run, runs: tool("plan", *PRETRAIN, f"tokenizer.checkpoint={run}", "--seconds", "0"),
}

# Door, kind of run, key of the record that holds a call, or (with `!`) is itself made one, and what is said of it; ""
# where the door does not look at the key and works.
WALK = [
    *((door, "pretrain", "config.model.drop_path", r"config\.model\.drop_path") for door in ("load", "show")),
    *((d, "pretrain", "config.model._target_", "webdataset") for d in ("embed", "convert", "export", "load")),
    ("show", "pretrain", "config.model._target_", ""),
    ("attention", "pretrain", "config.model.heads", r"config\.model\.heads"),
    ("reconstruct", "pretrain", "config.masking.min_block", r"masking\.min_block\._target_"),
    ("reconstruct", "pretrain", "config.masking", r"masking\._target_=webdataset\.gopen"),
    ("reconstruct", "pretrain", "config.tokenizer.hidden", r"tokenizer\.hidden\._target_"),
    ("reconstruct", "pretrain", "config.tokenizer._target_", r"tokenizer\._target_=webdataset\.gopen"),
    ("reconstruct", "pretrain", "config.stage.views.flip", ""),
    ("reconstruct with", "tokenizer", "config.tokenizer.kl_weight", r"tokenizer\.kl_weight\._target_"),
    ("knn", "pretrain", "config.model._target_", r"model\._target_=webdataset\.gopen"),
    ("knn", "pretrain", "config.model.init_std", r"config\.model\.init_std"),
    ("knn", "pretrain", "config.data.normalize.mean", r"normalize\.mean"),
    ("probe", "pretrain", "config.model._partial_", r"model\._partial_"),
    ("fine-tune", "pretrain", "config.image_size", r"config\.image_size"),
    ("fine-tune", "pretrain", "config.model._target_", r"model\._target_=webdataset\.gopen"),
    ("predict", "classify", "config.stage.pooling", "pooling"),
    ("predict", "classify", "config.stage.optim", ""),
    ("predict", "classify", "preprocessing.class_names", "class_names"),
    ("score", "classify", "config.stage.pooling", r"stage\.pooling\._target_"),
    ("score", "classify", "config.stage.eval_views.crop_pct", "crop_pct"),
    ("score", "classify", "config.stage.eval_views._target_", ""),
    ("segment", "segment", "config.stage.predict.scales", r"scales"),
    ("segment", "segment", "config.stage.predict._target_", ""),
    ("score a segmentation", "segment", "config.stage.blocks", r"stage\.blocks\._target_"),
    ("score a segmentation", "segment", "config.stage.channels", r"stage\.channels="),
    ("pretrain", "tokenizer", "config.tokenizer.code_dim", r"tokenizer\.code_dim\._target_"),
    ("pretrain", "tokenizer", "config.tokenizer._target_", r"tokenizer\._target_=webdataset\.gopen"),
    ("pretrain", "tokenizer", "config.tokenizer.new", r"tokenizer\.new\._target_"),
    ("plan", "tokenizer", "config.tokenizer.code_dim", r"tokenizer\.code_dim\._target_"),
    ("replay", "step", "config.model._target_", r"model\._target_=webdataset\.gopen"),
    ("replay", "step", "config.stage._target_", r"stage\._target_=webdataset\.gopen"),
    ("replay", "step", "config.stage.optim.lr", r"stage\.optim\.lr\._target_"),
    ("replay", "step", "config.stage.views.mask", r"stage\.views\.mask\._target_"),
    ("replay", "step", "config.stage.eval_views", r"stage\.eval_views\._target_"),
    ("replay", "step", "config.tokenizer.hidden", r"tokenizer\.hidden\._target_"),
    ("replay", "step", "config.callbacks", ""),
    ("replay", "step", "preprocessing.class_names", "class_names"),
]


def payload(stranger: Stranger, key: str) -> Any:
    """A call; at the place of a class's name, its name alone, with what else it takes beside it."""
    if key.endswith("._partial_"):
        return True
    return stranger.call["_target_"] if key.endswith("._target_") else stranger.call


@pytest.mark.parametrize(("door", "kind", "key", "says"), WALK, ids=lambda v: str(v).replace("config.", ""))
def test_nothing_in_a_checkpoint_is_called(
    stranger: Stranger, door: str, kind: str, key: str, says: str
) -> None:
    run = stranger.tampered(kind, key, payload(stranger, key))
    if says:
        with pytest.raises(BeitError, match=says) as caught:
            DOORS[door](run, stranger.runs)
        assert len(str(caught.value).splitlines()) == 1
    else:
        DOORS[door](run, stranger.runs)
    assert not stranger.mark.exists()


@pytest.mark.parametrize("door", DOORS)
def test_a_door_that_refuses_opens_for_what_a_run_wrote(stranger: Stranger, door: str) -> None:
    """So that the walk above is not refused for another reason."""
    if door in ("export", "convert", "score a segmentation"):
        pytest.skip("refused by `load` and `compose` like others; whole conversions have tests of their own")
    kind = next(kind for name, kind, *_ in WALK if name == door)
    DOORS[door](stranger.runs[kind], stranger.runs)


# --- interpolations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("door", "kind", "key"),
    [
        ("load", "pretrain", "config.model.name"),
        ("show", "pretrain", "config.name"),
        ("knn", "pretrain", "config.model.attention"),
        ("pretrain", "tokenizer", "config.tokenizer.name"),
        ("score", "classify", "config.stage.pooling"),
        ("segment", "segment", "config.stage.predict.mode"),
        ("reconstruct", "pretrain", "config.logger"),
        ("replay", "step", "config.stage.run_dir"),
    ],
)
def test_nothing_in_a_checkpoint_is_resolved(
    stranger: Stranger, capsys: pytest.CaptureFixture[str], door: str, kind: str, key: str
) -> None:
    for value in ("${oc.env:SECRET}", {"a": ["x ${pair:3}"]}, {"${oc.env:SECRET}": 1}):
        with pytest.raises(CheckpointError, match=re.escape(f"{key}")) as caught:
            DOORS[door](stranger.tampered(kind, key, value), stranger.runs)
        assert "interpolation" in str(caught.value) and SECRET not in str(caught.value)
    assert SECRET not in capsys.readouterr().out


def test_names_of_classes_are_taken_as_they_are(stranger: Stranger) -> None:
    """They come from folders, indices of shards and checkpoints, and go to the stage past Hydra."""
    names = ["${oc.env:SECRET}", stranger.call, ["a"]]
    made = make(DictConfig({"_target_": "types.SimpleNamespace", "name": "x", "lr": 1}), classes=names)
    assert vars(made) == {"lr": 1, "classes": names} and not stranger.mark.exists()
    classes = ["${oc.env:SECRET}", *"123456789"]
    run = save_classifier(stranger.place / "odd", classes=classes)
    assert beit_pretrain.load(run).labels == classes


def test_a_configuration_in_a_run_folder_is_compared_as_it_is(stranger: Stranger) -> None:
    before = {
        "name": "x",
        "model": {"width": "${oc.env:SECRET}", "empty": {}},
        "logger": {"a": "${nonsense:}"},
    }
    harmless, harmful = differences(before, {"name": "y", "model": {"width": 24}, "logger": {"a": [1]}})
    assert harmful == ["model.width: ${oc.env:SECRET} -> 24"]
    assert harmless == ["logger.a: ${nonsense:} -> [1]"]


def test_pages_show_a_run_folder_as_it_is(stranger: Stranger, capsys: pytest.CaptureFixture[str]) -> None:
    run = stranger.place / "runs" / "a"
    config = plain(compose([*CLASSIFY[:3], "name=a"]))
    config["model"]["drop_path"] = stranger.call
    config["stage"]["views"] = {**stranger.call, "fill": "${oc.env:SECRET}"}
    files.write_text(run / "config.yaml", yaml.safe_dump(config))
    results = {
        "name": "${oc.env:SECRET}",
        "stage": "classify",
        "status": "finished",
        "metrics": {"val/top1": 0.5},
    }
    files.write_text(
        run / "results.json",
        json.dumps({**results, "command": "touch mark", "recipe_diff": [], "seconds": 1}),
    )
    tool("report", run)
    shutil.copytree(run, run.with_name("b"))
    tool("compare", run.parent, "--out", "compare.html", "--csv", "compare.csv")
    for page in (run / "report.html", Path("compare.html"), Path("compare.csv")):
        assert SECRET not in page.read_text()
    assert SECRET not in capsys.readouterr().out and not stranger.mark.exists()


# --- memory -------------------------------------------------------------------------------------------------

HUGE = 10**9


@pytest.mark.parametrize(
    ("door", "kind", "key", "value", "says"),
    [
        ("load", "pretrain", "config.model.depth", HUGE, r"model\.depth=1000000000"),
        ("knn", "pretrain", "config.model.depth", 500, "number of blocks"),
        ("knn", "pretrain", "config.model.width", HUGE, r"model\.width"),
        ("probe", "pretrain", "config.model.width", 24000, "patch embedding"),
        ("score", "classify", "config.model.mlp_ratio", 1e4, r"fc1\.weight"),
        ("fine-tune", "classify", "config.model.mlp_ratio", HUGE, r"model\.mlp_ratio"),
        ("load", "classify", "config.model.heads", 24, "relative_position_bias_table"),
        ("load", "classify", "config.model.patch_size", 1, "patch embedding"),
        ("knn", "pretrain", "config.model.patch_size", True, r"model\.patch_size"),
        ("knn", "pretrain", "config.image_size", [HUGE, HUGE], r"config\.image_size"),
        ("show", "pretrain", "config.image_size", [4096, 4096], "more than 65,536"),
        ("knn", "pretrain", "config.image_size", [32, 64], "relative_position_bias_table"),
        ("predict", "classify", "config.stage.eval_views.crop_pct", 1e-9, "crop_pct"),
        ("knn", "pretrain", "config.model.init_std", 10**30, "whole number of 100 bits"),
        ("segment", "segment", "config.stage.predict.scales", [1e6], "scales"),
        ("segment", "segment", "config.stage.predict.windows", HUGE, "windows"),
        ("segment", "segment", "config.stage.predict.stride", [1, 1], "stride"),
        ("score a segmentation", "segment", "config.stage.channels", HUGE, r"stage\.channels"),
        ("reconstruct", "pretrain", "config.masking.grid", [HUGE, HUGE], ""),
        ("reconstruct", "pretrain", "config.masking.count", HUGE, r"masking\.count"),
        ("replay", "step", "config.stage.views.mask.grid", [HUGE, HUGE], "larger than any encoder"),
        ("pretrain", "tokenizer", "config.tokenizer.blocks", HUGE, r"tokenizer\.blocks"),
        ("pretrain", "tokenizer", "config.tokenizer.layers", HUGE, r"tokenizer\.layers"),
        ("reconstruct with", "tokenizer", "config.tokenizer.vocab_size", 10**12, "do not fit"),
        ("reconstruct with", "tokenizer", "config.tokenizer.hidden", 10**6, "do not fit"),
    ],
)
def test_a_file_does_not_decide_how_much_memory_is_taken(
    stranger: Stranger, door: str, kind: str, key: str, value: Any, says: str
) -> None:
    run = stranger.tampered(kind, key, value)
    if not says:
        DOORS[door](run, stranger.runs)
        return
    with pytest.raises(BeitError, match=says) as caught:
        DOORS[door](run, stranger.runs)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "a\nb", "x" * 300, 5])
def test_a_stored_name_leads_nowhere(stranger: Stranger, name: Any) -> None:
    """A model's name is part of a run folder's."""
    with pytest.raises(CheckpointError, match=r"config\.model\.name") as caught:
        DOORS["knn"](stranger.tampered("pretrain", "config.model.name", name), stranger.runs)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", 5),
        ("config", {}),
        ("config.stage", "pretrain"),
        ("config.stage.name", None),
        ("config.model", None),
        ("config.data", []),
        ("config.data.normalize", {}),
        ("config.data.normalize.mean", 0.5),
        ("config.data.normalize.mean", ["a", "b", "c"]),
        ("config.image_size", "huge"),
        ("config.image_size", [32]),
        ("preprocessing", None),
        ("preprocessing.class_names", 3),
        ("lineage", torch.zeros(2)),
        ("lineage", {("a",): 1}),
    ],
)
def test_a_record_of_another_shape_is_refused_in_one_line(stranger: Stranger, key: str, value: Any) -> None:
    run = stranger.tampered("pretrain", key, value)
    with pytest.raises(CheckpointError, match=r"path=.*give another checkpoint") as caught:
        beit_pretrain.load(run)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("door", "kind", "key"),
    [
        ("load", "pretrain", "config.model.drop_path"),
        ("reconstruct", "pretrain", "config.masking.min_block"),
        ("reconstruct with", "tokenizer", "config.tokenizer.hidden"),
        ("replay", "step", "config.stage.views.mask.count"),
        ("replay", "step", "config.stage.optim.lr"),
        ("segment", "segment", "config.stage.predict.crop"),
    ],
)
def test_an_option_of_a_wrong_kind_is_one_line(stranger: Stranger, door: str, kind: str, key: str) -> None:
    run = stranger.tampered(kind, key, "a text")
    with pytest.raises(BeitError) as caught:
        DOORS[door](run, stranger.runs)
    assert len(str(caught.value).splitlines()) == 1


def test_a_record_that_unfolds_without_end_is_refused(stranger: Stranger) -> None:
    folded: list[Any] = []
    for _ in range(40):
        folded = [folded] * 1000
    endless: list[Any] = []
    endless.append(endless)
    for value in (folded, endless):
        with pytest.raises(CheckpointError, match="larger than"):
            beit_pretrain.load(stranger.tampered("pretrain", "config.model.name", value))


# --- comparing ----------------------------------------------------------------------------------------------


def test_a_stored_node_is_like_its_yaml_if_all_its_classes_are() -> None:
    yaml_node = {
        "_target_": "a.B",
        "x": 1,
        "net": {"_target_": "a.C", "_partial_": True},
        "more": [{"_target_": "a.D"}],
    }
    like = [
        {**yaml_node, "x": {"deep": [1, {"plain": 2}]}, "new": None},
        {"_target_": "a.B"},
        {**yaml_node, "more": []},
        {**yaml_node, "net": None},
    ]
    for node in like:
        assert unlike(node, yaml_node, "k") is None
    unlikes = {
        "k._target_=a.X": {"_target_": "a.X"},
        "k._target_=None": {"x": 1},
        "k._args_=[1]": {"_target_": "a.B", "_args_": [1]},
        "k.x._target_=a.B": {"_target_": "a.B", "x": {"_target_": "a.B"}},
        "k.x[1][0]._target_=a.B": {"_target_": "a.B", "x": [1, [{"_target_": "a.B"}]]},
        "k.net._partial_=None": {"_target_": "a.B", "net": {"_target_": "a.C"}},
        "k.more[1]._target_=a.D": {"_target_": "a.B", "more": [{"_target_": "a.D"}, {"_target_": "a.D"}]},
    }
    for found, node in unlikes.items():
        assert unlike(node, yaml_node, "k") == found
