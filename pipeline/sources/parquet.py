"""Images inside Parquet files, as data set hubs keep them: a column of bytes, or of (bytes, path),
and a label.

Images cannot be read one by one, only by the row group, and a shuffle across all of them would read
every row group once a shard. So whole row groups are shuffled, laid end to end and cut into shards,
and each shard is shuffled in itself: a shard reads its own row groups, streamed, and at most one of
each neighbour's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.console import Progress
from pipeline.errors import ConfigError, DataError
from pipeline.images.left_out import LeftOut
from pipeline.images.refused import Refused
from pipeline.sources.columns import (
    choose_column,
    choose_label,
    find_files,
    labels_of_files,
    open_parquet,
)
from pipeline.sources.listing import (
    QUIET_S,
    Listing,
    SourceSettings,
    Wanted,
    name_and_class,
)
from pipeline.sources.names import sample_keys
from pipeline.sources.tables.image_field import (
    IMAGE_COLUMNS,
    ImageField,
    explain_lists,
    fields_of,
    readable_texts,
)
from pipeline.sources.tables.label_column import LabelPart

LOCATION = np.dtype([("file", np.int32), ("group", np.int32), ("row", np.int32)])
"""Where an image lies: number of the file, row group in the file, row in the group."""
_BATCH_ROWS = 64
"""Rows decoded at a time: a row group of photographs may not fit into memory."""
_READERS = 16


@dataclass(frozen=True)
class _Columns:
    image: ImageField
    label: str | None


class ParquetSource:
    """Images in a column of Parquet files.

    Args:
        uri: A folder of Parquet files, one file, or a pattern such as data/train-*.parquet.
        settings: Which columns are meant.
    """

    def __init__(self, uri: str, settings: SourceSettings | None = None) -> None:
        self.uri = uri
        self._settings = settings or SourceSettings()

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the image's path as the table has it, and its class if it has one."""
        return name_and_class(name, class_name)

    def _columns(self, schema: pa.Schema, shown: str) -> _Columns:
        image = self._image_field(schema, shown)
        # Another file may have the column: whether none has it is seen when all have been read.
        label = choose_label(
            list(schema.names), self._settings, shown=shown, is_needed=False
        )
        return _Columns(image, label)

    def _image_field(self, schema: pa.Schema, shown: str) -> ImageField:
        """Return the column of images.

        Raises:
            ConfigError: It cannot be told which one it is.
        """
        fields = [field for field in fields_of(schema) if field.bytes_path]
        names = [field.name for field in fields]
        option = "--image-column"
        chosen = choose_column(
            names,
            IMAGE_COLUMNS,
            self._settings.image_column,
            option=option,
            shown=shown,
        )
        # A record's field is taken only if no column holds images.
        columns = [field.name for field in fields if len(field.names) == 1]
        alone = columns or names
        if chosen is None and len(alone) == 1:
            chosen = alone[0]
        if chosen is None:
            raise ConfigError(
                f"convert: {shown} has no column of images with a usual name; columns with bytes: "
                f"{', '.join(names) or 'none'}; all columns: {', '.join(schema.names)}. "
                f"Choose one with {option}.{explain_lists(schema)}"
            )
        return fields[names.index(chosen)]

    def listing(self) -> Listing:
        """Return the images in the order of the files; sizes are the mean of their row group.

        Raises:
            DataError: No file, a damaged one, or no row.
            ConfigError: It cannot be told which column holds the images.
        """
        files = find_files(self.uri)
        indices = self._read_indices(files)
        shown = storage.redact(self.uri)
        names = pa.concat_arrays([index.names for index in indices])
        if not len(names):
            raise DataError(f"convert: {shown} has no rows. Check that it is complete.")
        # Together, not file by file: the types of their columns may differ.
        columns: list[str] = []
        for index in indices:
            columns.extend(index.columns)
        parts = [index.label for index in indices]
        left_out = LeftOut()
        labels, classes = labels_of_files(
            parts,
            columns,
            self._settings,
            shown=shown,
            left_out=left_out,
        )

        rows_per_group = np.concatenate([index.rows_per_group for index in indices])
        group_ends = np.cumsum(rows_per_group)
        sizes = np.concatenate([index.sizes for index in indices])
        locations = np.concatenate([index.locations for index in indices])
        names_and_sizes = [(file.name, file.size_bytes) for file in files]
        safe_names = _safe(names)
        keys = sample_keys(safe_names)
        # Each once: an empty group ends where it starts.
        group_bounds = np.append(0, group_ends)
        runs = np.unique(group_bounds)
        return Listing(
            uri=self.uri,
            names=names,
            sizes=sizes,
            labels=labels,
            classes=classes,
            passed_over={},
            left_out=left_out,
            kind="parquet",
            keys=keys,
            # The sizes of the files stand for their content, which is too much to hash here.
            fingerprint=json.dumps(names_and_sizes),
            locations=locations,
            files=tuple(file.uri for file in files),
            runs=runs.astype(np.int64),
        )

    def _read_indices(self, files: list[storage.FileInfo]) -> list[_Index]:
        """Read all of all files but the images, in the order of the files."""
        # A local disk gains little by several readers; a store answers many requests at once.
        threads = _READERS
        if storage.is_local(self.uri):
            threads = 1
        source_name = storage.name_of(self.uri)
        indices: list[_Index] = []
        with (
            Progress(
                f"Reading the index of {source_name}",
                total=len(files),
                unit="files",
                after_s=QUIET_S,
            ) as progress,
            ThreadPoolExecutor(threads, thread_name_prefix="parquet") as pool,
        ):
            numbers = range(len(files))
            for index in pool.map(self._read_index, numbers, files):
                indices.append(index)
                progress.advance(1)
        return indices

    def _read_index(self, number: int, file: storage.FileInfo) -> _Index:
        """Read all of a file but the images."""
        shown = storage.redact(file.uri)
        with open_parquet(file.uri) as parquet:
            schema = parquet.schema_arrow
            columns = self._columns(schema, shown)
            image = columns.image
            metadata = parquet.metadata
            groups = [
                metadata.row_group(number) for number in range(parquet.num_row_groups)
            ]
            num_rows = [group.num_rows for group in groups]
            rows_per_group = np.array(num_rows, np.int64)

            # The footer has no size per image, only per column of a row group: all get the mean.
            image_bytes = [
                _column_bytes(group, image.bytes_path, shown) for group in groups
            ]
            # A group may be empty.
            divisors = np.maximum(1, rows_per_group)
            mean_bytes = np.array(image_bytes, np.int64) // divisors

            # One column at a time: two of one name, or a name in a record, cannot be mixed up.
            count = int(rows_per_group.sum())
            paths = None
            if image.text_path:
                table = parquet.read(columns=[image.text_path], use_threads=False)
                paths = image.leaf(table)
            labels = pa.chunked_array([pa.nulls(count)])
            if columns.label is not None:
                table = parquet.read(columns=[columns.label], use_threads=False)
                labels = table.column(0)

        label = LabelPart(
            shown=shown,
            column=columns.label,
            values=labels,
            class_names=_class_names(schema, columns.label),
        )
        return _Index(
            names=_image_names(file, paths, count),
            label=label,
            columns=list(schema.names),
            sizes=np.repeat(mean_bytes, rows_per_group),
            locations=file_locations(number, rows_per_group),
            rows_per_group=rows_per_group,
        )

    def read_all(self, wanted: Wanted) -> Iterator[bytes | Refused]:
        """Yield the images; a shard's are held at once, for its order is not that of the row
        groups."""
        locations = wanted.locations
        assert locations is not None, "the listing has a location per image"
        found: list[bytes | Refused] = [b""] * len(wanted)
        # In the order of the files: each row group is read once, from front to back.
        groups = np.unique(locations[["file", "group"]])
        for file, group in groups.tolist():
            is_file = locations["file"] == file
            in_group = is_file & (locations["group"] == group)
            positions = np.flatnonzero(in_group).tolist()
            rows = locations["row"][in_group].tolist()
            position_of = dict(zip(rows, positions, strict=True))
            uri = wanted.files[file]
            self._read_group(uri, group, position_of, found)
        yield from found

    def _read_group(
        self,
        uri: str,
        group: int,
        position_of: dict[int, int],
        found: list[bytes | Refused],
    ) -> None:
        """Read some rows of a row group, each into its position of `found`."""
        with open_parquet(uri) as parquet:
            shown = storage.redact(uri)
            image = self._image_field(parquet.schema_arrow, shown)
            start = 0
            batches = parquet.iter_batches(
                _BATCH_ROWS,
                row_groups=[group],
                columns=[image.bytes_path],
                use_threads=False,
            )
            for batch in batches:
                values = image.leaf(batch)
                # Only rows that are wanted become Python objects: each is a copy of an image.
                for row in range(len(batch)):
                    position = position_of.get(start + row)
                    if position is None:
                        continue
                    data = values[row].as_py()
                    # Null: refused later as an empty file.
                    found[position] = data or b""
                start += len(batch)


@dataclass(frozen=True)
class _Index:
    """What a file says of its images."""

    names: pa.StringArray
    label: LabelPart
    columns: list[str]
    sizes: npt.NDArray[np.int64]
    locations: npt.NDArray[np.void]
    rows_per_group: npt.NDArray[np.int64]


def _image_names(file: storage.FileInfo, paths: Any, count: int) -> pa.StringArray:
    """Return the path that the table gives each image; the file's name and the row if it gives
    none."""
    stem = PurePosixPath(file.name).stem
    numbers = [f"{stem}/{row:08d}" for row in range(count)]
    numbered = pa.array(numbers, pa.string())
    if paths is None:
        return numbered
    texts = readable_texts(paths).combine_chunks()
    # Image by image: a table may name some of them only.
    filled = pc.fill_null(texts, "")
    has_path = pc.match_substring_regex(filled, ".")
    names: Any = pc.if_else(has_path, texts, numbered)
    if isinstance(names, pa.ChunkedArray):
        names = pa.concat_arrays(names.chunks)
    return names


def file_locations(
    file: int, rows_per_group: npt.NDArray[np.int64]
) -> npt.NDArray[np.void]:
    """Return the location of every row of a file, in order."""
    locations = np.empty(int(rows_per_group.sum()), LOCATION)
    starts = np.cumsum(rows_per_group) - rows_per_group
    locations["file"] = file
    groups = np.arange(len(rows_per_group))
    locations["group"] = np.repeat(groups, rows_per_group)
    # Rows count from the start of their group.
    start_of_row = np.repeat(starts, rows_per_group)
    locations["row"] = np.arange(len(locations)) - start_of_row
    return locations


def _column_bytes(group: Any, path: str, shown: str) -> int:
    """Return the bytes of a column in a row group, before compression."""
    columns = [group.column(i) for i in range(group.num_columns)]
    same = [column for column in columns if column.path_in_schema == path]
    # A column called `image.bytes` beside a record `image` with a field `bytes`.
    if len(same) > 1:
        raise ConfigError(
            f"convert: {shown} has {len(same)} columns with the path {path!r}. Rename one of them."
        )
    if not same:
        return 0
    size_bytes = same[0].total_uncompressed_size
    return int(size_bytes)


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """Return the names that Hugging Face's datasets keeps of a column's numbers."""
    metadata = schema.metadata or {}
    # Written by another program: it may hold anything, or lack any of the keys.
    try:
        described = json.loads(metadata[b"huggingface"])
        features = described["info"]["features"]
        names = features[label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    if not isinstance(names, list):
        return None
    return [str(name) for name in names]


def _safe(names: pa.StringArray) -> pa.StringArray:
    """Return paths that leave no folder: neither absolute nor with `..`."""
    safe = pc.replace_substring_regex(names, r"(^|/)(\.{1,2}(/|$))+", r"\1")
    return pc.replace_substring_regex(safe, r"^/+", "")
