"""The model card (README.md) of a converted model: what is known of it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beit_pretrain.checkpoint import record
from beit_pretrain.tools.certificate import Comparison
from beit_pretrain.tools.load import Loaded
from beit_pretrain.wording import show, times

RECIPE = {  # what a reader asks for first, by its place in the configuration
    "epochs": ("stage", "epochs"),
    "batch size": ("batch_size",),
    "learning rate": ("stage", "optim", "lr"),
    "lowest learning rate": ("stage", "optim", "min_lr"),
    "warm-up epochs": ("stage", "optim", "warmup_epochs"),
    "warm-up steps": ("stage", "optim", "warmup_steps"),
    "weight decay": ("stage", "optim", "weight_decay"),
    "layer-wise decay": ("stage", "optim", "layer_decay"),
    "betas": ("stage", "optim", "betas"),
    "gradient clipping": ("stage", "optim", "clip"),
    "stochastic depth": ("model", "drop_path"),
    "mixup": ("stage", "mixup"),
    "cutmix": ("stage", "cutmix"),
    "label smoothing": ("stage", "smoothing"),
    "seed": ("seed",),
}


class Use(NamedTuple):
    """How another library uses the folder: its name, the hub's task, code in which FOLDER is the path, and advice."""

    library: str
    task: str
    snippet: str
    notes: Sequence[str] = ()


def model_card(
    loaded: Loaded, use: Use, comparison: Comparison, pictures: Sequence[str], remarks: Sequence[str]
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    config = loaded.about["config"]
    name = config.get("name") or f"BEiT, stage {loaded.stage}"
    front = ["---", f"library_name: {use.library}", f"pipeline_tag: {use.task}", "tags:", "- beit", "---"]
    remarks = [*remarks, *use.notes]
    notes = ["\n".join(f"- {remark[0].upper()}{remark[1:]}." for remark in remarks)] if remarks else []
    sections = {
        "Use": [f'```python\nFOLDER = "."  # this folder\n\n{use.snippet}```', *notes],
        "Preprocessing": [_preprocessing(loaded)],
        "Training": _training(loaded),
        "Held-out scores": _scores(loaded.about.get("held_out") or {}),
        "Lineage": _lineage(loaded.about),
        "Conversion": [_conversion(comparison, pictures)],
    }
    parts = ["\n".join(front), f"# {name}", _what(loaded)]
    for title, paragraphs in sections.items():
        if paragraphs:
            parts += [f"## {title}", *paragraphs]
    return "\n\n".join(parts) + "\n"


def _what(loaded: Loaded) -> str:
    node, state = loaded.about["config"]["model"], loaded.model.state_dict()
    positions = {"shared": "one shared table", "per_layer": "a table in each block", "none": "none"}
    if loaded.stage == "pretrain":
        head = f"a head over {len(state['head.lm_head.weight']):,} visual tokens"
    elif loaded.stage == "classify":
        head = f"a classifier over {len(state['head.head.weight']):,} classes"
    else:
        head = f"UPerNet over {len(state['head.decode_head.conv_seg.weight']):,} classes"
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    return (
        f"BEiT (arXiv 2106.08254) with {head}: {node['depth']} blocks of width {node['width']} with {node['heads']} "
        f"heads, patches of {node['patch_size']} pixels, images of {times(loaded.preprocess.image_size)} pixels "
        f"(height x width), relative positions: {positions[node['rel_pos']]}, absolute positions: "
        f"{'learned' if node['abs_pos'] else 'none'}; {count:,} parameters. Written by beit-pretrain "
        f"{record.versions().get('beit-pretrain', '')}."
    )


def _preprocessing(loaded: Loaded) -> str:
    view = loaded.preprocess
    if loaded.stage == "segment":
        crop = f"windows of {times(view.image_size)} pixels"
    else:
        cover = "" if view.crop_pct == 1 else f" / {view.crop_pct:g}"
        crop = f"resized (bicubic) until it covers {times(view.image_size)} pixels{cover}, the centre cut out"
    normal = f"mean {show(view.mean)} and standard deviation {show(view.std)}"
    return f"RGB, {crop}, divided by 255, normalised with {normal}."


def _training(loaded: Loaded) -> list[str]:
    config, about = loaded.about["config"], loaded.about
    rows = [("stage", loaded.stage), *_recipe(config)]
    data, fingerprint = config["data"].get("name"), about["preprocessing"].get("data")
    if data:
        rows.append(("data", data))
    if fingerprint:
        rows.append(("data's fingerprint", f"`{fingerprint}`"))
    return [_table(("", ""), rows)]


def _recipe(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "optim" not in config["stage"]:
        return  # a file of others, which does not say how it was trained
    steps = config["stage"]["optim"].get("warmup_steps")
    for title, path in RECIPE.items():
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and not (title == "warm-up epochs" and steps):
            yield title, show(value)


def _scores(held_out: Mapping[str, float]) -> list[str]:
    return (
        [_table(("score", "value"), [(name, f"{value:.6g}") for name, value in held_out.items()])]
        if held_out
        else []
    )


def _lineage(about: Mapping[str, Any]) -> list[str]:
    foreign = about.get("foreign")
    lines = []
    if foreign:
        place = foreign["source"] if ":" in foreign["source"] else Path(foreign["source"]).name
        lines.append(f"- read from {place}, format {foreign['format']}")
    lineage = about["lineage"]
    if lineage.get("git_commit"):
        dirty = ", with changes" if lineage.get("git_dirty") else ""
        lines.append(f"- trained by commit `{lineage['git_commit']}`{dirty}")
    lines += _parents(lineage.get("parents") or {}, "")
    if known := lineage.get("versions"):
        lines.append(
            f"- versions in training: {', '.join(f'{name} {version}' for name, version in known.items())}"
        )
    return ["\n".join(lines)] if lines else []


def _parents(parents: Mapping[str, Any], indent: str) -> Iterator[str]:
    """One line for each checkpoint that a run started from, its own parents below it."""
    for role, parent in parents.items():
        said = {
            "stage": parent.get("stage"),
            "run": parent.get("name"),
            "format": parent.get("format"),
            "data": parent.get("data_name"),
            "fingerprint": parent.get("data"),
            "step": parent.get("step"),
            "sha256": parent.get("sha256"),
        }
        facts = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        yield f"{indent}- {role}: {facts}"
        yield from _parents(parent.get("parents") or {}, f"{indent}  ")


def _conversion(comparison: Comparison, pictures: Sequence[str]) -> str:
    line = comparison.line()
    return f"{line[0].upper()}{line[1:]}; pictures: {', '.join(pictures)}. Hashes and versions are in certificate.json."


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {one} | {other} |" for one, other in lines)
