"""Which process of a run this one is: the only reader of what launchers say in the environment.

    torchrun, deepspeed   RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE|LOCAL_SIZE MASTER_ADDR
                          MASTER_PORT
    srun                  SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID ...
    mpirun (Open MPI)     OMPI_COMM_WORLD_RANK ..., with MASTER_ADDR and MASTER_PORT passed by -x

The first that is there counts, in this order. `find_place` is strict and names what is wrong; the
functions above it are for the time before, and take what they can read. Imports no torch.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from pipeline.errors import ConfigError

Environment = Mapping[str, str]

_RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_WORLD_SIZE = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_RANKS_OF_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE."""
_START = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "TORCHELASTIC_RESTART_COUNT",
)
_FIRST_SLURM_PORT = 20_000
_SLURM_PORTS = 20_000


# --------------------------------------------------------------------- before anything was checked
def rank_of(env: Environment) -> int:
    """Tell this process's rank; 0 without a launcher."""
    return _first_number(env, _RANK, default=0)


def world_size_of(env: Environment) -> int:
    """Tell the number of ranks; 1 without a launcher."""
    return max(1, _first_number(env, _WORLD_SIZE, default=1))


def name_world_source(env: Environment) -> str:
    """Tell which variable the number of ranks comes from, e.g. `WORLD_SIZE in the environment`, for
    messages; empty without a launcher."""
    name = next((name for name in _WORLD_SIZE if env.get(name, "").isdigit()), "")
    return f"{name} in the environment" if name else ""


def stale_problems(env: Environment) -> list[str]:
    """Say so if a number of ranks was left in the environment by something else than a launcher.

    Launchers set RANK with it. Alone it would let the settings be checked for that many ranks, and
    the run start on one. A dry run may be asked so about a larger machine.
    """
    # A world of one is what a run without a launcher is anyway.
    size = env.get("WORLD_SIZE", "1")
    if "RANK" in env or size.strip() in ("", "1"):
        return []
    # srun and mpirun number the ranks themselves, and their own variables count then.
    if any(name in env for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK")):
        return []
    return [
        f"environment: WORLD_SIZE is {size} but RANK is not set, so no launcher has set it: unset "
        "WORLD_SIZE for a single process, or start with torchrun, deepspeed or srun"
    ]


def ranks_of_node(env: Environment) -> int:
    """Tell how many ranks share this node's cores; 1 if the launcher does not say."""
    return max(1, _first_number(env, _RANKS_OF_NODE, default=1))


def name_start(env: Environment, *, parent_pid: int) -> str:
    """Name this start of the program: equal on the ranks of one node, different on the next start.

    Args:
        env: the environment.
        parent_pid: of this process. The ranks of a node have one parent, the launcher; addresses
            and ports may be the same on the next start, the parent is not.
    """
    # Alone: no other rank has to come to the same name.
    if not is_launched(env):
        return uuid.uuid4().hex
    return ":".join([*(env.get(name, "") for name in _START), str(parent_pid)])


def is_launched(env: Environment) -> bool:
    """Tell whether a launcher has started this process."""
    return "RANK" in env or "SLURM_STEP_ID" in env or "OMPI_COMM_WORLD_RANK" in env


def shows_one_gpu_each(env: Environment) -> bool:
    """Tell whether the launcher shows every process its own GPU only, which is then number 0."""
    # Without CUDA_VISIBLE_DEVICES a process sees all GPUs, so the default holds a comma.
    return "SLURM_PROCID" in env and "," not in env.get("CUDA_VISIBLE_DEVICES", ",")


def _first_number(
    env: Environment,
    names: tuple[str, ...],
    *,
    default: int,
) -> int:
    for name in names:
        # What is not a number is told by `find_place`, once the settings are known to be right.
        if env.get(name, "").isdigit():
            return int(env[name])
    return default


# ------------------------------------------------------------------------------------------- strict
@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which process of a run this one is, as its launcher says.

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


def find_place(env: Environment) -> RankPlace:
    """Read rank and world size as the launcher gives them, or take a world of one.

    Args:
        env: the environment.

    Raises:
        ConfigError: the variables are incomplete, are not numbers, or contradict each other.
    """
    # torchrun inside an srun step: the inner launcher numbers the ranks.
    if "RANK" in env:
        place = _torchrun_place(env)
    elif "SLURM_STEP_NUM_TASKS" in env and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        place = _slurm_place(env)
    elif "OMPI_COMM_WORLD_SIZE" in env and _number(env, "OMPI_COMM_WORLD_SIZE") > 1:
        place = _mpi_place(env)
    else:
        return RankPlace(0, 0, 1, 1, "127.0.0.1", 0)
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(
            f"environment: RANK {place.rank} is not below WORLD_SIZE {place.world_size}."
        )
    return place


def write_place(
    env: MutableMapping[str, str],
    place: RankPlace,
    *,
    master_port: int,
) -> None:
    """Fill in the variables that torch and DeepSpeed look for; what the launcher has set stays.

    Args:
        env: the environment to change.
        place: this process.
        master_port: of the meeting point.
    """
    values = {
        "RANK": place.rank,
        "LOCAL_RANK": place.local_rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_WORLD_SIZE": place.local_world_size,
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": master_port,
    }
    for name, value in values.items():
        env.setdefault(name, str(value))


def _torchrun_place(env: Environment) -> RankPlace:
    missing = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env
    ]
    if missing:
        raise ConfigError(
            f"environment: RANK is set but {', '.join(missing)} is not. "
            "Start with torchrun, deepspeed or srun, or unset RANK for a single process."
        )
    rank = _number(env, "RANK")
    world_size = _number(env, "WORLD_SIZE")
    # Without either all ranks are taken to share one node, as when they are started by hand.
    local_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
    local_world_size = _number(env, local_name) if local_name in env else world_size
    local_rank = rank % local_world_size
    if "LOCAL_RANK" in env:
        local_rank = _number(env, "LOCAL_RANK")
    return RankPlace(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        master_addr=env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT"),
    )


def _slurm_place(env: Environment) -> RankPlace:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    # Every rank must come to the same port without talking to the others.
    port = _FIRST_SLURM_PORT + _number(env, "SLURM_JOB_ID") % _SLURM_PORTS
    if "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT")
    # Nodes may have unequal numbers of tasks, so the node's own entry counts.
    node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    counts = _tasks_by_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return RankPlace(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=_number(env, "SLURM_STEP_NUM_TASKS"),
        local_world_size=counts[min(node, len(counts) - 1)],
        master_addr=env.get("MASTER_ADDR") or first_slurm_host(nodes),
        master_port=port,
    )


def _tasks_by_node(text: str) -> list[int]:
    """Read Slurm's tasks per node: `4(x2),3` is two nodes with four tasks and one with three."""
    counts = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def _mpi_place(env: Environment) -> RankPlace:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ConfigError(
            f"environment: mpirun has not passed on {' and '.join(missing)}. Start with "
            "mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 ..., or with torchrun."
        )
    return RankPlace(
        rank=_number(env, "OMPI_COMM_WORLD_RANK"),
        local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=_number(env, "OMPI_COMM_WORLD_SIZE"),
        local_world_size=_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        master_addr=env["MASTER_ADDR"],
        master_port=_number(env, "MASTER_PORT"),
    )


def first_slurm_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as `gpu[03-07,11],login1`.

    Raises:
        ConfigError: the list is empty.
    """
    # `gpu[03-07,11]`: the name, then the first number with its zeros, then what follows.
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if not match:
        raise ConfigError(
            f"environment: SLURM_STEP_NODELIST {nodes!r} names no host. Set MASTER_ADDR to the "
            "host of rank 0."
        )
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix or ''}"


def _number(env: Environment, name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise ConfigError(
            f"environment: {name} is {env.get(name)!r}, a whole number was expected. "
            "Start with torchrun, deepspeed or srun, which set it."
        ) from None
