"""Tasks of srun get the variables of torchrun."""

from __future__ import annotations

from typing import Any

import pytest

from fastpref.utils import slurm
from fastpref.utils.errors import UserError

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_NODELIST": "gpu[007-008,12]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


def adopted(**changes: Any) -> dict[str, str]:
    """Variables that the task above gets; of its own, those that are None are left out."""
    before = {name: value for name, value in {**TASK, **changes}.items() if value is not None}
    after = dict(before)
    slurm.adopt(after)
    assert before.items() <= after.items()
    return {name: value for name, value in after.items() if name not in before}


def test_a_task_gets_its_rank_and_the_first_node() -> None:
    assert adopted() == {
        "WORLD_SIZE": "20",
        "RANK": "17",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "24718",
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node-a,node-b", "node-a"),
        ("n[3-5],m1", "n3"),
        ("n[03,7]-ib,m", "n03-ib"),
        ("rack1-gpu[10-12].cluster", "rack1-gpu10.cluster"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert adopted(SLURM_STEP_NODELIST=nodes)["MASTER_ADDR"] == first


def test_variables_of_the_job_stand_in_for_those_of_the_step() -> None:
    of_job = {name: None for name in TASK if name.startswith("SLURM_STEP")}
    ranks = adopted(**of_job, SLURM_JOB_NODELIST="n[4-7]", SLURM_TASKS_PER_NODE="8(x4)")
    assert [ranks[name] for name in ("WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE")] == [
        "32",
        "n4",
        "8",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"WORLD_SIZE": "2"},  # of a torchrun that srun has started
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": None},  # a shell of salloc
        {name: None for name in TASK if name.startswith("SLURM_STEP")} | {"ENVIRONMENT": "BATCH"},
    ],
)
def test_other_processes_stay_as_they_are(changes: dict[str, Any]) -> None:
    assert adopted(**changes) == {}


def test_an_address_that_is_set_stays() -> None:
    ranks = adopted(MASTER_ADDR="10.1.2.3", MASTER_PORT="1234")
    assert "MASTER_ADDR" not in ranks and "MASTER_PORT" not in ranks


def test_what_slurm_does_not_say_is_one_line() -> None:
    message = r"SLURM_PROCID: must be a whole number in a task of srun, got 'x'; start the ranks"
    with pytest.raises(UserError, match=message):
        adopted(SLURM_PROCID="x")
    message = r"SLURM_STEP_NODELIST: no name of a first node in '\[1-2\]'; set MASTER_ADDR, or"
    with pytest.raises(UserError, match=message):
        adopted(SLURM_STEP_NODELIST="[1-2]")


def test_a_batch_script_is_told_of_the_other_tasks() -> None:
    script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}
    assert slurm.lone_task(script) == (
        "the job has 8 tasks, and this is one process without srun; start it with srun"
    )
    assert slurm.lone_task({**script, "SLURM_NTASKS": "1"}) is None
    assert slurm.lone_task({**script, "WORLD_SIZE": "8"}) is None
    assert slurm.lone_task({}) is None
