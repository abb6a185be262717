"""A chain as Slurm jobs: what is handed in, after what, and what is kept when the same command comes again."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from running import hearing_ctrl_c

from beit_pretrain import chain as chains
from beit_pretrain import cli
from beit_pretrain.chain import run_chain
from beit_pretrain.compose import launcher_node
from beit_pretrain.errors import BeitError, ConfigError

# A user's own chain and own cluster, beside the project's.
CHAIN = """\
name: three
submit: null
links:
  first: [stage=tokenizer, experiment=digits_tokenizer]
  second: [stage=pretrain, experiment=digits_pretrain, tokenizer.checkpoint=@first]
  third: [stage=probe, experiment=digits_probe, init_from=@second]
  alone: [stage=tokenizer, experiment=digits_tokenizer, seed=1]
"""
CLUSTER = "defaults: [slurm]\npartition: own\nnodes: 4\n"
LINKS = ["first", "second", "third", "alone"]


class Chain:
    """The chain `three`, with sbatch and squeue that only write down."""

    def __init__(self, tmp_path: Path, patch: pytest.MonkeyPatch, search: str) -> None:
        patch.chdir(tmp_path)
        self.slurm = FakeSlurm(tmp_path / "slurm", patch)
        self.search = search
        self.folder = Path("runs/three")

    def run(self, *overrides: str) -> dict[str, str]:
        """Name to id of the jobs that this command has handed in."""
        before = set(self.slurm.submitted)
        run_chain([self.search, "chain=three", "chain.submit=slurm", *overrides])
        new = [job for job in self.slurm.submitted if job not in before]
        names = [self.slurm.name(job).removeprefix("three/") for job in new]
        assert len(set(names)) == len(names)
        return dict(zip(names, new, strict=True))

    def finish(self, link: str) -> None:
        (self.folder / link).mkdir(parents=True, exist_ok=True)
        results = {"name": link, "status": "finished", "seconds": 2.0, "metrics": {"val/loss": 1.0}}
        (self.folder / link / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The option that finds the user's files. Each list of overrides is composed once: that takes most of the time."""
    conf = tmp_path_factory.mktemp("conf")
    for group, name, text in (("chain", "three", CHAIN), ("hydra/launcher", "mine", CLUSTER)):
        (conf / group).mkdir(parents=True)
        (conf / group / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for function in (chains.compose, chains.launcher_node):
            once = cache(lambda *overrides, function=function: function(overrides))
            patch.setattr(chains, function.__name__, lambda overrides, once=once: once(*overrides))
        yield f"hydra.searchpath=[file://{conf}]"


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str) -> Chain:
    return Chain(tmp_path, monkeypatch, search)


def command(script: str) -> list[str]:
    return shlex.split(script.splitlines()[-1])


def test_each_link_is_a_job_after_those_it_starts_from(chain: Chain) -> None:
    jobs = chain.run()
    slurm = chain.slurm
    assert list(jobs) == [*LINKS, "report"]
    assert {name: slurm.after(job) for name, job in jobs.items()} == {
        "first": [],
        "second": [jobs["first"]],
        "third": [jobs["second"]],
        "alone": [],
        "report": [jobs[name] for name in LINKS],
    }
    second = slurm.script(jobs["second"])
    assert "#SBATCH --output=runs/three/second.log" in second
    assert command(second)[:1] == ["srun"] and {
        "tokenizer.checkpoint=runs/three/first",
        "name=three/second",
        "trainer=slurm",
        chain.search,
    } <= set(command(second))
    report = slurm.script(jobs["report"])
    assert command(report)[-2:] == ["report", "runs/three"] and "srun" not in command(report)
    known = json.loads((chain.folder / "chain.json").read_text())
    assert known == {"name": "three", "links": LINKS}


def test_the_same_command_keeps_what_is_waiting_or_running(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = chain.run()
    chain.slurm.now_active(*jobs.values())
    assert chain.run() == {}
    chain.finish("first")
    chain.slurm.now_active(*[job for name, job in jobs.items() if name != "first"])
    capsys.readouterr()
    assert chain.run() == {}
    said = capsys.readouterr().out
    assert "[1/4] first: finished" in said and f"[2/4] second: job {jobs['second']}, as before" in said


def test_what_failed_is_handed_in_again_with_all_that_waited_for_it(chain: Chain) -> None:
    before = chain.run()
    chain.finish("first")
    # `second` has failed; Slurm has not yet taken away the jobs that can never start now.
    chain.slurm.now_active(before["third"], before["alone"], before["report"])
    jobs = chain.run()
    assert list(jobs) == ["second", "third", "report"]
    assert chain.slurm.after(jobs["second"]) == []  # what it starts from is finished
    assert chain.slurm.after(jobs["third"]) == [jobs["second"]]
    assert chain.slurm.after(jobs["report"]) == [jobs["second"], jobs["third"], before["alone"]]
    chain.slurm.now_active(*jobs.values(), before["alone"])
    assert chain.run() == {}


def test_a_command_that_broke_off_is_gone_on_with(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    count = iter(range(10))

    def limited(command: list[str], **options: object) -> object:
        if command[0] == "sbatch" and next(count) == 2:
            chain.slurm.refuse("sbatch: error: QOSMaxSubmitJobPerUserLimit")
        return real(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", limited)
    with pytest.raises(BeitError, match="QOSMaxSubmitJobPerUserLimit"):
        chain.run()
    assert chain.slurm.submitted == ["101", "102"]
    chain.slurm.refuse(None)
    chain.slurm.now_active("101", "102")
    jobs = chain.run()
    assert list(jobs) == ["third", "alone", "report"] and chain.slurm.after(jobs["third"]) == ["102"]


def test_a_finished_chain_hands_nothing_in_and_shows_its_results(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.run()
    for link in LINKS:
        chain.finish(link)
    assert chain.run() == {}
    results = json.loads((chain.folder / "results.json").read_text())
    assert results["status"] == "finished" and results["seconds"] == 8.0 and list(results["links"]) == LINKS
    assert "report: runs/three/report.html" in capsys.readouterr().out


def test_other_options_are_not_passed_over(chain: Chain) -> None:
    before = chain.run()
    chain.finish("first")
    # A finished link is asked again, which goes on or says what is the matter.
    assert list(chain.run("links.first.stage.epochs=99")) == [*LINKS, "report"]
    jobs = json.loads((chain.folder / "jobs.json").read_text())["links"]
    chain.slurm.now_active(jobs["second"]["job"])
    with pytest.raises(ConfigError) as caught:
        chain.run("links.first.stage.epochs=99", "links.second.batch_size=8")
    job = jobs["second"]["job"]
    assert job != before["second"] and str(caught.value) == (
        f"link second is job {job}, with other options: end it first (scancel {job}), or give the same ones again"
    )


def test_a_link_starts_from_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain").mkdir()
    text = "name: odd\nlinks:\n  one: [stage=knn, init_from=@two]\n  two: [stage=pretrain]\n"
    (tmp_path / "chain" / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        run_chain([f"hydra.searchpath=[file://{tmp_path}]", "chain=odd"])
    assert str(caught.value) == (
        "init_from=@two: there is no link two before one in this chain (links: one, two)"
    )


# --- what a job asks for ------------------------------------------------------------------------------------


def test_what_a_job_asks_for_is_of_all_or_of_one_link(chain: Chain) -> None:
    jobs = chain.run(
        "hydra/launcher=mine",
        "hydra.launcher.gpus_per_node=2",
        "chain.resources.second.nodes=8",
        "chain.resources.second.additional_parameters.requeue=false",
        "links.third.trainer=default",
    )
    script = {name: chain.slurm.script(job) for name, job in jobs.items()}
    nodes = {name: re.findall(r"--(?:nodes|gpus-per-node|partition)=(\w+)", s) for name, s in script.items()}
    mine = ["own", "4", "2"]
    assert nodes == {
        "first": mine,
        "second": ["own", "8", "2"],
        "third": mine,
        "alone": mine,
        "report": ["own", "1"],
    }
    assert "--requeue" in script["first"] and "--requeue" not in script["second"]
    assert "trainer=default" in command(script["third"]) and "trainer=slurm" not in command(script["third"])
    assert not [word for text in script.values() for word in command(text) if "hydra.launcher" in word]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "chain.resources.secnd.nodes=2",
            "chain.resources.secnd.nodes=2: write chain.resources.LINK.key=value with one of the links first, "
            "second, third, alone, report",
        ),
        ("chain.resources.second=2", "chain.resources.second=2: write chain.resources.LINK.key=value with"),
        (
            "chain.resources.second.nods=2",
            "hydra.launcher.nods: there is no such option; did you mean hydra.launcher.nodes?",
        ),
        ("hydra.launcher.nodes=0", "hydra.launcher.nodes=0 must be a whole number above 0, or null"),
        (
            "chain.resources.second.nodes=5",
            "link second: batch_size=32 (over all devices) is no multiple of 5 devices",
        ),
        ("hydra/launcher=basic", "hydra/launcher=basic is not for Slurm: set hydra/launcher=slurm, or leave"),
        ("chain.submit=slrm", "chain.submit=slrm: set chain.submit=slurm, or null to run the links here"),
        ("links.third.stage.epoch=2", "stage.epoch: there is no such option; did you mean stage.epochs?"),
    ],
)
def test_a_mistake_shows_before_anything_is_handed_in(chain: Chain, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chain.run(override)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert chain.slurm.submitted == []


def test_what_jobs_ask_for_means_nothing_without_jobs(chain: Chain) -> None:
    with pytest.raises(ConfigError, match=r"^hydra.launcher.nodes=2 is for jobs: set chain.submit=slurm too"):
        run_chain([chain.search, "chain=three", "hydra.launcher.nodes=2"])
    with pytest.raises(
        ConfigError, match=r"^hydra/launcher=slurm is for jobs: write a script with beit-tools"
    ):
        cli.train(["stage=pretrain", "hydra/launcher=slurm"])


def test_a_dry_run_prints_the_scripts(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert chain.run("dry_run=true") == {} and not chain.folder.exists()
    said = capsys.readouterr().out
    assert said.count("#!/bin/bash") == 5 and "dry_run=" not in said
    assert "# third: after second\n" in said and "# alone: after nothing\n" in said
    assert "# report: after first, second, third, alone\n" in said


def test_a_sweep_over_slurm_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", {"submitit": None}.__getitem__)
    with pytest.raises(SystemExit) as ended:
        cli.main(["-m", "hydra/launcher=slurm", "stage=pretrain", "seed=1,2"])
    assert ended.value.code == 2 and capsys.readouterr().err == (
        "error: -m hydra/launcher=slurm needs hydra-submitit-launcher: pip install 'beit-pretrain[slurm]'\n"
    )


@pytest.mark.parametrize("overrides", [["chain=quickstart"], ["stage=pretrain", "chain.submit=slurm"]])
def test_a_chain_is_not_swept_over(overrides: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "beit_pretrain", "-m", *overrides, "seed=1,2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == (
        f"error: {overrides[-1]}: -m runs one stage with several settings, and a chain is not one\n"
    )


def test_a_launcher_of_ones_own_is_found_by_its_folder(chain: Chain) -> None:
    node = launcher_node([chain.search, "hydra/launcher=mine", "hydra.launcher.nodes=5"])
    assert (node.partition, node.nodes, node.cpus_per_task) == ("own", 5, launcher_node([]).cpus_per_task)


def test_ctrl_c_to_the_chain_alone_is_handed_on_to_its_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.write_text("#!/bin/sh\nexec sleep 60\n")
    link.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(link))
    monkeypatch.setattr(chains, "TOLD", 0.2)
    began = time.monotonic()
    with hearing_ctrl_c(), pytest.raises(KeyboardInterrupt):
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        chains.run_link([])
    assert time.monotonic() - began < 20
