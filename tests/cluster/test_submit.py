"""The text of sbatch scripts, and what sbatch and squeue are asked."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm

from beit_pretrain.cluster.submit import active, job_script, sbatch
from beit_pretrain.errors import BeitError, ConfigError


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def test_a_script_asks_for_what_the_node_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    node = {
        "_target_": "elsewhere.SlurmLauncher",
        "name": "not this",
        "partition": "gpu",
        "qos": None,
        "nodes": 4,
        "tasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 6,
        "mem_gb": 400,
        "timeout_min": 90,
        "signal_delay_s": 300,
        "additional_parameters": {"requeue": True, "mail_type": "END", "exclusive": False, "nice": None},
        "setup": ["module load cuda", "export A=1"],
    }
    assert job_script(node, "train --all", name="runs/one", log="logs/one.log") == (
        f"""\
#!/bin/bash
#SBATCH --job-name=runs/one
#SBATCH --output=logs/one.log
#SBATCH --open-mode=append
#SBATCH --chdir={tmp_path}
#SBATCH --partition=gpu
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --mem=400G
#SBATCH --time=90
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --mail-type=END

module load cuda
export A=1
srun --kill-on-bad-exit=1 --cpus-per-task=6 train --all
"""
    )


def test_what_is_null_becomes_no_option() -> None:
    lines = job_script({"nodes": None, "setup": None}, "train", name="a", log="b").splitlines()
    options = [line.split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert options == [f"#SBATCH --{o}" for o in ("job-name", "output", "open-mode", "chdir")]
    assert lines[-1] == "srun --kill-on-bad-exit=1 train"


def test_other_options_of_sbatch_win_and_an_array_is_one() -> None:
    node = {"nodes": 2, "additional_parameters": {"nodes": "2-4", "open-mode": "truncate"}}
    lines = job_script(node, "train", name="a", log="b", array="0-7%2").splitlines()
    assert {"#SBATCH --nodes=2-4", "#SBATCH --open-mode=truncate", "#SBATCH --array=0-7%2"} <= set(lines)
    assert "#SBATCH --nodes=2" not in lines


@pytest.mark.parametrize("tasks", [True, False])
def test_a_command_arrives_as_it_was_given(tasks: bool, slurm: FakeSlurm, tmp_path: Path) -> None:
    words = ["data.root=/with blank", "it's", "$HOME", "a=[1,2]", "tail\\"]
    command = shlex.join(["printf", "%s\\n", *words])
    srun = slurm.folder / "srun"  # leaves its own options out and says that it was there
    srun.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\ntouch started\nexec "$@"\n')
    srun.chmod(0o755)
    node = {"cpus_per_task": 2, "setup": ["export A=1"]}
    script = job_script(node, command, name="a", log="b", tasks=tasks)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == words and (tmp_path / "started").exists() == tasks


def test_a_log_with_a_blank_stays_one_option() -> None:
    line = next(
        o for o in job_script({}, "train", name="a", log="my runs/a.log").split("\n") if "output" in o
    )
    assert shlex.split(line)[1:] == ["--output=my runs/a.log"]


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"nodes": 0}, "hydra.launcher.nodes=0 must be a whole number above 0, or null"),
        ({"mem_gb": "4G"}, "hydra.launcher.mem_gb=4G must be a whole number above 0, or null"),
        (
            {"gpus_per_node": True},
            "hydra.launcher.gpus_per_node=True must be a whole number above 0, or null",
        ),
        (
            {"timeout_min": 3, "signal_delay_s": 120},
            "hydra.launcher.signal_delay_s=120 leaves nothing of timeout_min=3: "
            "set hydra.launcher.timeout_min=4 or more",
        ),
    ],
)
def test_a_job_that_cannot_be_is_refused(node: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_script(node, "train", name="a", log="b")
    assert str(caught.value) == says


def test_the_least_time_that_is_named_is_enough() -> None:
    assert "--time=4\n" in job_script({"timeout_min": 4, "signal_delay_s": 120}, "train", name="a", log="b")


# --- handing in ---------------------------------------------------------------------------------------------


def test_a_job_is_handed_in_and_has_an_id(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sbatch("one") == "101" and slurm.script("101") == "one"
    assert slurm.options("101") == ["--parsable"]
    monkeypatch.setenv("FAKE_SLURM_CLUSTER", ";far")  # as on sites with several clusters
    assert sbatch("two", after=["7", "101"]) == "102"
    assert slurm.options("102") == ["--parsable", "--dependency=afterok:7:101", "--kill-on-invalid-dep=yes"]


def test_what_a_job_around_has_set_does_not_reach_the_new_one(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CONF", "/etc/here.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")  # a user's own default
    seen = slurm.environment(sbatch("one"))
    assert "SLURM_MEM_PER_CPU" not in seen
    assert (seen["SLURM_CONF"], seen["SBATCH_ACCOUNT"]) == ("/etc/here.conf", "mine")


def test_what_slurm_says_is_one_line(slurm: FakeSlurm) -> None:
    slurm.refuse("sbatch: error: invalid partition\n specified: gpux\n")
    with pytest.raises(BeitError) as caught:
        sbatch("one")
    assert str(caught.value) == (
        "sbatch failed: sbatch: error: invalid partition specified: gpux; what a job asks for is hydra.launcher.*"
    )


def test_without_slurm_it_says_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        BeitError, match=r"^sbatch: there is no such command here; jobs are handed in on a login"
    ):
        sbatch("one")


def test_active_are_those_that_wait_or_run(slurm: FakeSlurm) -> None:
    assert active([]) == set() and not (slurm.folder / "asked").exists()
    slurm.now_active("102", "7", "103")
    assert active(["101", "102", "103"]) == {"102", "103"}
    asked = (slurm.folder / "asked").read_text()
    assert "--me" in asked and "PENDING" in asked and "COMPLETING" not in asked
