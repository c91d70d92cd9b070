"""The files of one cache folder: who needs which, what may go, and room for what comes. Shared by
processes.

Nothing is trusted but the kernel: a process that lives holds an advisory lock on its lease and on
every file it is filling, and loses it however it ends. So a lease or a half-filled file that can be
locked belongs to no process that lives.

    <root>/cache.lock          held for the moment in which files are looked at, placed or removed
    <root>/leases/<pid>-<id>   what a process reads now or will read soon; locked while it lives
    <root>/<dataset>/<name>    a whole, verified shard
    <root>/<dataset>/.partial-<name>   one on its way; locked by the process that fills it
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from filelock import FileLock, Timeout

PARTIAL = ".partial-"
_LEASES = "leases"
# The lock is held for a moment; who has it for a minute has stopped, or its disk has.
_LOCK_WAIT_S = 60.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Refusal = Literal["here", "busy", "full"]
"""Why a shard is not fetched now. `here`: it is there already. `busy`: another process fetches it.
`full`: what could be removed does not make room for it."""


@dataclass(frozen=True)
class Partial:
    """A shard on its way: room taken on the disk, locked by this process.

    Args:
        path: The half-filled file.
        target: Its name once it is whole.
        file: Open for writing, at the start.
    """

    path: Path
    target: Path
    file: BinaryIO


@dataclass(frozen=True)
class _Held:
    modified_s: float
    size_bytes: int
    path: Path


class CacheFolder:
    """One folder of cached shards inside a byte budget, used by any number of processes at once.

    Args:
        root: The folder; made if needed.
        max_bytes: Budget over everything in it, whole or on its way.
        on_evict: Told of each shard that is removed to make room.

    Raises:
        OSError: The folder cannot be made or written.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        on_evict: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._on_evict = on_evict
        (root / _LEASES).mkdir(parents=True, exist_ok=True)
        # A number of its own too: containers that share the folder may share process ids.
        number = uuid.uuid4().hex[:12]
        name = f"{os.getpid()}-{number}"
        self._lease_path = root / _LEASES / name
        # Made and locked in one: between the two a lease looks like a dead process's.
        with self._exclusive():
            self._lease: BinaryIO | None = self._lease_path.open("xb", buffering=0)
            _lock(self._lease)

    def need(self, names: Collection[str]) -> None:
        """Protect these files, and no others, from being removed by any process.

        Args:
            names: Paths below the root, here or not yet.

        Raises:
            OSError: The disk is full or read-only; what was protected before stays so.
        """
        content = json.dumps(sorted(names)).encode()
        with self._exclusive():
            if self._lease is None:
                return
            # Room first: a full disk must not cut the list that protects what is read now.
            # At least one byte, because the call refuses none.
            room = max(1, len(content))
            os.posix_fallocate(self._lease.fileno(), 0, room)
            os.pwrite(self._lease.fileno(), content, 0)
            os.ftruncate(self._lease.fileno(), len(content))

    def begin(self, name: str, size_bytes: int) -> Partial | Refusal:
        """Take room for a shard, removing those unused for longest that no live process needs.

        Args:
            name: Path below the root.
            size_bytes: Its whole size, taken on the disk at once.

        Raises:
            OSError: The disk fails for another reason than being full.
        """
        target = self.root / name
        path = target.with_name(PARTIAL + target.name)
        with self._exclusive():
            if target.exists():
                return "here"
            if path.exists() and not _remove_if_dead(path):
                return "busy"
            held, total_bytes = self._scan()
            needed = self._leased_names()
            spare = []
            for file in held:
                relative = file.path.relative_to(self.root)
                name_of_file = str(relative)
                if name_of_file not in needed:
                    spare.append(file)
            spare_bytes = sum(file.size_bytes for file in spare)
            kept_bytes = total_bytes - spare_bytes
            if kept_bytes + size_bytes > self._max_bytes:
                return "full"  # removing everything would not do, so none is removed in vain

            # A reader sets the time of its shard when it maps it: the oldest is unused for longest.
            spare.sort(key=lambda file: file.modified_s)
            waiting = iter(spare)
            while total_bytes + size_bytes > self._max_bytes:
                total_bytes -= self._evict(next(waiting))
            return self._take_room(path, target, size_bytes, waiting)

    def commit(self, partial: Partial) -> None:
        """Make a filled file visible under its name. What it holds has reached the disk by then."""
        # Not storage.write_atomic: the file was filled in place, in room taken beforehand, and its
        # lock must last until the rename.
        with partial.file:
            partial.file.flush()
            os.fdatasync(partial.file.fileno())
            partial.path.replace(partial.target)

    def abandon(self, partial: Partial) -> None:
        """Remove a file that will not be filled."""
        # While it is still locked: another process may take the same name once it is not.
        with partial.file, suppress(OSError):
            partial.path.unlink()

    def remove(self, name: str) -> None:
        """Remove a file that turned out to be damaged."""
        with self._exclusive(), suppress(OSError):
            (self.root / name).unlink()

    def close(self) -> None:
        """Give up the lease: nothing is protected for this process any more."""
        if self._lease is not None:
            # Whoever finds it first removes it; a dead lease is removed by others as well.
            with suppress(OSError):
                self._lease_path.unlink()
            self._lease.close()
            self._lease = None

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        path = self.root / "cache.lock"
        try:
            with FileLock(path, timeout=_LOCK_WAIT_S):
                yield
        # As an OSError, which callers read around: a stuck cache costs speed, never a batch.
        except Timeout as error:
            problem = f"{path} is held by a process that does not go on"
            raise OSError(errno.EBUSY, problem) from error

    def _scan(self) -> tuple[list[_Held], int]:
        """List the whole shards, and add up what they and the files on their way take. Removes dead
        files."""
        held = []
        total_bytes = 0
        # All datasets' folders: the budget is over everything in the cache.
        for path in self.root.glob("*/*"):
            if path.parent.name == _LEASES:
                continue
            is_partial = path.name.startswith(PARTIAL)
            if is_partial and _remove_if_dead(path):
                continue
            # A process that gives up or finishes renames and removes without the lock.
            with suppress(FileNotFoundError):
                stat = path.stat()
                total_bytes += stat.st_size
                if not is_partial:
                    whole = _Held(stat.st_mtime, stat.st_size, path)
                    held.append(whole)
        return held, total_bytes

    def _leased_names(self) -> set[str]:
        names: set[str] = set()
        for path in (self.root / _LEASES).iterdir():
            if _remove_if_dead(path):
                continue
            # A new lease is empty until its process says what it needs.
            with suppress(FileNotFoundError, ValueError):
                content = path.read_bytes() or b"[]"
                names.update(json.loads(content))
        return names

    def _evict(self, file: _Held) -> int:
        """Remove a shard. Whoever has it mapped reads on: only its name goes."""
        file.path.unlink(missing_ok=True)
        self._on_evict(file.path)
        return file.size_bytes

    def _take_room(
        self, path: Path, target: Path, size_bytes: int, spare: Iterator[_Held]
    ) -> Partial | Refusal:
        """Fill the file with room; if the disk is full before the budget is, more shards go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Partial(path, target, path.open("xb"))
        try:
            _lock(partial.file)
            while True:
                # All at once: a disk that fills up half-way would have cost the download.
                try:
                    room = max(1, size_bytes)
                    os.posix_fallocate(partial.file.fileno(), 0, room)
                    return partial
                except OSError as error:
                    file = next(spare, None)
                    if error.errno not in _NO_ROOM:
                        raise
                    if file is None:
                        self.abandon(partial)
                        return "full"
                    self._evict(file)
        except BaseException:
            self.abandon(partial)
            raise


def _lock(file: BinaryIO) -> None:
    # flock, not lockf: it belongs to the open file, and another open in this process sees it too.
    how = fcntl.LOCK_EX | fcntl.LOCK_NB
    fcntl.flock(file.fileno(), how)


def _remove_if_dead(path: Path) -> bool:
    """Remove a lease or half-filled file whose process has ended; return whether it is gone."""
    try:
        with path.open("rb") as file:
            # Shared: two processes may look at the same file at once, and neither takes the other
            # for its owner.
            try:
                how = fcntl.LOCK_SH | fcntl.LOCK_NB
                fcntl.flock(file.fileno(), how)
            except BlockingIOError:
                return False
            path.unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True
