"""One job a run folder: a lease file that says who works here, and whether it still does."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil
from filelock import FileLock

from pipeline import storage
from pipeline.errors import ConfigError, MaelstromError
from train.process.world import World

LEASE_FILE = "lease.json"
BEAT_S = 15.0
"""How often the holder touches its lease."""
STALE_S = 120.0
"""A lease of another machine that was not touched for so long is free: eight beats."""
_GUARD_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease.

    Args:
        host: machine and process namespace; only there can the process be looked up.
        pid: process of rank 0.
        started_s: when that process started, so that a reused pid is told apart.
        token: unique to this lease.
        command: for the message.
    """

    host: str
    pid: int
    started_s: float
    token: str
    command: str


class RunLease:
    """Holds a run folder while the context is open. Every rank enters; rank 0 holds it.

    Args:
        folder: local folder of the run; made if needed.
        world: the processes of the run.

    Raises:
        ConfigError: on entering, on every rank: another job works in this folder.
    """

    def __init__(self, folder: Path, *, world: World) -> None:
        self._path = folder / LEASE_FILE
        self._world = world
        self._token = uuid.uuid4().hex
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLease:
        problem: str | None = None
        if self._world.is_main:
            try:
                self._take()
            except (MaelstromError, OSError) as error:
                problem = str(error)
        # All ranks end alike; rank 0 alone would leave the others waiting for it.
        problem = self._world.broadcast(problem)
        if problem is not None:
            raise ConfigError(problem)
        if self._world.is_main:
            self._thread = threading.Thread(
                target=self._beat,
                name="lease",
                daemon=True,
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join()
        with suppress(OSError):
            holder = _read(self._path)
            # A lease that went stale may have been taken by another job meanwhile.
            if holder is not None and holder.token == self._token:
                self._path.unlink()

    def _take(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Looking and taking are one step: two jobs that start together must not both find a stale
        # lease.
        with FileLock(self._path.with_name(f".{LEASE_FILE}.lock"), timeout=_GUARD_WAIT_S):
            holder = _read(self._path)
            if holder is not None and _is_alive(holder, self._path):
                raise ConfigError(
                    f"run.dir {self._path.parent}: process {holder.pid} on "
                    f"{holder.host.partition('#')[0]} works here "
                    f"({holder.command}). Stop it first, or give another run.dir."
                )
            mine = Holder(
                _host(),
                os.getpid(),
                psutil.Process().create_time(),
                self._token,
                " ".join(sys.argv)[:200],
            )
            storage.write_atomic(str(self._path), json.dumps(asdict(mine)).encode())

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self._path)


def _host() -> str:
    # Containers may share a host name; process numbers only mean something within one namespace.
    namespace = ""
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}#{boot}#{namespace}"


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_alive(holder: Holder, path: Path) -> bool:
    if holder.host == _host():
        try:
            process = psutil.Process(holder.pid)
            same = abs(float(process.create_time()) - holder.started_s) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False
    here = socket.gethostname()
    if holder.host.partition("#")[0] == here and _boot_of(holder.host) not in (
        "",
        _boot_of(_host()),
    ):
        # This machine, before its last start: no process outlives that.
        return False
    # Clocks of two machines differ; the file server's own clock is compared with itself.
    probe = path.with_name(f".{LEASE_FILE}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime < STALE_S
    finally:
        probe.unlink()


def _boot_of(host: str) -> str:
    return host.split("#")[1] if host.count("#") == 2 else ""
