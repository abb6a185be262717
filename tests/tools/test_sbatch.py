"""`beit-tools sbatch`: a script that a user can read, change and hand in."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from beit_pretrain.compose import launcher_node
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.tools.app import app
from beit_pretrain.tools.sbatch import write_script

RUN = ["stage=pretrain", "data=folder", "data.root=/my images", "name=big/one"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_script_runs_the_command_with_what_it_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    app(["sbatch", *RUN, "hydra.launcher.nodes=4", "--out", "jobs/big.sh"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "hand it in: sbatch jobs/big.sh\n" in said and "log: runs/big/one.log   run: runs/big/one" in said
    lines = Path("jobs/big.sh").read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --nodes=4", "#SBATCH --job-name=big/one", "#SBATCH --output=runs/big/one.log"} <= set(
        lines
    )
    assert f"# Made by: beit-tools sbatch {shlex.join(RUN)} hydra.launcher.nodes=4" in lines
    command = shlex.split(lines[-1])
    assert command[0] == "srun"
    assert command[command.index(sys.executable) :] == [
        *(sys.executable, "-m", "beit_pretrain"),
        *RUN,
        "trainer=slurm",
    ]
    assert (
        Path("runs/big").is_dir() and not Path("runs/big/one").exists()
    )  # for the log; the run makes its own


def test_a_trainer_that_is_given_is_kept() -> None:
    write_script([*RUN, "trainer=default"], Path("job.sh"))
    assert shlex.split(Path("job.sh").read_text().splitlines()[-1])[-1] == "trainer=default"


def test_a_launcher_of_ones_own_is_taken() -> None:
    Path("conf/hydra/launcher").mkdir(parents=True)
    Path("conf/hydra/launcher/mine.yaml").write_text("defaults: [slurm]\naccount: me\n")
    search = f"hydra.searchpath=[file://{os.getcwd()}/conf]"
    write_script([*RUN, search, "hydra/launcher=mine"], Path("job.sh"))
    script = Path("job.sh").read_text()
    assert (
        "#SBATCH --account=me\n" in script and f"--cpus-per-task={launcher_node([]).cpus_per_task}" in script
    )
    command = shlex.split(script.splitlines()[-1])
    assert (
        search in command and "hydra/launcher=mine" not in command
    )  # the run may use other files of the folder


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stage=pretrain", "stage.optim.lrr=1"], "stage.optim.lrr: there is no such option; did you mean"),
        (
            ["stage=pretrain", "hydra.launcher.node=1"],
            "hydra.launcher.node: there is no such option; did you mean",
        ),
        (
            [*RUN, "hydra.launcher.nodes=3"],
            "batch_size=2048 (over all devices) is no multiple of 3 devices",
        ),
        (
            [*RUN, "hydra.launcher.nodes=0"],
            "hydra.launcher.nodes=0 must be a whole number above 0",
        ),
        (["chain=quickstart"], "a script runs one stage: set stage=pretrain or another; a chain as jobs is"),
        ([], "a script runs one stage: set stage=pretrain or another"),
    ],
)
def test_a_mistake_shows_now(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write_script(overrides, Path("job.sh"))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert not list(Path().iterdir())


def test_a_script_that_was_changed_is_not_written_over() -> None:
    Path("job.sh").write_text("mine")
    with pytest.raises(
        BeitError, match=r"^job.sh is there already: remove it, or give another file with --out$"
    ):
        write_script(["stage=pretrain"], Path("job.sh"))
    assert Path("job.sh").read_text() == "mine"
