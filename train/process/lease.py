"""One job a run folder: a lease file that says who works here, and whether it still does.

Taken before the processes of a run meet: a second start ends here, whatever port it was given.
Imports no torch.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from pipeline import storage
from pipeline.errors import ConfigError
from train.process.liveness import BEAT_S, STALE_S, Identity, is_alive, this_process

LEASE_FILE = "lease.json"
_GUARD_WAIT_S = 30.0


class FolderInUseError(ConfigError):
    """Another job works in this run folder: its files, its status too, must be left alone."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease.

    Args:
        host: machine, boot and process namespace, as `name#boot#namespace`; only there can the
            process be looked up.
        pid: process of rank 0.
        started_s: when that process started, so that a reused pid is told apart.
        token: unique to this lease; behind `@` the name of the start of the program.
        command: for the message.
    """

    # A file with other keys is taken for a free one: older releases must find these and no others.
    host: str
    pid: int
    started_s: float
    token: str
    command: str

    @property
    def process(self) -> Identity:
        """Whose number the pid is."""
        name, _, rest = self.host.partition("#")
        boot_id, _, namespace = rest.partition("#")
        return Identity(name, boot_id, namespace, self.pid, self.started_s)

    @property
    def launch(self) -> str:
        """Name of the start of the program; empty if an older release wrote the lease."""
        return self.token.partition("@")[2]


class RunLease:
    """Holds a run folder while the context is open. Every rank enters; rank 0 holds it.

    Args:
        folder: local folder of the run; made if needed.
        rank: of this process. The others rely on rank 0: refused, it ends, and its launcher ends
            them.
        launch: name of this start of the program, see `place.name_start`.
        on_beat: called every `BEAT_S` by a thread of rank 0; it must not raise.

    Raises:
        FolderInUseError: on entering, at rank 0: another job works in this folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        launch: str = "",
        on_beat: Callable[[], None] | None = None,
    ) -> None:
        self._path = folder / LEASE_FILE
        self._rank = rank
        self._token = f"{uuid.uuid4().hex}@{launch}"
        self._on_beat = on_beat
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLease:
        if self._rank == 0:
            self._take()
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
        # Joined first: a beat after the removal would touch a lease that is no longer ours.
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
        with FileLock(
            self._path.with_name(f".{LEASE_FILE}.lock"), timeout=_GUARD_WAIT_S
        ):
            holder = _read(self._path)
            if holder is not None and _works(holder, self._path):
                raise FolderInUseError(
                    f"run.dir {self._path.parent}: process {holder.pid} on "
                    f"{holder.process.host} works here "
                    f"({holder.command}). Stop it first, or give another run.dir."
                )
            here = this_process()
            mine = Holder(
                host=f"{here.host}#{here.boot_id}#{here.pid_namespace}",
                pid=here.pid,
                started_s=here.started_s,
                token=self._token,
                command=" ".join(sys.argv)[:200],
            )
            storage.write_atomic(str(self._path), json.dumps(asdict(mine)).encode())

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self._path)
            # After the lease, which other jobs ask; the status is for people.
            if self._on_beat is not None:
                self._on_beat()


def is_held_by_another(folder: Path, *, launch: str) -> bool:
    """Tell whether another start of the program works in a run folder; False if it cannot be told.

    Args:
        folder: local folder of the run; need not exist.
        launch: name of this start of the program, see `place.name_start`.
    """
    path = folder / LEASE_FILE
    try:
        holder = _read(path)
        if holder is None or _is_of(holder, launch):
            return False
        return _works(holder, path)
    except OSError:
        return False


def _is_of(holder: Holder, launch: str) -> bool:
    """Tell whether a lease belongs to a start of the program, seen from any of its nodes."""
    if holder.process.host == this_process().host:
        return holder.launch == launch
    # The last part is the launcher's process, another one on every node.
    theirs = holder.launch.rpartition(":")[0]
    ours = launch.rpartition(":")[0]
    return theirs == ours != ""


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    # A damaged file holds no name to wait for: it counts as a free folder.
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _works(holder: Holder, path: Path) -> bool:
    """Tell whether the holder of a lease still works."""
    alive = is_alive(holder.process)
    if alive is not None:
        return alive
    # Clocks of two machines differ; the file server's own clock is compared with itself.
    probe = path.with_name(f".{LEASE_FILE}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime < STALE_S
    finally:
        probe.unlink()
