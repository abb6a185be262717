"""A pre-training step of BEiT-B/16 on the CPU with and without the tokenizer:  python benchmarks/token_cache.py

The step that `beit-train stage=pretrain model=base tokenizer=dalle trainer.precision=bf16-mixed` makes, optimiser
included: with DALL-E's encoder in float32 and in bfloat16, and with ids from a token cache. The encoder has its
published size and random weights: what a step costs does not depend on them. All take turns in one process.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dall_e.encoder import Encoder
from measuring import faster, interleaved, machine, median, spread, table

from beit_pretrain.build import build_stage
from beit_pretrain.compose import compose
from beit_pretrain.data.transforms import Item, PretrainBatch
from beit_pretrain.stages.pretrain import Pretrain

ROUNDS, BATCH, SIDE = 5, 8, 320
FLOAT32, BFLOAT16, CACHED = "tokenizer in float32", "tokenizer in bfloat16", "ids from the cache"


def build(folder: Path) -> Pretrain:
    """The stage, with a tokenizer whose weights are made here."""
    torch.manual_seed(0)
    torch.save(Encoder(), folder / "encoder.pkl")
    cfg = compose(
        [
            "stage=pretrain",
            "model=base",
            "tokenizer=dalle",
            f"tokenizer.weights={folder}",
            "tokenizer.offline=true",
            "tokenizer.decoder=false",
            "trainer.accelerator=cpu",
            f"batch_size={BATCH}",
        ]
    )
    stage = build_stage(cfg)
    assert isinstance(stage, Pretrain)
    return stage.train()


def random_batch(stage: Pretrain) -> PretrainBatch:
    images = torch.randint(256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    return stage.views.collate(
        [Item(stage.views(image, key), key, 0, -1) for key, image in enumerate(images)]
    )


def step(stage: Pretrain, optimizer: torch.optim.Optimizer, batch: PretrainBatch, precision: str) -> None:
    """Forward, backward, clipping and update of one batch, as stages/base does them."""
    tokenizer: Any = stage.tokenizer
    tokenizer.precision = precision
    with torch.autocast("cpu", torch.bfloat16):
        result = stage.compute(batch, 0)
    (result.loss / result.count).backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in stage.trained_parameters()], stage.recipe.clip or 0.0)
    optimizer.step()
    optimizer.zero_grad()
    stage.after_step(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--threads", type=int, default=1
    )  # one: threads that wait for each other cost time too
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        stage = build(Path(folder))
    batch = random_batch(stage)
    cached = batch._replace(ids=stage.tokens(batch), token_image=None)
    optimizer = stage.configure_optimizers()
    ways = {
        FLOAT32: partial(step, stage, optimizer, batch, "float32"),
        BFLOAT16: partial(step, stage, optimizer, batch, "bfloat16"),
        CACHED: partial(step, stage, optimizer, cached, "float32"),
    }
    interleaved(ways, 1)  # what happens once
    costs = interleaved(ways, given.rounds)
    print(machine("torch"))
    print(f"BEiT-B/16 in bfloat16, batch {BATCH}, {torch.get_num_threads()} threads; {given.rounds} rounds\n")
    header = ["a step with", "ms by the clock", "ratio", "spread", "ms of cores", "ratio", "spread"]
    rows = []
    for name in ways:
        row = [name]
        for kind in ("wall", "cpu"):
            row += [
                f"{1000 * median(costs, name, kind):,.0f}",
                f"{faster(costs, name, FLOAT32, kind):.2f}",
                f"{spread(costs, name, kind):.0%}",
            ]
        rows.append(row)
    print(table(header, rows))
    print(f"\nthe cache over the tokenizer in bfloat16: x {faster(costs, CACHED, BFLOAT16, 'wall'):.2f}")


if __name__ == "__main__":
    main()
