"""Every yaml explains itself, composes, and fits the code it names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from beit_pretrain.chain import link_overrides
from beit_pretrain.cli import HELP
from beit_pretrain.compose import choices, compose, config_dir

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
STAGES = ("tokenizer", "pretrain", "classify", "probe", "segment", "knn")
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "hydra")
DIFFS = ("experiment", "chain")  # their options are explained where they are defined
SPEAKS_FOR_ITSELF = ("_target_", "_convert_", "defaults", "name")

# Keys that only the configuration uses, and arguments that are added where it is turned into objects (run.py).
STRIPPED = {
    "data": {"name", "root", "dataset", "normalize", "check_label_maps"},
    "tokenizer": {"name", "checkpoint", "cache", "views"},
    "model": {"name"},
    "stage": {"name", "encoder", "knn"},
}
ADDED = {
    "data": {"views", "eval_views", "batch_size", "micro_batch_size", "seed", "bad_log", "limit_steps"},
    "stage": {"tokenizer", "encoder", "classes"},
}


def relative(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_the_files_are_those_that_the_program_reads() -> None:
    assert config_dir() == CONFIGS and len(FILES) > 20


# --- words --------------------------------------------------------------------------------------------------


def header(path: Path) -> list[str]:
    """The comment lines a file opens with, without Hydra's package line."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.lstrip("# ") for line in lines[:end] if "@package" not in line]


def command(path: Path) -> list[str]:
    """The overrides of the first command in a file's opening comment."""
    for line in header(path):
        if found := re.search(r"beit-(?:train(?: -m)?|tools sweep)((?: +~?[\w./]+(?:=[^\s`(,;]+)?)*)", line):
            return [word for word in found[1].split() if word.startswith("~") or "=" in word]
    raise AssertionError(f"{relative(path)}: open with a comment that names a command which uses it")


def without_checkpoints(overrides: list[str]) -> list[str]:
    return [o for o in overrides if o.split("=")[0] not in ("tokenizer.checkpoint", "init_from")]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_opens_with_a_command_that_chooses_it(path: Path) -> None:
    overrides = command(path)
    cfg = compose(without_checkpoints(overrides))
    group, default = (
        path.parent.relative_to(CONFIGS).as_posix(),
        OmegaConf.load(CONFIGS / "train.yaml").defaults,
    )
    by_default = any(entry == {group: path.stem} for entry in default) or path == CONFIGS / "train.yaml"
    assert by_default or f"{group}={path.stem}" in overrides
    assert isinstance(cfg, DictConfig)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_option_has_a_comment(path: Path) -> None:
    if path.parent.name in DIFFS:
        pytest.skip("a diff: its options are explained where they are defined")
    silent = [f"{line + 1}: {key}" for key, line in unexplained(path.read_text())]
    assert not silent, f"{relative(path)}: no comment at {', '.join(silent)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_name_is_that_of_its_file(path: Path) -> None:
    name = yaml.safe_load(path.read_text()).get("name")
    job = "beit-train" if "hydra" in relative(path) else None  # what squeue shows
    assert name in (None, path.stem, "${.dataset}", job)


def test_the_commands_of_the_pages_have_the_rate_of_their_batch() -> None:
    """There is no hidden scaling, so a command with another batch than its stage's rate is for names another rate."""
    pages = [(CONFIGS.parent / page).read_text() for page in ("README.md", "docs/training.md")]
    text = "\n".join([HELP, *pages]).replace("\\\n", " ")
    seen = set()
    for line in re.findall(r"beit-train (stage=(?:tokenizer|pretrain|classify|segment) [^`\n#]*)", text):
        options = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if options.keys() & {"experiment", "dry_run", "debug", "mode"} or "..." in line:
            continue
        seen.add(options["stage"])
        stage = (CONFIGS / "stage" / f"{options['stage']}.yaml").read_text()
        found = re.search(r"^  lr: (\S+) #.* for a global batch of (\d+)", stage, re.MULTILINE)
        assert found
        rate = float(options.get("stage.optim.lr", found[1]))
        batch = int(options.get("batch_size", compose([]).batch_size))
        assert rate / batch == pytest.approx(float(found[1]) / int(found[2]), rel=0.01), line
    assert seen == {"tokenizer", "pretrain", "classify", "segment"}


def unexplained(text: str) -> Iterator[tuple[str, int]]:
    """Options without a word: not on their line, not above their paragraph, not on a mapping they lie in."""
    root = yaml.compose(text)
    if root is not None:
        yield from _unexplained(root, text.splitlines())


def _unexplained(node: yaml.Node, lines: list[str]) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line
        # An interpolation is explained where it leads to.
        plain = not (isinstance(value, yaml.ScalarNode) and value.value.startswith("${"))
        if "#" in lines[line] or key.value in SPEAKS_FOR_ITSELF or not plain:
            continue
        if _paragraph_has_words(lines, line):
            continue
        if isinstance(value, yaml.MappingNode):
            yield from _unexplained(value, lines)
        else:
            yield key.value, line


def _paragraph_has_words(lines: list[str], line: int) -> bool:
    """Whether the paragraph of a line opens with a comment, the file's own opening comment aside."""
    start = line
    while start > 0 and lines[start - 1].strip():
        start -= 1
    return start > 0 and lines[start].lstrip().startswith("#")


def test_a_silent_option_would_be_found() -> None:
    text = "# beit-train\na: 1 # why\nb: 2\nc: # why\n  d: 3\ne:\n  f: 4\n\n# why\ng: 5\nh: 6\n"
    assert list(unexplained(text)) == [("b", 2), ("f", 6)]


# --- composing ----------------------------------------------------------------------------------------------


@cache
def composed(group: str, choice: str) -> DictConfig:
    """A configuration with one choice; not to be changed."""
    stage = "pretrain"
    if group == "chain":
        return compose(command(CONFIGS / group / f"{choice}.yaml"))
    if group == "experiment":
        stage = next(
            o.removeprefix("stage=") for o in command(CONFIGS / group / f"{choice}.yaml") if "stage" in o
        )
    stage = choice if group == "stage" else stage
    return compose([f"stage={stage}", *([f"{group}={choice}"] if group != "stage" else [])])


def all_choices() -> list[tuple[str, str]]:
    return [(group, choice) for group in GROUPS for choice in choices(group)]


@pytest.mark.parametrize(("group", "choice"), all_choices(), ids=str)
def test_a_choice_composes(group: str, choice: str) -> None:
    cfg = deepcopy(composed(group, choice))
    assert cfg.name
    for key in ("root", "dataset"):  # what a user has to give
        if OmegaConf.is_missing(cfg.data, key):
            cfg.data[key] = "given"
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert plain and "???" not in str(plain)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("data", ["digits", "torchvision"])
@pytest.mark.parametrize("model", ["micro", "base"])
def test_stages_data_and_models_combine(stage: str, data: str, model: str) -> None:
    cfg = compose([f"stage={stage}", f"data={data}", f"model={model}"])
    name = {"digits": "digits", "torchvision": "CIFAR10"}[data]
    assert cfg.name == f"{stage}-{name}-{'dvae' if stage == 'tokenizer' else model}"


def targets(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All nodes that describe an object, with their place."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, child in node.items():
            yield from targets(child, f"{key}.{name}" if key else name)


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """What a class takes; `**more` is followed to the class it is passed on to."""
    found: dict[str, inspect.Parameter] = {}
    for one in kind.__mro__[:-1]:  # without object
        if "__init__" not in vars(one):
            continue
        own = dict(inspect.signature(vars(one)["__init__"]).parameters)
        more = [name for name, p in own.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
        found = {**own, **found}
        for name in ("self", *more):
            found.pop(name, None)
        if not more:
            break
    return found


@pytest.mark.parametrize(("group", "choice"), all_choices(), ids=str)
def test_the_code_takes_what_the_yaml_gives(group: str, choice: str) -> None:
    plain = OmegaConf.to_container(composed(group, choice), resolve=False)
    found = dict(targets(plain))
    assert found or group == "chain"
    for place, node in found.items():
        taken = parameters(get_class(node["_target_"]))
        given = node.keys() - STRIPPED.get(place, set()) - {"_target_", "_convert_"}
        if unknown := sorted(given - taken.keys()):
            raise AssertionError(f"{place}: {node['_target_']} does not take {', '.join(unknown)}")
        needed = {name for name, p in taken.items() if p.default is inspect.Parameter.empty}
        if missing := sorted(needed - given - ADDED.get(place, set())):
            raise AssertionError(f"{place}: {node['_target_']} needs {', '.join(missing)} as well")


# --- chains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", choices("chain"))
def test_the_links_of_a_chain_compose_and_start_from_earlier_ones(chain: str, tmp_path: Path) -> None:
    cfg = compose([*command(CONFIGS / "chain" / f"{chain}.yaml"), f"runs={tmp_path}"])
    commands = link_overrides(cfg, [], {}, tmp_path / cfg.name)
    done: set[str] = set()
    for name, overrides in commands.items():
        link = compose(without_checkpoints(overrides))
        assert link.stage.name in STAGES and link.run_dir == str(tmp_path / cfg.name / name)
        for override in overrides:
            key, _, value = override.partition("=")
            if key in ("tokenizer.checkpoint", "init_from"):
                assert value in {str(tmp_path / cfg.name / earlier) for earlier in done}
        done.add(name)
    assert len(done) > 1
