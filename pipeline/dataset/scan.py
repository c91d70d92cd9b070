"""Indexing of shards made elsewhere: one pass over each, the result kept so that it happens
once."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import storage
from pipeline.console import Progress
from pipeline.dataset.info import DATASET_FILE
from pipeline.errors import DataError
from pipeline.formats.index import index_shard
from pipeline.formats.records import SUFFIXES, ShardIndex

logger = logging.getLogger(__name__)
_THREADS = 8


def list_shards(uri: str) -> tuple[str, list[storage.FileInfo]]:
    """Return the container and the shards of a folder, by name.

    Raises:
        DataError: There is no such folder, no shard in it, or shards of two containers.
    """
    seen: Counter[str] = Counter()
    shards: dict[str, list[storage.FileInfo]] = {}
    for file in storage.list_files(uri):
        seen[Path(file.name).suffix.lower() or "no extension"] += 1
        for container, suffix in SUFFIXES.items():
            if file.name.endswith(suffix) and not file.name.startswith("."):
                shards.setdefault(container, []).append(file)
    if len(shards) > 1:
        raise DataError(
            f"dataset: {storage.redact(uri)} holds shards of several containers "
            f"({', '.join(sorted(shards))}). "
            "Give each a folder of its own."
        )
    if not shards:
        what = ", ".join(f"{count} {suffix}" for suffix, count in seen.most_common(5)) or "nothing"
        raise DataError(
            f"dataset: {storage.redact(uri)} holds neither {DATASET_FILE} nor tars or betons; "
            f"seen: {what}. "
            "Give the folder of the shards, or make shards from images with pipeline.convert."
        )
    ((container, found),) = shards.items()
    return container, sorted(found, key=lambda file: file.name)


def scan(uri: str, files: list[storage.FileInfo]) -> Iterator[ShardIndex | DataError]:
    """Index shards, several at a time, and yield in order what each holds, or why it cannot be
    indexed."""

    def one(file: storage.FileInfo) -> ShardIndex | DataError:
        try:
            return index_shard(file.uri)
        except DataError as error:
            return error

    workers = min(_THREADS, (os.cpu_count() or 1) if storage.is_local(uri) else _THREADS)
    label = f"Scanning {storage.name_of(uri)}"
    pool = ThreadPoolExecutor(workers, thread_name_prefix="scan")
    try:
        with Progress(label, total=len(files), unit="shards") as progress:
            waiting = [pool.submit(one, file) for file in files]
            waiting.reverse()  # a result is dropped as soon as it has been taken
            for file in files:
                yield waiting.pop().result()
                progress.advance(1, size_bytes=file.size_bytes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def finished_shards(uri: str, files: list[storage.FileInfo]) -> Iterator[ShardIndex]:
    """Index shards in order.

    Raises:
        DataError: One of them cannot be indexed.
    """
    ignored: Counter[str] = Counter()
    num_bad = 0
    for shard in scan(uri, files):
        if isinstance(shard, DataError):
            raise DataError(f"dataset: {shard}")
        ignored.update(shard.ignored)
        num_bad += len(shard.bad)
        yield shard
    if ignored:
        logger.warning("%s: passed over: %s", storage.redact(uri), dict(ignored))
    if num_bad:
        logger.warning(
            "%s: %d images cannot be read and will be replaced", storage.redact(uri), num_bad
        )
