"""Open a dataset; a folder of shards made elsewhere is scanned once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from pipeline.dataset.scan import (
    ShardFiles,
    finished_shards,
    is_selection,
    list_shards,
    logger,
)
from pipeline.dataset.writer import write_dataset
from pipeline.errors import ConfigError, DataError, InfrastructureError, MaelstromError
from pipeline.formats.compressed import is_unpacked_copy
from pipeline.formats.records import ShardIndex
from pipeline.images.left_out import LeftOut

_SCAN_VERSION = f"{FORMAT_VERSION}.2"
"""Part of a scan's name in the cache: a newer program that learns more of shards scans anew."""


def open_dataset(
    uri: str, *, cache_dir: Path | None = None, image_component: str | None = None
) -> Manifest:
    """Open a dataset by the folder that holds it, or some of its shards by their names.

    Without `dataset.json`, the folder's tars or betons are scanned once and the result is kept in
    `cache_dir`.

    Args:
        uri: Folder, or the `dataset.json` in it; or shards: a pattern such as `data/train-*.tar` or
            `data/train-{0000..0003}.tar`, a list with commas, or one file.
        cache_dir: Folder in which scans of foreign shards are kept; by default one under the
            user's cache directory.
        image_component: For shards made elsewhere, the member of a sample that is its image, such
            as `image.jpg`; None takes the usual ones.

    Raises:
        ConfigError: The pattern cannot be read, or `dataset.json` has chosen the images already.
        DataError: Not found, unfinished, empty or damaged.
    """
    folder = (
        uri.rstrip("/").removesuffix(f"/{DATASET_FILE}")
        if uri.endswith(DATASET_FILE)
        else uri
    )
    chosen = list_shards(folder) if is_selection(folder) else None
    if chosen is not None:
        folder = chosen.folder
    description = storage.join(folder, DATASET_FILE)
    where = f"dataset: {storage.redact(description)}"
    if storage.exists(description):
        info = parse_dataset_info(storage.read_twice(description), where=where)
        if info.num_samples == 0:
            raise DataError(
                f"{where}: the dataset is empty. Convert a folder that has images."
            )
        dataset = Manifest(folder, info)
        # Chosen shards keep the dataset's rows and class names; shards that it does not list are
        # scanned like those of any other folder.
        names = None if chosen is None else [file.name for file in chosen.files]
        if names is None or set(names) <= set(info.shards.columns["name"]):
            _refuse_component(image_component, where)
            return (
                dataset
                if names is None
                else _part_of(
                    dataset,
                    names,
                    cache_dir=cache_dir,
                )
            )
    elif storage.exists(storage.join(folder, PLAN_FILE)):
        raise DataError(
            f"dataset: {storage.redact(folder)} holds a conversion that has not finished "
            f"({PLAN_FILE} is there, "
            f"{DATASET_FILE} is not). Run the same pipeline.convert command again: it makes only "
            "what is missing."
        )

    return scan_cached(
        uri if chosen else folder,
        cache_dir=cache_dir,
        component=image_component,
    )


def _refuse_component(image_component: str | None, where: str) -> None:
    if image_component is not None:
        raise ConfigError(
            f"{where} says already which images the samples have, so --image-component "
            f"{image_component} changes nothing. Leave it out, or remove that file."
        )


def _part_of(
    dataset: Manifest,
    names: list[str],
    *,
    cache_dir: Path | None,
) -> Manifest:
    """Open some shards of a dataset, in the order named; class names and rows are the dataset's."""
    listed = dataset.info.shards.columns["name"]
    if names == listed:
        return dataset
    # Kept in the cache, as a scan is: a manifest has no way to skip row groups.
    number_of = {name: number for number, name in enumerate(listed)}

    def shards() -> Iterator[ShardIndex]:
        for name in names:
            number = number_of[name]
            yield ShardIndex(dataset.info.shards[number], dataset.shard_table(number))

    digest = hashlib.sha256(
        f"part\0{FORMAT_VERSION}\0{_place_of(dataset.uri)}".encode()
    )
    digest.update("\0".join([dataset.info.fingerprint, *names]).encode())
    index_uri = _index_uri(cache_dir, digest.hexdigest())
    with _cache_lock(dataset.uri, index_uri):
        info = _known(index_uri) or write_dataset(
            index_uri,
            shards=shards(),
            name=dataset.info.name,
            container=dataset.info.format,
            classes=dataset.info.classes,
            made_by={
                "tool": "part of a dataset",
                "fingerprint": dataset.info.fingerprint,
            },
            versions=dataset.info.versions,
        )
    return Manifest(
        dataset.uri,
        info,
        index_uri=index_uri,
    )


def default_cache_dir() -> Path:
    """Return the folder under the user's cache directory."""
    return Path(storage.cache_home()) / "maelstrom"


def scan_cached(
    uri: str,
    *,
    cache_dir: Path | None,
    component: str | None = None,
) -> Manifest:
    """Open shards that no `dataset.json` describes: scan them, or use the scan of an earlier run.

    The scan is kept by the folder's URI and every shard's name, size and version: a changed shard
    is scanned anew.

    Raises:
        DataError: No shards, or one that is damaged.
    """
    found = list_shards(uri)
    digest = hashlib.sha256(f"{_SCAN_VERSION}\0{_place_of(found.folder)}".encode())
    if component is not None:
        digest.update(f"\0component {component}".encode())
    for file in found.files:
        digest.update(f"\0{file.name}\0{file.size_bytes}\0{file.version}".encode())
    index_uri = _index_uri(cache_dir, digest.hexdigest())
    # The ranks of a node start together: one scans, the rest wait.
    with _cache_lock(uri, index_uri):
        info = _known(index_uri) or _scan_once(
            uri,
            found,
            index_uri,
            component,
        )
    return Manifest(
        found.folder,
        info,
        index_uri=index_uri,
    )


def _place_of(folder: str) -> str:
    """Return a folder's address, the same for every way to write a local one."""
    return (
        str(storage.local_path(folder).resolve())
        if storage.is_local(folder)
        else folder
    )


def _index_uri(cache_dir: Path | None, digest: str) -> str:
    return str((cache_dir or default_cache_dir()) / "scans" / digest[:32])


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


def _known(index_uri: str) -> DatasetInfo | None:
    """Return what an earlier run has kept."""
    description = storage.join(index_uri, DATASET_FILE)
    if not storage.exists(description):
        return None
    return parse_dataset_info(
        storage.read_bytes(description), where=f"dataset: {description}"
    )


def _scan_once(
    uri: str,
    found: ShardFiles,
    index_uri: str,
    component: str | None,
) -> DatasetInfo:
    chosen = "" if component is None else f" --image-component {component}"
    # An unpacked copy is removed with the command: there is no place to keep an index.
    if not is_unpacked_copy(uri):
        logger.warning(
            "%s has no %s: its %d shards are scanned once. To keep the result beside them: "
            "python -m pipeline.verify %s --write-manifest%s",
            storage.redact(uri),
            DATASET_FILE,
            len(found.files),
            storage.redact(found.folder),
            chosen,
        )
    # Filled while the shards pass: it is written after the last of them.
    left_out = LeftOut()
    made_by: dict[str, Any] = {"tool": "scan"}
    if component is not None:
        made_by["image_component"] = component

    def shards() -> Iterator[ShardIndex]:
        yield from finished_shards(
            found,
            left_out,
            image_component=component,
        )
        made_by["left_out"] = dict(left_out.counts)

    return write_dataset(
        index_uri,
        shards=shards(),
        name=storage.name_of(uri),
        container=found.container,
        made_by=made_by,
    )
