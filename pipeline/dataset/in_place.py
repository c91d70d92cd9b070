"""Makes a dataset of shards that were made elsewhere, without moving them: an index beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.dataset.info import DATASET_FILE, PLAN_FILE, DatasetInfo
from pipeline.dataset.scan import (
    ShardFiles,
    container_of,
    finished_shards,
    is_selection,
    list_shards,
)
from pipeline.dataset.writer import write_dataset
from pipeline.errors import ConfigError
from pipeline.formats.records import SUFFIXES, ShardIndex
from pipeline.images.left_out import LeftOut
from pipeline.images.refused import Refused


@dataclass(frozen=True)
class InPlace:
    """What was written.

    Args:
        info: The new `dataset.json`.
        left_out: What is in the shards and not used.
        bad: Shard, key and reason of each image that cannot be read.
    """

    info: DatasetInfo
    left_out: LeftOut
    bad: list[tuple[str, str, Refused]] = field(default_factory=list)


def index_in_place(uri: str, *, image_component: str | None = None) -> InPlace:
    """Write `manifest.parquet`, `dataset.json` and, for tars, DALI's indexes beside shards.

    Args:
        uri: The folder, or a pattern that names all shards in it.
        image_component: Member of a sample that is its image, such as `image.jpg`.

    Raises:
        ConfigError: There is a dataset, or an unfinished conversion, already; or other shards.
        DataError: A shard is damaged.
        InfrastructureError: The folder cannot be written.
    """
    found = list_shards(uri)
    _refuse_owned(found.folder)
    _refuse_others(uri, found)
    left_out = LeftOut()
    bad: list[tuple[str, str, Refused]] = []
    made_by: dict[str, Any] = {"tool": "pipeline.verify --write-manifest"}
    if image_component is not None:
        made_by["image_component"] = image_component

    def shards() -> Iterator[ShardIndex]:
        for shard in finished_shards(
            found,
            left_out,
            image_component=image_component,
        ):
            name = shard.file.name
            bad.extend((name, key, refused) for key, refused in shard.bad)
            if shard.dali_index:
                # By length: the ending may be written .TAR.
                stem = name[: -len(SUFFIXES["webdataset"])]
                index_uri = storage.join(found.folder, f"{stem}.idx")
                storage.write_atomic(index_uri, shard.dali_index)
            yield shard
        # The description is written after the last shard: by now all is counted.
        made_by["left_out"] = dict(left_out.counts)

    info = write_dataset(
        found.folder,
        shards=shards(),
        name=storage.name_of(found.folder),
        container=found.container,
        made_by=made_by,
    )
    return InPlace(info, left_out, bad)


def _refuse_owned(folder: str) -> None:
    """Refuse a folder that is a dataset already, or becomes one."""
    for name in (DATASET_FILE, PLAN_FILE):
        if storage.exists(storage.join(folder, name)):
            raise ConfigError(
                f"verify: {storage.redact(folder)} already has {name}. Verify it without "
                "--write-manifest, or remove that file first."
            )


def _refuse_others(uri: str, found: ShardFiles) -> None:
    """Refuse to describe some of a folder's shards: its `dataset.json` must know them all."""
    if not is_selection(uri):
        return
    chosen = {file.name for file in found.files}
    others = []
    for file in storage.list_files(found.folder):
        is_shard = container_of(file.name) is not None and not storage.is_hidden(
            file.name
        )
        if is_shard and file.name not in chosen:
            others.append(file.name)
    if others:
        raise ConfigError(
            f"verify: {storage.redact(found.folder)} also holds {min(others)}, and one "
            f"{DATASET_FILE} describes all shards of a folder. Move the shards that you mean into "
            "a folder of their own; or use the pattern as it is: its scan is kept in the cache."
        )
