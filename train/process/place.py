"""Where this process stands, as its launcher's environment says. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError


def world_size_of(env: Mapping[str, str]) -> int:
    """Tell the number of ranks from the launcher's environment; 1 where there is no launcher."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if env.get(name, "").isdigit():
            return max(1, int(env[name]))
    return 1


_FIRST_SLURM_PORT = 20_000
_SLURM_PORTS = 20_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands, as its launcher says.

    Args:
        rank: 0 to world_size - 1.
        local_rank: the same within this node.
        world_size: processes of the run.
        local_world_size: processes of this node.
        master_addr: host of rank 0.
        master_port: TCP port of the meeting point; 0 picks a free one (a single process).
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int


def find_place(env: Mapping[str, str]) -> Place:
    """Read rank and world size from torchrun's or deepspeed's variables, from srun's, or take a
    world of one.

    Args:
        env: the environment.

    Raises:
        ConfigError: the variables are there in part, or are not numbers.
    """
    if "RANK" in env:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ConfigError(
                f"environment: RANK is set but {', '.join(missing)} is not. "
                "Start with torchrun, deepspeed or srun, or unset RANK for a single process."
            )
        rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
        local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
        local_world = _number(env, local) if local in env else world
        local_rank = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else rank % local_world
        return _checked(
            Place(
                rank,
                local_rank,
                world,
                local_world,
                env["MASTER_ADDR"],
                _number(env, "MASTER_PORT"),
            )
        )
    if "SLURM_STEP_NUM_TASKS" in env and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        return _checked(_slurm_place(env))
    return Place(0, 0, 1, 1, "127.0.0.1", 0)


def _slurm_place(env: Mapping[str, str]) -> Place:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    port = _FIRST_SLURM_PORT + _number(env, "SLURM_JOB_ID") % _SLURM_PORTS
    # "4(x2),3" means two nodes with four tasks and one with three; a node's own count is what
    # matters here.
    counts = [
        int(number)
        for number, times in re.findall(
            r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1")
        )
        for _ in range(int(times or 1))
    ]
    node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    return Place(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=_number(env, "SLURM_STEP_NUM_TASKS"),
        local_world_size=counts[min(node, len(counts) - 1)],
        master_addr=env.get("MASTER_ADDR") or first_slurm_host(nodes),
        master_port=_number(env, "MASTER_PORT") if "MASTER_PORT" in env else port,
    )


def first_slurm_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as `gpu[03-07,11],login1`.

    Raises:
        ConfigError: the list is empty.
    """
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if not match:
        raise ConfigError(
            f"environment: SLURM_STEP_NODELIST {nodes!r} names no host. Set MASTER_ADDR to the "
            "host of rank 0."
        )
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix or ''}"


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise ConfigError(
            f"environment: {name} is {env.get(name)!r}, a whole number was expected. "
            "Start with torchrun, deepspeed or srun, which set it."
        ) from None


def _checked(place: Place) -> Place:
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(
            f"environment: RANK {place.rank} is not below WORLD_SIZE {place.world_size}."
        )
    return place


def rank_of_environment() -> int:
    """Tell this process's rank before anything is set up."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0
