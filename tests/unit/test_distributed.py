"""Where a process stands in a run, from the variables each launcher sets."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from train.process.place import Place, find_place, first_slurm_host
from train.process.world import World

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
}


def test_nothing_set_is_a_world_of_one() -> None:
    assert find_place({}) == Place(0, 0, 1, 1, "127.0.0.1", 0)


def test_torchrun_is_read() -> None:
    assert find_place(TORCHRUN) == Place(5, 1, 8, 4, "node0", 29500)


def test_deepspeed_launcher_names_its_node_size_otherwise() -> None:
    env = {**TORCHRUN, "LOCAL_SIZE": "4"}
    del env["LOCAL_WORLD_SIZE"]
    assert find_place(env) == Place(5, 1, 8, 4, "node0", 29500)


def test_srun_is_read() -> None:
    place = find_place(SRUN)
    assert place == Place(5, 1, 8, 4, "gpu03", 20_000 + 123456 % 20_000)


def test_srun_of_uneven_nodes_gives_each_its_own_size() -> None:
    uneven = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,3(x2)", "SLURM_STEP_NUM_TASKS": "10"}
    assert [find_place({**uneven, "SLURM_NODEID": node}).local_world_size for node in "012"] == [
        4,
        3,
        3,
    ]


def test_batch_script_outside_srun_is_a_world_of_one() -> None:
    assert (
        find_place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).world_size == 1
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-07,11],login1", "gpu03"),
        ("gpu1,gpu2", "gpu1"),
        ("node-a", "node-a"),
        ("rack[2,5]-n", "rack2-n"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_slurm_host(nodes) == first


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'"),
        ({**TORCHRUN, "RANK": "8"}, "not below WORLD_SIZE 8"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "MASTER_ADDR"),
    ],
)
def test_contradictions_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_place(env)


def test_a_world_of_one_agrees_with_itself() -> None:
    world = World()
    world.barrier()
    assert world.is_main
    assert world.broadcast("x") == "x"
    assert world.gather(3) == [3]
    assert world.mean([1, 2.5]) == [1.0, 2.5]
    assert world.highest(4) == 4
    world.end()
