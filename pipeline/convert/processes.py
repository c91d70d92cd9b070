"""Make shards in a pool of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver
from multiprocessing.synchronize import Event
from typing import Any

from pipeline.console import outlive_readers
from pipeline.convert.shard import Part, ShardTask, make_shard
from pipeline.convert.workers import Workers, cores
from pipeline.errors import InfrastructureError

_TASKS_PER_WORKER = 2
"""Tasks handed out at a time: one that runs and one that is ready. More would hold more of the
listing in memory, and would be lost when the user stops."""


def _context() -> Any:
    """Return the way to start processes."""
    # Not by fork: the caller may run threads, and a lock that one of them holds would stay locked
    # in the child forever.
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context(
        "forkserver" if "forkserver" in methods else "spawn"
    )


def warm_up(workers: Workers) -> None:
    """Begin to import what workers need, in a process beside this one.

    Workers are forked off that process and start at once; meanwhile this one lists the source.
    """
    context = _context()
    count = workers.count or cores()
    uses_server = context.get_start_method() == "forkserver"
    if workers.engine == "local" and count > 1 and uses_server:
        context.set_forkserver_preload(["pipeline.convert.processes"])
        forkserver.ensure_running()


def make_in_processes(
    shards: Sequence[int], task: Callable[[int], ShardTask], count: int
) -> Iterator[tuple[int, Part]]:
    """Make shards in a pool of processes; a failure stops the others at their next image.

    Args:
        shards: Numbers of the shards.
        task: Tells what a shard is made of; called when its work is handed out.
        count: Processes.

    Raises:
        InfrastructureError: A process was killed.
    """
    context = _context()
    stop = context.Event()
    running: dict[Future[Part], int] = {}
    left = iter(shards)
    setup = (stop, dict(os.environ))
    with ProcessPoolExecutor(
        count, mp_context=context, initializer=start_worker, initargs=setup
    ) as pool:
        try:
            while True:
                # Tasks are made late, one by one: all at once would copy the whole listing.
                while len(running) < _TASKS_PER_WORKER * count:
                    shard = next(left, None)
                    if shard is None:
                        break
                    running[pool.submit(make_shard_in_worker, task(shard))] = shard

                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InfrastructureError(
                "convert: a worker process was killed, most likely because memory ran out. Run "
                f"the same command again with fewer --workers (now {count}); finished shards are "
                "kept."
            ) from error
        finally:
            # Leaving the pool waits for its processes: without this, until their shards are done.
            stop.set()
            for future in running:
                future.cancel()


class Worker:
    """State of one worker process, set up when it starts."""

    stop: Event | None = None


def start_worker(stop: Event, environment: dict[str, str]) -> None:
    """Set up a worker process.

    Args:
        stop: When set, workers give up.
        environment: The parent's. The process that workers are forked off keeps the one it was
            started with, and credentials may have changed since.
    """
    # Workers warn on stderr (of retries, for example), and must not end for that either.
    outlive_readers()
    Worker.stop = stop
    os.environ.clear()
    os.environ.update(environment)
    # A terminal sends Ctrl-C to every process of the group; the parent then tells the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(
            target=_end_with, args=(parent.sentinel,), name="parent-watch", daemon=True
        ).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    # A killed parent cannot stop its workers: without this they would wait for work forever.
    os._exit(1)


def make_shard_in_worker(task: ShardTask) -> Part:
    """Make one shard in a worker process that `start_worker` has set up."""
    return make_shard(task, Worker.stop)
