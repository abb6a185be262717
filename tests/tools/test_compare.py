"""`beit-tools compare`: the runs that folders stand for, and what is said, written and refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from report.conftest import fake_run

from beit_pretrain import cli
from beit_pretrain.errors import BeitError
from beit_pretrain.tools.app import app
from beit_pretrain.tools.run_folders import run_folders


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs, one within a folder of W&B's and one below another run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name, loss in (("a", 2.5), ("deep/b", 2.0), ("a/lr=1", 2.2)):
        results = {"metrics": {"val/loss": loss}, "command": f"beit-train name={name}"}
        fake_run(tmp_path / "runs" / name, name=name, steps=100, sheets=0, results=results)
    for inner in ("wandb/run-1/files", ".submitit"):
        (tmp_path / "runs" / "a" / inner).mkdir(parents=True)
        (tmp_path / "runs" / "a" / inner / "config.yaml").write_text("wandb_version: 1\n")
    return tmp_path / "runs"


def tool(*arguments: str) -> None:
    app(list(arguments), standalone_mode=False)


def test_a_folder_stands_for_itself_or_for_the_runs_below_it(runs: Path) -> None:
    assert run_folders([runs]) == [runs / "a", runs / "a" / "lr=1", runs / "deep" / "b"]
    assert run_folders([runs / "a"]) == [runs / "a"]
    assert run_folders([runs / "deep", runs / "a" / ".." / "deep" / "b"]) == [
        runs / "deep" / "b"
    ]  # each once


@pytest.mark.parametrize(("name", "said"), [("gone", "gone is not there"), ("empty", "empty holds no run")])
def test_a_path_without_a_run_is_named(runs: Path, name: str, said: str) -> None:
    (runs / "empty").mkdir()
    with pytest.raises(BeitError, match=f"{said}: give folders of runs"):
        tool("compare", str(runs / "a"), str(runs / name))
    assert not Path("compare.html").exists()


def test_the_table_the_best_ones_command_and_what_was_written(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("compare", str(runs))
    out = " ".join(capsys.readouterr().out.split())
    rows = [out.index(f"│ {name} │ {loss} │") for name, loss in (("deep/b", 2), ("a/lr=1", 2.2), ("a", 2.5))]
    assert rows == sorted(rows)  # best first
    assert out.endswith(
        "Best val/loss of the finished runs: deep/b, 2 beit-train name=deep/b written: compare.html"
    )
    assert {path.name for path in Path().iterdir()} == {"runs", "compare.html"}


def test_a_csv_is_written_where_it_is_asked_for(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool("compare", str(runs / "a"), str(runs / "deep"), "--out", "page.html", "--csv", "table.csv")
    assert capsys.readouterr().out.endswith("written: page.html\nwritten: table.csv\n")
    with Path("table.csv").open(newline="") as file:
        assert {row["name"]: row["val/loss"] for row in csv.DictReader(file)} == {"deep/b": "2.0", "a": "2.5"}


def test_a_damaged_run_is_named_and_left_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "a" / "metrics.csv").write_text("no,such,column\n")
    tool("compare", str(runs))
    said, wrong = capsys.readouterr()
    assert wrong.startswith(f"left out: {runs / 'a' / 'metrics.csv'} is damaged") and wrong.count("\n") == 1
    assert "│ deep/b" in said and f"Left out: {runs / 'a'}" in Path("compare.html").read_text()
    (runs / "deep" / "b" / "results.json").write_text("{")
    with pytest.raises(BeitError, match=r"1 run to compare in .*runs: give at least two"):
        tool("compare", str(runs))


def test_many_runs_are_cut_short_on_the_terminal(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(15):
        results = {"metrics": {"val/loss": 3 + n / 10}}
        fake_run(runs / f"n{n}", name=f"n{n}", steps=20, sheets=0, results=results)
    tool("compare", str(runs))
    out = capsys.readouterr().out
    assert "and 3 more" in out and "n11 " in out and "n12 " not in out


def test_a_page_that_cannot_be_written_is_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["beit-tools", "compare", str(runs), "--out", "no/such/folder/page.html"])
    with pytest.raises(SystemExit) as ended:
        cli.tools_main()
    assert ended.value.code == 2
    wrong = capsys.readouterr().err
    assert wrong.startswith("error: no/such/folder/page.html could not be written") and wrong.count("\n") == 1
