"""Make shards as Ray tasks."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.convert.shard import Part, ShardTask, make_shard
from pipeline.convert.workers import Workers, cores
from pipeline.errors import ConfigError, InfrastructureError, MaelstromError

_RETRIES = 3
_LOOK_EVERY_S = 2.0
"""Seconds between looks at which tasks are overdue."""
_OVERDUE_FACTOR = 3.0
"""A task is overdue when it runs this many times the median."""
_OVERDUE_LEAST_S = 30.0
"""But not before this many seconds: small shards vary by large factors."""
_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's shared memory: tasks and parts are small, images never pass through it."""


def make_in_ray(
    shards: Sequence[int], task: Callable[[int], ShardTask], workers: Workers
) -> Iterator[tuple[int, Part]]:
    """Make shards as Ray tasks. What a lost worker did is done again; a straggler gets a second
    copy, and the first result counts.

    Args:
        shards: Numbers of the shards.
        task: Tells what a shard is made of; called when its work is handed out.
        workers: How many tasks at a time, and the cluster.

    Raises:
        InfrastructureError: Ray cannot be used, or a shard kept failing.
    """
    ray = _start_ray(workers)
    try:
        remote = ray.remote(make_shard).options(
            num_cpus=1,
            max_retries=_RETRIES,
            # A refused image or a wrong setting fails again; only storage and network recover.
            retry_exceptions=[InfrastructureError],
            scheduling_strategy="SPREAD",
        )
        yield from _gather(
            ray,
            remote,
            shards,
            task,
            limit=_slots(ray, workers),
        )
    except ray.exceptions.RayError as error:
        # Ray wraps what a task raised; our own errors already say what to do.
        cause = getattr(
            error,
            "cause",
            None,
        )
        if isinstance(cause, MaelstromError):
            raise cause from None
        details = str(error).strip()[-500:]
        raise InfrastructureError(
            f"convert: Ray gave up after {_RETRIES} retries ({type(error).__name__}: {details}). "
            "Run the same command again; finished shards are kept."
        ) from error
    finally:
        ray.shutdown()


def _start_ray(workers: Workers) -> Any:
    """Connect to the cluster, or start Ray on this machine, and return the module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A task without a GPU keeps the node's CUDA_VISIBLE_DEVICES; Ray warns of a change of that
    # default otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if workers.ray_address is not None and _has_ray_token():
        # Ray 2.60 starts a cluster with its token if there is one, but connects without it unless
        # told.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "convert: --engine ray needs the package ray, which is not installed. "
            "Install it with: pip install -e '.[ray]' -c constraints.txt"
        ) from None
    try:
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=False,
            **_ray_options(workers),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        cluster = (
            f"at {workers.ray_address}" if workers.ray_address else "on this machine"
        )
        raise InfrastructureError(
            f"convert: Ray cannot be used {cluster} ({error}). Check --ray-address and the "
            "cluster's token (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or ~/.ray/auth_token)."
        ) from error
    return ray


def _ray_options(workers: Workers) -> dict[str, Any]:
    """Return what `ray.init` needs to know of the cluster."""
    root = str(Path(__file__).resolve().parents[2])
    if workers.ray_address is not None:
        # The nodes must have the dependencies installed; this repository's code is sent to them.
        code = {"py_modules": [f"{root}/pipeline"]}
        return {"address": workers.ray_address, "runtime_env": code}
    # Ray's processes are started from another folder and must still find this package.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{before}" if before else root
    return {
        "address": "local",  # not a cluster that happens to run here
        "num_cpus": workers.count or cores(),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }


def _has_ray_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    named = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return storage.local_path(named).is_file()


def _slots(ray: Any, workers: Workers) -> int:
    """Return how many tasks run at a time."""
    return workers.count or max(1, int(ray.cluster_resources().get("CPU", 1)))


def _gather(
    ray: Any,
    remote: Any,
    shards: Sequence[int],
    task: Callable[[int], ShardTask],
    *,
    limit: int,
) -> Iterator[tuple[int, Part]]:
    """Hand out tasks and yield the shards' parts as they are finished.

    Never more tasks than slots: the time since a task was handed out is then the time it has run.
    """
    left = iter(shards)
    running: dict[Any, tuple[int, float]] = {}
    took_s: list[float] = []
    try:
        while True:
            while len(running) < limit:
                shard = next(left, None)
                if shard is None:
                    break
                running[remote.remote(task(shard))] = shard, time.monotonic()
            if not running:
                return

            ready, _ = ray.wait(
                list(running),
                num_returns=1,
                timeout=_LOOK_EVERY_S,
            )
            for ref in ready:
                if ref not in running:
                    continue  # a copy of a shard that came in the same moment
                shard, start_s = running.pop(ref)
                copies = [
                    other for other, (number, _) in running.items() if number == shard
                ]
                try:
                    part = ray.get(ref)
                except ray.exceptions.RayError:
                    if copies:
                        continue  # the other copy may yet succeed
                    raise
                took_s.append(time.monotonic() - start_s)
                # The first copy counts. Both write the same bytes, so a late one does no harm.
                for other in copies:
                    running.pop(other)
                    ray.cancel(other, force=True)
                yield shard, part

            late = overdue(
                list(running.values()),
                took_s,
                now_s=time.monotonic(),
                slots=limit,
            )
            for shard in late:
                running[remote.remote(task(shard))] = shard, time.monotonic()
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def overdue(
    running: Sequence[tuple[int, float]],
    took_s: Sequence[float],
    *,
    now_s: float,
    slots: int,
) -> list[int]:
    """Return the shards that have run so much longer than others that a second copy should race
    them.

    Args:
        running: (shard, when it was handed out) of all tasks that are under way, copies too.
        took_s: Seconds that finished shards took.
        now_s: The time now, of the same clock.
        slots: Tasks that can run at a time; copies take free slots only.
    """
    if not took_s:
        return []
    limit_s = max(_OVERDUE_LEAST_S, _OVERDUE_FACTOR * statistics.median(took_s))
    numbers = [shard for shard, _ in running]
    # One copy per shard: a third would be as slow if the shard itself is what takes long.
    late = [
        shard
        for shard, start_s in running
        if now_s - start_s > limit_s and numbers.count(shard) == 1
    ]
    free = max(0, slots - len(running))
    return late[:free]
