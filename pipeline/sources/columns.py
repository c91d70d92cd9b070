"""What sources that are tables share: their Parquet files, and which column is meant."""

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
        ConfigError: The folder holds the files of several splits.
        DataError: There is no such file.
    """
    name = storage.name_of(uri)
    is_pattern = has_pattern(uri)
    is_folder = not uri.startswith("https:") and not is_pattern and storage.is_folder(uri)
    if not is_folder and not is_pattern and name.endswith(".parquet"):
        return [storage.FileInfo(name, uri, storage.size_of(uri))]

    folder = uri
    pattern = "*.parquet"
    if not is_folder:
        folder, pattern = uri.rsplit("/", 1) if "/" in uri else (".", uri)
    files = [file for file in storage.list_files(folder) if fnmatch.fnmatch(file.name, pattern)]
    if not files:
        # A data set cloned from a hub keeps its files one folder below.
        data_folder = storage.join(uri, "data")
        if pattern == "*.parquet" and storage.is_folder(data_folder):
            return find_files(data_folder)
        raise DataError(
            f"convert: no file {pattern} in {storage.redact(folder)}. Check the folder and the "
            "pattern."
        )

    # Hubs name files train-00000-of-00007.parquet, all splits in one folder.
    splits = sorted({file.name.split("-")[0] for file in files if "-of-" in file.name})
    if pattern == "*.parquet" and len(splits) > 1:
        example = storage.redact(storage.join(folder, splits[0]))
        raise ConfigError(
            f"convert: {storage.redact(folder)} holds files of {', '.join(splits)}. Give one of "
            f"them, for example {example}-*.parquet."
        )
    return sorted(files, key=lambda file: file.name)


def has_pattern(uri: str) -> bool:
    """Tell whether the last part of a URI has marks of a pattern."""
    return any(mark in storage.name_of(uri) for mark in "*[")


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Open one file; damage is an error that names it."""
    with storage.open_read(uri, buffer_bytes=_BUFFER_BYTES) as file:
        try:
            source = pa.PythonFile(cast(io.IOBase, file), mode="r")
            yield pq.ParquetFile(source, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"convert: {storage.redact(uri)} is damaged, or is not a Parquet file "
                f"({type(error).__name__}: {error}). Download it again."
            ) from error


def holds_images(uri: str, settings: SourceSettings) -> bool:
    """Tell whether the tables hold images, and not their URIs."""
    with open_parquet(find_files(uri)[0].uri) as parquet:
        schema = parquet.schema_arrow
    return any(
        path_of_bytes(field) for field in schema if settings.image_column in (None, field.name)
    )


def path_of_bytes(field: pa.Field) -> str:
    """Return the path of a column's bytes; empty if it has none.

    A column may hold bytes itself, or records of (bytes, path) as Hugging Face's datasets does.
    """
    kind: Any = field.type
    if not pa.types.is_struct(kind):
        return field.name if _is_binary(kind) else ""
    inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return f"{field.name}.bytes" if _is_binary(inner.get("bytes")) else ""


def _is_binary(kind: Any) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def choose_column(
    names: list[str], usual: tuple[str, ...], asked: str | None, *, option: str, shown: str
) -> str | None:
    """Return the column asked for, else the first that has a usual name, else None.

    Args:
        names: Columns of the table.
        usual: Names to look for, in lower case, the best first.
        asked: Column that the user chose.
        option: Option that chooses it, for errors.
        shown: What to call the table in errors.

    Raises:
        ConfigError: The table does not have the column asked for.
    """
    if asked is not None:
        if asked not in names:
            raise ConfigError(
                f"convert: {shown} has no column {asked!r} ({option}); it has {', '.join(names)}."
            )
        return asked
    # Reversed: of two names that differ in case only, the first counts.
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)
