"""What tables share: which column is meant, class numbers out of a column, and the Parquet files of
a place."""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.formats.table import NO_LABEL
from pipeline.sources.listing import SourceSettings, number_classes

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
    return any(_bytes_of(field) for field in schema if settings.image_column in (None, field.name))


def _bytes_of(field: pa.Field) -> str:
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


def label_numbers(
    values: pa.ChunkedArray, class_names: list[str] | None
) -> tuple[npt.NDArray[np.int32], list[str] | None]:
    """Return class numbers and names of a column: numbers are kept, names are numbered in sorted
    order."""
    if pa.types.is_integer(values.type):
        given: Any = values
        numbers = given.fill_null(NO_LABEL).to_numpy().astype(np.int64)
        if len(numbers) and (numbers.min() < -1 or numbers.max() >= 2**31):
            raise DataError(
                f"convert: labels run from {numbers.min()} to {numbers.max()}; expected 0 and "
                "above."
            )
        return numbers.astype(np.int32), class_names
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return number_classes(
            pa.concat_arrays(values.cast(pa.string()).chunks or [pa.array([], pa.string())])
        )
    if pa.types.is_null(values.type):
        return np.full(len(values), NO_LABEL, np.int32), None
    raise ConfigError(
        f"convert: the label column holds {values.type}; expected numbers or names. Choose with "
        "--label-column."
    )
