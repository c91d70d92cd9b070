"""Tells what a source is: from its name if that is enough, else from what lies in the folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.dataset.info import DATASET_FILE, PLAN_FILE
from pipeline.errors import ConfigError
from pipeline.formats.records import SUFFIXES
from pipeline.sources.columns import has_pattern, holds_images
from pipeline.sources.dataset import DatasetSource
from pipeline.sources.folder import FolderSource
from pipeline.sources.listing import Source, SourceKind, SourceSettings
from pipeline.sources.names import IMAGE_SUFFIXES
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.table import TEXT_SUFFIXES, ListSource
from pipeline.sources.tar import TarSource
from pipeline.storage.uri import split_scheme

WNID = re.compile(r"n\d{8}")
"""Name of an ImageNet class: a noun of WordNet and its number."""
_OWN_PARQUET = re.compile(r"(manifest(-\d+)?|rejected)\.parquet")


def find_kind(uri: str, settings: SourceSettings) -> SourceKind:
    """Return what a source is.

    Raises:
        ConfigError: A folder holds several things.
    """
    is_https = uri.startswith("https:")
    # A signed URL has its signature behind the name.
    path = split_scheme(uri)[1].partition("?")[0] if is_https else uri
    suffix = PurePosixPath(path).suffix.lower()
    # A local folder may be called x.tar; asking a store for each name would cost a request.
    is_file = not (storage.is_local(uri) and storage.is_folder(uri))
    by_name: dict[str, SourceKind] = {
        ".tar": "tar",
        **dict.fromkeys(TEXT_SUFFIXES, "list"),
    }
    if suffix in by_name and is_file:
        return by_name[suffix]
    if is_pattern(uri) or (suffix == ".parquet" and is_file):
        return _kind_of_table(uri, settings)
    if is_https or not storage.is_folder(uri):
        return "folder"  # whose own message says what is wrong
    return _kind_of_folder(uri, settings)


def is_pattern(uri: str) -> bool:
    """Tell whether a URI names several files, such as data/train-*.parquet."""
    # A file may have such a mark in its own name.
    return has_pattern(uri) and not storage.exists(uri)


def _kind_of_folder(uri: str, settings: SourceSettings) -> SourceKind:
    """Tell what a folder holds; several kinds of sources in it are an error."""
    seen: Counter[str] = Counter()
    tars: list[str] = []
    for file in storage.list_files(uri):
        suffix = PurePosixPath(file.name).suffix.lower()
        # A plan is that of an unfinished conversion, which says so when it is opened.
        if file.name in (DATASET_FILE, PLAN_FILE):
            return "dataset"
        is_hidden = file.name.startswith(".")
        if not _OWN_PARQUET.fullmatch(file.name) and not is_hidden:
            seen["image" if suffix in IMAGE_SUFFIXES else suffix] += 1
        if suffix == SUFFIXES["webdataset"]:
            tars.append(PurePosixPath(file.name).stem)
    if SUFFIXES["ffcv"] in seen:
        return "dataset"

    kinds: dict[str, SourceKind] = {}
    if seen["image"]:
        kinds["images"] = "folder"
    if tars:
        kinds["tars"] = _kind_of_tars(uri, tars)
    if seen[".parquet"]:
        kinds["Parquet files"] = "parquet"
    if len(kinds) > 1:
        raise ConfigError(
            f"convert: {storage.redact(uri)} holds {' and '.join(kinds)}. Give a folder with one "
            "of them, or name the files, for example data/train-*.parquet."
        )

    if "Parquet files" in kinds:
        return _kind_of_table(uri, settings)
    # A data set cloned from a hub keeps its Parquet files one folder below.
    data_folder = storage.join(uri, "data")
    if not kinds and storage.is_folder(data_folder):
        suffixes = {PurePosixPath(file.name).suffix for file in storage.list_files(data_folder)}
        if ".parquet" in suffixes:
            return _kind_of_table(data_folder, settings)
    return next(iter(kinds.values()), "folder")


def _kind_of_tars(uri: str, stems: list[str]) -> SourceKind:
    """Tell tars of classes from a dataset of tars, by their names."""
    whole = [stem for stem in stems if stem.startswith("ILSVRC2012_img_")]
    if whole:
        raise ConfigError(
            f"convert: {storage.redact(uri)} holds {whole[0]}.tar. Give that file as the source, "
            "one conversion for train and one for val."
        )
    return "tar" if all(WNID.fullmatch(stem) for stem in stems) else "dataset"


def _kind_of_table(uri: str, settings: SourceSettings) -> SourceKind:
    return "parquet" if holds_images(uri, settings) else "list"


def open_source(
    uri: str, settings: SourceSettings | None = None, *, kind: SourceKind | None = None
) -> Source:
    """Return the source at a URI.

    Args:
        uri: A folder of images; a dataset; a tar of images or of class tars; Parquet files, by
            folder, file or pattern; a CSV, TSV or Parquet list of URIs.
        settings: Where labels come from, and which columns of a table are meant.
        kind: What it is; None finds out. Workers are told: looking again costs a listing.
    """
    kinds: dict[SourceKind, Callable[[str, SourceSettings], Source]] = {
        "folder": FolderSource,
        "dataset": DatasetSource,
        "tar": TarSource,
        "parquet": ParquetSource,
        "list": ListSource,
    }
    settings = settings or SourceSettings()
    return kinds[kind or find_kind(uri, settings)](uri, settings)
