"""The links of a chain side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from beit_pretrain.report import make_chain_report
from beit_pretrain.report.comparison import compare
from beit_pretrain.report.folder import read_run
from beit_pretrain.report.intervals import wilson

LINKS = {"tokenizer": "tokenizer", "pretrain": "pretrain", "probe": "probe"}
LINKS |= {"finetune": "classify", "scratch": "classify"}


def _tuned(make_run, name: str, top1: float, **results: Any) -> Path:
    metrics = {"test/top1": top1, "test/images": 397}
    return make_run(name, stage="classify", results={"metrics": metrics, **results})


def _chain(make_run) -> list[tuple[str, Path]]:
    links = [
        (name, make_run(name, stage=stage, steps=200)) for name, stage in LINKS.items() if name != "scratch"
    ]
    return [*links, ("scratch", _tuned(make_run, "scratch", 0.71, init_from=None, steps=200))]


def _compare(*folders: Path):
    return compare([(folder.name, read_run(folder)) for folder in folders])


def test_every_way_to_use_the_encoder_stands_in_one_plot(make_run, tmp_path: Path, words) -> None:
    links = _chain(make_run)
    path = make_chain_report(tmp_path / "runs", links)
    said = words(path)
    assert (
        "Result: what pre-training is worth Fine-tuned from pre-training: 88.4%, from scratch with the same "
        "200 labels and steps: 71.0% (397 test images). The difference is +17.4 points (95%: +11.9 to +22.8)."
    ) in said
    assert "Linear probe probe: frozen encoder, block 2, both, lr 0.003 92.0% 88.9 to 94.3%" in said
    assert "finetune pre-trained, 200 training images, 200 steps 88.4% 84.9 to 91.2%" in said
    assert "scratch from scratch, 200 training images, 200 steps 71.0% 66.4 to 75.2%" in said
    assert (
        "kNN probe: frozen encoder, block 2 91.0%" in said
        and "kNN, raw pixels probe: no encoder 97.0%" in said
    )
    assert "Accuracy on test images." in said and "Raw pixels do well" in said
    assert said.count("Held-out top-1 while training") == 1 and "kNN accuracy on frozen features" not in said
    spans = re.findall(r'<i style="left: ([\d.]+)%; width: ([\d.]+)%">', path.read_text())
    low, high = wilson(0.71, 397)
    assert [float(number) for number in spans[-1]] == pytest.approx([100 * low, 100 * (high - low)], abs=0.01)


def test_only_what_uses_pre_trained_weights_stands_out(make_run) -> None:
    found = _compare(*[folder for _, folder in _chain(make_run)])
    assert found is not None
    assert [(bar.label, bar.main) for bar in found.bars] == [
        ("Linear probe", True), ("Linear, raw pixels", False), ("kNN", True),
        ("kNN, untrained encoder", False), ("kNN, raw pixels", False), ("finetune", True), ("scratch", False),
    ]  # fmt: skip
    assert found.chart is not None and [label for label, *_ in found.chart.legend()] == [
        "finetune",
        "scratch",
    ]


@pytest.mark.parametrize("stages", [(), ("pretrain",), ("pretrain", "knn"), ("classify",)])
def test_a_single_result_is_compared_with_nothing(make_run, stages: tuple[str, ...]) -> None:
    assert _compare(*[make_run(stage, stage=stage, steps=200) for stage in stages]) is None


def test_a_probe_alone_stands_beside_its_knn(make_run) -> None:
    found = _compare(make_run(stage="probe"))
    assert found is not None and len(found.bars) == 5 and not found.sentences and found.chart is None


def test_different_labels_or_steps_are_said(make_run) -> None:
    ours = _tuned(make_run, "ours", 0.884)
    other = _tuned(make_run, "other", 0.9, init_from=None, train_images=1000, steps=4000)
    found = _compare(ours, other)
    assert found is not None and found.sentences == [
        "Fine-tuned from pre-training, 200 labels and 1,000 steps: 88.4%, from scratch, 1,000 labels and 4,000 "
        "steps: 90.0% (397 test images). The difference is -1.6 points (95%: -6.0 to +2.8), too little to tell "
        "with so few images."
    ]


def test_several_pairs_are_named(make_run) -> None:
    folders = [_tuned(make_run, f"ours{i}", 0.9) for i in range(2)]
    folders.append(_tuned(make_run, "plain", 0.5, init_from=None))
    found = _compare(*folders)
    assert found is not None and len(found.sentences) == 2
    assert found.sentences[1].startswith(
        "Fine-tuned from pre-training (ours1): 90.0%, from scratch (plain) with the same 200 labels and steps: 50.0%"
    )


def test_other_images_are_named_and_not_set_against_each_other(make_run) -> None:
    ours = _tuned(make_run, "ours", 0.9)
    metrics = {"val/top1": 0.8, "val/images": 50}
    other = make_run("other", stage="classify", results={"metrics": metrics, "init_from": None})
    found = _compare(ours, other)
    assert found is not None and not found.sentences and "Accuracy on" not in found.measured
    assert [bar.note.rpartition(", ")[2] for bar in found.bars] == ["test images", "held-out images"]


def test_a_link_of_unknown_size_or_start_has_no_interval_and_no_sentence(make_run) -> None:
    ours = _tuned(make_run, "ours", 0.9)
    older = make_run("older", stage="classify")
    for folder in (ours, older):
        text = (folder / "results.json").read_text()
        (folder / "results.json").write_text(text.replace("test/images", "x").replace("init_from", "y"))
    found = _compare(ours, older)
    assert found is not None and not found.sentences
    assert all(bar.span is None for bar in found.bars) and "interval" not in found.measured
