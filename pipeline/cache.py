"""Shards on this machine's disk: local ones are mapped in place, remote ones are staged ahead of need.

A remote shard is fetched with concurrent ranged reads into a temporary file, checked against the manifest's sha256 and
then renamed, so that a cut, flipped or killed download is never served. The ranks of a node share one copy. A sample
whose shard is not there yet is read by its own range, so that nobody waits for a whole shard.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from filelock import FileLock, Timeout

from pipeline import storage
from pipeline.errors import DataError, InfrastructureError
from pipeline.manifest import Manifest, Rows

U8 = npt.NDArray[np.uint8]
logger = logging.getLogger(__name__)

_PART_BYTES = 8 * 2**20
_PARTS_AT_ONCE = 8
_SHARDS_AT_ONCE = 2
_TRIES = 3
_PARTIAL = ".tmp-"
_PARTIAL_LIVES_S = 600
_MAPPED_SHARDS = 1024


def default_cache_dir() -> Path:
    """Return the folder under which shards and scans are kept: `$XDG_CACHE_HOME/maelstrom` or `~/.cache/maelstrom`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maelstrom"


@dataclass
class CacheCounters:
    """What the cache did.

    Attributes:
        staged_shards, staged_bytes: fetched whole and verified.
        read_through: samples read by their own range.
        refused_shards: downloads whose hash did not match, fetched again.
        evicted_shards: removed to stay inside the budget.
    """

    staged_shards: int = 0
    staged_bytes: int = 0
    read_through: int = 0
    refused_shards: int = 0
    evicted_shards: int = 0


class ShardCache:
    """Verified copies of one dataset's remote shards, inside a byte budget.

    Args:
        manifest: the dataset.
        folder: cache folder; shared by processes and by runs. Each dataset has a folder of its own in it.
        max_bytes: budget over everything in `folder`.
    """

    def __init__(self, manifest: Manifest, *, folder: Path, max_bytes: int) -> None:
        self._manifest = manifest
        self._root = folder / "shards"
        self._folder = self._root / manifest.info.fingerprint[:24]
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Path | None]] = {}
        self._stager = ThreadPoolExecutor(_SHARDS_AT_ONCE, thread_name_prefix="stage")
        self._fetcher = ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="fetch")
        self._broken: BaseException | None = None
        self.counters = CacheCounters()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InfrastructureError(
                f"cache: cannot use {self._folder}: {error.strerror}. "
                "Set loader.cache_dir to a folder that can be written"
            ) from error

    def path(self, shard: int) -> Path:
        """Return where a shard's copy is, or will be. Its name carries its hash: another content is another file."""
        return self._folder / f"{self._manifest.shard_sha256(shard)[:16]}-{self._manifest.shard_name(shard)}"

    def staged(self, shard: int) -> Path | None:
        """Return the verified copy of a shard if it is here."""
        path = self.path(shard)
        return path if path.exists() else None

    def stage(self, shards: Iterable[int]) -> None:
        """Begin to fetch shards, in this order, unless they are here or under way."""
        with self._lock:
            for shard in shards:
                if shard not in self._pending and self.staged(shard) is None:
                    self._pending[shard] = self._stager.submit(self._stage_one, shard)

    def close(self) -> None:
        """Stop fetching. Unfinished downloads leave nothing behind that could be served."""
        self._stager.shutdown(wait=True, cancel_futures=True)
        self._fetcher.shutdown(wait=True, cancel_futures=True)

    def _stage_one(self, shard: int) -> Path | None:
        path = self.path(shard)
        try:
            with FileLock(f"{path}.lock", timeout=0):
                if not path.exists() and not self._fetch(shard, path):
                    return None
            return path
        except Timeout:
            # Another process of this node is fetching it; samples are read through until it is there.
            return None
        except (OSError, InfrastructureError, DataError) as error:
            # The samples are still readable by range: say it once, and let the caller meet the real failure there.
            if self._broken is None:
                logger.warning("cache: %s could not be staged: %s", path.name, storage.redact(str(error)))
            self._broken = error
            return None
        finally:
            with self._lock:
                self._pending.pop(shard, None)

    def _fetch(self, shard: int, path: Path) -> bool:
        """Fetch, check and place a shard; False where the budget has no room for it now."""
        uri, size = self._manifest.shard_uri(shard), self._manifest.shard_bytes(shard)
        expected = self._manifest.shard_sha256(shard)
        partial = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}-{threading.get_ident()}")
        try:
            if not self._reserve(partial, size):
                return False
            for attempt in range(_TRIES):
                if self._download(uri, size, partial) == expected:
                    partial.replace(path)
                    self.counters.staged_shards += 1
                    self.counters.staged_bytes += size
                    return True
                self.counters.refused_shards += 1
                logger.warning("cache: %s arrived damaged (try %d of %d)", storage.redact(uri), attempt + 1, _TRIES)
        finally:
            with suppress(OSError):
                partial.unlink()
        raise DataError(
            f"cache: {storage.redact(uri)} has not the sha256 that dataset.json says, {_TRIES} times in a row. "
            "It was replaced or damaged in the store: check it with pipeline.verify --full"
        )

    def _download(self, uri: str, size: int, partial: Path) -> str:
        starts = range(0, size, _PART_BYTES)
        digest = hashlib.sha256()
        with partial.open("r+b") as file:
            # In order, so that the hash is taken while later parts are still under way.
            parts = self._fetcher.map(
                lambda start: storage.read_bytes(uri, start, min(_PART_BYTES, size - start)), starts
            )
            for part in parts:
                file.write(part)
                digest.update(part)
        return digest.hexdigest()

    def _reserve(self, partial: Path, needed: int) -> bool:
        """Make room for a download and take it at once, so that two downloads never count on the same room.

        Removes the shards unused for longest. A process that has one mapped keeps reading it: only its name goes.
        """
        with FileLock(f"{self._root}/evict.lock"):
            held = []
            for path in self._root.glob("*/*"):
                with suppress(OSError):
                    if not path.name.endswith(".lock"):
                        stat = path.stat()
                        held.append((stat.st_mtime, stat.st_size, path))
            total = sum(size for _, size, _ in held)
            for modified, size, path in sorted(held):
                if total + needed <= self._max_bytes:
                    break
                if _PARTIAL in path.name and time.time() - modified < _PARTIAL_LIVES_S:
                    continue
                with suppress(OSError):
                    path.unlink()
                    total -= size
                    self.counters.evicted_shards += 1
            if total + needed > self._max_bytes:
                return False
            with partial.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, needed)
            return True


class ShardReader:
    """Bytes of samples out of their shards, wherever those are.

    Args:
        manifest: the dataset.
        cache_dir: folder for copies of remote shards.
        cache_bytes: its budget.
        verify_hashes: `on` checks every sample's bytes against the manifest.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        cache_dir: Path | None = None,
        cache_bytes: int = 64 * 2**30,
        verify_hashes: str = "off",
    ) -> None:
        self._manifest = manifest
        self._verify = verify_hashes == "on"
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, U8] = OrderedDict()
        self._ranges = ThreadPoolExecutor(32, thread_name_prefix="range")
        self._cache = (
            None
            if storage.is_local(manifest.uri)
            else ShardCache(manifest, folder=cache_dir or default_cache_dir(), max_bytes=cache_bytes)
        )

    @property
    def counters(self) -> CacheCounters:
        """What the cache did; all zero for local shards."""
        return self._cache.counters if self._cache else CacheCounters()

    def prepare(self, shards: Iterable[int]) -> None:
        """Have shards staged in this order; returns at once."""
        if self._cache:
            self._cache.stage(shards)

    def read(self, rows: Rows) -> tuple[list[U8], dict[int, str]]:
        """Read the encoded images of some samples.

        Returns:
            One uint8 array a sample (a view of a mapped shard where that is local), and the reason of each that does
            not match the manifest's hash, by its place.

        Raises:
            DataError: a shard is missing or shorter than the manifest says.
            InfrastructureError: the storage failed for longer than the retries.
        """
        images: list[U8 | Future[bytes]] = []
        for shard, offset, size in zip(
            rows.shards_B.tolist(), rows.offsets_B.tolist(), rows.sizes_B.tolist(), strict=True
        ):
            mapped = self._mapped(shard)
            if mapped is not None:
                images.append(mapped[offset : offset + size])
            else:
                uri = self._manifest.shard_uri(shard)
                images.append(self._ranges.submit(storage.read_bytes, uri, offset, size))
        through = sum(isinstance(image, Future) for image in images)
        if self._cache:
            self._cache.counters.read_through += through
        done = [
            np.frombuffer(image.result(), dtype=np.uint8) if isinstance(image, Future) else image for image in images
        ]
        bad: dict[int, str] = {}
        # What came by range was not covered by a shard's hash, so it is always checked.
        for i, (image, expected) in enumerate(zip(done, rows.hashes_B.tolist(), strict=True)):
            if (self._verify or isinstance(images[i], Future)) and xxhash.xxh3_64_intdigest(image.data) != expected:
                again = self._reread(rows, i) if isinstance(images[i], Future) else None
                if again is None:
                    bad[i] = "hash mismatch"
                else:
                    done[i] = again
        return done, bad

    def close(self) -> None:
        """Let go of maps, threads and downloads."""
        self._ranges.shutdown(wait=True, cancel_futures=True)
        if self._cache:
            self._cache.close()
        self._maps.clear()

    def _reread(self, rows: Rows, i: int) -> U8 | None:
        uri = self._manifest.shard_uri(int(rows.shards_B[i]))
        for _ in range(_TRIES):
            image = np.frombuffer(storage.read_bytes(uri, int(rows.offsets_B[i]), int(rows.sizes_B[i])), dtype=np.uint8)
            if xxhash.xxh3_64_intdigest(image.data) == int(rows.hashes_B[i]):
                return image
        return None

    def _mapped(self, shard: int) -> U8 | None:
        with self._lock:
            mapped = self._maps.get(shard)
            if mapped is not None:
                self._maps.move_to_end(shard)
                return mapped
        if self._cache is None:
            path: Path | None = storage.local_path(self._manifest.shard_uri(shard))
        else:
            path = self._cache.staged(shard)
        if path is None:
            return None
        try:
            mapped = _map_file(path, expected_bytes=self._manifest.shard_bytes(shard))
            if self._cache is not None:
                os.utime(path)
        except FileNotFoundError as error:
            if self._cache is not None:
                return None  # evicted between the look and the map
            raise DataError(
                f"dataset: {path} is missing; dataset.json lists it. Restore it, or check with pipeline.verify"
            ) from error
        with self._lock:
            self._maps[shard] = mapped
            while len(self._maps) > _MAPPED_SHARDS:
                self._maps.popitem(last=False)
        return mapped


def _map_file(path: Path, *, expected_bytes: int) -> U8:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected_bytes:
            raise DataError(
                f"dataset: {path} has {size} bytes, the manifest says {expected_bytes}. It was cut or replaced: "
                "convert it again, or write its manifest anew with pipeline.verify --write-manifest"
            )
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
