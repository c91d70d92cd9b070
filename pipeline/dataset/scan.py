"""Indexing of shards made elsewhere: one pass over each, the result kept so that it happens
once."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline import storage
from pipeline.console import Progress
from pipeline.dataset.info import DATASET_FILE
from pipeline.dataset.splits import pattern_per_split
from pipeline.errors import DataError
from pipeline.formats.compressed import compression_of_name
from pipeline.formats.index import index_shard
from pipeline.formats.records import DEAD_LINK, SUFFIXES, EmptyShardError, ShardIndex
from pipeline.images.left_out import LeftOut, printable

logger = logging.getLogger(__name__)
EMPTY_ARCHIVE = "empty archive"
_THREADS = 8
_MOST_LOOKED_AT = 20_000
_MOST_FOLDERS = 5
"""Folders that a message names."""
"""Files that are listed for a message's sake."""


@dataclass(frozen=True)
class ShardFiles:
    """The shards that an address stands for.

    Args:
        folder: URI of the folder that they all lie in.
        container: `webdataset` or `ffcv`.
        files: The shards, by name or as they were listed.
    """

    folder: str
    container: str
    files: list[storage.FileInfo]


def is_selection(uri: str) -> bool:
    """Tell whether an address names shard files, and not the folder that holds them."""
    if storage.names_several(uri):
        return True
    return container_of(storage.name_of(uri)) is not None and not storage.is_folder(uri)


def container_of(name: str) -> str | None:
    """Return the container that a file's name says; None if it is not a shard's name."""
    lower = name.lower()
    return next(
        (kind for kind, suffix in SUFFIXES.items() if lower.endswith(suffix)), None
    )


def list_shards(uri: str) -> ShardFiles:
    """Return the shards of a folder, a pattern, a list or one file.

    Raises:
        DataError: There is no such folder, no shard in it, shards of two containers or of several
            splits.
    """
    if is_selection(uri):
        return _selected(uri)
    is_file = (
        storage.is_local(uri) and storage.exists(uri) and not storage.is_folder(uri)
    )
    if is_file:
        raise DataError(
            f"dataset: {storage.redact(uri)} is a file, and not a tar or beton. Give a folder of "
            f"shards, its shards as a pattern, or make shards from it: {_how_to_convert(uri)}"
        )
    seen: Counter[str] = Counter()
    shards: list[storage.FileInfo] = []
    folders: list[str] = []

    def on_other(name: str, entry: storage.OtherEntry) -> None:
        if entry is storage.OtherEntry.FOLDER and not storage.is_hidden(name):
            folders.append(name)

    for file in storage.list_files(uri, on_other=on_other):
        if storage.is_hidden(file.name):
            seen["hidden"] += 1
            continue
        seen[_ending_of(file.name)] += 1
        if container_of(file.name) is not None:
            shards.append(file)
    if not shards:
        raise DataError(_why_no_shards(uri, seen, folders))
    shards.sort(key=lambda file: file.name)
    _refuse_splits(uri, shards)
    return ShardFiles(
        uri,
        _one_container(uri, shards),
        shards,
    )


def _selected(uri: str) -> ShardFiles:
    files = (
        storage.find_named(uri)
        if storage.names_several(uri)
        else [storage.find_one(uri)]
    )
    strangers = [file.name for file in files if container_of(file.name) is None]
    if strangers:
        raise DataError(
            f"dataset: {storage.redact(uri)} names {strangers[0]}, which is not a tar or beton. "
            "Give a pattern that ends in .tar or .beton."
        )
    # A manifest names its shards without a folder: two folders may have a shard of one name.
    folders = list(dict.fromkeys(storage.folder_of(file.uri) for file in files))
    if len(folders) > 1:
        named = " and ".join(storage.redact(folder) for folder in folders[:2])
        raise DataError(
            f"dataset: {storage.redact(uri)} names shards in several folders ({named}). The shards "
            "of a dataset lie in one folder: link them into one, or convert each folder."
        )
    return ShardFiles(
        folders[0],
        _one_container(uri, files),
        files,
    )


def _one_container(uri: str, files: list[storage.FileInfo]) -> str:
    containers = sorted({str(container_of(file.name)) for file in files})
    if len(containers) > 1:
        raise DataError(
            f"dataset: {storage.redact(uri)} holds shards of several containers "
            f"({', '.join(containers)}). "
            "Give each a folder of its own."
        )
    return containers[0]


def _refuse_splits(uri: str, files: list[storage.FileInfo]) -> None:
    """Refuse train and validation shards in one folder: they are not one dataset."""
    patterns = pattern_per_split(file.name for file in files)
    if patterns:
        raise DataError(
            say_splits(
                "dataset",
                uri,
                patterns,
            )
        )


def say_splits(
    command: str,
    uri: str,
    patterns: dict[str, str],
) -> str:
    """Return what to tell about a folder that holds several splits.

    Args:
        command: Start of the message.
        uri: The folder.
        patterns: What to type for each split.
    """
    # A list is complete for each of its files, a pattern only behind the folder.
    choices = [
        f"{split}: {','.join(storage.join(uri, name) for name in pattern.split(','))}"
        for split, pattern in patterns.items()
    ]
    return (
        f"{command}: {storage.redact(uri)} holds files of {', '.join(patterns)}, which are splits "
        f"and not one dataset. Give one of them, in quotes: {storage.redact('; '.join(choices))}"
    )


def _ending_of(name: str) -> str:
    compressed = compression_of_name(name)
    if compressed is not None:
        return compressed.ending
    return Path(name).suffix.lower() or "no extension"


def _why_no_shards(uri: str, seen: Counter[str], folders: list[str]) -> str:
    """Return what to tell about a folder without shards: what is there, and what to do next."""
    shown = storage.redact(uri)
    what = (
        ", ".join(f"{count} {ending}" for ending, count in seen.most_common(5))
        or "no files"
    )
    if folders:
        named = ", ".join(printable(name) for name in sorted(folders)[:_MOST_FOLDERS])
        more = ", ..." if len(folders) > _MOST_FOLDERS else ""
        what += f" and {len(folders):,} folders ({named}{more})"
    packed = [
        ending for ending in seen if compression_of_name(f"x{ending}") is not None
    ]
    if packed:
        return (
            f"dataset: {shown} holds compressed archives ({what}), in which no image can be found "
            f"without reading all before it. Make shards of them: {_how_to_convert(uri)}"
        )
    # Only now: going through all folders of a bucket takes long, and is for this message alone.
    deeper = folders_below(uri)
    if deeper:
        named = ", ".join(
            storage.redact(storage.join(uri, name)) for name in deeper[:5]
        )
        return f"dataset: {shown} holds no shards itself. Give the folder that does: {named}"
    return (
        f"dataset: {shown} holds neither {DATASET_FILE} nor tars or betons; seen: {what}. "
        f"Give the folder of the shards, or make shards from images: {_how_to_convert(uri)}"
    )


def _how_to_convert(uri: str) -> str:
    return f"python -m pipeline.convert {storage.redact(uri)} DST"


def folders_below(uri: str) -> list[str]:
    """Return the folders below a folder that hold shards, such as `train`; for messages."""
    found: dict[str, None] = {}
    for file in islice(storage.list_files(uri, recursive=True), _MOST_LOOKED_AT):
        folder, _, name = file.name.rpartition("/")
        is_shard = container_of(name) is not None or name == DATASET_FILE
        if folder and is_shard and not storage.is_hidden(file.name):
            found[folder] = None
    return sorted(found)


def scan(
    uri: str, files: list[storage.FileInfo], *, image_component: str | None = None
) -> Iterator[ShardIndex | DataError]:
    """Index shards, several at a time, and yield in order what each holds, or why it cannot be
    indexed.

    Args:
        uri: What they belong to.
        files: The shards.
        image_component: Member of a sample that is its image, as `index_shard` takes it.
    """

    def one(file: storage.FileInfo) -> ShardIndex | DataError:
        try:
            return index_shard(file.uri, image_component=image_component)
        except DataError as error:
            return error

    workers = min(
        _THREADS, (os.cpu_count() or 1) if storage.is_local(uri) else _THREADS
    )
    label = f"Scanning {storage.name_of(uri)}"
    pool = ThreadPoolExecutor(workers, thread_name_prefix="scan")
    try:
        with Progress(
            label,
            total=len(files),
            unit="shards",
        ) as progress:
            waiting = [pool.submit(one, file) for file in files]
            waiting.reverse()  # a result is dropped as soon as it has been taken
            for file in files:
                yield waiting.pop().result()
                progress.advance(1, size_bytes=file.size_bytes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def finished_shards(
    found: ShardFiles, left_out: LeftOut, *, image_component: str | None = None
) -> Iterator[ShardIndex]:
    """Index shards in order.

    Args:
        found: The shards.
        left_out: Told what is in the shards and not used; complete at the end.
        image_component: Member of a sample that is its image, as `index_shard` takes it.

    Raises:
        DataError: One of them cannot be indexed, or all are empty.
    """
    shown = storage.redact(found.folder)
    num_bad = 0
    num_good = 0
    shards = scan(
        found.folder,
        found.files,
        image_component=image_component,
    )
    for file, shard in zip(
        found.files,
        shards,
        strict=True,
    ):
        if isinstance(shard, EmptyShardError):
            # A job that had no images left closes an archive without members.
            left_out.add(EMPTY_ARCHIVE, file.name)
            continue
        if isinstance(shard, DataError):
            raise DataError(f"dataset: {shard}")
        left_out.count(shard.ignored)
        if shard.dead_links:
            left_out.names.setdefault(DEAD_LINK, []).extend(shard.dead_links)
        num_bad += len(shard.bad)
        num_good += 1
        yield shard
    if not num_good:
        raise DataError(f"dataset: {shown}: all {len(found.files)} archives are empty.")
    if left_out:
        logger.warning(
            "%s: left out: %s",
            shown,
            left_out.say(),
        )
    if num_bad:
        logger.warning(
            "%s: %d images cannot be read and will be replaced",
            shown,
            num_bad,
        )
