"""Where a process stands in a run, from the variables each launcher sets."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from train.process.place import (
    RankPlace,
    find_place,
    first_slurm_host,
    name_start,
    rank_of,
    ranks_of_node,
    world_size_of,
    write_place,
)
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


MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
ROOMS = Path(__file__).resolve().parents[2]
LAUNCHER_NAME = re.compile(
    r"(LOCAL_)?(RANK|WORLD_SIZE|SIZE)|(SLURM|OMPI)_[A-Z_]+|MASTER_[A-Z]+"
)


def test_one_file_reads_what_launchers_say() -> None:
    readers = set()
    for room in ("pipeline", "model", "train", "deploy"):
        for path in (ROOMS / room).rglob("*.py"):
            constants = [
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            if any(LAUNCHER_NAME.fullmatch(text) for text in constants):
                readers.add(str(path.relative_to(ROOMS)))
    assert readers == {"train/process/place.py"}


def test_mpirun_is_read_and_must_pass_on_the_meeting_point() -> None:
    assert find_place(MPIRUN) == RankPlace(5, 1, 8, 4, "node0", 29500)
    without = {name: value for name, value in MPIRUN.items() if name != "MASTER_PORT"}
    with pytest.raises(ConfigError, match="not passed on MASTER_PORT"):
        find_place(without)
    alone = {**without, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}
    assert find_place(alone).world_size == 1


@pytest.mark.parametrize("env", [TORCHRUN, SRUN, MPIRUN])
def test_the_early_answers_are_the_strict_ones(env: dict[str, str]) -> None:
    place = find_place(env)
    assert (rank_of(env), world_size_of(env)) == (place.rank, place.world_size)
    if env is not SRUN:  # srun binds tasks to cores of their own
        assert ranks_of_node(env) == place.local_world_size


@pytest.mark.parametrize("env", [TORCHRUN, SRUN, MPIRUN])
def test_a_start_has_one_name_on_a_node_and_another_the_next_time(
    env: dict[str, str],
) -> None:
    env = {**env, "SLURM_STEP_ID": "0"} if env is SRUN else env
    assert name_start(env, parent_pid=7) == name_start(env, parent_pid=7)
    assert name_start(env, parent_pid=7) != name_start(env, parent_pid=8)
    assert name_start({}, parent_pid=7) != name_start({}, parent_pid=7)


def test_what_the_launcher_has_set_stays() -> None:
    env = {"MASTER_PORT": "1"}
    write_place(env, find_place({}), master_port=2)
    assert env["MASTER_PORT"] == "1"
    assert find_place(env) == RankPlace(0, 0, 1, 1, "127.0.0.1", 1)


def test_nothing_set_is_a_world_of_one() -> None:
    assert find_place({}) == RankPlace(0, 0, 1, 1, "127.0.0.1", 0)


def test_torchrun_is_read() -> None:
    assert find_place(TORCHRUN) == RankPlace(5, 1, 8, 4, "node0", 29500)


def test_deepspeed_launcher_names_its_node_size_otherwise() -> None:
    env = {**TORCHRUN, "LOCAL_SIZE": "4"}
    del env["LOCAL_WORLD_SIZE"]
    assert find_place(env) == RankPlace(5, 1, 8, 4, "node0", 29500)


def test_srun_is_read() -> None:
    place = find_place(SRUN)
    assert place == RankPlace(5, 1, 8, 4, "gpu03", 20_000 + 123456 % 20_000)


def test_srun_of_uneven_nodes_gives_each_its_own_size() -> None:
    uneven = {
        **SRUN,
        "SLURM_STEP_TASKS_PER_NODE": "4,3(x2)",
        "SLURM_STEP_NUM_TASKS": "10",
    }
    assert [
        find_place({**uneven, "SLURM_NODEID": node}).local_world_size for node in "012"
    ] == [
        4,
        3,
        3,
    ]


def test_batch_script_outside_srun_is_a_world_of_one() -> None:
    assert (
        find_place(
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
        ).world_size
        == 1
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
