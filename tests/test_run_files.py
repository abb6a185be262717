"""What a run leaves, and that nothing else is thrown away with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from beit_pretrain import run_files
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.run_files import clear

RUN = yaml.safe_dump({"name": "a", "run_dir": "runs/a", "stage": {"name": "pretrain"}, "seed": 0})
LEFT = [
    "config.yaml",
    "metrics.csv",
    ".metrics.csv.part",
    "timing.csv",
    "events.csv",
    "init_from.json",
    "bad_samples.csv",
    "wandb_id",
    "features.f32",
    "rehearsal.json",
    "order-0.jsonl",
    "results.json",
    ".results.json.node7-15.tmp",
    "report.html",
    ".report.html.512",
    ".report.html.node7.local-512",
    "checkpoints/step-00000012.ckpt",
    "checkpoints/step-00000011.ckpt.bad",
    "checkpoints/.step-00000013.ckpt.node7-15.tmp",
    "checkpoints/best.ckpt",
    "checkpoints/.last.ckpt.512",
    "pictures/masks.png",
    "pictures/step-00000012.png",
    "pictures/step-00000013.part",
    "pictures/worst/0.png",
    "bad_steps/step-00000003-rank0.pt",
    "tensorboard/events.out.tfevents.1700000000.node7.15.0",
    "tensorboard/hparams.yaml",
    "wandb/offline-run-1/files/config.yaml",
]
OWN = [
    "notes.txt",
    "step-00000012.ckpt",
    "metrics.csv.bak",
    ".git/config",
    "checkpoints/kept-by-hand.ckpt",
    "checkpoints/step-best.ckpt",
    "pictures/holiday.jpg",
    "lr=1e-3/config.yaml",
    "lr=1e-3/checkpoints/step-00000012.ckpt",
]


def lay(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(RUN if name.endswith("config.yaml") else name)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_run_is_thrown_away_and_nothing_else(tmp_path: Path) -> None:
    lay(tmp_path, [*LEFT, *OWN, ".lock"])
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step-00000012.ckpt")
    clear(tmp_path)
    assert names(tmp_path) == sorted([*OWN, ".lock"])
    assert not any(
        (tmp_path / name).exists() for name in ("bad_steps", "tensorboard", "wandb", "pictures/worst")
    )


@pytest.mark.parametrize(
    "content", [["a.jpg"], ["results.json", "metrics.csv"], ["train/n01/a.png"], ["config.yaml"]]
)
def test_a_folder_that_holds_no_run_is_left_alone(tmp_path: Path, content: list[str]) -> None:
    lay(tmp_path, content)
    if "config.yaml" in content:
        (tmp_path / "config.yaml").write_text("version: 1\nstage: {a: 1}\n")  # of another program
    with pytest.raises(ConfigError, match=r"holds no run .*another name="):
        clear(tmp_path)
    assert names(tmp_path) == sorted(content)


def test_many_foreign_files_are_not_all_named(tmp_path: Path) -> None:
    lay(tmp_path, [f"{n}.jpg" for n in range(9)])
    with pytest.raises(ConfigError, match=re.escape("(0.jpg, 1.jpg, 2.jpg and 6 more)")):
        clear(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "", "- 5"])
def test_a_damaged_run_can_be_thrown_away_if_its_diary_is_there(tmp_path: Path, text: str) -> None:
    lay(tmp_path, [*LEFT, "notes.txt"])
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="holds no run"):
        clear(tmp_path)
    (tmp_path / "events.csv").write_text("time,step,event,job,restart,ranks,detail\n")
    clear(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_a_new_folder_and_one_of_a_start_that_failed_are_cleared(tmp_path: Path) -> None:
    clear(tmp_path)
    lay(tmp_path, [".lock", ".config.yaml.node7-15.tmp"])
    clear(tmp_path)
    assert names(tmp_path) == [".lock"]


def test_what_links_point_to_stays(tmp_path: Path) -> None:
    kept, run = tmp_path / "elsewhere", tmp_path / "run"
    lay(kept, ["step-00000012.ckpt", "metrics.csv"])
    lay(run, ["config.yaml"])
    (run / "checkpoints").symlink_to(kept)
    (run / "wandb").symlink_to(kept)
    (run / "metrics.csv").symlink_to(kept / "metrics.csv")
    (run / "mine").symlink_to(kept)
    clear(run)
    assert [path.name for path in run.iterdir()] == ["mine"]
    assert names(kept) == ["metrics.csv", "step-00000012.ckpt"]


def test_a_kill_while_a_run_is_thrown_away_leaves_one_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, LEFT)
    removed: list[Path] = []
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        removed.append(path)
        if len(removed) == 5:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        clear(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "results.json").exists() and (tmp_path / "config.yaml").exists()
    clear(tmp_path)
    assert names(tmp_path) == []


def test_the_documents_list_of_files_is_this_one() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    section = page.partition("## What a run leaves")[2].partition("\n## ")[0]
    told = set(
        re.findall(r"`([\w.]+/?)`", "".join(row for row in section.splitlines() if row.startswith("|")))
    )
    known = {pattern.partition("/")[0] + "/" * ("/" in pattern) for pattern in run_files.FILES}
    known |= {f"{name}/" for name in run_files.FOLDERS if "/" not in name}
    known -= {"rehearsal.json"}  # of a drill
    assert known - {"order-[0-9]*.jsonl"} <= told


def test_a_configuration_of_aliases_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join(["a0: &a0 [1, 2]", *levels]))
    with pytest.raises(BeitError, match=r"config\.yaml is not valid YAML \(it has aliases"):
        run_files.read_config(tmp_path / "config.yaml")
