"""What tables share: which column is meant, class numbers out of a column, and the Parquet files of
a place."""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.sources.listing import SourceSettings

LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "category", "fine_label")
_BUFFER_BYTES = 2**20


def find_files(uri: str) -> list[storage.FileInfo]:
    """Return the Parquet files of a folder, a pattern or a file, by name.

    Raises:
        DataError: There is none.
    """
    if (
        not uri.startswith("https:")
        and not any(mark in storage.name_of(uri) for mark in "*[")
        and storage.is_folder(uri)
    ):
        folder, pattern = uri, "*.parquet"
    elif storage.name_of(uri).endswith(".parquet") and not any(
        mark in storage.name_of(uri) for mark in "*["
    ):
        return [storage.FileInfo(storage.name_of(uri), uri, storage.size_of(uri))]
    else:
        folder, pattern = uri.rsplit("/", 1) if "/" in uri else (".", uri)
    found = [file for file in storage.list_files(folder) if fnmatch.fnmatch(file.name, pattern)]
    if not found and pattern == "*.parquet" and storage.is_folder(storage.join(uri, "data")):
        return find_files(storage.join(uri, "data"))
    if not found:
        raise DataError(
            f"convert: no file {pattern} in {storage.redact(folder)}. Check the folder and the "
            "pattern."
        )
    words = {file.name.split("-")[0] for file in found if "-of-" in file.name}
    if pattern == "*.parquet" and len(words) > 1:
        raise ConfigError(
            f"convert: {storage.redact(folder)} holds files of {', '.join(sorted(words))}. Give "
            "one of them, as "
            f"{storage.redact(storage.join(folder, sorted(words)[0]))}-*.parquet."
        )
    return sorted(found, key=lambda file: file.name)


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Open one file; damage is an error that names it."""
    with storage.open_read(uri, buffer_bytes=_BUFFER_BYTES) as file:
        try:
            source = pa.PythonFile(cast(io.IOBase, file), mode="r")
            yield pq.ParquetFile(source, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"convert: {storage.redact(uri)} is damaged, or no Parquet file "
                f"({type(error).__name__}: {error}). "
                "Download it again."
            ) from error


def holds_images(uri: str, settings: SourceSettings) -> bool:
    """Tell whether the tables hold images, and not their URIs."""
    with open_parquet(find_files(uri)[0].uri) as parquet:
        schema = parquet.schema_arrow
    return any(
        path_of_bytes(field) for field in schema if settings.image_column in (None, field.name)
    )


def path_of_bytes(field: pa.Field) -> str:
    """Return the path of a column's bytes, or nothing where it has none."""
    kind: Any = field.type
    if pa.types.is_struct(kind):
        inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return f"{field.name}.bytes" if _is_binary(inner.get("bytes")) else ""
    return field.name if _is_binary(kind) else ""


def _is_binary(kind: Any) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def choose_column(
    names: list[str], usual: tuple[str, ...], asked: str | None, *, option: str, where: str
) -> str | None:
    """Return the column asked for, else the first of the usual names, else nothing.

    Raises:
        ConfigError: The one asked for is not there.
    """
    if asked is not None:
        if asked not in names:
            raise ConfigError(
                f"convert: {where} has no column {asked!r} ({option}); it has {', '.join(names)}."
            )
        return asked
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)
