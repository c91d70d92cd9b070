"""Which ranks of this node are there: the one record from which a survivor tells who died.

A rank that is killed says nothing, and the others only notice a closed connection. So every rank
leaves its process number in a folder of this node before it imports torch, and takes it back when
it ends by itself. A number that is left and has no process is the rank that died. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from pipeline.errors import InfrastructureError, MaelstromError

GOES_ON = "The same command goes on from the last checkpoint."
_MARKS = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "wait timeout",
)
"""How torch's collectives word a lost peer; some of its errors are plain RuntimeErrors."""
_RESUME = f"Let it go on with kill -CONT, or end it with kill -9. {GOES_ON}"
_LOCK_WAIT_S = 10.0
_VERDICT = "verdict.json"
_STALE_S = 600.0
"""How long a roll without a living rank is kept while its launcher lives, which may start more."""
_SKEW_S = 30.0
"""How much earlier another rank of the same start may have begun."""
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


@dataclass(frozen=True, slots=True)
class Entry:
    """A rank of this node.

    Args:
        rank: its number.
        pid: its process.
        started_s: when that process started, so that a reused number is told apart.
        parent: the process that started it; of an older version's entry, itself.
    """

    rank: int
    pid: int
    started_s: float
    parent: int

    def state(self) -> str:
        """Tell whether the process `runs`, is `stopped` (SIGSTOP, a debugger) or is `gone`."""
        try:
            process = psutil.Process(self.pid)
            if abs(float(process.create_time()) - self.started_s) > 1.0:
                return "gone"
            status = process.status()
        except psutil.NoSuchProcess:
            return "gone"
        except psutil.Error:
            return "runs"
        # A killed process whose launcher has not asked for its exit code yet.
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "gone"
        return "stopped" if status in _STOPPED else "runs"

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"


class Roll:
    """The ranks that one launcher has started on this node.

    Args:
        launch: names this start; equal on the ranks of the node.
        rank: of this process.
        world_size: of the run; a single process keeps no roll.
    """

    def __init__(self, launch: str, *, rank: int, world_size: int) -> None:
        name = hashlib.sha256(launch.encode()).hexdigest()[:16]
        # Containers may share this folder, and each counts its processes by itself.
        self._prefix = f"maelstrom-{os.getuid()}-{_pid_namespace()}-"
        # Not in the run's folder: process numbers mean something on this node only, and a folder
        # that is full or read-only must not keep the ranks from agreeing on what happened.
        self._folder = Path(tempfile.gettempdir()) / f"{self._prefix}{name}"
        self._rank = rank
        self.is_kept = world_size > 1
        """Whether there are other ranks to keep a roll of."""

    def sign(self) -> None:
        """Put this process on the roll."""
        if not self.is_kept:
            return
        started_s = psutil.Process().create_time()
        text = json.dumps(
            {"pid": os.getpid(), "started_s": started_s, "parent": os.getppid()}
        )
        self._clear_stale()
        with self.locked():
            self._forget_earlier(started_s)
        # A roll makes a message better; a node without room for it trains all the same.
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            # Written beside and renamed: a reader never sees half of it.
            unfinished = self._folder / f".rank-{self._rank}"
            unfinished.write_text(text)
            unfinished.replace(self._folder / f"rank-{self._rank}")

    def leave(self) -> None:
        """Take this process off: it ends by itself, and has said why."""
        if not self.is_kept:
            return
        with suppress(OSError):
            (self._folder / f"rank-{self._rank}").unlink(missing_ok=True)
            # The last one clears up, also behind those that could not.
            if all(entry.state() == "gone" for entry in self.others()):
                self._remove()

    def others(self) -> list[Entry]:
        """List the other ranks that have signed and not left, by rank."""
        entries = _entries_in(self._folder) if self.is_kept else []
        return [entry for entry in entries if entry.rank != self._rank]

    def gone(self) -> list[Entry]:
        """List the ranks whose process ended without taking itself off."""
        return [entry for entry in self.others() if entry.state() == "gone"]

    def stopped(self) -> list[Entry]:
        """List the ranks whose process somebody has stopped."""
        return [entry for entry in self.others() if entry.state() == "stopped"]

    # -------------------------------------------------------------------------------- the verdict
    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one rank of the node at a time decide what ended the run."""
        if not self.is_kept:
            yield
            return
        lock = FileLock(self._folder / ".lock", timeout=_LOCK_WAIT_S)
        is_held = False
        # Without the lock two ranks may both report; that is better than none.
        with suppress(OSError, Timeout):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            lock.acquire()
            is_held = True
        try:
            yield
        finally:
            if is_held:
                lock.release()

    def verdict(self) -> int | None:
        """Give the exit code that a rank of this node has reported; None if none has yet."""
        if not self.is_kept:
            return None
        try:
            known: dict[str, Any] = json.loads((self._folder / _VERDICT).read_text())
            return int(known["exit_code"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def decide(self, exit_code: int) -> None:
        """Write down what was reported, for the other ranks of the node."""
        if not self.is_kept:
            return
        with suppress(OSError):
            (self._folder / _VERDICT).write_text(json.dumps({"exit_code": exit_code}))

    def _remove(self) -> None:
        _remove(self._folder)

    def _forget_earlier(self, started_s: float) -> None:
        """Remove what a start of the same name has left: a script that starts again in a loop has
        the same number, and so have address and port.

        Args:
            started_s: when this process started.
        """
        begun_s = started_s - _SKEW_S
        for entry in _entries_in(self._folder):
            # A rank of this start that died before this one came keeps its entry.
            if entry.started_s < begun_s and entry.state() == "gone":
                with suppress(OSError):
                    (self._folder / f"rank-{entry.rank}").unlink()
        verdict = self._folder / _VERDICT
        with suppress(OSError):
            if verdict.stat().st_mtime < begun_s:
                verdict.unlink()

    def _clear_stale(self) -> None:
        """Remove the rolls of starts whose ranks were all killed: none was left to do so."""
        for folder in self._folder.parent.glob(f"{self._prefix}*"):
            # A folder or file may go at any moment: other starts clear up too.
            with suppress(OSError):
                if folder != self._folder and _is_stale(folder):
                    _remove(folder)


def _pid_namespace() -> int:
    """Give the number of what process numbers are counted in; 0 if this system has only one."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _entries_in(folder: Path) -> list[Entry]:
    """List the ranks that have signed and not left, by rank."""
    found = []
    for path in folder.glob("rank-*"):
        # A rank that leaves at this moment, or a full disk that cut its entry.
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(path.read_text())
            rank = int(path.name.removeprefix("rank-"))
            pid = int(known["pid"])
            found.append(
                Entry(
                    rank,
                    pid,
                    started_s=float(known["started_s"]),
                    parent=int(known.get("parent", pid)),
                )
            )
    return sorted(found, key=lambda entry: entry.rank)


def _is_stale(folder: Path) -> bool:
    """Tell whether all ranks on a roll are gone for good."""
    known = folder.lstat()
    # In a folder that all users share, a link or a stranger's folder may bear our name.
    if not stat.S_ISDIR(known.st_mode) or known.st_uid != os.getuid():
        return False
    entries = _entries_in(folder)
    if any(entry.state() != "gone" for entry in entries):
        return False
    # Its launcher may be about to start another rank, which would miss the one that died.
    has_launcher = not entries or any(
        psutil.pid_exists(entry.parent) for entry in entries
    )
    return not has_launcher or time.time() - known.st_mtime > _STALE_S


def _remove(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    folder.rmdir()


# ------------------------------------------------------------------------------------------- causes
def is_consequence(error: BaseException, roll: Roll) -> bool:
    """Tell whether an error may only be what this rank noticed of another one's end.

    Args:
        error: what ended this rank.
        roll: the ranks of this node.
    """
    if isinstance(error, MaelstromError) or not isinstance(error, RuntimeError):
        return False
    if not roll.is_kept:
        return False
    # By name, because torch is not imported here.
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return any(mark in str(error) for mark in _MARKS)


def name_cause(error: BaseException, roll: Roll, *, rank: int) -> InfrastructureError:
    """Say which rank died or hangs, as far as this node can tell.

    Args:
        error: what this rank noticed.
        roll: the ranks of this node.
        rank: this rank.
    """
    gone = roll.gone()
    if gone:
        return rank_died(gone)
    stopped = roll.stopped()
    if stopped:
        return InfrastructureError(
            f"{_listed(stopped)} {_verb(stopped)} stopped. {_RESUME}"
        )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return InfrastructureError(
        f"rank {rank} lost contact with another rank ({first_line}). The ranks of this node are "
        f"there: look at the other nodes and at the network between them. {GOES_ON}"
    )


def rank_died(gone: list[Entry]) -> InfrastructureError:
    """Give the error for ranks whose process ended without a word."""
    return InfrastructureError(
        f"{_listed(gone)} {_verb(gone)} killed or crashed: its process is gone and left no "
        "report. Memory that ran out is in dmesg ('Out of memory'); a crash has its lines above. "
        f"{GOES_ON}"
    )


def _listed(entries: list[Entry]) -> str:
    return ", ".join(str(entry) for entry in entries)


def _verb(entries: list[Entry]) -> str:
    return "was" if len(entries) == 1 else "were"


def describe_stopped(roll: Roll) -> str:
    """Name the ranks of this node that somebody has stopped, for the end of a message; empty if
    there are none."""
    stopped = roll.stopped()
    return f" {_listed(stopped)} {_verb(stopped)} stopped. {_RESUME}" if stopped else ""
