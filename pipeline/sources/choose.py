"""Tells what a source is: from its name where that is enough, from what lies in the folder where it
is not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.dataset.info import DATASET_FILE, PLAN_FILE
from pipeline.errors import ConfigError
from pipeline.formats.records import SUFFIXES
from pipeline.sources.folder import FolderSource
from pipeline.sources.listing import Source, SourceKind, SourceSettings
from pipeline.sources.names import IMAGE_SUFFIXES
from pipeline.storage.uri import split_scheme

WNID = re.compile(r"n\d{8}")
"""Name of an ImageNet class: a noun of WordNet and its number."""
_OWN_PARQUET = re.compile(r"(manifest(-\d+)?|rejected)\.parquet")


def find_kind(uri: str, settings: SourceSettings) -> SourceKind:
    """Return what a source is.

    Raises:
        ConfigError: A folder holds several things.
    """
    path = split_scheme(uri)[1].partition("?")[0] if uri.startswith("https:") else uri
    suffix = PurePosixPath(path).suffix.lower()
    by_name: dict[str, SourceKind] = {".tar": "tar", ".csv": "list", ".tsv": "list"}
    if suffix in by_name and not (storage.is_local(uri) and storage.is_folder(uri)):
        return by_name[suffix]
    if is_pattern(uri) or (
        suffix == ".parquet" and not (storage.is_local(uri) and storage.is_folder(uri))
    ):
        return _kind_of_table(uri, settings)
    if uri.startswith("https:") or not storage.is_folder(uri):
        return "folder"  # whose own message says what is wrong
    return _kind_of_folder(uri, settings)


def is_pattern(uri: str) -> bool:
    """Tell whether a URI names several files, such as data/train-*.parquet."""
    return any(mark in storage.name_of(uri) for mark in "*[") and not storage.exists(uri)


def _kind_of_folder(uri: str, settings: SourceSettings) -> SourceKind:
    seen: Counter[str] = Counter()
    tars: list[str] = []
    for file in storage.list_files(uri):
        suffix = PurePosixPath(file.name).suffix.lower()
        if file.name == DATASET_FILE or (file.name == PLAN_FILE):
            return "dataset"  # an unfinished one says so when it is opened
        if not _OWN_PARQUET.fullmatch(file.name) and not file.name.startswith("."):
            seen["image" if suffix in IMAGE_SUFFIXES else suffix] += 1
        if suffix == SUFFIXES["webdataset"]:
            tars.append(PurePosixPath(file.name).stem)
    if SUFFIXES["ffcv"] in seen:
        return "dataset"
    found: dict[str, SourceKind] = {}
    if seen["image"]:
        found["images"] = "folder"
    if tars:
        found["tars"] = _kind_of_tars(uri, tars)
    if seen[".parquet"]:
        found["Parquet files"] = "parquet"
    if len(found) > 1:
        raise ConfigError(
            f"convert: {storage.redact(uri)} holds {' and '.join(found)}. Give a folder with one "
            "of them, or name the "
            "files, as in data/train-*.parquet."
        )
    if found.get("Parquet files"):
        return _kind_of_table(uri, settings)
    if not found and storage.is_folder(storage.join(uri, "data")) and not seen["image"]:
        # A data set cloned from a hub keeps its Parquet files one folder below.
        below = Counter(
            PurePosixPath(file.name).suffix
            for file in storage.list_files(storage.join(uri, "data"))
        )
        if below[".parquet"]:
            return _kind_of_table(storage.join(uri, "data"), settings)
    return next(iter(found.values()), "folder")


def _kind_of_tars(uri: str, stems: list[str]) -> SourceKind:
    whole = [stem for stem in stems if stem.startswith("ILSVRC2012_img_")]
    if whole:
        raise ConfigError(
            f"convert: {storage.redact(uri)} holds {whole[0]}.tar. Give that file as the source, "
            "one conversion for train and one for val."
        )
    return "tar" if all(WNID.fullmatch(stem) for stem in stems) else "dataset"


def _kind_of_table(uri: str, settings: SourceSettings) -> SourceKind:
    from pipeline.sources.columns import holds_images

    return "parquet" if holds_images(uri, settings) else "list"


def open_source(
    uri: str, settings: SourceSettings | None = None, *, kind: SourceKind | None = None
) -> Source:
    """Return the source at a URI.

    Args:
        uri: A folder of images; a dataset; a tar of images or of class tars; Parquet files, by
            folder, file or pattern; a CSV, TSV or Parquet list of URIs.
        settings: Where labels come from, and which columns of a table are meant.
        kind: What it is, where that is known.
    """
    # They need this module's names.
    from pipeline.sources.dataset import DatasetSource
    from pipeline.sources.parquet import ParquetSource
    from pipeline.sources.table import ListSource
    from pipeline.sources.tar import TarSource

    kinds: dict[SourceKind, Callable[[str, SourceSettings], Source]] = {
        "folder": FolderSource,
        "dataset": DatasetSource,
        "tar": TarSource,
        "parquet": ParquetSource,
        "list": ListSource,
    }
    settings = settings or SourceSettings()
    return kinds[kind or find_kind(uri, settings)](uri, settings)
