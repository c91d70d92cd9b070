"""A folder of images as a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.dataset.info import DATASET_FILE
from pipeline.errors import ConfigError, DataError
from pipeline.images.header import IMAGE_SUFFIXES
from pipeline.images.left_out import LeftOut, printable
from pipeline.images.refused import Refused
from pipeline.sources.listing import (
    Listing,
    ListingBuilder,
    SourceSettings,
    Wanted,
    name_and_class,
    read_each,
    say_note,
)
from pipeline.sources.names import why_skipped
from pipeline.sources.tables.metadata_file import metadata_notes

_MOST_NAMED = 20
"""Folders that a note names."""


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
        return read_each(
            self.uri,
            lambda i: read(wanted.names[i]),
            len(wanted),
        )

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the file's name, and its class if it has one."""
        return name_and_class(name, class_name)

    def listing(self) -> Listing:
        """Return the folder's images by name.

        Raises:
            DataError: There is no such folder, or no image in it.
            ConfigError: It is unclear whether there are classes.
        """
        if storage.exists(self.uri) and not storage.is_folder(self.uri):
            if storage.name_of(self.uri).lower().endswith(".gz"):
                raise ConfigError(
                    f"convert: {storage.redact(self.uri)} is packed with gzip; of packed files "
                    "only tars are read. Unpack it first, for example with gunzip -k, and give "
                    "that."
                )
            raise ConfigError(
                f"convert: {storage.redact(self.uri)} is a file. Give the folder that holds the "
                "images, or a .tar, .parquet, .csv, .tsv or .jsonl file."
            )
        builder = ListingBuilder(self.uri)
        classes = _ClassFolders(self.uri, builder)
        for file in storage.list_files(
            self.uri,
            recursive=True,
            on_other=classes.on_other,
        ):
            if builder.add(file.name, file.size_bytes):
                classes.on_image(file.name)
        if not len(builder):
            deeper = _sources_below(self.uri, builder.left_out)
            expected = (
                f"Expected {', '.join(IMAGE_SUFFIXES)}, tars, betons or Parquet files."
            )
            raise DataError(
                f"convert: no image in {storage.redact(self.uri)}; seen: {builder.seen()}. "
                f"{deeper or expected}"
            )
        if self._settings.labels != "none":
            builder.left_out.notes.extend(classes.notes())
            for note in metadata_notes(self.uri):
                say_note(builder.left_out, note)
        return builder.build(self._settings, kind="folder")


def _sources_below(uri: str, left_out: LeftOut) -> str:
    """Return which files or folders below are sources themselves; empty if there is none."""
    found: dict[str, None] = {}
    for ending in (
        ".tar",
        ".beton",
        ".parquet",
        ".gz",
        ".tgz",
        ".csv",
        ".tsv",
        ".json",
    ):
        for name in left_out.names.get(ending, ()):
            folder, _, file = name.rpartition("/")
            # A table or a list is given by its name, shards by their folder.
            if ending in (".csv", ".tsv"):
                found[storage.join(uri, name)] = None
            elif ending != ".json" or file == DATASET_FILE:
                found[
                    storage.join(uri, folder) if folder else storage.join(uri, name)
                ] = None
    if not found:
        return ""
    named = ", ".join(storage.redact(each) for each in list(found)[:5])
    return f"There are shards, archives or tables below it: give one of them, such as {named}"


class _ClassFolders:
    """Watches for what would shift class numbers without a word, and for what is not a file.

    Args:
        uri: The source.
        builder: Counts what is left out.
    """

    def __init__(self, uri: str, builder: ListingBuilder) -> None:
        self._holding: set[str] = set()
        self._has_deep = False
        self._uri = uri
        self._builder = builder
        self._folders: set[str] = set()
        self._dead: list[str] = []
        self._linked: list[str] = []

    def on_image(self, name: str) -> None:
        """Note a listed image."""
        folder, _, below = name.partition("/")
        # Of a flat folder of ten million images no name is kept here.
        if below:
            self._holding.add(folder)
            self._has_deep = self._has_deep or "/" in below

    def on_other(self, name: str, entry: storage.OtherEntry) -> None:
        """Note an entry that is not a file."""
        if entry is storage.OtherEntry.FOLDER:
            if "/" not in name and not storage.is_hidden(name):
                self._folders.add(name)
            return
        if entry is storage.OtherEntry.SECOND_LINK:
            # The files below it are listed under the other name: counted once, told twice.
            self._linked.append(name)
            return
        shown = name
        if entry is storage.OtherEntry.DEAD_LINK:
            shown = f"{name} -> {self._target_of(name)}"
            is_class = "/" not in name and why_skipped(name) == "no extension"
            if is_class:
                self._dead.append(shown)
        reason = "hidden" if storage.is_hidden(name) else str(entry)
        self._builder.left_out.add(reason, shown)

    def _target_of(self, name: str) -> str:
        try:
            return str(storage.local_path(storage.join(self._uri, name)).readlink())
        except OSError:
            return "?"  # taken away in the meantime

    def notes(self) -> list[str]:
        """Return a sentence for each kind of folder that is not a class, although it may look like
        one."""
        empty = sorted(self._folders - self._holding - set(self._linked))
        # A flat folder of images has no classes that could shift.
        has_classes = bool(self._folders & self._holding)
        is_wrapped = len(self._holding) == 1 and self._has_deep
        told = {
            "class folder holds all images, in folders of its own; if those are the classes, give "
            "it as SRC": list(self._holding) if is_wrapped else [],
            "class folders hold no image and get no class number": empty
            if has_classes
            else [],
            "class folders are dead links and get no class number": self._dead,
            "folders are reached twice and are listed once": self._linked,
        }
        return [
            f"{len(names):,} {what}: {_first(names)}"
            for what, names in told.items()
            if names
        ]


def _first(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in sorted(names)[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown}, ..."
