"""A training on shards that is stopped on two ranks and goes on with one or three is the one that was left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster.test_parallel import HALFWAY, LEAN, SMALL, STEPS, alone, assert_alike, continued
from parallel_ranks import Job, on_ranks
from runs import save_tokenizer

from beit_pretrain.tools.app import app

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Found .* module.s. in eval mode",  # the frozen tokenizer
    "ignore:.*GPU available but not used",
    "ignore:The `srun` command is available",
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning",
)


def test_stopped_on_two_ranks_and_continued_on_one_and_three(tmp_path: Path) -> None:
    """Shard counts and batches that divide by nothing, windows of 5 shards, loader workers, uneven masks."""
    shards = tmp_path / "shards"
    with pytest.raises(SystemExit) as ended:
        app(["shards", "write", "digits", str(shards), "--samples", "71", "--workers", "1"])
    assert ended.value.code == 0
    pretrain = ["stage=pretrain", "experiment=digits_pretrain", "data=shards", f"data.root={shards}", *SMALL]
    pretrain += [
        *LEAN,
        "masking.exact=false",
        "data.shuffle_shards=5",
        f"tokenizer.checkpoint={save_tokenizer(tmp_path / 'tok')}",
    ]
    pretrain += ["stage.epochs=2", "data.epoch_steps=10", "stage.optim.warmup_epochs=0.5", *HALFWAY]
    notes = ["+callbacks.notes._target_=parallel_ranks.Notes", "+callbacks.notes.folder=notes"]
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    alone(one, [Job("whole", pretrain)])
    on_ranks(2, two, [Job("stopped", [*pretrain, *notes, "data.workers=1"])])
    assert_alike(two / "runs/stopped", one / "runs/whole")
    alone(one, [Job("from-two", pretrain, continued(two / "runs/stopped", one, "from-two"))])
    on_ranks(
        3, three, [Job("from-two", [*pretrain, *notes], continued(two / "runs/stopped", three, "from-two"))]
    )
    for folder in (one, three):
        assert_alike(folder / "runs/from-two", one / "runs/whole")
    # The second half: on two ranks, and on three after the restart, the same images of each update, each once.
    seen = [_samples(folder / "notes", ranks) for folder, ranks in ((two, 2), (three, 3))]
    assert seen[1] == {step: images for step, images in seen[0].items() if step >= 10} and len(seen[1]) == 10
    for epoch in (0, 10):
        images = [image for step in range(epoch, epoch + 10) for image in seen[0][step]]
        assert len(images) == len(set(images)) == 120
    assert len(seen[0]) == STEPS


def _samples(folder: Path, ranks: int) -> dict[int, list[int]]:
    """The images of each update, over all ranks, sorted."""
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        for noted in json.loads((folder / f"notes-{rank}.json").read_text())["steps"]:
            found.setdefault(noted["step"], []).extend(noted["samples"])
    return {step: sorted(images) for step, images in found.items()}
