"""The ways into Slurm: a script, a sweep, a chain of jobs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from running import SMALL_PRETRAIN, SMALL_TOKENIZER, assert_same_end, start, train

from beit_pretrain.cluster import events
from beit_pretrain.tools.sbatch import write_script

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ONE_CPU = "hydra.launcher.cpus_per_task=1"
# A callback that fails while a file is there.
FRAGILE = """\
from pathlib import Path
from lightning.pytorch import Callback
class Fragile(Callback):
    def on_train_start(self, trainer, pl_module):
        if Path("fragile").exists():
            raise RuntimeError("the file fragile is there")
"""


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_two_nodes_have_names_of_their_own(slurm, tmp_path: Path) -> None:
    job = slurm.submit("srun hostname", "--nodes=2", cwd=tmp_path)
    slurm.finished(job)
    assert sorted((tmp_path / f"{job}.log").read_text().split()) == ["n1", "n2"]


def test_a_script_of_beit_tools_trains_on_two_nodes(
    slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resources = ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2", ONE_CPU]
    write_script([*SMALL_TOKENIZER, "name=two/nodes", *resources], Path("job.sh"))
    # From elsewhere: the script knows its folder.
    job = slurm.run("sbatch", "--parsable", str(tmp_path / "job.sh"), cwd=Path("/")).strip()
    slurm.finished(job, seconds=240)
    shown, run = slurm.job(job), tmp_path / "runs" / "two" / "nodes"
    assert (shown["JobName"], shown["NodeList"], shown["Requeue"]) == ("two/nodes", "n[1-2]", "1")
    assert [(row["event"], row["ranks"], row["job"]) for row in events.read(run)] == [
        ("start", "4", job),
        ("finish", "4", job),
    ]
    assert results(run)["status"] == "finished"
    # One rank speaks.
    assert (tmp_path / "runs" / "two" / "nodes.log").read_text().count("held-out perplexity") == 1


def test_a_sweep_is_an_array_of_jobs_and_each_can_be_interrupted(slurm, tmp_path: Path) -> None:
    arguments = [
        "-m",
        *SMALL_TOKENIZER,
        "hydra/launcher=slurm",
        ONE_CPU,
        "hydra.launcher.array_parallelism=2",
    ]
    often = ["+callbacks.slow._target_=running.Slow", "checkpoint.every_steps=4"]
    process = start([*arguments, *often, "tokenizer.hidden=8,16", "seed=1,2"], tmp_path)
    names = [f"tokenizer.hidden={h},seed={s}" for h in (16, 8) for s in (1, 2)]
    sweep = tmp_path / "runs" / "tokenizer-digits-dvae"
    first = sweep / "tokenizer.hidden=8,seed=1"
    while not list(first.glob("checkpoints/step-*.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    jobs = slurm.jobs("beit-train")[-4:]
    # What Slurm sends before the time is over. While members of its array wait, scancel takes a delivered signal for
    # undelivered and repeats it, first after 5 seconds, in the job's next life too.
    slurm.run("bash", "-c", f"timeout 4 scancel --signal=USR2 {jobs[0]} || true")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    slurm.finished(*jobs)
    assert sorted(path.name for path in sweep.iterdir()) == names
    assert all(results(sweep / name)["status"] == "finished" for name in names)
    assert {row["job"] for row in events.read(first)} == {jobs[0]}
    assert [row["event"] for row in events.read(first)] == ["start", "signal", "requeue", "start", "finish"]
    assert [slurm.job(job)["Restarts"] for job in jobs] == ["1", "0", "0", "0"]
    assert {job.partition("_")[2] for job in jobs} == {"0", "1", "2", "3"}
    assert {slurm.job(job)["ArrayTaskThrottle"] for job in jobs} == {"2"}
    times = [(slurm.job(job)["StartTime"], slurm.job(job)["EndTime"]) for job in jobs[1:]]
    assert all(sum(start <= begin < end for start, end in times) <= 2 for begin, _ in times)
    train([*SMALL_TOKENIZER, *often, "tokenizer.hidden=8", "seed=1", "name=whole"], tmp_path)
    assert_same_end(first, tmp_path / "runs" / "whole")


def test_a_chain_of_jobs_goes_on_after_a_link_has_failed(
    slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "chain").mkdir(parents=True)
    links = {
        "tokenizer": SMALL_TOKENIZER,
        "pretrain": [*SMALL_PRETRAIN, "tokenizer.checkpoint=@tokenizer"],
        "knn": ["stage=knn", "trainer.accelerator=cpu", "init_from=@pretrain"],
    }
    text = yaml.safe_dump({"name": "three", "submit": None, "links": links}, sort_keys=False)
    (tmp_path / "conf" / "chain" / "three.yaml").write_text(text)
    (tmp_path / "fragile.py").write_text(FRAGILE)
    (tmp_path / "fragile").touch()
    monkeypatch.setattr("running.HERE", tmp_path)  # what is importable in the jobs
    command = [
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
        "chain=three",
        "chain.submit=slurm",
        "+links.pretrain.callbacks.fragile._target_=fragile.Fragile",
        ONE_CPU,
        "chain.resources.pretrain.nodes=2",
    ]
    train(command, tmp_path)
    chain = tmp_path / "runs" / "three"
    first = json.loads((chain / "jobs.json").read_text())
    jobs = {name: entry["job"] for name, entry in first["links"].items()}
    ends = {name: slurm.wait(job, seconds=240)["JobState"] for name, job in jobs.items()}
    assert ends == {"tokenizer": "COMPLETED", "pretrain": "FAILED", "knn": "CANCELLED"}
    assert "the file fragile is there" in (chain / "pretrain.log").read_text()
    assert slurm.wait(first["report"])["JobState"] == "CANCELLED"

    (tmp_path / "fragile").unlink()
    said = train(command, tmp_path)
    assert "[1/3] tokenizer: finished\n" in said
    second = json.loads((chain / "jobs.json").read_text())
    again = {name: entry["job"] for name, entry in second["links"].items()}
    assert [name for name in links if again[name] != jobs[name]] == ["pretrain", "knn"]
    assert train(command, tmp_path).count("as before") == 2  # asked while they wait
    slurm.finished(*again.values(), second["report"], seconds=240)
    assert {row["ranks"] for row in events.read(chain / "pretrain")} == {"2"}
    assert results(chain)["status"] == "finished" and list(results(chain)["links"]) == list(links)
    assert "kNN" in (chain / "report.html").read_text()
    assert "report: runs/three/report.html" in train(command, tmp_path)  # nothing is left to do

    here = [command[0], "chain=three", "name=whole", "links.pretrain.trainer.devices=2"]
    train(here, tmp_path)
    assert results(tmp_path / "runs" / "whole")["links"] == results(chain)["links"]
