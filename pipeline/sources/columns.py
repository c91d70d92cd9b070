"""What sources that are tables share: their Parquet files, and which column is meant."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset.scan import say_splits
from pipeline.dataset.splits import pattern_per_split
from pipeline.errors import ConfigError, DataError
from pipeline.formats.table import NO_LABEL
from pipeline.images.left_out import LeftOut
from pipeline.sources.listing import SourceSettings, say_note
from pipeline.sources.tables.image_field import ImageField, fields_of, is_binary
from pipeline.sources.tables.label_column import LabelPart, Labels, labels_of_parts

LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "category", "fine_label")
_BUFFER_BYTES = 2**20


def find_files(uri: str) -> list[storage.FileInfo]:
    """Return the Parquet files of a folder, a pattern, a list or a file; those of a folder by name.

    Raises:
        ConfigError: The folder holds the files of several splits.
        DataError: There is no such file.
    """
    if uri.startswith("https:"):
        return [storage.FileInfo(storage.name_of(uri), uri, storage.size_of(uri))]
    if storage.names_several(uri):
        return storage.find_named(uri)
    if not storage.is_folder(uri):
        return [storage.FileInfo(storage.name_of(uri), uri, storage.size_of(uri))]

    # Cameras and Windows programs write endings in upper case.
    listed = [
        file
        for file in storage.list_files(uri)
        if file.name.lower().endswith(".parquet")
    ]
    # macOS puts a ._file beside every file.
    files = [file for file in listed if not storage.is_hidden(file.name)]
    if not files:
        # A data set cloned from a hub keeps its files one folder below.
        data_folder = storage.join(uri, "data")
        if storage.is_folder(data_folder):
            return find_files(data_folder)
        raise DataError(
            f"convert: no file *.parquet in {storage.redact(uri)}. Check the folder."
        )
    patterns = pattern_per_split(file.name for file in files)
    if patterns:
        raise ConfigError(say_splits("convert", uri, patterns))
    return sorted(files, key=lambda file: file.name)


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
    """Tell whether the tables hold images, and not only their URIs or paths."""
    with open_parquet(find_files(uri)[0].uri) as parquet:
        fields = fields_of(parquet.schema_arrow)
        asked = settings.image_column
        for field in fields:
            is_meant = asked in (None, field.name)
            if is_meant and field.bytes_path and _has_bytes(parquet, field):
                return True
    return False


def _has_bytes(parquet: pq.ParquetFile, field: ImageField) -> bool:
    """Tell whether a column of bytes has any: records may come with paths alone."""
    if not field.text_path or is_binary(field.kind):
        return True
    path = field.bytes_path
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        leaves = [group.column(i) for i in range(group.num_columns)]
        leaf = next(leaf for leaf in leaves if leaf.path_in_schema == path)
        statistics: Any = leaf.statistics
        if statistics is not None and statistics.has_null_count:
            num_null = statistics.null_count
        elif leaf.total_uncompressed_size > _BUFFER_BYTES:
            # Written without statistics: a column of nulls is short, images are not read here.
            return True
        else:
            rows = parquet.read_row_group(number, columns=[path], use_threads=False)
            num_null = field.leaf(rows).null_count
        if num_null < group.num_rows:
            return True
    # A table without rows is one of images, which has its own message.
    return parquet.metadata.num_rows == 0


def choose_label(
    names: list[str], settings: SourceSettings, *, shown: str, is_needed: bool = True
) -> str | None:
    """Return the column of labels; None if there is none, or none is wanted.

    Args:
        names: Columns of the table.
        settings: Which column is meant.
        shown: What to call the table in errors.
        is_needed: Whether a column that was asked for must be there. Of several files some may
            lack it.
    """
    asked = settings.label_column
    if settings.labels == "none" or not (is_needed or asked is None or asked in names):
        return None
    return choose_column(
        names, LABEL_COLUMNS, asked, option="--label-column", shown=shown
    )


def labels_of_files(
    parts: Sequence[LabelPart],
    columns: Sequence[str],
    settings: SourceSettings,
    *,
    shown: str,
    left_out: LeftOut,
) -> Labels:
    """Return the labels of a source's files, and say which images have none.

    Args:
        parts: The labels of each file.
        columns: Names of the columns in any of the files.
        settings: Which column is meant.
        shown: What to call the source.
        left_out: Gets a note of each thing that is said.

    Raises:
        As `labels_of_parts` does.
        ConfigError: No file has the column asked for.
    """
    _note_unused(settings, shown, left_out)
    if settings.labels == "none":
        return labels_of_parts(parts)
    without = [part for part in parts if part.column is None]
    if len(without) == len(parts):
        names = list(dict.fromkeys(columns))
        # Raises if a column was asked for: no file has it.
        choose_label(names, settings, shown=shown)
        say_note(
            left_out,
            f"{shown}: no label column was found, so no image gets a label. Looked for "
            f"{', '.join(LABEL_COLUMNS)}; there are {', '.join(names)}. Choose one with "
            "--label-column; --labels none says that there is none.",
        )
        return labels_of_parts(parts)

    labels, classes = labels_of_parts(parts)
    if without:
        say_note(
            left_out,
            f"{shown}: {len(without):,} of {len(parts):,} files have no label column, for "
            f"example {without[0].shown}. Their images get no label.",
        )
    num_without = int(np.count_nonzero(labels == NO_LABEL))
    # Those of files without the column have been told already.
    num_told = sum(len(part.values) for part in without)
    if num_without > num_told:
        say_note(
            left_out,
            f"{shown}: {num_without:,} of {len(labels):,} images have no label (empty, "
            "null, NaN or -1).",
        )
    largest = int(labels.max(initial=NO_LABEL))
    if classes is not None and largest >= len(classes):
        say_note(
            left_out,
            f"{shown}: labels run to {largest}, but there are names for {len(classes):,} "
            "classes only. The numbers are kept.",
        )
    return labels, classes


def _note_unused(settings: SourceSettings, shown: str, left_out: LeftOut) -> None:
    """Say which settings a table has no use for: they are meant for folders and tars."""
    unused: list[str] = []
    if settings.labels == "folders":
        unused.append("--labels folders")
    if settings.ground_truth is not None:
        unused.append("--ground-truth")
    if settings.synsets is not None:
        unused.append("--synsets")
    if unused:
        say_note(
            left_out,
            f"{shown} is a table, whose labels are a column: {', '.join(unused)} is not "
            "used. Choose the column with --label-column.",
        )


def choose_column(
    names: list[str],
    usual: tuple[str, ...],
    asked: str | None,
    *,
    option: str,
    shown: str,
) -> str | None:
    """Return the column asked for, else the first that has a usual name, else None.

    Args:
        names: Columns of the table.
        usual: Names to look for, in lower case, the best first.
        asked: Column that the user chose.
        option: Option that chooses it, for errors.
        shown: What to call the table in errors.

    Raises:
        ConfigError: The table does not have the column asked for, or has it twice.
    """
    chosen = _choose(names, usual, asked, option=option, shown=shown)
    if chosen is not None and names.count(chosen) > 1:
        raise ConfigError(
            f"convert: {shown} has {names.count(chosen)} columns called {chosen!r}. Rename one, or "
            f"choose another column{f' with {option}' if option else ''}."
        )
    return chosen


def _choose(
    names: list[str],
    usual: tuple[str, ...],
    asked: str | None,
    *,
    option: str,
    shown: str,
) -> str | None:
    if asked is not None:
        if asked not in names:
            raise ConfigError(
                f"convert: {shown} has no column {asked!r} ({option}); it has {', '.join(names)}."
            )
        return asked
    # Reversed: of two names that differ in case only, the first counts.
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)
