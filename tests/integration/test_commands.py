"""The commands as a user types them: a chain, a sweep, tools, mistakes, a full disk."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from running import SMALL_TOKENIZER, environment, hearing_ctrl_c, start, train, train_here

from beit_pretrain.cluster import events

# The quickstart in small: one epoch each.
SMALL_CHAIN = [
    "chain=quickstart",
    "links.tokenizer.tokenizer.vocab_size=32",
    "links.tokenizer.tokenizer.hidden=16",
    "links.tokenizer.stage.epochs=1",
    "model.width=24",
    "model.depth=2",
    "links.pretrain.stage.epochs=1",
    "links.probe.stage.epochs=1",
    "links.finetune.stage.epochs=1",
    "links.scratch.stage.epochs=1",
    "stage.optim.warmup_epochs=0",
    "trainer.accelerator=cpu",
    "logger=csv",
]


def tools(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from beit_pretrain.cli import tools_main; tools_main()", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def chain_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("chain")
    return folder, train([*SMALL_CHAIN], folder)


def test_a_chain_hands_its_weights_on_and_reports(chain_run: tuple[Path, str]) -> None:
    folder, output = chain_run
    chain = folder / "runs" / "quickstart"
    assert "[5/5] scratch" in output and "report: runs/quickstart/report.html" in output
    results = json.loads((chain / "results.json").read_text())
    assert list(results["links"]) == ["tokenizer", "pretrain", "probe", "finetune", "scratch"]
    for link, starts in (("finetune", True), ("scratch", False)):
        done = json.loads((chain / link / "results.json").read_text())
        assert done["train_images"] == 200 and (done["init_from"] is not None) == starts
        assert results["links"][link]["test/top1"] == done["metrics"]["test/top1"]
    assert "copied into each block" in output  # what became of the weights
    config = yaml.safe_load((chain / "pretrain" / "config.yaml").read_text())
    assert config["tokenizer"]["vocab_size"] == 32  # taken over from the link before
    assert config["model"]["width"] == 24
    page = (chain / "report.html").read_text()
    assert "kNN" in page and "from scratch" in page


@pytest.fixture
def links_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The links of a chain are real, but no processes of their own."""

    def link(arguments: Sequence[str]) -> int:
        train_here(arguments, Path.cwd())
        return 0

    monkeypatch.setattr("beit_pretrain.chain.run_link", link)


@pytest.mark.usefixtures("links_here")
def test_an_interrupted_chain_goes_on_at_the_unfinished_link(chain_run: tuple[Path, str]) -> None:
    folder, _ = chain_run
    chain = folder / "runs" / "quickstart"
    stamps = {
        name: (chain / name / "results.json").stat().st_mtime_ns
        for name in ("tokenizer", "pretrain", "finetune")
    }
    (chain / "finetune" / "results.json").unlink()
    train_here([*SMALL_CHAIN], folder)
    now = {name: (chain / name / "results.json").stat().st_mtime_ns for name in stamps}
    assert now["tokenizer"] == stamps["tokenizer"] and now["pretrain"] == stamps["pretrain"]
    assert now["finetune"] > stamps["finetune"]


@pytest.mark.usefixtures("links_here")
def test_a_chain_can_be_looked_at_before_anything_is_there(tmp_path: Path) -> None:
    output = train_here(["chain=quickstart", "dry_run=true"], tmp_path)
    assert "starts from runs/quickstart/tokenizer, which is not there yet" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.epoch=3", "stage.epoch: .*did you mean stage.epochs"),
        ("links.pretrian.stage.epochs=3", "links.pretrian: the chain quickstart has the links tokenizer"),
        ("stage=pretrain", "stage and chain are both given"),
    ],
)
def test_a_mistake_in_a_chain_shows_before_it_runs(override: str, message: str, tmp_path: Path) -> None:
    import re

    output = train_here(["chain=quickstart", override], tmp_path, code=2)
    assert re.search(message, output), output
    assert "Traceback" not in output and not (tmp_path / "runs").exists()


def test_knn_after_the_fact_is_that_beside_the_probe(chain_run: tuple[Path, str]) -> None:
    folder, _ = chain_run
    done = tools(["knn", "runs/quickstart/pretrain", "data=digits", "name=after", "logger=csv"], folder)
    assert done.returncode == 0, done.stderr
    after, link = (
        json.loads((folder / "runs" / name / "results.json").read_text())["knn"]
        for name in ("after", "quickstart/probe")
    )
    assert after == link


def test_a_sweep_runs_every_job_in_its_own_folder_and_outlives_a_bad_one(tmp_path: Path) -> None:
    output = train(
        ["-m", *SMALL_TOKENIZER, "stage.epochs=1", "name=sweep", "stage.optim.lr=1e-3,-1,2e-3"],
        tmp_path,
        code=1,
    )
    folder = tmp_path / "runs" / "sweep"
    assert (folder / "stage.optim.lr=0.001" / "results.json").exists()
    assert (folder / "stage.optim.lr=0.002" / "results.json").exists()
    assert "stage.optim.lr=-1" in output and "Traceback" not in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


@pytest.mark.slow
def test_each_job_of_a_sweep_may_have_several_processes(tmp_path: Path) -> None:
    sweep = ["-m", *SMALL_TOKENIZER, "stage.epochs=1", "name=sweep", "trainer.devices=2", "seed=1,2"]
    train(sweep, tmp_path)
    for seed in (1, 2):
        run = tmp_path / "runs" / "sweep" / f"seed={seed}"
        assert [row["ranks"] for row in events.read(run)] == ["2", "2"]
        assert (run / "results.json").exists()


def test_debug_takes_two_steps_in_a_folder_of_its_own(tmp_path: Path) -> None:
    train_here([*SMALL_TOKENIZER, "name=tok", "debug=true"], tmp_path)
    results = json.loads((tmp_path / "runs" / "tok-debug" / "results.json").read_text())
    assert results["steps"] == 2
    assert not (tmp_path / "runs" / "tok").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    output = train_here([*SMALL_TOKENIZER, "dry_run=true"], tmp_path)
    assert "17" in output and list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    # The limit on the size of a file stands in for the full disk: the second checkpoint does not fit.
    train_here([*SMALL_TOKENIZER, "name=tok", "stage.epochs=1"], tmp_path)
    run = tmp_path / "runs" / "tok"
    good = (run / "checkpoints" / "last.ckpt").resolve()
    size = good.stat().st_size

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    command = [sys.executable, "-m", "beit_pretrain", *SMALL_TOKENIZER, "name=tok"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=small_files,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "was not written" in errors[0] and "Traceback" not in done.stderr
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["best.ckpt", "last.ckpt", good.name]
    train_here([*SMALL_TOKENIZER, "name=tok"], tmp_path)
    assert json.loads((run / "results.json").read_text())["steps"] == 34


def test_a_second_writer_is_refused_and_ctrl_c_can_be_taken_up_again(tmp_path: Path) -> None:
    arguments = [
        *SMALL_TOKENIZER,
        "name=tok",
        "stage.epochs=4000",
    ]  # longer than the second one takes to start
    with hearing_ctrl_c():
        first = start(arguments, tmp_path)
    checkpoints = tmp_path / "runs" / "tok" / "checkpoints"
    try:
        while not checkpoints.exists() and first.poll() is None:
            time.sleep(0.05)
        output = train(arguments, tmp_path, code=2)
        assert f"is being written by process {first.pid}" in output
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate(timeout=60)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 130, output
    assert "the same command goes on" in output and "Traceback" not in output
    assert not (tmp_path / "runs" / "tok" / ".lock").exists()
