"""CsvLog: a table that doesn't show how often the run was killed."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

import pytest
import torch

from beit_pretrain.callbacks.csv_log import CsvLog, read_rows
from beit_pretrain.errors import DataError


def history(seed: int = 0, steps: int = 40) -> list[tuple[int, dict[str, float]]]:
    """What a run logs: training every 2 steps, validation every 8, kNN every 16, timing every 5."""
    draw = random.Random(seed)
    calls: list[tuple[int, dict[str, float]]] = []
    for step in range(1, steps + 1):
        epoch = step / 8
        if step % 2 == 0:
            calls.append((step, {"epoch": epoch, "train/loss": draw.random(), "train/lr": draw.random()}))
        if step % 5 == 0:
            calls.append((step, {"epoch": epoch, "time/images_per_second": draw.random()}))
        if step % 8 == 0:
            calls.append((step, {"epoch": epoch, "val/loss": draw.random()}))
        if step % 16 == 0:
            calls.append((step, {"epoch": epoch, "knn/best": draw.random(), "knn/best_block": 3}))
    return calls


def expected(calls: list[tuple[int, dict[str, float]]]) -> list[dict[str, str]]:
    """The rows by the definition: per step, everything that is not a time, as text."""
    rows: dict[int, dict[str, str]] = {}
    for step, metrics in calls:
        steady = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        if set(steady) - {"epoch"}:
            row = rows.setdefault(step, {"step": str(step)})
            row.update({name: repr(value) for name, value in steady.items()})
    return list(rows.values())


def write(folder: Path, calls: list[tuple[int, dict[str, float]]], resume_step: int | None = None) -> None:
    log = CsvLog(folder, resume_step)
    for step, metrics in calls:
        log.log_metrics(metrics, step)


def test_a_step_is_one_row_however_many_calls_it_took(tmp_path: Path) -> None:
    calls = history()
    write(tmp_path, calls)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert rows == expected(calls)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == (
        "step,epoch,train/loss,train/lr,val/loss,knn/best,knn/best_block"
    )


def test_times_go_to_their_own_file(tmp_path: Path) -> None:
    write(tmp_path, history())
    assert "time" not in (tmp_path / "metrics.csv").read_text()
    timing = read_rows(tmp_path / "timing.csv")
    assert [row["step"] for row in timing] == [str(step) for step in range(5, 41, 5)]
    assert set(timing[0]) == {"step", "epoch", "images_per_second"}


def test_a_killed_run_leaves_the_same_bytes_as_one_that_was_not(tmp_path: Path) -> None:
    calls = history()
    write(tmp_path / "whole", calls)
    whole = (tmp_path / "whole" / "metrics.csv").read_bytes()
    draw = random.Random(1)
    for trial in range(25):
        folder, start = tmp_path / f"killed-{trial}", 0
        while start is not None:
            todo = [call for call in calls if call[0] > start]
            died = draw.randrange(len(todo) + 20)  # calls done when the process ends
            write(folder, todo[:died], start or None)
            if 0 < died < len(todo) and draw.random() < 0.7:  # a line that was being written
                with (folder / "metrics.csv").open("ab") as file:
                    file.write(draw.choice([b"3", b"41,5.0,0.2", b"41,5.0,0.2,0.1,0.9,"]))
            reached = todo[died - 1][0] if 0 < died <= len(todo) else start
            # The checkpoint is somewhere before, at a step whose calls are complete.
            start = None if died >= len(todo) else draw.randint(start, max(start, reached - 1))
        assert (folder / "metrics.csv").read_bytes() == whole, trial


def test_without_a_checkpoint_everything_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, [(0, {"val/loss": 9.0}), (2, {"train/loss": 1.0}), (4, {"train/loss": 2.0})])
    write(tmp_path, [(2, {"train/loss": 1.0})])
    assert (tmp_path / "metrics.csv").read_text() == "step,epoch,val/loss,train/loss\n0,,9.0,\n2,,,1.0\n"


def test_nothing_is_touched_before_the_first_row(tmp_path: Path) -> None:
    write(tmp_path, history())
    before = (tmp_path / "metrics.csv").read_bytes()
    CsvLog(tmp_path)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert CsvLog(tmp_path / "new").save_dir == str(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_numbers_keep_all_their_digits(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": torch.tensor(1 / 3), "c": float("nan"), "d": torch.tensor(7), "e": 1e-300}
    write(tmp_path, [(1, values)])  # pyright: ignore[reportArgumentType]
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert float(row["a"]) == 0.1 + 0.2 and float(row["e"]) == 1e-300 and math.isnan(float(row["c"]))
    assert float(row["b"]) == torch.tensor(1 / 3).item() and row["d"] == "7"


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    log = CsvLog(tmp_path)
    for step in range(1, 4):
        log.log_metrics({"train/loss": 0.5}, step)
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == step + 1


def test_a_file_that_is_no_table_is_not_overwritten(tmp_path: Path) -> None:
    for content in ("hello\nworld\n", "step,loss\n1,2,3\n", "step,loss\nx,2\n", "\n\n"):
        (tmp_path / "metrics.csv").write_text(content)
        with pytest.raises(DataError, match=r"metrics\.csv is not a table of metrics.*overwrite=true"):
            write(tmp_path, [(1, {"train/loss": 1.0})], 5)
        assert (tmp_path / "metrics.csv").read_text() == content


def test_a_metric_without_a_step_is_a_programmers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimiser step"):
        CsvLog(tmp_path).log_metrics({"train/loss": 1.0})
