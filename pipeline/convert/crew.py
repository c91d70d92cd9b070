"""Who makes the shards: this process, a pool of processes, or Ray. The bytes are the same whoever
does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Crew:
    """Who works.

    Args:
        engine: `local`: processes of this machine. `ray`: Ray Core tasks, one a shard.
        workers: Processes, or tasks at a time; 0 means the cores that there are.
        ray_address: Of a cluster that runs, such as `auto` or `ray://head:10001`; nothing starts
            Ray on this machine.
    """

    engine: Engine = "local"
    workers: int = 0
    ray_address: str | None = None


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
