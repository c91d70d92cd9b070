"""Reads the tables of a list: rows that name an image, and rows that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.images.refused import Reason
from pipeline.sources.columns import (
    choose_column,
    choose_label,
    find_files,
    open_parquet,
)
from pipeline.sources.listing import SourceSettings
from pipeline.sources.tables.image_field import (
    ImageField,
    explain_lists,
    fields_of,
    readable_texts,
)
from pipeline.sources.tables.label_column import LabelPart, json_labels, typed_texts
from pipeline.sources.tables.text_rows import (
    DelimitedTable,
    JsonLinesTable,
    TextTable,
    decode_text,
)

URI_COLUMNS = (
    "uri",
    "url",
    "path",
    "file",
    "filename",
    "file_name",
    "image",
    "image_path",
    "image_url",
    "filepath",
    "file_path",
    "img_path",
    "image_file",
    "img",
)
SIZE_COLUMNS = ("size_bytes", "size", "bytes")
DELIMITED_SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""Endings of text tables, and the delimiter that each promises."""
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (*DELIMITED_SUFFIXES, *JSON_LINES_SUFFIXES)
"""Endings of every list that is text."""
UNKNOWN_SIZE_BYTES = 110_000
"""Size assumed for an image if the list gives none: the mean of ImageNet's train set."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Args:
        name: What to call it in `rejected.parquet`.
        reason: What it is counted as.
        error: What to tell the user if no row can be used.
    """

    name: str
    reason: Reason
    error: MaelstromError


@dataclass(frozen=True)
class ListTable:
    """The rows of one file that name an image.

    Args:
        names: Path or URI in each row.
        label: Their labels.
        sizes: Bytes that the table says each image has; None if it does not say so.
        columns: Names of all columns.
        bad: Rows that name no image.
    """

    names: list[str]
    label: LabelPart
    sizes: npt.NDArray[np.int64] | None
    columns: list[str]
    bad: list[BadRow]


def read_tables(uri: str, settings: SourceSettings) -> list[ListTable]:
    """Read every file of a list.

    Args:
        uri: A text table; or Parquet files, as for `find_files`.
        settings: Which columns are meant.

    Raises:
        DataError: A file cannot be read as a table.
        ConfigError: A file has no column of URIs.
    """
    name = storage.name_of(uri)
    suffix = PurePosixPath(name).suffix
    suffix = suffix.lower()
    if suffix not in TEXT_SUFFIXES:
        files = find_files(uri)
        return [_read_parquet(file.uri, settings) for file in files]

    shown = storage.redact(uri)
    data = storage.read_bytes(uri)
    text = decode_text(data, shown=shown)
    table: TextTable
    if suffix in JSON_LINES_SUFFIXES:
        table = JsonLinesTable(text)
    else:
        # The delimiter is looked for in the header: a line that names a column of URIs.
        table = DelimitedTable(
            text,
            delimiter=DELIMITED_SUFFIXES[suffix],
            is_header=lambda columns: _has_uris(columns, settings),
        )
    rows = _read_text(table, name, shown, settings)
    return [rows]


def _has_uris(columns: list[str], settings: SourceSettings) -> bool:
    """Tell whether columns include one of URIs."""
    asked = settings.image_column
    if asked is not None:
        return asked in columns
    lower = {name.lower() for name in columns}
    return not lower.isdisjoint(URI_COLUMNS)


def _uri_column(
    columns: list[str], settings: SourceSettings, shown: str, *, more: str = ""
) -> str:
    """Return the column of URIs.

    Raises:
        ConfigError: There is none.
    """
    column = choose_column(
        columns,
        URI_COLUMNS,
        settings.image_column,
        option="--image-column",
        shown=shown,
    )
    if column is None:
        usual = ", ".join(URI_COLUMNS)
        given = ", ".join(columns) or "none"
        raise ConfigError(
            f"convert: {shown} has no column of URIs ({usual}); it has {given}. Choose one with "
            "--image-column; a CSV needs a header, for example a first line `path,label`."
            f"{more}"
        )
    return column


def _read_text(
    table: TextTable, file_name: str, shown: str, settings: SourceSettings
) -> ListTable:
    """Read a text table."""
    columns = table.columns
    if not columns:
        _refuse_empty(table, file_name)
    uri = _uri_column(columns, settings, shown)
    label = choose_label(columns, settings, shown=shown)
    size = choose_column(columns, SIZE_COLUMNS, None, option="", shown=shown)
    # By place: rows are lists, and of two columns of one name the first counts.
    uri_place = columns.index(uri)
    label_place = None if label is None else columns.index(label)
    size_place = None if size is None else columns.index(size)

    names: list[str] = []
    labels: list[Any] = []
    sizes: list[Any] = []
    bad: list[BadRow] = []
    for row in table.rows():
        values = row.values
        place = f"{file_name} line {row.line}"
        if values is None:
            bad.append(_unreadable(place, row.problem))
            continue
        name = values[uri_place]
        if not isinstance(name, str) or not name.strip():
            bad.append(_without_path(place, name))
            continue
        names.append(name)
        labels.append(None if label_place is None else values[label_place])
        sizes.append(None if size_place is None else values[size_place])

    # JSON has types of its own; in CSV they are found by looking at all values.
    if isinstance(table, JsonLinesTable):
        label_values = json_labels(labels, f"column {label!r} of {shown}")
    else:
        label_values = typed_texts(labels)
    # As text, in JSON too: one rule reads the sizes of all text tables.
    size_texts = [None if size is None else str(size) for size in sizes]
    typed_sizes = typed_texts(size_texts)
    return ListTable(
        names=names,
        label=LabelPart(shown, label, label_values),
        sizes=_whole_sizes(typed_sizes),
        columns=columns,
        bad=bad,
    )


def _refuse_empty(table: TextTable, file_name: str) -> None:
    """Say why a table without columns has none, if a row shows it."""
    for row in table.rows():
        place = f"{file_name} line {row.line}"
        unreadable = _unreadable(place, row.problem)
        raise unreadable.error


def _read_parquet(uri: str, settings: SourceSettings) -> ListTable:
    """Read one Parquet file of URIs."""
    shown = storage.redact(uri)
    file_name = storage.name_of(uri)
    with open_parquet(uri) as parquet:
        columns = list(parquet.schema_arrow.names)
        texts = _paths(parquet, settings, shown)
        label = choose_label(columns, settings, shown=shown, is_needed=False)
        size = choose_column(columns, SIZE_COLUMNS, None, option="", shown=shown)
        labels = _column(parquet, label)
        sizes = _column(parquet, size)

    names: list[str] = []
    named: list[int] = []
    bad: list[BadRow] = []
    for row, text in enumerate(texts):
        if text is None or not text.strip():
            # People count rows from 1.
            number = row + 1
            place = f"{file_name} row {number}"
            bad.append(_without_path(place, None))
            continue
        names.append(text)
        named.append(row)
    if bad:
        labels = _rows_of(labels, named)
        sizes = _rows_of(sizes, named)
    return ListTable(
        names=names,
        label=LabelPart(shown, label, labels),
        sizes=_whole_sizes(sizes),
        columns=columns,
        bad=bad,
    )


def _paths(
    parquet: pq.ParquetFile, settings: SourceSettings, shown: str
) -> list[str | None]:
    """Return the path or URI in each row."""
    schema = parquet.schema_arrow
    fields = fields_of(schema)
    hint = explain_lists(schema)
    # A column of text counts before one of a usual name that holds, say, lists of images.
    with_text = [field.name for field in fields if field.text_path]
    names = with_text
    if settings.image_column is not None or not _has_uris(with_text, settings):
        names = [field.name for field in fields]
    chosen = _uri_column(names, settings, shown, more=hint)
    all_names = [field.name for field in fields]
    number = all_names.index(chosen)
    field: ImageField = fields[number]

    path = field.text_path
    # A file without rows may have no type.
    if pa.types.is_null(field.kind):
        path = field.name
    if not path:
        raise DataError(
            f"convert: {shown}: column {chosen!r} holds {field.kind}; expected a path or URI in "
            f"every row. Choose another with --image-column.{hint}"
        )
    rows = parquet.read(columns=[path], use_threads=False)
    values = field.leaf(rows)
    texts = readable_texts(values).to_pylist()
    return [None if text is None else str(text) for text in texts]


def _column(parquet: pq.ParquetFile, name: str | None) -> Any:
    """Return a column; nulls if there is none."""
    if name is None:
        num_rows = parquet.metadata.num_rows
        return pa.chunked_array([pa.nulls(num_rows)])
    # By place: of two columns of one name Arrow would take neither by its name.
    table = parquet.read(columns=[name], use_threads=False)
    return table.column(0)


def _rows_of(values: Any, rows: list[int]) -> Any:
    """Return some rows of a column."""
    # Arrow cannot pick rows of a view.
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    numbers = pa.array(rows, pa.int64())
    return values.take(numbers)


def _whole_sizes(values: Any) -> npt.NDArray[np.int64] | None:
    """Return sizes that a table gives; None if they are not whole numbers."""
    is_empty = values.null_count == len(values)
    if is_empty or not pa.types.is_integer(values.type):
        return None
    known = values.fill_null(UNKNOWN_SIZE_BYTES)
    signed = known.cast(pa.int64(), safe=False)
    sizes = signed.to_numpy()
    # A negative size would move the bounds of shards backwards.
    return np.maximum(sizes, 0)


def _unreadable(name: str, problem: str) -> BadRow:
    """Return a row that is not one of this table."""
    error = DataError(f"convert: {name}: {problem}.")
    return BadRow(name, Reason.BAD_ROW, error)


def _without_path(name: str, value: Any) -> BadRow:
    """Return a row that names no image.

    Args:
        name: The file and the row.
        value: What stands in place of a path.
    """
    if value is None or isinstance(value, str):
        error = DataError(f"convert: {name}: no path or URL.")
        return BadRow(name, Reason.NO_PATH, error)
    # A number or a list in JSON, cut: it may be long.
    problem = f"{value!r:.80} is not a path or URL"
    return _unreadable(name, problem)
