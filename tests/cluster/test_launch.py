"""What srun and torchrun say of the processes they start, as they were seen to say it."""

from __future__ import annotations

import pytest

from beit_pretrain.cluster.launch import Launch, idle_tasks, job_id, launched, restarts

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
TASK = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "4",
    "RANK": "6",
    "LOCAL_RANK": "2",
    "GROUP_RANK": "1",
    "WORLD_SIZE": "8",
}


def test_a_task_of_srun_knows_its_place() -> None:
    assert launched(TASK) == Launch("slurm", nodes=2, per_node=3, rank=4, local_rank=1, node_rank=1)
    assert launched(TASK).processes == 6


@pytest.mark.parametrize(
    ("tasks", "nodes", "per_node"),
    [("1", 1, 1), ("2", 1, 2), ("4(x3)", 3, 4), ("2(x3),1", 4, 0), ("1,2", 2, 0), ("2,2(x2)", 3, 2)],
)
def test_nodes_are_read_from_the_step(tasks: str, nodes: int, per_node: int) -> None:
    found = launched({**TASK, "SLURM_STEP_TASKS_PER_NODE": tasks})
    assert (found.nodes, found.per_node) == (nodes, per_node)


def test_torchrun_within_a_slurm_job_goes_before_slurm() -> None:
    expected = Launch("torchrun", nodes=2, per_node=4, rank=6, local_rank=2, node_rank=1)
    assert launched(TORCHRUN) == launched({**TASK, **TORCHRUN}) == expected


def test_without_either_a_process_is_alone_and_lightnings_children_have_a_number() -> None:
    assert launched({}) == Launch("alone")
    assert launched({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}).rank == 1


def test_tasks_that_srun_has_not_started_are_noticed() -> None:
    assert idle_tasks(BATCH) == 6
    assert idle_tasks({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}) == 2
    assert idle_tasks(TASK) == idle_tasks({}) == idle_tasks({"SLURM_NTASKS": "4"}) == 0


def test_a_member_of_an_array_is_named_as_scontrol_wants_it() -> None:
    assert job_id(BATCH) == "7"
    assert job_id({**BATCH, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}) == "5_2"
    assert job_id({}) is None
    assert (restarts({}), restarts({"SLURM_RESTART_COUNT": "3"})) == (0, 3)
