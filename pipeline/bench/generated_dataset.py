"""Datasets of any size without an image: manifests that are real in form, for measuring what size
costs.

The manifest files are one file under many names, so that ten million samples are made in a second.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.info import (
    DATASET_FILE,
    DatasetInfo,
    ManifestFile,
    Shards,
    fingerprint_of,
)
from pipeline.dataset.writer import SHARDS_PER_FILE, write_dataset
from pipeline.formats.records import ShardFile, ShardIndex
from pipeline.formats.table import ShardTable, TableBuilder

_IMAGE_BYTES = 110_000
"""Mean size of an ImageNet-1k training image."""


def generate_manifest(
    folder: Path, *, num_shards: int, samples_per_shard: int
) -> DatasetInfo:
    """Write `dataset.json` and manifest files of a dataset whose shards do not exist.

    Args:
        folder: Empty local folder; made if needed.
        num_shards: Shards, all of one content.
        samples_per_shard: Samples in each.
    """
    table = _table(samples_per_shard)
    content_hash = table.content_hash()
    # Two files are written at most, a full one and the rest; all others are hard links.
    whole, rest = divmod(num_shards, SHARDS_PER_FILE)
    files: list[ManifestFile] = []
    info: DatasetInfo | None = None
    for count, times in ((SHARDS_PER_FILE, whole), (rest, 1)):
        if not count or not times:
            continue
        part = folder / f"part-{count}"
        shards = []
        for s in range(count):
            file = ShardFile(f"{s}", len(table), 1, "", content_hash)
            shards.append(ShardIndex(file, table))
        info = write_dataset(
            str(part), shards=shards, name="generated", container="webdataset"
        )
        source = part / info.manifest[0].name
        size_bytes = source.stat().st_size
        for _ in range(times):
            number = len(files)
            name = f"manifest-{number:05d}.parquet"
            os.link(source, folder / name)
            first_shard = number * SHARDS_PER_FILE
            files.append(ManifestFile(name, first_shard, count, size_bytes))
        shutil.rmtree(part)
    assert info is not None

    # Made up, but of the right length: reading `dataset.json` must cost what it costs for real.
    hashes = [f"{s:032x}" for s in range(num_shards)]
    columns: dict[str, list[Any]] = {
        "name": [f"train-{s:06d}.tar" for s in range(num_shards)],
        "num_samples": [samples_per_shard] * num_shards,
        "size_bytes": [samples_per_shard * _IMAGE_BYTES] * num_shards,
        "sha256": [f"{s:064x}" for s in range(num_shards)],
        "content_hash": hashes,
    }
    info = replace(
        info,
        num_samples=num_shards * samples_per_shard,
        num_shards=num_shards,
        manifest=files,
        shards=Shards(columns),
        fingerprint=fingerprint_of(hashes),
    )
    (folder / DATASET_FILE).write_bytes(info.to_json())
    return info


def _table(count: int) -> ShardTable:
    # Random, because equal hashes would compress to nothing, and so would the cost of reading.
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, count)
    builder = TableBuilder()
    for i, value in enumerate(hashes.tolist()):
        builder.add(
            f"n01440764_{i:06d}",
            offset=512 + i * _IMAGE_BYTES,
            size=_IMAGE_BYTES - 1024,
            label=i % 1000,
            width=500,
            height=375,
            image_format="jpeg",
            mode="RGB",
            xxh3=value,
        )
    return builder.build()
