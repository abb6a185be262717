"""What a file of weights is and where it comes from, as a tree on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from beit_pretrain.checkpoint import files, record
from beit_pretrain.checkpoint.finite import counted, not_finite
from beit_pretrain.errors import CheckpointError
from beit_pretrain.models.default_blocks import blocks_of_null
from beit_pretrain.origins import AVERAGE, grid_of
from beit_pretrain.wording import pair, printable, times
from beit_pretrain.wording import show as typed

KEY = "SOURCE"
SHORT = 12  # digits of a hash that is there to be recognised
NAMED = 10  # classes that are named
UNFOLDED = 1000  # columns where nobody looks: a fact stays in its line, for grep
WRITTEN_BY = {
    "original": "the authors' format",
    "huggingface": "Transformers' format",
    "timm": "timm's format",
}
TABLES = {
    "shared": "one relative table",
    "per_layer": "a relative table for each block",
    "none": "none relative",
}
PARTS = {
    "tokenizer": ("tokenizer",),
    "probe": ("bank",),
}  # that a stage's checkpoint holds; else encoder and head
COUNTED = (
    ".running_mean",
    ".running_var",
    ".scale.mean",
    ".scale.deviation",
    ".use",
)  # statistics, not parameters
# Options of a stage or tokenizer that no weight depends on, or that have a line of their own.
UNSAID = {
    "_target_",
    "name",
    "epochs",
    "seed",
    "run_dir",
    "log_every",
    "max_bad_steps",
    "compile",
    "eps",
    "grid",
}
UNSAID |= {"pooling", "blocks", "channels", "cache", "cache_gb", "checkpoint", "views", "weights", "offline"}

Row = tuple[str, str]


def show(source: str, heads: int | None = None) -> None:
    """Print what a checkpoint of any format that can be read is, what made it, and what it was made from.

    `heads` is the number of heads for a file that does not say it.
    Ancestors that still lie where they lay are compared with the hashes that the checkpoint remembers.
    Raises CheckpointError if there is no such file, or none of a BEiT.
    """
    file, _ = record.file_of(source, key=KEY)
    saved = record.read(source, key=KEY, heads=heads)
    lineage = saved["beit_pretrain"]["lineage"]
    tree = Tree(Text(printable(source)))
    tree.add(
        _table([*_file(file, saved), *_model(saved), *_training(saved["beit_pretrain"]), *_code(lineage)])
    )
    _add_parents(tree, lineage)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = UNFOLDED
    with console.capture() as printed:
        console.print(tree)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _table(rows: Iterable[Row]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=9)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(printable(value)))
    return table


def _add_parents(tree: Tree, lineage: Mapping[str, Any]) -> None:
    """A branch for each file that a run started from, with the branches of its own."""
    for role, entry in (lineage.get("parents") or {}).items():
        if isinstance(entry, str):  # of a run that kept no more than the file's hash
            tree.add(Text(printable(f"{role} sha256 {entry[:SHORT]}")))
            continue
        if "path" not in entry:  # published weights: they have a name
            tree.add(Text(printable(f"{role} {entry['name']}")))
            continue
        branch = tree.add(Text(printable(f"{role} {entry['path']}{_whether_there(entry)}")))
        branch.add(_table([*_ancestor(entry), *_code(entry, lineage.get("versions"))]))
        _add_parents(branch, entry)


def _whether_there(entry: Mapping[str, Any]) -> str:
    """Whether the file that a run started from still lies at its path; nothing for an address."""
    path = Path(entry["path"]).expanduser()
    if not path.exists():
        return "" if ":" in entry["path"] else ": not found from here"
    try:
        digest = files.sha256(record.file_of(path, key=KEY)[0])
    except (CheckpointError, OSError):
        return ": not found from here"
    return ": found" if digest == entry["sha256"] else f": changed since, now sha256 {digest[:SHORT]}"


def _ancestor(entry: Mapping[str, Any]) -> Iterator[Row]:
    yield "what", _what(entry["stage"], entry.get("name"), entry.get("step"), None, entry.get("format"))
    yield "sha256", entry["sha256"][:SHORT]
    if entry.get("data"):
        yield "data", f"{entry['data_name']} {entry['data'][:SHORT]}"
    yield from _frozen(entry)


# --- the file -----------------------------------------------------------------------------------------------------


def _file(path: Path, saved: Mapping[str, Any]) -> Iterator[Row]:
    about, state = saved["beit_pretrain"], saved["state_dict"]
    config, foreign = about["config"], about.get("foreign", {})
    stage = config["stage"]["name"]
    places = saved.get("global_step"), saved.get("epoch")
    yield "what", _what(stage, config.get("name"), *places, foreign.get("format"))
    yield "file", f"{path}, {_size(path.stat().st_size)}"
    yield "sha256", files.sha256(path)
    parts = _parts(stage)
    own = {name: value for name, value in state.items() if name.partition(".")[0] in parts}
    if len(parts) == 1:  # as frozen weights are remembered: without the part's name
        own = {name.partition(".")[2]: value for name, value in own.items()}
    yield "weights", files.weight_hash(own)
    if spoilt := not_finite(state):
        yield "spoilt", f"{counted(spoilt)}: refused wherever weights are used"
    average = ["ema"] if any(name.startswith(AVERAGE) for name in state) else []
    yield "kept", ", ".join(["raw", *average, *(["optimiser"] if saved.get("optimizer_states") else [])])
    yield from _frozen(about)
    if left_out := foreign.get("left_out"):
        yield "left out", _few(left_out)
    for note in foreign.get("notes", ()):
        yield "note", note


def _what(stage: str, run: str | None, step: int | None, epoch: int | None, written_by: str | None) -> str:
    words = [f"stage={stage}"]
    words += [WRITTEN_BY[written_by]] if written_by else []
    words += [f"run {run}"] if run else []
    words += [f"step {step:,}"] if step is not None else []
    words += [f"epoch {epoch:,}"] if epoch is not None else []
    return ", ".join(words)


def _frozen(about: Mapping[str, Any]) -> Iterator[Row]:
    """What a run looked through and did not train, by its hash of weights."""
    for part, digest in (about.get("frozen") or {}).items():
        yield "frozen", f"{part}, weights {digest[:SHORT]}"


def _code(lineage: Mapping[str, Any], above: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Commit and versions; with `above`, those that are others than there."""
    if commit := lineage.get("git_commit"):
        yield "commit", commit[:SHORT] + (", with uncommitted changes" if lineage.get("git_dirty") else "")
    known = lineage.get("versions") or {}
    versions = [f"{name}=={version}" for name, version in known.items() if (above or {}).get(name) != version]
    if versions:
        yield "versions", " ".join(versions)


# --- the model ----------------------------------------------------------------------------------------------------


def _parts(stage: str) -> Sequence[str]:
    return PARTS.get(stage, ("encoder", "head"))


def _model(saved: Mapping[str, Any]) -> Iterator[Row]:
    about, state = saved["beit_pretrain"], saved["state_dict"]
    config = about["config"]
    stage, size = config["stage"], pair(config["image_size"])
    if stage["name"] == "tokenizer":
        yield "tokenizer", f"{config['tokenizer']['name']}: {_options(config['tokenizer'])}"
        yield "images", f"{times(size)} pixels"
    else:
        model = config["model"]
        yield (
            "model",
            f"{model['name']}: {model['width']} wide, {model['depth']} blocks, {model['heads']} heads, "
            f"patches of {times([model['patch_size']] * 2)}",
        )
        extras = ["absolute ones"] * bool(model["abs_pos"]) + ["layer scale"] * bool(model["layer_scale"])
        yield "positions", ", ".join([TABLES[model["rel_pos"]], *extras])
        yield "images", f"{times(size)} pixels, {times(grid_of(config))} patches"
        yield "head", _head(stage, model["depth"], state, about["preprocessing"].get("class_names"))
    counts = ((part, _parameters(state, part)) for part in _parts(stage["name"]))
    yield "parameters", ", ".join(f"{part} {count:,}" for part, count in counts)
    yield from _pixels(about)


def _head(
    stage: Mapping[str, Any], depth: int, state: Mapping[str, Tensor], names: Sequence[str] | None
) -> str:
    match stage["name"]:
        case "classify":
            return f"{stage['pooling']} pooling, {_classes(len(state['head.head.weight']), names)}"
        case "segment":
            blocks = ", ".join(map(str, stage["blocks"] or blocks_of_null(depth)))
            classes = len(state["head.decode_head.conv_seg.weight"])
            return f"UPerNet of {stage['channels']} channels on blocks {blocks}, {_classes(classes, names)}"
        case "probe":
            return f"linear classifiers, {_classes(len(names or ()), names)}"
    if "head.lm_head.weight" not in state:
        return "none"
    return f"{len(state['head.lm_head.weight']):,} visual tokens"


def _classes(count: int, names: Sequence[str] | None) -> str:
    return f"{count:,} classes" + (", names unknown" if names is None else f": {_few(names)}")


def _few(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMED:,} more"] if len(names) > NAMED + 1 else []
    return ", ".join([*names[: NAMED if more else None], *more])


def _parameters(state: Mapping[str, Tensor], part: str) -> int:
    return sum(
        value.numel()
        for name, value in state.items()
        if name.startswith(f"{part}.") and value.is_floating_point() and not name.endswith(COUNTED)
    )


def _pixels(about: Mapping[str, Any]) -> Iterator[Row]:
    """How images were scaled, cut and normalised."""
    made, stage = about["preprocessing"], about["config"]["stage"]
    crop = stage.get("eval_views", {}).get("crop_pct")
    colours = [
        f"{name} {'unknown' if made.get(name) is None else typed(made[name])}" for name in ("mean", "std")
    ]
    yield "pixels", ", ".join([*colours, *([f"crop_pct {crop}"] if crop else [])])
    if "resize" in made:
        yield "resize", made["resize"]


# --- the training -------------------------------------------------------------------------------------------------


def _training(about: Mapping[str, Any]) -> Iterator[Row]:
    config, held_out = about["config"], about.get("held_out")
    stage = config["stage"]
    if held_out:
        yield "score", " ".join(_scores(held_out))
    if data := about["preprocessing"].get("data"):
        yield "data", f"{config['data']['name']} {data}"
    if "optim" not in stage:
        return  # a file of others
    masking = _options(config["masking"], "masking.") if stage["name"] == "pretrain" else ""
    drop_path = "" if stage["name"] == "tokenizer" else f"drop_path={typed(config['model']['drop_path'])}"
    start = f"init_weights={config['init_weights']}" if config["init_from"] else ""
    first = f"epochs={stage['epochs']} batch_size={config['batch_size']} seed={config['seed']}"
    words = [first, start, _options(stage["optim"]), _options(stage), drop_path, masking]
    yield "recipe", " ".join(filter(None, words))


def _options(node: Mapping[str, Any], prefix: str = "") -> str:
    """A node's values, as one would type them."""
    return " ".join(
        f"{prefix}{name}={typed(value)}"
        for name, value in node.items()
        if name not in UNSAID and value is not None and not isinstance(value, Mapping)
    )


def _scores(held_out: Mapping[str, float]) -> Iterator[str]:
    """Held-out numbers with their standard errors, by the names that they have in metrics.csv."""
    for name, value in held_out.items():
        if not name.endswith("_se"):
            error = held_out.get(f"{name}_se")
            yield f"{name}={value:.4g}" + ("" if error is None else f"±{error:.2g}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
