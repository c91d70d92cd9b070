"""Tells what a source is: from its name if that is enough, else from what lies in the folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.console import say
from pipeline.dataset.info import DATASET_FILE, PLAN_FILE
from pipeline.dataset.scan import say_splits
from pipeline.dataset.splits import pattern_per_split
from pipeline.errors import ConfigError
from pipeline.formats.records import SUFFIXES
from pipeline.formats.table import NO_LABEL
from pipeline.formats.webdataset import IMAGE_EXTENSIONS, split_key
from pipeline.images.header import IMAGE_SUFFIXES
from pipeline.images.left_out import LeftOut
from pipeline.sources.columns import holds_images
from pipeline.sources.dataset import DatasetSource
from pipeline.sources.folder import FolderSource
from pipeline.sources.listing import Listing, Source, SourceKind, SourceSettings
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.table import TEXT_SUFFIXES, ListSource
from pipeline.sources.tar import TarSource, first_members
from pipeline.storage.uri import split_scheme

WNID = re.compile(r"n\d{8}")
"""Name of an ImageNet class: a noun of WordNet and its number."""
_MOST_PREVIEWS = 3
"""Pictures beside shards that do not make them a folder of images."""
_MOST_MEMBERS = 1000
"""Members of a tar that are looked at to tell whether it is a shard."""
_ENDINGS: dict[SourceKind, tuple[str, ...]] = {
    "dataset": tuple(SUFFIXES.values()),
    "tar": (".tar",),
    "parquet": (".parquet",),
    "list": (".parquet", *TEXT_SUFFIXES),
}
"""Endings of the files that a source reads in its folder."""
_WHAT: dict[SourceKind, str] = {
    "folder": "a folder of images",
    "tar": "a tar of images",
    "dataset": "a dataset",
    "parquet": "a Parquet file",
    "list": "a list",
}
"""What to call a source in messages."""
_OWN_PARQUET = re.compile(r"(manifest(-\d+)?|rejected)\.parquet")


def find_kind(uri: str, settings: SourceSettings) -> SourceKind:
    """Return what a source is.

    Raises:
        ConfigError: A folder holds several things, or several splits.
    """
    is_https = uri.startswith("https:")
    # A signed URL has its signature behind the name.
    path = split_scheme(uri)[1].partition("?")[0] if is_https else uri
    suffix = PurePosixPath(path).suffix.lower()
    if not is_https and storage.names_several(uri):
        return _kind_of_files(
            uri,
            storage.find_named(uri),
            settings,
        )
    # A local folder may be called x.tar; asking a store for each name would cost a request.
    is_file = not (storage.is_local(uri) and storage.is_folder(uri))
    if suffix == ".tar" and is_file:
        return _kind_of_tar(uri)
    if suffix in TEXT_SUFFIXES and is_file:
        return "list"
    if suffix == SUFFIXES["ffcv"] and is_file and not is_https:
        return "dataset"
    if suffix == ".parquet" and is_file:
        return _kind_of_table(uri, settings)
    if is_https or not storage.is_folder(uri):
        return "folder"  # whose own message says what is wrong
    return _kind_of_folder(uri, settings)


def _kind_of_files(
    uri: str,
    files: list[storage.FileInfo],
    settings: SourceSettings,
) -> SourceKind:
    """Tell what the files are that a pattern or a list names."""
    suffixes = sorted({PurePosixPath(file.name).suffix.lower() for file in files})
    if suffixes == [".tar"]:
        return _kind_of_tars(uri, [PurePosixPath(file.name).stem for file in files])
    if suffixes == [SUFFIXES["ffcv"]]:
        return "dataset"
    if suffixes == [".parquet"]:
        return _kind_of_table(uri, settings)
    raise ConfigError(
        f"convert: {storage.redact(uri)} names files that end in {', '.join(suffixes)}. A pattern "
        "or a list names tars, betons or Parquet files, of one kind; of images give the folder."
    )


def _kind_of_tar(uri: str) -> SourceKind:
    """Tell a shard from a tar of loose images: in a shard, neighbours share a key."""
    if uri.startswith("https:"):
        return "tar"  # a dataset needs a file system, and says so
    before: tuple[str, str] | None = None
    for name in first_members(uri, _MOST_MEMBERS):
        parts = split_key(name)
        if parts is None or storage.is_hidden(name):
            continue
        # Two neighbours of one key, an image and what only a sample has.
        pair = {_role_of(parts[1]), _role_of(before[1])} if before else set()
        if before and before[0] == parts[0] and pair == {"image", "beside"}:
            return "dataset"
        before = parts
    return "tar"


def _role_of(extension: str) -> str:
    if extension in ("cls", "json", "txt"):
        return "beside"
    return "image" if extension.rpartition(".")[2] in IMAGE_EXTENSIONS else "other"


def _kind_of_folder(uri: str, settings: SourceSettings) -> SourceKind:
    """Tell what a folder holds; several kinds of sources in it are an error."""
    names: dict[str, list[str]] = {}
    num_images = 0
    for file in storage.list_files(uri):
        # A plan is that of an unfinished conversion, which says so when it is opened.
        if file.name in (DATASET_FILE, PLAN_FILE):
            return "dataset"
        # What operating systems leave behind decides nothing.
        if storage.is_hidden(file.name) or _OWN_PARQUET.fullmatch(file.name):
            continue
        suffix = PurePosixPath(file.name).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            # Counted alone: a flat folder may hold ten million, and their names fill memory.
            num_images += 1
        elif suffix in (".tar", ".parquet", SUFFIXES["ffcv"]):
            names.setdefault(suffix, []).append(file.name)
    if SUFFIXES["ffcv"] in names:
        return "dataset"

    tars = names.get(".tar", [])
    stems = {PurePosixPath(name).stem for name in tars}
    # img2dataset writes 00000.parquet beside 00000.tar: what it knows of that shard's images.
    tables = [
        name
        for name in names.get(".parquet", [])
        if PurePosixPath(name).stem not in stems
    ]
    # A preview or two beside shards is no collection of images.
    has_previews = bool(tars) and num_images <= max(_MOST_PREVIEWS, len(tars))
    kinds: dict[str, SourceKind] = {}
    if num_images and not has_previews:
        kinds["images"] = "folder"
    if tars:
        kinds["tars"] = _kind_of_tars(uri, sorted(stems))
    if tables:
        kinds["Parquet files"] = "parquet"
    if len(kinds) > 1:
        shown = storage.redact(uri)
        endings = [name for name, has in ((".tar", tars), (".parquet", tables)) if has]
        named = " or ".join(f"'{shown}/*{ending}'" for ending in endings)
        raise ConfigError(
            f"convert: {shown} holds {' and '.join(kinds)}. Give a folder with one of them, or "
            f"name the files, for example {named}."
        )

    if tables:
        _refuse_splits(uri, tables)
        return _kind_of_table(uri, settings)
    if tars:
        _refuse_splits(uri, tars)
    # A data set cloned from a hub keeps its Parquet files one folder below.
    data_folder = storage.join(uri, "data")
    if not kinds and storage.is_folder(data_folder):
        below = [file.name for file in storage.list_files(data_folder)]
        tables = [name for name in below if name.lower().endswith(".parquet")]
        if tables:
            _refuse_splits(data_folder, tables)
            return _kind_of_table(data_folder, settings)
    return next(iter(kinds.values()), "folder")


def _refuse_splits(uri: str, names: list[str]) -> None:
    patterns = pattern_per_split(names)
    if patterns:
        raise ConfigError(
            say_splits(
                "convert",
                uri,
                patterns,
            )
        )


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

    Raises:
        ConfigError: It holds several things, or the settings are for another kind of source.
    """
    kinds: dict[SourceKind, Callable[[str, SourceSettings], Source]] = {
        "folder": FolderSource,
        "dataset": DatasetSource,
        "tar": TarSource,
        "parquet": ParquetSource,
        "list": ListSource,
    }
    settings = settings or SourceSettings()
    kind = kind or find_kind(uri, settings)
    _refuse_unused(uri, settings, kind)
    return kinds[kind](uri, settings)


def _refuse_unused(uri: str, settings: SourceSettings, kind: SourceKind) -> None:
    """Refuse what a source of this kind would ignore: the user expects it to change the result."""
    shown = storage.redact(uri)
    is_table = kind in ("parquet", "list")
    columns = {
        "--image-column": settings.image_column,
        "--label-column": settings.label_column,
    }
    given = [option for option, value in columns.items() if value is not None]
    if given and not is_table:
        raise ConfigError(
            f"convert: {' and '.join(given)}: {_WHAT[kind]} has no columns, and {shown} is one. "
            "Leave it out, or give the table as the source, for example a .csv, .jsonl or .parquet "
            "file."
        )
    if settings.image_component is not None and kind != "dataset":
        raise ConfigError(
            f"convert: --image-component is for WebDataset shards, and {shown} holds none. Leave "
            "it out."
        )
    if settings.ground_truth is not None and kind == "dataset":
        raise ConfigError(
            f"convert: --ground-truth is for images without labels, and the dataset {shown} keeps "
            "its own. Leave it out, or give the folder or tar of the images as the source."
        )
    if settings.synsets is not None and settings.ground_truth is None:
        raise ConfigError(
            "convert: --synsets needs --ground-truth, whose numbers it explains."
        )


def list_source(source: Source, uri: str, settings: SourceSettings) -> Listing:
    """Return what a source holds, and what lies beside it in its folder.

    Args:
        source: Opened.
        uri: What it was opened by.
        settings: What it was opened with.
    """
    listing = source.listing()
    is_unlabelled = listing.kind == "dataset" and not (listing.labels != NO_LABEL).any()
    if is_unlabelled and settings.labels != "none":
        # Tars of loose pictures by class, called cat.tar and dog.tar, look like shards.
        say(
            f"convert: note: no sample in the shards of {storage.redact(uri)} has a label (.cls, "
            "or label in .json)"
        )
    beside = _left_beside(uri, listing.kind)
    listing.left_out.update(beside)
    for reason, count in beside.counts.items():
        listing.passed_over[reason] = listing.passed_over.get(reason, 0) + count
    return listing


def _left_beside(uri: str, kind: SourceKind) -> LeftOut:
    """Count the files of a folder that are not the shards, class tars or tables that it is read
    for."""
    left_out = LeftOut()
    is_one_file = uri.startswith("https:") or storage.names_several(uri)
    # A folder of images has counted its files itself.
    if kind == "folder" or is_one_file or not storage.is_folder(uri):
        return left_out
    # Everything in the folder of a finished dataset is the dataset's.
    if kind == "dataset" and storage.exists(storage.join(uri, DATASET_FILE)):
        return left_out
    endings = _ENDINGS[kind]
    files = list(storage.list_files(uri, recursive=True))
    # Tables may lie in `data`, as hubs keep them.
    has_own = any(
        "/" not in file.name and file.name.lower().endswith(endings) for file in files
    )
    folder = "" if has_own or kind not in ("parquet", "list") else "data/"
    for file in files:
        name = file.name.removeprefix(folder)
        is_read = file.name.startswith(folder) and "/" not in name
        if storage.is_hidden(file.name):
            left_out.add("hidden", file.name)
        elif not (
            is_read
            and name.lower().endswith(endings)
            and not _OWN_PARQUET.fullmatch(name)
        ):
            suffix = PurePosixPath(name).suffix.lower()
            left_out.add(
                "in a folder below" if "/" in name else suffix or "no extension",
                file.name,
            )
    return left_out
