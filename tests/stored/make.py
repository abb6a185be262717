"""Makes what lies beside this file, in the folder in which it is started; README.md says how and with what.

It is kept to show how the files came about. It needs the release that they are to be of, and no test runs it.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import signal
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from beit_pretrain import chain, cli, load
from beit_pretrain.cluster.interruption import Interruption
from beit_pretrain.cluster.signals import Interrupted, Signals
from beit_pretrain.compose import compose
from beit_pretrain.data.shards import ShardSource
from beit_pretrain.data.tokens import HELD_OUT, TokenCache
from beit_pretrain.errors import TrainingError
from beit_pretrain.run import run
from beit_pretrain.tools.app import app

CPU = ["trainer.accelerator=cpu", "logger=csv", "~callbacks.progress", "~callbacks.pictures"]
TOKENIZER = [
    "tokenizer.image_size=16",
    "tokenizer.vocab_size=16",
    "tokenizer.hidden=4",
    "tokenizer.code_dim=4",
]
SMALL = ["image_size=16", "model.width=8", "model.heads=2", "model.depth=2"]
FEW = ["data.train_limit=64", "batch_size=16"]
BRIEF = ["stage.epochs=2", "stage.optim.warmup_epochs=0.5", "stage.log_every=1"]
MASK = ["masking.count=8", "masking.min_block=2"]
PROBE = ["stage.lrs=[3.0e-2]", "stage.pixels=false"]
CHAIN = [
    "chain=quickstart",
    "runs=trained",
    "name=chain",
    "~chain.links.scratch",
    *(f"links.tokenizer.{option}" for option in TOKENIZER),
    *(f"links.pretrain.{option}" for option in [*SMALL, *MASK]),
    *(f"links.finetune.{option}" for option in [*SMALL, "stage.ema=0.9", "stage.head_init_scale=1.0"]),
    *(f"links.probe.{option}" for option in PROBE),
    *FEW,
    *BRIEF,
    *CPU,
]
PRETRAIN = ["stage=pretrain", "experiment=digits_pretrain", "tokenizer.checkpoint=trained/chain/tokenizer"]
# Lanczos is another one in some versions of torchvision, and a run does not go on with another.
PRETRAIN += [*SMALL, *MASK, *FEW, *BRIEF, "stage.views.token_interpolation=bicubic"]
FROM_SHARDS = ["data=shards", "data.root=shards", "data.workers=0", "batch_size=4", "image_size=16", *BRIEF]
FROM_SHARDS += ["init_from=trained/chain/pretrain"]
FLAT = ["model=micro", "model.width=4", "model.heads=1", "stage.channels=4"]
ON_SCENES = [
    "stage=segment",
    "data=image_masks",
    "data.root=scenes",
    "data.workers=0",
    "batch_size=3",
    "image_size=[16,20]",
]
# name: options, and the step after which a signal comes
UNFINISHED: dict[str, tuple[list[str], int]] = {
    "tokenizer": (["stage=tokenizer", "experiment=digits_tokenizer", *TOKENIZER, *FEW, *BRIEF], 5),
    "pretrain": (PRETRAIN, 5),
    "classify": ([*FROM_SHARDS, "stage=classify", "stage.views.rand_augment=null"], 5),
    "probe": ([*FROM_SHARDS, "stage=probe", *PROBE, "stage.cache=none", "stage.knn.k=5"], 5),
    "segment": ([*ON_SCENES, *FLAT, "stage.epochs=3", "stage.optim.warmup_steps=2", "stage.log_every=1"], 5),
}
SCORED = {
    "knn": ["stage=knn", "init_from=trained/chain/pretrain", *FEW],
    "evaluated": ["stage=classify", "mode=evaluate", "init_from=trained/chain/finetune", *SMALL],
    "segment_evaluated": [*ON_SCENES, *FLAT, "mode=evaluate", "init_from=unfinished/segment"],
}
EXPLODING = [
    *PRETRAIN,
    "batch_size=4",
    "stage.optim.lr=1e30",
    "stage.optim.clip=null",
    "stage.max_bad_steps=1",
]
CACHED = [*PRETRAIN, "tokenizer.cache=ids", "tokenizer.views=2", *CPU]
SEARCH = ["sweep=default", "sweep.trials=2", "runs=trained", "name=search", "stage=classify"]
SEARCH += ["+sweep.parameters.stage.optim.lr={low:1e-4,high:1e-2,log:true}"]
SEARCH += ["experiment=digits_finetune", *SMALL, *FEW, *BRIEF, *CPU]
PACKED = (".ckpt", ".pt", ".pth", ".safetensors", ".tar", ".ids", ".samples", ".npy", ".journal")
CONVERTED = {
    "original": ["finetune"],
    "huggingface": ["finetune"],
    "timm": ["finetune"],
}


def draw_images(root: Path) -> None:
    """Class folders of small photographs of nothing, 12 to train on and 4 held out, of odd sizes and two formats."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                coarse = rng.integers(0, 256, (4, 5, 3), np.uint8) // 2 + 100 * label
                image = Image.fromarray(coarse.astype(np.uint8)).resize((37, 29), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{index}.{'png' if index == 0 else 'jpg'}")


def draw_scenes(root: Path) -> None:
    """Coloured halves with their label maps: 6 to train on and 3 held out."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 60, 50], [60, 180, 80], [50, 70, 210]])
    for split, count in (("training", 6), ("validation", 3)):
        for index in range(count):
            labels = np.zeros((36, 47), np.uint8)
            labels[:, rng.integers(10, 40) :] = rng.integers(1, 3)
            labels[:2] = 255
            pixels = colours[np.minimum(labels, 2)] + rng.integers(-20, 20, (1, 47, 3))
            for kind, array in (("images", pixels.astype(np.uint8)), ("annotations", labels)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / kind / split / f"{index}.png")
    (root / "classes.txt").write_text("left\nmiddle\nright\n")


def train(overrides: Sequence[str], stop: int | None = None) -> None:
    """A run in this process, ended by a signal after `stop` updates."""
    cfg = compose(list(overrides))
    asked = Interruption.on_train_batch_end

    def signal_after(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        asked(self, trainer, *rest)

    with Signals() as signals, patch.object(Interruption, "on_train_batch_end", signal_after):
        signals.listen_to(["USR1"])
        try:
            run(cfg, overrides, signals)
        except Interrupted as interrupted:
            assert interrupted.step == stop
        else:
            assert stop is None


def link(arguments: Sequence[str]) -> int:
    train(arguments)
    return 0


def tool(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


def commands() -> dict[str, list[str]]:
    return {
        **{name: [*own, *CPU, "runs=unfinished", f"name={name}"] for name, (own, _) in UNFINISHED.items()},
        **{name: [*own, *CPU, "runs=trained", f"name={name}"] for name, own in SCORED.items()},
    }


def finished(folder: Path) -> dict[str, Any]:
    """The metrics of a run, to compare with those of another release."""
    return json.loads((folder / "results.json").read_text())["metrics"]


def going_on(told: dict[str, list[str]]) -> dict[str, Any]:
    """What the unfinished runs end with, in copies of their folders; the segmentation's stays, without its weights."""
    ends = {}
    shutil.copytree("unfinished", "ends", symlinks=True)
    for name in UNFINISHED:
        train([*told[name], "runs=ends"])
        ends[name] = finished(Path("ends") / name)
    shutil.copytree("ends/segment", "trained/segment", ignore=lambda *_: ["checkpoints"])
    return ends


def numbers_of(models: Sequence[Path]) -> dict[str, Any]:
    """The first logits and a checksum of all for one picture, which is made of arithmetic."""
    found = {}
    for path in models:
        loaded = load(path)
        height, width = loaded.preprocess.image_size
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        pixels = torch.stack([(rows * 7 + columns * (3 + c)) % 256 for c in range(3)]).to(torch.uint8)
        image = loaded.preprocess.normalize(pixels[None])
        out = loaded.model(image) if loaded.stage != "pretrain" else loaded.model.encoder(image)
        out = (out[0] if isinstance(out, tuple) else out).double().flatten()
        found[str(path)] = {"shape": len(out), "first": out[:8].tolist(), "norm": out.norm().item()}
    return found


def shards_hold() -> dict[str, str]:
    """What the shards hold: the label and a hash of the file of every image."""
    source = ShardSource(root="shards")
    assert source.labels is not None
    files = {source.name(index): (index, source.read(index)) for index in range(len(source))}
    return {
        name: f"{source.labels[index]} {sha256(data).hexdigest()}" for name, (index, data) in files.items()
    }


def ids_hold() -> dict[str, str]:
    """What the token cache holds: a hash of the ids of each view, in the order of the images."""
    (folder,) = Path("ids").iterdir()
    made_of = json.loads((folder / "cache.json").read_text())
    sizes = {key: made_of.pop(key) for key in ("samples", "tokens", "vocabulary")}
    cache = TokenCache(root=Path("ids"), made_of=made_of, views=2, **sizes)
    assert cache.folder == folder
    found = {}
    for view in (0, 1, HELD_OUT):
        ids, known = cache.read(np.arange(cache.samples), np.full(cache.samples, view))
        found[str(view)] = f"{known.sum()} {sha256(ids[known].tobytes()).hexdigest()}"
    return found


def keep_the_last(runs: Path) -> None:
    """Leave out what only takes room: older checkpoints and their second names, optimisers of what is finished."""
    for path in [*runs.rglob("best.ckpt"), *runs.rglob("last.ckpt")]:
        path.unlink()
    for folder in runs.rglob("checkpoints"):
        *older, last = sorted(folder.glob("step-*.ckpt"))
        for path in older:
            path.unlink()
        if (folder.parent / "results.json").exists():
            content = torch.load(last, weights_only=True)
            del content["optimizer_states"]
            torch.save(content, last)
        (folder / "last.ckpt").symlink_to(last.name)


def pack() -> None:
    """Leave out reports and pictures, and pack what is not text.

    `test_stored.py` unpacks it and names the newest checkpoint `last.ckpt` again.
    """
    for name in ("report.html", "last.ckpt", "trial-*.log"):
        for path in Path.cwd().rglob(name):
            path.unlink()
    for folder in [*Path.cwd().rglob("pictures"), *Path("trained/search").glob("trial-*/checkpoints")]:
        shutil.rmtree(folder)
    for path in Path.cwd().rglob(
        "results.json"
    ):  # the worst images of a segmentation are named by their whole path
        path.write_text(path.read_text().replace(str(Path.cwd()), "/data"))
    for path in [p for p in Path.cwd().rglob("*") if p.suffix in PACKED]:
        path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
        path.unlink()


def main() -> None:
    torch.set_num_threads(1)
    draw_images(Path("images"))
    draw_scenes(Path("scenes"))
    tool("shards", "write", "images", "shards", "--samples", "6", "--workers", "1")
    with patch.object(chain, "run_link", link):
        chain.run_chain(CHAIN)
    keep_the_last(Path("trained"))
    told = commands()
    for name, (_, stop) in UNFINISHED.items():
        train(told[name], stop)
    keep_the_last(Path("unfinished"))
    for name in SCORED:
        train(told[name])
    try:
        train([*EXPLODING, *CPU, "runs=unfinished", "name=exploding"])
    except TrainingError as error:
        print(error)
    tool("tokens", "build", *CACHED[1:])
    tool("sweep", *SEARCH)
    ends = going_on(told)
    runs = {name: Path("trained/chain") / name for name in ("pretrain", "finetune")}
    for form, names in CONVERTED.items():
        for name in names:
            tool("convert", str(runs[name]), f"converted/{form}-{name}", "--to", form)
    models = [*runs.values(), Path("unfinished/segment"), *sorted(Path("converted").iterdir())]
    expected = {
        "commands": told,
        "ends": ends,
        "scored": {name: finished(Path("trained") / name) for name in SCORED},
        "search": SEARCH,
        "cached": CACHED,
        "ids": ids_hold(),
        "logits": numbers_of(models),
        "shards": shards_hold(),
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for folder in ("images", "ends"):
        shutil.rmtree(folder)
    pack()


if __name__ == "__main__":
    cli._quiet()
    with patch("socket.gethostname", return_value="elsewhere"):  # it is part of a token cache's file names
        main()
