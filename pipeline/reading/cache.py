"""Verified copies of remote shards on this machine's disk, staged ahead of need.

A shard is fetched with concurrent ranged reads into a file that nobody serves, checked against the
manifest's sha256 inside the retry, and then renamed: a cut, flipped or killed download is never
seen. The ranks of a node share one copy. What the cache cannot hold (budget, full or read-only
disk) is read from the store sample by sample: slower, not wrong.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from pathlib import Path

from pipeline import storage
from pipeline.dataset import Manifest
from pipeline.errors import DataError, InfrastructureError, MaelstromError
from pipeline.reading.cache_folder import CacheFolder, Partial

logger = logging.getLogger(__name__)
PART_BYTES = 16 * 2**20
"""Size of one ranged read of a shard: at 8 at once 16 MiB came to 90% of the fastest plain client,
8 MiB to 82%, 4 MiB to 68% (docs/benchmarks/storage.md)."""
_PARTS_AT_ONCE = 8
# Two, so that one is hashed and synced while the other still comes in.
_SHARDS_AT_ONCE = 2
_TRIES = 3
_BUSY_RETRY_S = 1.0
_FULL_RETRY_S = 10.0
_FAILED_RETRY_S = (5.0, 30.0, 120.0, 600.0)
"""Pauses after the first, second, ... failure to stage one shard; the last is repeated."""
_READ_ON = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Failures of the cache's disk with which a run goes on, reading from the store."""


def default_cache_dir() -> Path:
    """Return the folder under which shards and scans are kept: `$XDG_CACHE_HOME/maelstrom` or
    `~/.cache/maelstrom`."""
    return Path(storage.cache_home()) / "maelstrom"


@dataclass
class CacheCounters:
    """What the cache did; may be counted from several threads.

    Attributes:
        staged_shards, staged_bytes: fetched whole and verified.
        read_through: samples read by their own range.
        retries: storage calls that failed and were made again.
        refused_shards, refused_samples: arrived damaged and were fetched again.
        failed_shards: attempts to stage a shard that were given up for a while.
        evicted_shards: removed to stay inside the budget or the disk.
        no_room: attempts that found neither budget nor disk for a shard.
    """

    staged_shards: int = 0
    staged_bytes: int = 0
    read_through: int = 0
    retries: int = 0
    refused_shards: int = 0
    refused_samples: int = 0
    failed_shards: int = 0
    evicted_shards: int = 0
    no_room: int = 0
    _lock: threading.Lock = field(
        default_factory=threading.Lock, repr=False, compare=False
    )

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._lock:
            for name, count in counts.items():
                total = getattr(self, name) + count
                setattr(self, name, total)

    def count_retry(self) -> None:
        """Count one storage call that is made again."""
        self.add(retries=1)


class _State(Enum):
    """Where a shard stands that is needed and not here."""

    QUEUED = auto()
    FETCHING = auto()
    PAUSED = auto()


@dataclass(frozen=True)
class _Turn:
    """When a shard is fetched.

    Args:
        state: `QUEUED`: the next free thread takes it. `FETCHING`: a thread has it. `PAUSED`: it
            was tried in vain, and is tried again later.
        again_at_s: That time, of `time.monotonic`, if it is paused.
    """

    state: _State
    again_at_s: float = 0.0


_QUEUED = _Turn(_State.QUEUED)
_FETCHING = _Turn(_State.FETCHING)


class ShardCache:
    """Verified copies of one dataset's remote shards, inside a byte budget.

    Args:
        manifest: the dataset.
        folder: cache folder; shared by processes and by runs. Each dataset has a folder of its own
            in it.
        max_bytes: budget over everything in `folder`.

    Raises:
        InfrastructureError: the folder cannot be used. A full or read-only disk is no error: it is
            read around.
    """

    def __init__(self, manifest: Manifest, *, folder: Path, max_bytes: int) -> None:
        self.counters = CacheCounters()
        self._manifest = manifest
        self._root = folder / "shards"
        self._folder = _open_folder(
            self._root, max_bytes=max_bytes, counters=self.counters
        )
        self._changed = threading.Condition()
        self._needed: list[int] = []
        # What is needed and not here, in the order in which it is needed.
        self._turns: dict[int, _Turn] = {}
        self._failures: dict[int, int] = {}
        # Set when a shard found no room, of `time.monotonic`: then no other is tried before it.
        self._full_until_s: float | None = None
        self._warned = False
        self._closed = False
        self._stagers: list[threading.Thread] = []
        self._fetcher = ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="fetch")

    def name(self, shard: int) -> str:
        """Return a shard's path below the cache. It carries its hash: another content is another
        file."""
        # 64 bits of the hash tell the shards of one dataset apart, and leave room for their names.
        dataset = self._manifest.info.fingerprint[:24]
        prefix = self._manifest.shard_sha256(shard)[:16]
        name = self._manifest.shard_name(shard)
        return f"{dataset}/{prefix}-{name}"

    def path(self, shard: int) -> Path:
        """Return where a shard's copy is, or will be."""
        return self._root / self.name(shard)

    def staged(self, shard: int) -> Path | None:
        """Return the verified copy of a shard if it is here."""
        # Only whole files have this name: they are renamed to it once they are verified.
        path = self.path(shard)
        if path.exists():
            return path
        return None

    def need(self, shards: Iterable[int]) -> bool:
        """Say which shards are read now and soon, first needed first: these are protected, and
        fetched once begun.

        Returns:
            Whether this differs from what was needed before.
        """
        # Once per global batch; mostly nothing has changed, and then it costs a comparison.
        needed = list(dict.fromkeys(shards))
        if needed == self._needed:
            return False
        # The lease first: a shard that is here now must not be evicted while it is looked for. It
        # knows no order, so that it is written anew only for another set.
        if self._folder is not None and set(needed) != set(self._needed):
            names = [self.name(shard) for shard in needed]
            self._guarded(lambda folder: folder.need(names))
        with self._changed:
            known = set(self._needed)
            turns: dict[int, _Turn] = {}
            for shard in needed:
                turn = self._turns.get(shard)
                # What was here when it was announced stays here: the lease protects it, and the
                # disk is not asked again.
                if turn is None and shard not in known and self.staged(shard) is None:
                    turn = _QUEUED
                if turn is not None:
                    turns[shard] = turn
            self._needed = needed
            self._turns = turns
            # What is no longer needed may make room for what is.
            self._full_until_s = None
            self._changed.notify_all()
        return True

    def begin(self) -> None:
        """Begin to fetch what is needed and not here. Separate from `need`, so that a first batch
        may go first."""
        with self._changed:
            if self._stagers or self._folder is None or self._closed:
                return
            for number in range(_SHARDS_AT_ONCE):
                thread = threading.Thread(
                    target=self._stage_ahead, name=f"stage-{number}", daemon=True
                )
                self._stagers.append(thread)
                thread.start()

    def wait(self) -> None:
        """Wait until every needed shard is here, has failed, or has found no room. For tests and
        measurements."""

        def is_quiet() -> bool:
            turns = self._turns.values()
            paused = all(turn.state is _State.PAUSED for turn in turns)
            return paused or self._full_until_s is not None

        with self._changed:
            self._changed.wait_for(is_quiet)

    def drop(self, shard: int) -> None:
        """Remove a copy that was damaged where it lies; it will be fetched again."""
        name = self.name(shard)
        self._guarded(lambda folder: folder.remove(name))
        with self._changed:
            self._turns[shard] = _QUEUED
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching. Unfinished downloads leave nothing behind."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # Before the threads are joined: they wait for the parts, which this cancels.
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        for thread in self._stagers:
            thread.join()
        if self._folder is not None:
            self._folder.close()

    def _guarded(self, call: Callable[[CacheFolder], None]) -> None:
        """Make a change to the folder; its failure costs speed, never a batch."""
        if self._folder is None:
            return
        try:
            call(self._folder)
        except OSError as error:
            self._warn(f"{self._root}: {error.strerror}")

    def _stage_ahead(self) -> None:
        """Fetch one shard after the other; the body of a thread."""
        while (shard := self._next()) is not None:
            try:
                turn = self._stage_one(shard)
            except (OSError, MaelstromError, RuntimeError, CancelledError) as error:
                if self._closed:
                    return  # it was stopped, which is no failure
                turn = self._pause_after(error, shard)
            with self._changed:
                if turn is None:
                    self._turns.pop(shard, None)
                # It may be needed no longer: then it is not asked for again either.
                elif shard in self._turns:
                    self._turns[shard] = turn
                self._changed.notify_all()

    def _pause_after(self, error: BaseException, shard: int) -> _Turn:
        """Count a failure and say when the shard is tried again: later after each."""
        # Its samples are still readable by range; the caller meets the real failure there.
        self.counters.add(failed_shards=1)
        failures = self._failures.get(shard, 0) + 1
        self._failures[shard] = failures
        number = min(failures, len(_FAILED_RETRY_S))
        pause_s = _FAILED_RETRY_S[number - 1]
        name = self._manifest.shard_name(shard)
        problem = storage.redact(str(error))
        self._warn(f"{name} could not be staged: {problem}")
        again_at_s = time.monotonic() + pause_s
        return _Turn(_State.PAUSED, again_at_s)

    def _next(self) -> int | None:
        """Wait for the next shard to be fetched and take it; None at the end."""
        with self._changed:
            while not self._closed:
                now_s = time.monotonic()
                soonest_s: float | None = None
                for shard, turn in self._turns.items():
                    if turn.state is _State.FETCHING:
                        continue
                    start_s = max(turn.again_at_s, self._full_until_s or 0.0)
                    if start_s <= now_s:
                        self._turns[shard] = _FETCHING
                        return shard
                    if soonest_s is None or start_s < soonest_s:
                        soonest_s = start_s
                # Without a shard to wait for, only a change can bring one.
                timeout_s = None
                if soonest_s is not None:
                    timeout_s = soonest_s - now_s
                self._changed.wait(timeout_s)
        return None

    def _stage_one(self, shard: int) -> _Turn | None:
        """Fetch, check and place one shard; return its next turn, None if it is here."""
        assert self._folder is not None
        size_bytes = self._manifest.shard_bytes(shard)
        name = self.name(shard)
        partial = self._folder.begin(name, size_bytes)
        if partial == "here":
            return None
        if partial == "busy":
            # Another process fills it; its rename is not announced, so the disk is looked at again.
            again_at_s = time.monotonic() + _BUSY_RETRY_S
            return _Turn(_State.PAUSED, again_at_s)
        if partial == "full":
            self.counters.add(no_room=1)
            with self._changed:  # one shard found no room, so the next would not either
                self._full_until_s = time.monotonic() + _FULL_RETRY_S
            return _QUEUED

        try:
            self._fetch(shard, partial)
            self._folder.commit(partial)
        except BaseException:
            self._folder.abandon(partial)
            raise
        self.counters.add(staged_shards=1, staged_bytes=size_bytes)
        return None

    def _fetch(self, shard: int, partial: Partial) -> None:
        uri = self._manifest.shard_uri(shard)
        size_bytes = self._manifest.shard_bytes(shard)
        expected = self._manifest.shard_sha256(shard)
        for attempt in range(_TRIES):
            if self._download(uri, size_bytes, partial) == expected:
                return
            self.counters.add(refused_shards=1)
            logger.warning(
                "cache: %s arrived damaged (try %d of %d)",
                storage.redact(uri),
                attempt + 1,
                _TRIES,
            )
        raise DataError(
            f"cache: {storage.redact(uri)} was read {_TRIES} times and never had the sha256 that "
            "dataset.json lists. It was replaced or damaged in the store: check it with "
            "pipeline.verify --full"
        )

    def _download(self, uri: str, size_bytes: int, partial: Partial) -> str:
        """Write an object into a partial file; return its sha256, in hex."""

        def read(start: int) -> memoryview:
            length = min(PART_BYTES, size_bytes - start)
            return storage.read_view(
                uri, start, length, on_retry=self.counters.count_retry
            )

        digest = hashlib.sha256()
        # A try before this one may have left its bytes.
        partial.file.seek(0)
        under_way: deque[Future[memoryview]] = deque()
        starts = iter(range(0, size_bytes, PART_BYTES))
        # In order, so that the hash is taken while later parts are still under way; few, so that
        # memory stays small.
        most = _PARTS_AT_ONCE // _SHARDS_AT_ONCE + 2
        while True:
            num_free = most - len(under_way)
            for start in islice(starts, num_free):
                part_under_way = self._fetcher.submit(read, start)
                under_way.append(part_under_way)
            if not under_way:
                return digest.hexdigest()
            oldest = under_way.popleft()
            part = oldest.result()
            partial.file.write(part)
            digest.update(part)

    def _warn(self, problem: str) -> None:
        # Once per run: a full disk fails anew every ten seconds.
        if not self._warned:
            self._warned = True
            logger.warning(
                "cache: %s. Samples are read from the store one by one meanwhile, which is slower",
                problem,
            )


def _open_folder(
    root: Path, *, max_bytes: int, counters: CacheCounters
) -> CacheFolder | None:
    def count_eviction(path: Path) -> None:
        counters.add(evicted_shards=1)

    try:
        return CacheFolder(root, max_bytes=max_bytes, on_evict=count_eviction)
    # Other failures, such as a folder without permission, are mistakes that can be mended.
    except OSError as error:
        if error.errno in _READ_ON:
            logger.warning(
                "cache: %s: %s. No new shard is cached; samples are read from the store one by "
                "one, which is slower. Set loader.cache_dir to a folder with space",
                root,
                error.strerror,
            )
            return None
        raise InfrastructureError(
            f"cache: cannot use {root}: {error.strerror}. Set loader.cache_dir to a folder that "
            "can be written"
        ) from error
