"""Make shards as Ray tasks."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.convert.crew import Crew, cores
from pipeline.convert.shard import Part, ShardTask, make_shard
from pipeline.errors import ConfigError, InfrastructureError, MaelstromError

_RETRIES = 3
_LOOK_EVERY_S = 2.0
_OVERDUE_FACTOR = 3.0
_OVERDUE_LEAST_S = 30.0
_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's shared memory: tasks and parts are small, images never pass through it."""


def _in_ray(
    shards: Sequence[int], task: Callable[[int], ShardTask], crew: Crew
) -> Iterator[tuple[int, Part]]:
    """Work as Ray tasks: what a lost worker did is done again, and a straggler gets a second copy;
    the first counts."""
    ray = _start_ray(crew)
    try:
        remote = ray.remote(make_shard).options(
            num_cpus=1,
            max_retries=_RETRIES,
            retry_exceptions=[InfrastructureError],
            scheduling_strategy="SPREAD",
        )
        yield from _gather(ray, remote, shards, task, limit=_places(ray, crew))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, MaelstromError):
            raise cause from None
        raise InfrastructureError(
            f"convert: Ray gave up after {_RETRIES} retries ({type(error).__name__}: "
            f"{str(error).strip()[-500:]}). "
            "Run the same command again; finished shards are kept."
        ) from error
    finally:
        ray.shutdown()


def _start_ray(crew: Crew) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A task without a GPU keeps the node's CUDA_VISIBLE_DEVICES; Ray warns of a change of that
    # default otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if crew.ray_address is not None and _has_ray_token():
        # Ray 2.60 starts a cluster with its token where there is one, and connects without it
        # unless told.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "convert: --engine ray needs the package ray, which is not installed. "
            "Install it with: pip install -e '.[ray]' -c constraints.txt"
        ) from None
    root = str(Path(__file__).resolve().parents[2])
    options: dict[str, Any]
    if crew.ray_address is not None:
        # The nodes need the packages, not the repository: this one is sent to them.
        options = {"address": crew.ray_address, "runtime_env": {"py_modules": [f"{root}/pipeline"]}}
    else:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        options = {
            "address": "local",  # not a cluster that happens to run here
            "num_cpus": crew.workers or cores(),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(
            log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=False, **options
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"at {crew.ray_address}" if crew.ray_address else "on this machine"
        raise InfrastructureError(
            f"convert: Ray cannot be used {where} ({error}). Check --ray-address, and the "
            "cluster's token "
            "(RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or ~/.ray/auth_token)."
        ) from error
    return ray


def _has_ray_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().is_file()


def _places(ray: Any, crew: Crew) -> int:
    return crew.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))


def _gather(
    ray: Any, remote: Any, shards: Sequence[int], task: Callable[[int], ShardTask], *, limit: int
) -> Iterator[tuple[int, Part]]:
    """Hand out as many tasks as there are places, so that the time since then is the time they have
    run."""
    left = iter(shards)
    running: dict[Any, tuple[int, float]] = {}
    took_s: list[float] = []
    try:
        while True:
            while len(running) < limit and (shard := next(left, None)) is not None:
                running[remote.remote(task(shard))] = shard, time.monotonic()
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_EVERY_S)
            for ref in ready:
                if ref not in running:
                    continue  # a copy of a shard that came in the same moment
                shard, start_s = running.pop(ref)
                copies = [other for other, (number, _) in running.items() if number == shard]
                try:
                    part = ray.get(ref)
                except ray.exceptions.RayError:
                    if copies:
                        continue  # the other copy may yet succeed
                    raise
                took_s.append(time.monotonic() - start_s)
                for other in copies:
                    running.pop(other)
                    ray.cancel(other, force=True)
                yield shard, part
            for shard in overdue(
                list(running.values()), took_s, now_s=time.monotonic(), places=limit
            ):
                running[remote.remote(task(shard))] = shard, time.monotonic()
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def overdue(
    running: Sequence[tuple[int, float]], took_s: Sequence[float], *, now_s: float, places: int
) -> list[int]:
    """Return the shards that have run so much longer than others that a second copy should race
    them.

    Args:
        running: (shard, when it was handed out) of all tasks that are under way, copies too.
        took_s: Seconds that finished shards took.
        now_s: The time now, of the same clock.
        places: Tasks that can run at a time; copies take free places only.
    """
    if not took_s:
        return []
    limit_s = max(_OVERDUE_LEAST_S, _OVERDUE_FACTOR * statistics.median(took_s))
    numbers = [shard for shard, _ in running]
    late = [
        shard
        for shard, start_s in running
        if now_s - start_s > limit_s and numbers.count(shard) == 1
    ]
    return late[: max(0, places - len(running))]
