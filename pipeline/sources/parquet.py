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
from pipeline.errors import ConfigError, DataError
from pipeline.sources.columns import (
    LABEL_COLUMNS,
    _bytes_of,
    choose_column,
    find_files,
    label_numbers,
    open_parquet,
)
from pipeline.sources.listing import Listing, SourceSettings, Wanted, name_and_class, sample_keys

IMAGE_COLUMNS = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "photo",
    "bytes",
    "image_bytes",
)
_FILE_SHIFT, _GROUP_SHIFT = 44, 24
"""A place is file << 44 | row group << 24 | row in it."""
_BATCH_ROWS = 64
_READERS = 16


@dataclass(frozen=True)
class _Columns:
    image: str
    """Path of the column of bytes: `image.bytes` in a struct."""
    path: str | None
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
        """Return the image's path as the table has it, and its class where it has one."""
        return name_and_class(name, class_name)

    def _columns(self, schema: pa.Schema, where: str) -> _Columns:
        places = {field.name: _bytes_of(field) for field in schema}
        with_bytes = [name for name, place in places.items() if place]
        option = "--image-column"
        chosen = choose_column(
            with_bytes, IMAGE_COLUMNS, self._settings.image_column, option=option, where=where
        )
        if chosen is None and len(with_bytes) == 1:
            chosen = with_bytes[0]
        if chosen is None:
            raise ConfigError(
                f"convert: {where} has no column of images that can be told by its name; those "
                "with bytes are "
                f"{', '.join(with_bytes) or 'none'} of {', '.join(schema.names)}. Choose one with "
                f"{option}."
            )
        label = None
        if self._settings.labels != "none":
            label = choose_column(
                schema.names,
                LABEL_COLUMNS,
                self._settings.label_column,
                option="--label-column",
                where=where,
            )
        kind: Any = schema.field(chosen).type
        has_path = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        return _Columns(places[chosen], f"{chosen}.path" if has_path else None, label)

    def listing(self) -> Listing:
        """Return the images in the order of the files; sizes are the mean of their row group.

        Raises:
            DataError: No file, a damaged one, or no row.
            ConfigError: It cannot be told which column holds the images.
        """
        files = find_files(self.uri)
        with ThreadPoolExecutor(
            1 if storage.is_local(self.uri) else _READERS, thread_name_prefix="parquet"
        ) as pool:
            found = list(pool.map(self._read_index, range(len(files)), files))
        names = pa.concat_arrays([part.names for part in found])
        if not len(names):
            raise DataError(f"convert: {storage.redact(self.uri)} has no row.")
        classes = next((part.class_names for part in found if part.class_names), None)
        values = pa.chunked_array([chunk for part in found for chunk in part.labels.chunks])
        labels, classes = label_numbers(values, classes)
        rows = np.concatenate([[0], *(part.group_rows for part in found)])
        return Listing(
            uri=self.uri,
            names=names,
            sizes=np.concatenate([part.sizes for part in found]),
            labels=labels,
            classes=classes,
            passed_over={},
            kind="parquet",
            keys=sample_keys(_safe(names)),
            fingerprint=json.dumps([(file.name, file.size_bytes) for file in files]),
            places=np.concatenate([part.places for part in found]),
            files=tuple(file.uri for file in files),
            runs=np.unique(np.cumsum(rows)).astype(np.int64),
        )

    def _read_index(self, number: int, file: storage.FileInfo) -> _Index:
        """Read all of a file but the images."""
        with open_parquet(file.uri) as parquet:
            columns = self._columns(parquet.schema_arrow, storage.redact(file.uri))
            groups = [parquet.metadata.row_group(g) for g in range(parquet.num_row_groups)]
            counts = np.array([group.num_rows for group in groups], np.int64)
            sizes = [
                _column_bytes(group, columns.image) // max(1, group.num_rows) for group in groups
            ]
            wanted = [name for name in (columns.path, columns.label) if name]
            table = parquet.read(columns=wanted, use_threads=False) if wanted else None
            names = _class_names(parquet.schema_arrow, columns.label)
        count = int(counts.sum())
        labels = (
            table[columns.label]
            if table is not None and columns.label
            else pa.chunked_array([pa.nulls(count)])
        )
        plain = pa.array(
            [f"{PurePosixPath(file.name).stem}/{row:08d}" for row in range(count)], pa.string()
        )
        if table is not None and columns.path:
            paths = (
                pc.struct_field(table[columns.path.partition(".")[0]], [0])
                .combine_chunks()
                .cast(pa.string())
            )
            plain = pc.if_else(
                pc.invert(pc.match_substring_regex(pc.fill_null(paths, ""), ".")), plain, paths
            )
        if isinstance(plain, pa.ChunkedArray):
            plain = pa.concat_arrays(plain.chunks)
        rows = [
            np.arange(n) | number << _FILE_SHIFT | g << _GROUP_SHIFT
            for g, n in enumerate(counts.tolist())
        ]
        places = np.concatenate([np.empty(0, np.int64), *rows])
        return _Index(
            plain, labels, names, np.repeat(np.array(sizes, np.int64), counts), places, counts
        )

    def read_all(self, wanted: Wanted) -> Iterator[bytes | str]:
        """Yield the images; a shard's are held at once, for its order is not that of the row
        groups."""
        rows = np.array(wanted.places, np.int64)
        groups = rows >> _GROUP_SHIFT
        found: list[bytes | str] = [b""] * len(rows)
        for group in np.unique(groups).tolist():
            positions = np.flatnonzero(groups == group)
            file = wanted.files[group >> (_FILE_SHIFT - _GROUP_SHIFT)]
            asked = dict(
                zip(
                    (rows[positions] & (1 << _GROUP_SHIFT) - 1).tolist(),
                    positions.tolist(),
                    strict=True,
                )
            )
            self._read_group(file, group & (1 << _FILE_SHIFT - _GROUP_SHIFT) - 1, asked, found)
        yield from found

    def _read_group(
        self, uri: str, group: int, asked: dict[int, int], found: list[bytes | str]
    ) -> None:
        """Read some rows of a row group into their positions."""
        with open_parquet(uri) as parquet:
            column = self._columns(parquet.schema_arrow, storage.redact(uri)).image
            start = 0
            for batch in parquet.iter_batches(
                _BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False
            ):
                values: Any = batch.column(0)
                if pa.types.is_struct(values.type):
                    values = pc.struct_field(values, [0])
                for row in range(len(batch)):
                    if start + row in asked:
                        found[asked[start + row]] = values[row].as_py() or b""
                start += len(batch)


@dataclass(frozen=True)
class _Index:
    """What a file says of its images."""

    names: pa.StringArray
    labels: pa.ChunkedArray
    class_names: list[str] | None
    sizes: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    group_rows: npt.NDArray[np.int64]


def _column_bytes(group: Any, path: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return next(
        (
            int(column.total_uncompressed_size)
            for column in columns
            if column.path_in_schema == path
        ),
        0,
    )


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """Return the names that Hugging Face's datasets keeps of a column's numbers."""
    try:
        known = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label][
            "names"
        ]
        return [str(name) for name in known]
    except (KeyError, ValueError, TypeError):
        return None


def _safe(names: pa.StringArray) -> pa.StringArray:
    """Return paths that leave no folder: neither absolute nor with `..`."""
    safe = pc.replace_substring_regex(names, r"(^|/)(\.{1,2}(/|$))+", r"\1")
    return pc.replace_substring_regex(safe, r"^/+", "")
