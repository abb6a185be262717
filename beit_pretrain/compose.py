"""From overrides to a complete configuration, the same way for every command.

A configuration that starts from a checkpoint takes the shape of what is in it (the tokenizer's architecture,
the encoder's size) from the checkpoint, which describes itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from beit_pretrain.adoption import adopt_checkpoints
from beit_pretrain.errors import ConfigError
from beit_pretrain.models.default_blocks import default_blocks
from beit_pretrain.run_files import FOLDERS
from beit_pretrain.wording import either, is_whole, pair, show

NEEDED = (
    "model",
    "tokenizer",
    "masking",
    "data",
    "trainer",
    "checkpoint",
)  # groups without which nothing runs
# Options that name a place: an empty text there is a variable that is not set.
PLACES = ("name", "runs", "run_dir", "init_from", "checkpoint.folder")
PLACES += tuple(f"tokenizer.{name}" for name in ("checkpoint", "cache", "weights"))
PLACES += tuple(f"data.{name}" for name in ("root", "dataset"))
PLACES += tuple(
    f"data.source.{name}" for name in ("root", "dataset", "train", "val", "test", "cache", "class_names")
)
LAUNCHER = "hydra/launcher"  # the group of what a Slurm job asks for
LONGEST = 255  # bytes that file systems allow a name
SEARCHPATH = "hydra.searchpath"  # a user's own folders of yaml files


def config_dir() -> Path:
    """The folder with the yaml files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def register_resolvers() -> None:
    OmegaConf.register_new_resolver("pair", pair, replace=True)
    OmegaConf.register_new_resolver(
        "grid", lambda size, patch: [s // int(patch) for s in pair(size)], replace=True
    )
    # BEiT's evaluation: the centre 224 of 256, and the whole picture where fine-tuning was at 384 or above.
    OmegaConf.register_new_resolver(
        "crop_pct", lambda size: 1.0 if min(pair(size)) >= 384 else 0.875, replace=True
    )
    # A depth that is none is named by the checks.
    OmegaConf.register_new_resolver(
        "blocks", lambda depth: default_blocks(depth) if is_whole(depth, 1) else None, replace=True
    )


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration for these Hydra overrides, with a name and with what its checkpoints decide.

    Raises ConfigError, in one line, for an unknown group, choice or key, with the nearest known one.
    """
    register_resolvers()
    try:
        cfg = _composed(overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides)) from error
    return complete(cfg, overrides)


def launcher_node(overrides: Sequence[str]) -> DictConfig:
    """What a Slurm job asks for: `hydra.launcher` of these overrides, resolved, slurm.yaml unless they name another.

    Raises ConfigError, in one line, for an unknown key, and for a launcher that is not for Slurm.
    """
    register_resolvers()
    if LAUNCHER not in explicit_keys(overrides):
        overrides = [*overrides, f"{LAUNCHER}=slurm"]
    try:
        cfg = _composed(overrides, hydra=True)
        node = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides)) from error
    assert isinstance(node, dict)
    if not str(node["_target_"]).endswith(".SlurmLauncher"):
        choice = explicit_keys(overrides)[LAUNCHER]
        raise ConfigError(f"{LAUNCHER}={choice} is not for Slurm: set {LAUNCHER}=slurm, or leave it out")
    return OmegaConf.create(node)


def _composed(overrides: Sequence[str], *, hydra: bool = False) -> DictConfig:
    """What Hydra makes of the overrides, also from within a job that Hydra runs (it keeps one global state)."""
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return hydra_compose("train", overrides=list(overrides), return_hydra_config=hydra)
    finally:
        state.hydra = outer


def complete(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Fill in what depends on other choices: checkpoints' own shapes, and the run's name."""
    with open_dict(cfg):
        # Hydra leaves no key where a group has no choice, or was taken out with ~group.
        for group, empty in (("stage", None), ("chain", None), ("callbacks", {}), ("logger", {})):
            cfg.setdefault(group, empty)
        explicit = explicit_keys(overrides)
        _check_groups(cfg, explicit)
        if empty := list(_empty(cfg)):
            raise ConfigError(
                [
                    f"{key}= is an empty text (of a variable that is not set?): give a value, or leave {key}= out"
                    for key in empty
                ]
            )
        try:
            if cfg.stage is not None and "_target_" in cfg.stage:
                adopt_checkpoints(cfg, explicit, node_of)
            name = default_name(cfg) if cfg.name is None else cfg.name
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, overrides)) from error
        cfg.name = f"{name}-debug" if cfg.debug and name is not None else name
        if name is not None and (fault := name_fault(name) or name_fault(cfg.name)):
            raise ConfigError(fault)
        if cfg.debug and cfg.stage is not None and "epochs" in cfg.stage:
            cfg.stage.epochs = 1
    return cfg


def _check_groups(cfg: DictConfig, explicit: dict[str, str]) -> None:
    if missing := [group for group in NEEDED if cfg.get(group) is None]:
        raise ConfigError([f"{group} is needed: set {group}={either(choices(group))}" for group in missing])
    experiment = explicit.get("experiment")
    if experiment and cfg.chain is None and (cfg.stage is None or "_target_" not in cfg.stage):
        raise ConfigError(
            f"experiment={experiment} changes the options of a stage and chooses none: "
            f"set {either([f'stage={name}' for name in choices('stage')])} too"
        )


def _empty(cfg: DictConfig) -> Iterator[str]:
    """Keys of places that are an empty text, which would stand for the working folder, or for no place at all."""
    for key, value in _flat(OmegaConf.to_container(cfg, resolve=False)):
        texts = value if isinstance(value, list) else [value]
        place = any(key == place or key.startswith(f"{place}.") for place in PLACES)
        if place and any(isinstance(text, str) and not text.strip() for text in texts):
            yield key


def name_fault(name: Any, *, by_hand: bool = True) -> str:
    """Why a run's name cannot be that of a folder below `runs`, or nothing.

    A sweep's job (not `by_hand`) is named after its overrides, which may hold the path of a checkpoint.
    """
    if isinstance(name, bool) or not isinstance(name, str | int | float):
        return f"name={show(name)}: set a name for the run's folder below runs"
    parts = PurePosixPath(str(name)).parts
    if not parts or parts[0] == "/" or ".." in parts:
        return f"name={name} is no folder below runs: set one such as my-run or my-sweep/first (the place is runs=)"
    if "\0" in str(name) or any(len(part.encode("utf-8", "surrogatepass")) > LONGEST for part in parts):
        return f"name={str(name)[:40]!r}... is no folder's name: set one of at most {LONGEST} bytes, without a NUL"
    if by_hand and (inner := [part for part in parts[1:] if part in FOLDERS]):
        return f"name={name}: a run keeps files of its own in a folder {inner[0]}: set another name"
    return ""


def default_name(cfg: DictConfig) -> str | None:
    if cfg.chain is not None:
        return str(cfg.chain.name)
    if cfg.stage is None:
        return None
    model = cfg.tokenizer.name if cfg.stage.get("name") == "tokenizer" else cfg.model.name
    # A score must not take the folder of the training it is a score of.
    score = "evaluate-" if cfg.mode == "evaluate" else ""
    return f"{score}{cfg.stage.get('name')}-{cfg.data.name}-{model}"


def explicit_keys(overrides: Sequence[str]) -> dict[str, str]:
    """Key to value of the plain overrides, without Hydra's prefixes."""
    return {o.split("=", 1)[0].lstrip("+~"): o.split("=", 1)[1] for o in overrides if "=" in o}


def flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a configuration, unresolved."""
    if OmegaConf.is_dict(node) and not node._is_none() and not node._is_missing():
        for key in node:
            name = f"{prefix}{key}"
            yield name
            child = node._get_node(key)
            if OmegaConf.is_dict(child):
                yield from flat_keys(child, f"{name}.")


def choices(group: str) -> list[str]:
    """What can be chosen for a group."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def choice_of(group: str, target: Any) -> str | None:
    """The choice of a group whose yaml names the class `target`.

    For what a file says of itself: its classes are compared with those of the yaml files here and never imported.
    """
    for name in choices(group):
        content = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8"))
        if isinstance(target, str) and (content or {}).get("_target_") == target:
            return name
    return None


def node_of(group: str, target: Any) -> dict[str, Any]:
    """The composed node of the choice of a group that names this class, as plain containers; empty without one."""
    register_resolvers()
    choice = choice_of(group, target)
    node = (
        {}
        if choice is None
        else OmegaConf.to_container(_composed([f"{group}={choice}"])[group], resolve=True)
    )
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def _nearest(word: str, known: Sequence[str]) -> str:
    """A hint at the known name that was meant; a key may lack its group, as `lr` for `stage.optim.lr`."""
    tail = word.split(".")[-1]
    same = [k for k in known if k.split(".")[-1] == tail]
    close = difflib.get_close_matches(word, same or known, n=1, cutoff=0.0 if same else 0.5)
    if not close:
        alike = difflib.get_close_matches(tail, [k.split(".")[-1] for k in known], n=1, cutoff=0.7)
        close = [k for k in known if k.split(".")[-1] in alike]
    return f"; did you mean {close[0]}?" if close else ""


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's complaint in one line, with the nearest name that exists."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return _no_choice(group, choice, list(error.options or []))
    if malformed := _malformed(error, text, overrides):
        return malformed
    found = re.search(r"Could not override '([^']+)'", text) or re.search(
        r"Key '([^']+)' not in|Could not (?:append|delete)[^']*'([^']+)'", text
    )
    if found:
        key = next(name for name in found.groups() if name)
        known = _known_keys(overrides)
        if key.startswith("stage.") and not any(k.startswith("stage.") for k in known):
            return (
                f"{key} is an option of a stage: set {either([f'stage={n}' for n in choices('stage')])} too"
            )
        return f"{key}: there is no such option{_nearest(key, known)}"
    what, _, where = text.partition(" full_key: ")
    return f"{where.split(' ')[0]}: {what}" if where else text


def _no_choice(group: str, choice: str, known: Sequence[str]) -> str:
    return f"{group}={choice}: there is no such choice{_nearest(choice, known)} (known: {', '.join(known)})"


def _malformed(error: Exception, text: str, overrides: Sequence[str]) -> str | None:
    """What is wrong with the writing of an override, if that is the matter."""
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = found.group(1).partition("=")
        return (
            f"{key}={value}: several values; write '{key}=[{value}]' for a list, or beit-train -m to try each"
        )
    for override in [error.override] if isinstance(error, OverrideParseException) else overrides:
        key, equals, value = str(override).partition("=")
        bare = key.lstrip("+~")
        if not bare or (not equals and not key.startswith("~")):
            hint = f", such as {bare}={choices(bare)[0]}" if bare and _is_group(bare) else ""
            return f"{override}: an option is written key=value{hint}"
        if isinstance(error, OverrideParseException):
            return (
                f"{override}: the value cannot be read; quote one with spaces, commas, brackets or = in it: "
                f"'{key}=\"{value}\"'"
            )
        if "group override must be" in text and _is_group(bare) and value not in choices(bare):
            return _no_choice(bare, value, choices(bare))
    return None


def _known_keys(overrides: Sequence[str]) -> list[str]:
    """The keys there are with the groups that were chosen; Hydra's own only where they are for users."""
    try:
        cfg = _composed(_group_choices(overrides), hydra=True)
    except (HydraException, OmegaConfBaseException):
        return []
    keys = flat_keys(cfg)
    return [key for key in keys if key.startswith("hydra.launcher.") or not key.startswith("hydra")]


def _group_choices(overrides: Sequence[str]) -> list[str]:
    names = (o.split("=", 1)[0].lstrip("+~") for o in overrides)
    return [o for o, name in zip(overrides, names, strict=True) if _is_group(name) or name == SEARCHPATH]


def recipe_diff(cfg: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """What a run changed against its recipe (the chosen groups without single keys): key, recipe, this run.

    Values are compared before interpolation: a changed image_size shows once and not wherever it is used.
    """
    register_resolvers()
    recipe = _composed(_group_choices(overrides))
    theirs, ours = (dict(_flat(OmegaConf.to_container(c, resolve=False))) for c in (recipe, cfg))
    rows = []
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        if key.split(".")[0] in {"name", "run_dir", "runs", "resume_step", "logger", "dry_run", "overwrite"}:
            continue
        if ours.get(key) != theirs.get(key):
            rows.append([key, str(theirs.get(key)), str(ours.get(key))])
    return rows


def set_by_hand(cfg: DictConfig, overrides: Sequence[str]) -> set[str]:
    """Keys with another value than the groups give that were chosen, recipes (experiment=) left out."""
    groups = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") != "experiment"]
    return {key for key, _, _ in recipe_diff(cfg, groups)}


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of plain containers; lists are values."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_group(name: str) -> bool:
    return "." not in name and (config_dir() / name).is_dir()
