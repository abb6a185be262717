"""A run's folder through the commands: what is thrown away, who may write, and what a kill left out."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import SMALL_TOKENIZER, environment, train_here

from beit_pretrain.callbacks.csv_log import read_rows
from beit_pretrain.cluster import events
from beit_pretrain.errors import BeitError
from beit_pretrain.tools.app import app

TINY = [*SMALL_TOKENIZER, "stage.epochs=1", "data.train_limit=64", "batch_size=16", "stage.log_every=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four updates."""
    work = tmp_path_factory.mktemp("folders")
    train_here([*TINY, "name=a"], work)
    return work / "runs" / "a"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it in a place of its own."""
    shutil.copytree(made, tmp_path / "runs" / "a", symlinks=True)
    return tmp_path / "runs" / "a"


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# --- throwing away ------------------------------------------------------------------------------------------


def test_overwrite_begins_anew_and_keeps_what_is_not_the_runs(run: Path, made: Path) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints" / "step-00000009.ckpt").touch()
    shutil.copytree(made, run / "seed=5")
    below = contents(run / "seed=5")
    train_here([*TINY, "name=a", "seed=1", "overwrite=true"], run.parents[1])
    assert (run / "notes.txt").read_text() == "mine" and contents(run / "seed=5") == below
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000004.ckpt"]
    assert json.loads((run / "results.json").read_text())["status"] == "finished"
    assert (run / "metrics.csv").read_bytes() != (made / "metrics.csv").read_bytes()


@pytest.mark.parametrize("name", ["name=", "name=.", "name=..", "name=a/../..", "name={work}"])
@pytest.mark.parametrize("how", ["overwrite=true", "debug=true"])
def test_no_name_leads_out_of_runs(run: Path, name: str, how: str) -> None:
    work = run.parents[1]
    (work / "source.py").write_text("mine")
    before = contents(work)
    told = train_here([*TINY, name.format(work=work), how], work, code=2)
    assert told.count("\n") == 1 and told.startswith("error: name=")
    assert contents(work) == before


@pytest.mark.parametrize("how", ["overwrite=true", "debug=true"])
def test_photographs_are_not_a_run(tmp_path: Path, how: str) -> None:
    name = "photos" + "-debug" * (how == "debug=true")
    (tmp_path / "data" / name / "pictures").mkdir(parents=True)
    (tmp_path / "data" / name / "pictures" / "a.png").write_text("mine")
    told = train_here([*TINY, "runs=data", "name=photos", how], tmp_path, code=2)
    assert f"data/{name} holds no run (pictures)" in told and told.count("\n") == 1
    assert list(contents(tmp_path)) == [f"data/{name}/pictures/a.png"]


def test_a_run_is_not_thrown_away_by_one_that_starts_from_it(run: Path) -> None:
    before = contents(run)
    told = train_here([*TINY, "name=a", f"init_from={run}", "overwrite=true"], run.parents[1], code=2)
    assert "which this run starts from" in told and contents(run) == before


def test_a_chain_does_not_take_the_place_of_a_run(run: Path) -> None:
    before = contents(run)
    told = train_here(["chain=quickstart", "name=a", "dry_run=true"], run.parents[1], code=2)
    assert "holds a run, not a chain" in told and contents(run) == before


# --- what a kill left out -----------------------------------------------------------------------------------


def test_a_report_that_a_kill_left_out_is_made_by_the_same_command(run: Path) -> None:
    work, checkpoint = run.parents[1], (run / "checkpoints" / "step-00000004.ckpt").stat().st_mtime_ns
    # The number is beyond the largest of a process.
    (run / "report.html").rename(run / f".report.html.{socket.gethostname()}-4194305")
    train_here([*TINY, "name=a"], work)
    assert (run / "report.html").stat().st_size > 1000 and not list(run.glob(".report*"))
    assert (run / "checkpoints" / "step-00000004.ckpt").stat().st_mtime_ns == checkpoint
    page = (run / "report.html").stat().st_mtime_ns
    train_here([*TINY, "name=a"], work)
    assert (run / "report.html").stat().st_mtime_ns == page


# --- damaged folders ----------------------------------------------------------------------------------------


def spoil(run: Path, name: str, content: bytes) -> None:
    if name == "metrics.csv, unfinished":
        (run / "results.json").unlink()
        name = "metrics.csv"
    (run / name).write_bytes(content)


DAMAGE = [
    ("config.yaml", b"a: ["),
    ("config.yaml", b"- 5"),
    ("config.yaml", b"a: !!python/name:os.system"),
    ("results.json", b"{"),
    ("results.json", b"[5]"),
    ("metrics.csv, unfinished", b"\xff\xfe,5\n"),
    ("metrics.csv, unfinished", b"a,b\n1,2\n"),
]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_folder_is_one_line(run: Path, name: str, content: bytes) -> None:
    spoil(run, name, content)
    before = contents(run)
    told = train_here([*TINY, "name=a"], run.parents[1], code=2)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and name.partition(",")[0] in errors[0] and "Traceback" not in told
    now = contents(run)
    if "unfinished" in name:  # its last checkpoint is that of the last step
        del now["results.json"]
    assert now == before


@pytest.mark.parametrize("name", ["metrics.csv", "timing.csv", "events.csv", "config.yaml", "results.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"5\n", b'"', b"\0\n"])
def test_a_report_of_a_damaged_folder_is_one_line(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    before = contents(run)
    try:
        app(["report", str(run)], standalone_mode=False)
    except BeitError as error:
        assert name in str(error) and "\n" not in str(error)
        assert contents(run) == before


def test_a_diary_that_cannot_be_read_is_one_line_within_a_job(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "job_id", lambda: "5")
    for content in (b"\xff\n", b"a,b\n1,2\n"):
        (run / "events.csv").write_bytes(content)
        with pytest.raises(BeitError, match=r"events\.csv is damaged .*: mend or move the file away"):
            events.starts_in_vain(run, 0)


def test_a_run_whose_checkpoints_were_removed_is_refused(run: Path) -> None:
    (run / "results.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        path.unlink()
    before = contents(run)
    told = train_here([*TINY, "name=a"], run.parents[1], code=2)
    assert "its checkpoints are gone" in told and contents(run) == before


# --- two writers --------------------------------------------------------------------------------------------


def lose(how: str, step: int = 2) -> list[str]:
    return [
        "+callbacks.lose._target_=running.LoseFolder",
        "+callbacks.lose.run_dir=${run_dir}",
        f"+callbacks.lose.how={how}",
        f"+callbacks.lose.step={step}",
    ]


@pytest.mark.parametrize("more", [[], ["checkpoint.every_steps=1"], ["stage.log_every=50"]])
def test_a_run_that_lost_its_folder_ends_before_it_writes(tmp_path: Path, more: list[str]) -> None:
    told = train_here([*TINY, "name=a", *lose("taken"), *more], tmp_path, code=1)
    assert "process 5 on node8 has taken the folder over" in told and told.count("error: ") == 1
    run = tmp_path / "runs" / "a"
    assert contents(run) == json.loads((tmp_path / "runs" / "then.json").read_text())
    assert json.loads((run / ".lock").read_text())["host"] == "node8"


def test_a_run_whose_folder_was_removed_ends_in_one_line_and_does_not_make_it_again(tmp_path: Path) -> None:
    told = train_here([*TINY, "name=a", *lose("removed")], tmp_path, code=1)
    assert "runs/a was removed" in told and told.count("error: ") == 1 and "Traceback" not in told
    assert not (tmp_path / "runs" / "a").exists()


def on(host: str, arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    """`beit-train` on a machine of this name, which waits less long for a sign of life."""
    code = f"""
import socket, sys
socket.gethostname = lambda: {host!r}
from beit_pretrain.cluster import lock
lock.WATCH, lock.HEARTBEAT, lock.LOOK = 3.0, 0.5, 0.1
from beit_pretrain.cli import main
main(sys.argv[1:])
"""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_machine_that_stood_still_does_not_write_into_the_run_that_went_on_without_it(
    tmp_path: Path,
) -> None:
    command = [*TINY, "stage.epochs=3", "checkpoint.every_steps=1", "+callbacks.slow._target_=running.Slow"]
    train_here([*command, "name=alone"], tmp_path)
    run, deadline = tmp_path / "runs" / "a", time.monotonic() + 240

    def rows() -> int:
        return len(read_rows(run / "metrics.csv"))

    def begun_again() -> bool:
        return [event["event"] for event in events.read(run)] == ["start", "start"]

    stalled = on("node7", [*command, "name=a"], tmp_path)
    while rows() < 2:
        assert stalled.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    stalled.send_signal(signal.SIGSTOP)
    reached = rows()
    other = on("node8", [*command, "name=a"], tmp_path)
    try:
        while not begun_again() or rows() < reached + 2:
            assert other.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        stalled.send_signal(signal.SIGCONT)
        told = stalled.communicate(timeout=60)[0]
        assert stalled.returncode == 1 and "on node8 has taken the folder over" in told
        told = other.communicate(timeout=120)[0]
        assert other.returncode == 0 and "watching for up to 3 s whether process" in told, told
    finally:
        stalled.kill()
        other.kill()
    assert (run / "metrics.csv").read_bytes() == (tmp_path / "runs" / "alone" / "metrics.csv").read_bytes()
    assert not (run / ".lock").exists()
