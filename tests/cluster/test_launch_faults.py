"""Processes, devices and nodes that do not agree are told before any process waits for another one."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from beit_pretrain import devices
from beit_pretrain.compose import compose

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "GROUP_WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "3",
    "GROUP_RANK": "0",
}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "6", "SLURM_NNODES": "3"}
CPU = ["stage=pretrain", "data=digits", "model=micro", "batch_size=48", "trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _started_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)


def _faults(monkeypatch: pytest.MonkeyPatch, started: Mapping[str, str], *overrides: str) -> list[str]:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    return list(devices.launch_faults(compose([*CPU, *overrides])))


@pytest.mark.parametrize(
    "started", [STEP, TORCHRUN, {}, {**ALLOCATION, "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}]
)
def test_without_a_word_the_processes_that_were_started_train(
    monkeypatch: pytest.MonkeyPatch, started: Mapping[str, str]
) -> None:
    assert _faults(monkeypatch, started) == []


def test_devices_and_nodes_follow_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _faults(monkeypatch, STEP, "trainer=slurm") == []
    cfg = compose([*CPU, "trainer=slurm"])
    assert (devices.devices(cfg), devices.nodes(cfg), devices.processes(cfg)) == (2, 3, 6)


@pytest.mark.parametrize(
    ("started", "override", "says"),
    [
        (
            STEP,
            "trainer.devices=4",
            "trainer.devices=4, but srun has started 2 processes on each node: leave",
        ),
        (
            STEP,
            "trainer.num_nodes=1",
            "trainer.num_nodes=1, but srun has started processes on 3 nodes: leave",
        ),
        (
            TORCHRUN,
            "trainer.devices=2",
            "trainer.devices=2, but torchrun has started 4 processes on each node",
        ),
        (
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
            "seed=0",
            "srun has started different numbers of tasks on the nodes (2(x2),1): set --ntasks-per-node",
        ),
        (ALLOCATION, "seed=0", "this Slurm allocation is for 6 tasks, but srun has not started this process"),
        ({}, "trainer=slurm", "trainer=slurm, but srun has not started this process: write `srun beit-train"),
        ({}, "trainer.num_nodes=2", "trainer.num_nodes=2, but this process was started by itself"),
    ],
)
def test_what_does_not_agree_is_one_line(
    monkeypatch: pytest.MonkeyPatch, started: Mapping[str, str], override: str, says: str
) -> None:
    faults = _faults(monkeypatch, started, override)
    assert len(faults) == 1 and faults[0].startswith(says), faults
    assert "\n" not in faults[0]


def test_one_process_on_purpose_is_allowed_in_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _faults(monkeypatch, ALLOCATION, "trainer.devices=2", "trainer.num_nodes=1") == []


def test_a_dry_run_needs_no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _faults(monkeypatch, {}, "trainer=slurm", "dry_run=true") == []


def test_fewer_gpus_than_processes_name_the_flag_that_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    cfg = compose(["stage=pretrain", "trainer.accelerator=gpu"])
    assert [f for f in devices.device_faults(cfg) if "--gpus-per-task" in f] == [
        "2 processes were started on this node, which shows them 1 GPUs: give the job --gpus-per-node=2 and no "
        "--gpus-per-task, or start as many processes as there are GPUs"
    ]


def test_a_batch_that_a_job_cannot_share_is_told_before_the_job_waits() -> None:
    cfg = compose([*CPU, "batch_size=48"])
    assert devices.job_faults(cfg, {"nodes": 3, "tasks_per_node": 4}) == []
    assert devices.job_faults(cfg, {"nodes": None, "tasks_per_node": None}) == []
    (fault,) = devices.job_faults(cfg, {"nodes": 5, "tasks_per_node": 2})
    assert fault.startswith("batch_size=48 (over all devices) is no multiple of 10 devices")
    assert cfg.trainer.num_nodes == "auto", "the configuration itself stays"
