"""A folder of images as a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.images.refused import Refused
from pipeline.sources.listing import (
    Listing,
    ListingBuilder,
    SourceSettings,
    Wanted,
    name_and_class,
    read_each,
)
from pipeline.sources.names import IMAGE_SUFFIXES
from pipeline.sources.tables.metadata_file import say_metadata


class FolderSource:
    """A folder of class folders (the first folder of a path is its class), or a flat folder without
    labels.

    Hidden files and folders are skipped.

    Args:
        uri: The folder.
        settings: Where labels come from.
    """

    def __init__(self, uri: str, settings: SourceSettings | None = None) -> None:
        self.uri = uri
        self._settings = settings or SourceSettings()

    def read_all(self, wanted: Wanted) -> Iterator[bytes | Refused]:
        """Yield the files' bytes."""
        read = storage.reader_below(self.uri)
        return read_each(self.uri, lambda i: read(wanted.names[i]), len(wanted))

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the file's name, and its class if it has one."""
        return name_and_class(name, class_name)

    def listing(self) -> Listing:
        """Return the folder's images by name.

        Raises:
            DataError: There is no such folder, or no image in it.
            ConfigError: It is unclear whether there are classes.
        """
        if self._settings.labels != "none" and not self.uri.startswith("https:"):
            say_metadata(self.uri)
        if storage.exists(self.uri) and not storage.is_folder(self.uri):
            raise ConfigError(
                f"convert: {storage.redact(self.uri)} is a file. Give the folder that holds the "
                "images, or a .tar, .parquet, .csv, .tsv or .jsonl file."
            )
        builder = ListingBuilder(self.uri)
        for file in storage.list_files(self.uri, recursive=True):
            builder.add(file.name, file.size_bytes)
        if not len(builder):
            raise DataError(
                f"convert: no image in {storage.redact(self.uri)}; seen: {builder.seen()}. "
                f"Expected {', '.join(IMAGE_SUFFIXES)}, tars, betons or Parquet files."
            )
        return builder.build(self._settings, kind="folder")
