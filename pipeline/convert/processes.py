"""Make shards in a pool of processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

from pipeline.convert.crew import Crew, cores
from pipeline.convert.shard import Part, ShardTask, make_shard_in_worker, start_worker
from pipeline.errors import InfrastructureError


def _context() -> Any:
    """Return the way to start processes: not by fork, for the caller may run threads, which do not
    survive one."""
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def warm_up(crew: Crew) -> None:
    """Begin to import, in a process beside this one, what workers need: they are forked off it and
    start at once."""
    context = _context()
    if (
        crew.engine == "local"
        and (crew.workers or cores()) > 1
        and context.get_start_method() == "forkserver"
    ):
        context.set_forkserver_preload(["pipeline.convert.shard"])
        forkserver.ensure_running()


def _in_processes(
    shards: Sequence[int], task: Callable[[int], ShardTask], workers: int
) -> Iterator[tuple[int, Part]]:
    """Work in a pool of processes. A failure stops the rest at the next image."""
    context = _context()
    stop = context.Event()
    waiting: dict[Future[Part], int] = {}
    left = iter(shards)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker, initargs=(stop, dict(os.environ))
    ) as pool:
        try:
            while True:
                while len(waiting) < 2 * workers and (shard := next(left, None)) is not None:
                    waiting[pool.submit(make_shard_in_worker, task(shard))] = shard
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InfrastructureError(
                "convert: a worker process was killed, most likely for want of memory. Run the "
                "same command again with "
                f"fewer --workers (now {workers}); finished shards are kept."
            ) from error
        finally:
            stop.set()
            for future in waiting:
                future.cancel()
