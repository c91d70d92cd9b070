"""Bytes of samples out of their shards: mapped in place, out of the cache, or by range from the
store.

Shapes: B samples.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import storage
from pipeline.dataset.manifest import Manifest, Rows
from pipeline.errors import DataError
from pipeline.images.refused import Reason, Refused
from pipeline.reading.cache import CacheCounters, ShardCache, default_cache_dir

U8 = npt.NDArray[np.uint8]
_TRIES = 3
# Ranges of one sample are short: latency bounds them, not the network.
_RANGES_AT_ONCE = 32
# Each map is one of the 65,530 that Linux gives a process (vm.max_map_count).
_MOST_MAPS = 16_384


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
        # The read thread maps, and so does the decode thread when it looks for a substitute.
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, U8] = OrderedDict()
        self._max_maps = _maps_allowed()
        # A local shard is mapped where it lies: a copy of it would only take room.
        self._cache: ShardCache | None = None
        if not storage.is_local(manifest.uri):
            folder = cache_dir or default_cache_dir()
            self._cache = ShardCache(manifest, folder=folder, max_bytes=cache_bytes)
        self.counters = self._cache.counters if self._cache else CacheCounters()
        """What the cache did; all zero for local shards."""
        self._ranges = ThreadPoolExecutor(_RANGES_AT_ONCE, thread_name_prefix="range")

    @property
    def is_staging(self) -> bool:
        """Whether shards are copied to this machine's disk, so that it is of use to `prepare`
        them."""
        return self._cache is not None

    def prepare(self, shards: Iterable[int]) -> None:
        """Say which shards are read now and soon, first needed first; returns at once.

        They are staged in this order, after the first read, and no process removes them from the
        cache.
        """
        needed = list(shards)
        if self._cache is None or not self._cache.need(needed):
            return
        # A map keeps the disk space of a shard that was evicted: let go of what has passed.
        keep = set(needed)
        with self._lock:
            passed = [shard for shard in self._maps if shard not in keep]
            for shard in passed:
                del self._maps[shard]

    def read(
        self, rows: Rows, *, skip: Collection[int] = ()
    ) -> tuple[list[U8], dict[int, Refused]]:
        """Read the encoded images of some samples.

        Args:
            rows: where they lie.
            skip: places that are not read: what is refused already may be of any size. They come
                out empty.

        Returns:
            One uint8 array per sample (a view of a mapped shard if that is local), and the reason
            of each that does not match the manifest's hash, by its place.

        Raises:
            DataError: a shard is missing or shorter than the manifest says.
            InfrastructureError: the storage failed for longer than the retries.
        """
        # Ranges are all under way before the first is waited for.
        images: list[U8 | Future[U8]] = []
        shards = rows.shards_B.tolist()
        offsets = rows.offsets_B.tolist()
        sizes = rows.sizes_B.tolist()
        places = zip(shards, offsets, sizes, strict=True)
        for i, (shard, offset, size) in enumerate(places):
            if i in skip:
                images.append(np.empty(0, dtype=np.uint8))
                continue
            mapped = self._mapped(shard)
            if mapped is not None:
                images.append(mapped[offset : offset + size])
            else:
                future = self._ranges.submit(self._read_range, rows, i)
                images.append(future)
        by_range = {i for i, image in enumerate(images) if isinstance(image, Future)}
        # Counted before they are waited for: a read that fails was one, too.
        self.counters.add(read_through=len(by_range))
        done: list[U8] = []
        for image in images:
            if isinstance(image, Future):
                done.append(image.result())
            else:
                done.append(image)
        if self._cache is not None:
            self._cache.begin()  # not before: the first batch has the store to itself
        # What came by range was not covered by a shard's hash, so it is always checked.
        bad = {}
        for i, image in enumerate(done):
            is_checked = self._verify or i in by_range
            if i in skip or not is_checked:
                continue
            if not _matches(image, rows, i):
                bad[i] = Refused(Reason.HASH_DIFFERS)
        return done, bad

    def close(self) -> None:
        """Let go of maps, threads and downloads."""
        self._ranges.shutdown(wait=True, cancel_futures=True)
        if self._cache is not None:
            self._cache.close()
        with self._lock:
            self._maps.clear()

    def _read_range(self, rows: Rows, i: int) -> U8:
        """Read one sample by its own range, again if it arrives damaged; the last try is
        returned as it is."""
        shard = int(rows.shards_B[i])
        uri = self._manifest.shard_uri(shard)
        offset = int(rows.offsets_B[i])
        size = int(rows.sizes_B[i])
        # Tries of the content; a call that fails is tried again below, in `storage`.
        for _ in range(_TRIES):
            data = storage.read_view(
                uri, offset, size, on_retry=self.counters.count_retry
            )
            image = np.frombuffer(data, dtype=np.uint8)
            if _matches(image, rows, i):
                break
            self.counters.add(refused_samples=1)
        return image

    def _mapped(self, shard: int) -> U8 | None:
        with self._lock:
            mapped = self._maps.get(shard)
            if mapped is not None:
                self._maps.move_to_end(shard)
                return mapped
        if self._cache is None:
            mapped = self._map_local(shard)
        else:
            mapped = self._map_cached(self._cache, shard)
        if mapped is not None:
            with self._lock:
                self._maps[shard] = mapped
                # Only forgotten: images cut from a map keep it open until they are decoded.
                while len(self._maps) > self._max_maps:
                    self._maps.popitem(last=False)
        return mapped

    def _map_local(self, shard: int) -> U8:
        uri = self._manifest.shard_uri(shard)
        path = storage.local_path(uri)
        expected_bytes = self._manifest.shard_bytes(shard)
        try:
            mapped = _map_file(path)
        except FileNotFoundError as error:
            raise DataError(
                f"dataset: {path} is missing; dataset.json lists it. Restore it, or check with "
                "pipeline.verify"
            ) from error
        # Slices behind the end would come out short, and every one look like a damaged image.
        if mapped.size != expected_bytes:
            raise DataError(
                f"dataset: {path} has {mapped.size} bytes, the manifest says {expected_bytes}. It "
                "was cut or replaced: convert it again, or write its manifest anew with "
                "pipeline.verify --write-manifest"
            )
        return mapped

    def _map_cached(self, cache: ShardCache, shard: int) -> U8 | None:
        path = cache.staged(shard)
        if path is None:
            return None
        try:
            mapped = _map_file(path)
            with suppress(PermissionError, OSError):
                os.utime(path)  # the time of last use, by which the oldest is removed
        except FileNotFoundError:
            return None  # removed between the look and the map
        # It was verified before it got its name, so something on this machine has cut it since.
        if mapped.size == self._manifest.shard_bytes(shard):
            return mapped
        cache.drop(shard)
        return None


def _matches(image: U8, rows: Rows, i: int) -> bool:
    expected = int(rows.hashes_B[i])
    return xxhash.xxh3_64_intdigest(image.data) == expected


def _map_file(path: Path) -> U8:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.empty(0, dtype=np.uint8)  # nothing can be mapped
        # The map outlives the file's descriptor; the array keeps the map.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype=np.uint8)


def _maps_allowed() -> int:
    """Say how many shards may be mapped at once. Each map keeps a file open: the process's limit is
    raised for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        wanted = 2 * _MOST_MAPS
    else:
        wanted = min(2 * _MOST_MAPS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft == resource.RLIM_INFINITY:
        return _MOST_MAPS
    # The other half is for sockets, checkpoints and whatever else the run opens.
    return max(16, min(_MOST_MAPS, soft // 2))
