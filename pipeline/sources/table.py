"""A table of images' URIs and labels: CSV, TSV or Parquet."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.console import Progress
from pipeline.errors import ConfigError, DataError
from pipeline.formats.table import NO_LABEL
from pipeline.images.refused import Reason, Refused
from pipeline.sources.columns import LABEL_COLUMNS, choose_column, find_files
from pipeline.sources.labels import labels_of_column
from pipeline.sources.listing import (
    QUIET_S,
    Listing,
    SourceSettings,
    Wanted,
    name_and_class,
    read_each,
)
from pipeline.sources.names import sample_keys
from pipeline.storage.uri import SCHEME, split_scheme

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
)
SIZE_COLUMNS = ("size_bytes", "size", "bytes")
_UNKNOWN_SIZE_BYTES = 110_000
"""Size assumed for an image if the list gives none: the mean of ImageNet's train set."""


class ListSource:
    """Images named one by one.

    An image that is not there is left out with its reason: links die. Names are stored without what
    may be a secret.

    Args:
        uri: The table, with a header. Paths in it that are not whole are taken from its own folder.
        settings: Which columns are meant.
    """

    def __init__(self, uri: str, settings: SourceSettings | None = None) -> None:
        self.uri = uri
        self._settings = settings or SourceSettings()

    def read_all(self, wanted: Wanted) -> Iterator[bytes | Refused]:
        """Yield the files' bytes."""

        def read(i: int) -> bytes | Refused:
            try:
                return storage.read_bytes(self._whole(wanted.names[i]))
            except DataError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return Refused(Reason.NOT_FOUND)
                raise

        # One remote image is enough to read several at a time.
        all_local = all(storage.is_local(self._whole(name)) for name in wanted.names)
        return read_each(self.uri if all_local else "https://", read, len(wanted))

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the URI without what may be a secret, and the class if there is one."""
        return name_and_class(name, class_name)

    def _whole(self, name: str) -> str:
        scheme, path = split_scheme(name)
        if not SCHEME.match(name) and not path.startswith("/"):
            folder = self.uri.rsplit("/", 1)[0] if "/" in self.uri else "."
            return storage.join(folder, name)
        if scheme in ("", "file") and not storage.is_local(self.uri):
            raise ConfigError(
                f"convert: {storage.redact(self.uri)} names the local file {path!r}; a list from "
                "elsewhere must not. Copy the list to this machine if you trust it."
            )
        return name

    def listing(self) -> Listing:
        """Return the images in the order of the list.

        Raises:
            DataError: The table cannot be read, or has no row.
            ConfigError: It has no column of URIs.
        """
        table, names, labels = self._read()
        numbers, classes = labels_of_column(labels, None)
        return Listing(
            uri=self.uri,
            names=names,
            sizes=self._sizes(table, names),
            labels=numbers,
            classes=classes,
            passed_over={},
            kind="list",
            keys=sample_keys(_short(names)),
        )

    def _read(self) -> tuple[pa.Table, pa.StringArray, pa.ChunkedArray]:
        shown = storage.redact(self.uri)
        files = find_files(self.uri) if not self.uri.endswith((".csv", ".tsv")) else []
        try:
            if files:
                table = pa.concat_tables(
                    pq.read_table(pa.BufferReader(storage.read_bytes(f.uri))) for f in files
                )
            else:
                delimiter = "\t" if self.uri.endswith(".tsv") else ","
                options = pa_csv.ParseOptions(delimiter=delimiter)
                table = pa_csv.read_csv(
                    io.BytesIO(storage.read_bytes(self.uri)), parse_options=options
                )
        except pa.ArrowException as error:
            raise DataError(f"convert: {shown} cannot be read as a table ({error}).") from error
        asked = self._settings.image_column
        column = choose_column(
            table.column_names, URI_COLUMNS, asked, option="--image-column", shown=shown
        )
        if column is None:
            raise ConfigError(
                f"convert: {shown} has no column of URIs ({', '.join(URI_COLUMNS)}); it has "
                f"{', '.join(table.column_names)}. Choose one with --image-column; a CSV needs a "
                "header."
            )
        if not len(table):
            raise DataError(f"convert: {shown} has no rows. Check that it is complete.")
        values = table[column]
        if values.null_count or not (
            pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        ):
            raise DataError(f"convert: {shown}: column {column!r} must hold a URI in every row.")
        label = None
        if self._settings.labels != "none":
            asked = self._settings.label_column
            label = choose_column(
                table.column_names, LABEL_COLUMNS, asked, option="--label-column", shown=shown
            )
        labels: Any = (
            table[label] if label else pa.chunked_array([np.full(len(table), NO_LABEL, np.int32)])
        )
        names: Any = pa.concat_arrays(values.cast(pa.string()).chunks)
        return table, names, labels

    def _sizes(self, table: pa.Table, names: pa.StringArray) -> npt.NDArray[np.int64]:
        """Return the sizes given, those of local files, and a guess for the rest: only the shards'
        bounds need them.

        Every URI is looked at: one that cannot be opened is reported before any image is read.
        """
        sizes = np.full(len(names), _UNKNOWN_SIZE_BYTES, np.int64)
        label = f"Looking up sizes for {storage.name_of(self.uri)}"
        with Progress(label, total=len(names), after_s=QUIET_S) as progress:
            for row, name in enumerate(names.to_pylist()):
                uri = self._whole(str(name))
                progress.advance(1)
                if not storage.is_local(uri):
                    continue
                try:
                    sizes[row] = storage.local_path(uri).stat().st_size
                except OSError:
                    # Reading it will say what is wrong; without bytes it fills no shard.
                    sizes[row] = 0

        # Sizes that the list gives count for all images: a remote one cannot be asked cheaply.
        given = choose_column(table.column_names, SIZE_COLUMNS, None, option="", shown="")
        if given and pa.types.is_integer(table[given].type):
            column: Any = table[given]
            return np.asarray(column.fill_null(_UNKNOWN_SIZE_BYTES).to_numpy(), np.int64)
        return sizes


def _short(names: pa.StringArray) -> pa.StringArray:
    """Return paths for keys: without scheme, user, query, `..`, and the folders that all have in
    common."""
    short = pc.replace_substring_regex(names, r"^[A-Za-z][A-Za-z0-9+.-]*://([^/@]*@)?", "")
    short = pc.if_else(
        pc.match_substring_regex(names, "^https:"),
        pc.replace_substring_regex(short, r"[?#].*$", ""),
        short,
    )
    texts = [posixpath.normpath(str(text)).lstrip("/") for text in short.to_pylist()]
    texts = ["/".join(part for part in text.split("/") if part != "..") for text in texts]
    common = posixpath.commonpath([posixpath.dirname(text) for text in texts])
    skip = len(common) + 1 if common else 0
    return pa.array([text[skip:] for text in texts], pa.string())
