"""Who makes the shards: this process, a pool of processes, or Ray. The bytes do not depend on
it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Workers:
    """Who makes the shards.

    Args:
        engine: `local`: processes on this machine. `ray`: Ray Core tasks, one per shard.
        count: Processes, or tasks at a time; 0 means one per core.
        ray_address: Of a running cluster, for example `auto` or `ray://head:10001`; None starts Ray
            on this machine.
    """

    engine: Engine = "local"
    count: int = 0
    ray_address: str | None = None


def cores() -> int:
    """Return how many cores this process may use."""
    # A container or a Slurm task may use fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
