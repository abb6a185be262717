"""`beit-tools report`: the page of a run or a chain anew, whatever state it is in."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.conftest import fake_run

from beit_pretrain import chain, cli
from beit_pretrain.tools.app import app


@pytest.mark.parametrize("finished", [True, False])
def test_the_page_of_a_run_is_made_anew(
    tmp_path: Path, finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_run(tmp_path / "run", name="digits", steps=100, sheets=0)
    (run / "report.html").write_text("old")
    if not finished:
        (run / "results.json").unlink()
    app(["report", str(run)], standalone_mode=False)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert "<h1>digits</h1>" in page and "masked image modelling" in page
    assert (">finished<" in page) == finished


def test_a_chain_is_left_to_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chain.json").write_text("{}")
    monkeypatch.setattr(chain, "report_chain", lambda folder: folder / "report.html")
    app(["report", str(tmp_path)], standalone_mode=False)
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_a_folder_without_a_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["beit-tools", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.tools_main()
    said = f"error: {tmp_path} holds no run (config.yaml) and no chain (chain.json): give the folder of one"
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{said}, such as runs/NAME\n"
    assert list(tmp_path.iterdir()) == []
