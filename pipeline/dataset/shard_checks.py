"""What can be wrong with one shard: its size, its rows in the manifest, its bytes, its images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.dataset.info import DATASET_FILE
from pipeline.dataset.manifest import Manifest
from pipeline.errors import DataError
from pipeline.formats.index import index_shard
from pipeline.formats.records import ShardIndex
from pipeline.formats.table import FORMATS, ShardTable
from pipeline.images.decodable import undecodable


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Args:
        shard: File it is in; empty if it concerns the whole dataset.
        key: Sample it concerns, or empty.
        problem: What is wrong.
    """

    shard: str
    key: str
    problem: str


def check_shard(
    manifest: Manifest, s: int, present: dict[str, int], *, full: bool
) -> list[Problem]:
    """Return what is wrong with one shard.

    Args:
        manifest: Of the dataset.
        s: Number of the shard.
        present: Bytes of the files in the dataset's folder, by name.
        full: Read and decode everything.
    """
    name = manifest.shard_name(s)
    expected = manifest.info.shards[s]
    if name not in present:
        missing = Problem(name, "", "missing")
        return [missing]
    problems = []
    size_bytes = present[name]
    if size_bytes != expected.size_bytes:
        text = f"{size_bytes} bytes, {DATASET_FILE} says {expected.size_bytes}"
        problems.append(Problem(name, "", text))
    try:
        table = manifest.shard_table(s)
        inconsistent = _inconsistent(name, table, expected.size_bytes)
        problems.extend(inconsistent)
        # Of the rows, not of the shard's bytes: a manifest can be exchanged for another one's.
        if table.content_hash() != expected.content_hash:
            text = f"the manifest's rows have not the content hash in {DATASET_FILE}"
            problems.append(Problem(name, "", text))
    except DataError as error:
        # Without its rows the shard's bytes cannot be compared.
        damaged = Problem(name, "", str(error))
        return [*problems, damaged]
    if full:
        of_bytes = _verify_bytes(manifest, s, table)
        problems.extend(of_bytes)
    return problems


def _inconsistent(name: str, table: ShardTable, size_bytes: int) -> Iterator[Problem]:
    """Find rows that cannot be true: outside the file, on top of each other."""
    ends = table.offsets + table.sizes
    is_negative = (table.offsets < 0) | (table.sizes < 0)
    is_outside = is_negative | (ends > size_bytes)
    outside = np.flatnonzero(is_outside)
    for row in outside.tolist():
        start = table.offsets[row]
        end = ends[row]
        text = f"bytes {start} to {end} lie outside the file"
        yield Problem(name, table.keys[row], text)
    # By offset, not by row: FFCV's workers write a beton's pages out of order.
    order = np.argsort(table.offsets, kind="stable")
    starts = table.offsets[order]
    sizes = table.sizes[order]
    ends = ends[order]
    # Links in a foreign tar share the bytes of one member: the same place, not a part of it.
    starts_same = starts[1:] == starts[:-1]
    has_same_size = np.diff(sizes) == 0
    is_same = starts_same & has_same_size
    overlaps = starts[1:] < ends[:-1]
    wrong = overlaps & ~is_same
    rows = order[1:][wrong]
    for row in rows.tolist():
        yield Problem(name, table.keys[row], "lies on top of the sample before it")


def _verify_bytes(manifest: Manifest, s: int, table: ShardTable) -> list[Problem]:
    name = manifest.shard_name(s)
    try:
        component = manifest.info.made_by.get("image_component")
        index = index_shard(manifest.shard_uri(s), image_component=component)
    except DataError as error:
        damaged = Problem(name, "", str(error))
        return [damaged]
    problems = []
    sha256 = index.file.sha256
    expected = manifest.shard_sha256(s)
    # Not the end of it: the rows tell which of the images are concerned.
    if sha256 != expected:
        text = f"sha256 is {sha256}, {DATASET_FILE} says {expected}"
        problems.append(Problem(name, "", text))
    different = _different(name, table, index.table)
    problems.extend(different)
    uri = manifest.shard_uri(s)
    undecodable_ones = find_undecodable(uri, name, index)
    problems.extend(undecodable_ones)
    return problems


def _different(name: str, said: ShardTable, found: ShardTable) -> Iterator[Problem]:
    """Compare the manifest's rows with the file's."""
    if said.keys != found.keys:
        # Rows cannot be paired any more: one line says what is missing.
        missing = set(said.keys) - set(found.keys)
        some_missing = sorted(missing)[:5]
        counts = f"{len(found)} samples in the file, {len(said)} in the manifest"
        text = f"{counts}; missing {some_missing}"
        yield Problem(name, "", text)
        return
    for column, what in (
        ("hashes", "the image's bytes are not those the manifest knows (xxh3)"),
        ("offsets", "the image lies elsewhere than the manifest says"),
        ("sizes", "the image's size is not that in the manifest"),
        ("labels", "the label is not that in the manifest"),
        ("widths", "the width is not that in the manifest"),
        ("heights", "the height is not that in the manifest"),
    ):
        said_values = getattr(said, column)
        found_values = getattr(found, column)
        rows = np.flatnonzero(said_values != found_values)
        for row in rows.tolist():
            yield Problem(name, said.keys[row], what)


def find_undecodable(uri: str, name: str, index: ShardIndex) -> Iterator[Problem]:
    """Yield the images of an indexed shard that cannot be decoded, or are refused by their header.

    Args:
        uri: The shard.
        name: What to call it.
        index: Of its images.
    """
    table = index.table
    reasons = dict(index.bad)
    with storage.open_read(uri) as file:
        for row, key in enumerate(table.keys):
            if key in reasons:
                yield Problem(name, key, str(reasons[key]))
                continue
            if FORMATS[table.formats[row]] == "raw":
                # Bare pixels: their count was checked with the index; there is nothing to decode.
                continue
            offset = int(table.offsets[row])
            size = int(table.sizes[row])
            file.seek(offset)
            data = file.read(size)
            refused = undecodable(data)
            if refused:
                yield Problem(name, key, str(refused))
