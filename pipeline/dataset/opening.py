"""Open a dataset; a folder of shards made elsewhere is scanned once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock

from pipeline import storage
from pipeline.dataset.info import (
    DATASET_FILE,
    FORMAT_VERSION,
    PLAN_FILE,
    DatasetInfo,
    parse_dataset_info,
)
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.scan import finished_shards, list_shards, logger
from pipeline.dataset.writer import write_dataset
from pipeline.errors import DataError, InfrastructureError, MaelstromError


def open_dataset(uri: str, *, cache_dir: Path | None = None) -> Manifest:
    """Open a dataset by the folder that holds it.

    Without `dataset.json`, the folder's tars or betons are scanned once and the result is kept in
    `cache_dir`.

    Args:
        uri: Folder, or the `dataset.json` in it.
        cache_dir: Folder in which scans of foreign shards are kept; by default one under the
            user's cache directory.

    Raises:
        DataError: Not found, unfinished, empty or damaged.
    """
    folder = uri.rstrip("/").removesuffix(f"/{DATASET_FILE}") if uri.endswith(DATASET_FILE) else uri
    description = storage.join(folder, DATASET_FILE)
    where = f"dataset: {storage.redact(description)}"
    if storage.exists(description):
        info = parse_dataset_info(storage.read_twice(description), where=where)
        if info.num_samples == 0:
            raise DataError(f"{where}: the dataset is empty. Convert a folder that has images.")
        return Manifest(folder, info)
    if storage.exists(storage.join(folder, PLAN_FILE)):
        raise DataError(
            f"dataset: {storage.redact(folder)} holds a conversion that has not finished "
            f"({PLAN_FILE} is there, "
            f"{DATASET_FILE} is not). Run the same pipeline.convert command again: it makes only "
            "what is missing."
        )

    return scan_cached(folder, cache_dir=cache_dir)


def default_cache_dir() -> Path:
    """Return the folder under the user's cache directory."""
    return Path(storage.cache_home()) / "maelstrom"


def scan_cached(uri: str, *, cache_dir: Path | None) -> Manifest:
    """Open a folder of shards that has no `dataset.json`: scan it, or use the scan of an earlier
    run.

    The scan is kept by the folder's URI and every shard's name, size and version: a changed shard
    is scanned anew.

    Raises:
        DataError: No shards, or one that is damaged.
    """
    container, files = list_shards(uri)
    where = str(storage.local_path(uri).resolve()) if storage.is_local(uri) else uri
    digest = hashlib.sha256(f"{FORMAT_VERSION}\0{where}".encode())
    for file in files:
        digest.update(f"\0{file.name}\0{file.size_bytes}\0{file.version}".encode())
    index_uri = str((cache_dir or default_cache_dir()) / "scans" / digest.hexdigest()[:32])
    # The ranks of a node start together: one scans, the rest wait.
    with _cache_lock(uri, index_uri):
        info = _scan_once(uri, container, files, index_uri)
    return Manifest(uri, info, index_uri=index_uri)


def _cache_lock(uri: str, index_uri: str) -> AcquireReturnProxy:
    """Take the lock of a scan's folder in the cache.

    Raises:
        InfrastructureError: The cache cannot be written.
    """
    try:
        storage.make_folder(index_uri)
        return FileLock(storage.join(index_uri, "lock")).acquire()
    except (OSError, MaelstromError) as error:
        shown = storage.redact(uri)
        raise InfrastructureError(
            f"dataset: {shown} has no {DATASET_FILE}, so that its index is kept in the cache, "
            f"which cannot be written: {error} Set XDG_CACHE_HOME to a folder that can be written, "
            f"or keep the index next to the shards: python -m pipeline.verify {shown} "
            "--write-manifest"
        ) from error


def _scan_once(
    uri: str, container: str, files: list[storage.FileInfo], index_uri: str
) -> DatasetInfo:
    description = storage.join(index_uri, DATASET_FILE)
    if storage.exists(description):
        return parse_dataset_info(storage.read_bytes(description), where=f"dataset: {description}")
    logger.warning(
        "%s has no %s: its %d shards are scanned once. To keep the result beside them: "
        "python -m pipeline.verify %s --write-manifest",
        storage.redact(uri),
        DATASET_FILE,
        len(files),
        storage.redact(uri),
    )
    return write_dataset(
        index_uri,
        shards=finished_shards(uri, files),
        name=storage.name_of(uri),
        container=container,
        made_by={"tool": "scan"},
    )
