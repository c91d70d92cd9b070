"""`dataset.json`: what a dataset is, shard by shard. Written last, it is the commit of a
conversion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import DataError
from pipeline.formats.records import ShardFile

DATASET_FILE = "dataset.json"
Columns = dict[str, list[Any]]
"""Values of all shards, by the name of the column."""
FORMAT_VERSION = 1
"""Version of `dataset.json` and `manifest.parquet` that this program writes and reads."""


# In the order of `ShardFile`'s fields: rows are built from the columns by position.
_COLUMNS: tuple[tuple[str, type], ...] = (
    ("name", str),
    ("num_samples", int),
    ("size_bytes", int),
    ("sha256", str),
    ("content_hash", str),
)


class Shards(Sequence[ShardFile]):
    """The dataset's shards in order, kept as columns: 100,000 of them load in a fraction of a
    second."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    @classmethod
    def of(cls, shards: Iterable[ShardFile]) -> Shards:
        """Build the columns from single shards."""
        rows = list(shards)
        columns = {}
        for name, _ in _COLUMNS:
            columns[name] = [getattr(row, name) for row in rows]
        return cls(columns)

    def __len__(self) -> int:
        return len(self.columns["name"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            numbers = range(first, last, step)
            return [self[i] for i in numbers]
        values = [self.columns[name][index] for name, _ in _COLUMNS]
        return ShardFile(*values)

    def __iter__(self) -> Iterator[ShardFile]:
        # `Sequence` would go by `__getitem__`, which takes the columns apart once per shard.
        columns = [self.columns[name] for name, _ in _COLUMNS]
        for row in zip(*columns, strict=True):
            yield ShardFile(*row)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Shards):
            return False
        return self.columns == other.columns

    # Equal by content, which may change: as a key it would be lost.
    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One Parquet file of the manifest: row group g holds shard `first_shard + g`."""

    name: str
    first_shard: int
    num_shards: int
    size_bytes: int


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    Args:
        name: The dataset's name, such as the split's.
        format: Container of the shards, `webdataset` or `ffcv`.
        num_samples: Samples in all shards.
        num_shards: Shard files.
        classes: Class names by label, or None.
        made_by: Tool, version and settings that made it; neither paths nor secrets.
        versions: Versions of the packages that shaped the bytes.
        manifest: The Parquet files.
        shards: Every shard.
        fingerprint: sha256 over the shards' content hashes in order; equal for tar and beton of the
            same samples.
        format_version: Of this file's layout.
    """

    name: str
    format: str
    num_samples: int
    num_shards: int
    classes: list[str] | None
    made_by: dict[str, Any]
    versions: dict[str, str]
    manifest: list[ManifestFile]
    shards: Shards
    fingerprint: str
    format_version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> bytes:
        """Return the file's bytes; equal content gives equal bytes."""
        manifest = []
        for file in self.manifest:
            manifest.append(
                {
                    "name": file.name,
                    "first_shard": file.first_shard,
                    "num_shards": file.num_shards,
                    "size_bytes": file.size_bytes,
                }
            )
        # The order is a part of the bytes. Shards come last: a person reads the head of the file.
        data = {
            "name": self.name,
            "format": self.format,
            "format_version": self.format_version,
            "num_samples": self.num_samples,
            "num_shards": self.num_shards,
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "made_by": self.made_by,
            "versions": self.versions,
            "manifest": manifest,
            "shards": self.shards.columns,
        }
        text = json.dumps(data, indent=1, ensure_ascii=False)
        return text.encode() + b"\n"


def fingerprint_of(content_hashes: Iterable[str]) -> str:
    """Return the dataset's fingerprint: sha256 of the shards' content hashes, one a line, in
    order."""
    # Not over the files' sha256: the same samples in a tar and in a beton are one dataset, and a
    # run may go on with either.
    digest = hashlib.sha256()
    for content_hash in content_hashes:
        digest.update(f"{content_hash}\n".encode())
    return digest.hexdigest()


def parse_dataset_info(text: bytes, *, where: str) -> DatasetInfo:
    """Read `dataset.json` and check that it agrees with itself.

    Args:
        text: The file's bytes.
        where: What to call it in errors.

    Raises:
        DataError: It is not JSON, misses a field, is newer than this program, or its sums do not
            match.
    """
    remedy = "Check the dataset with pipeline.verify, or convert it again."
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise TypeError("the top level is not an object")
        # First of all: a newer layout may lack what is looked for below.
        version = data["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{where}: format_version is {version!r}, this program reads {FORMAT_VERSION}. "
                "Use the version of this program that made the dataset, or convert it again."
            )
        columns = _checked_columns(data["shards"])
        classes = data["classes"]
        if classes is not None:
            classes = [str(name) for name in classes]
        info = DatasetInfo(
            name=str(data["name"]),
            format=str(data["format"]),
            num_samples=int(data["num_samples"]),
            num_shards=int(data["num_shards"]),
            classes=classes,
            made_by=dict(data["made_by"]),
            versions=dict(data["versions"]),
            manifest=[ManifestFile(**entry) for entry in data["manifest"]],
            shards=Shards(columns),
            fingerprint=str(data["fingerprint"]),
        )
    # What a hand-edited or foreign file may raise on its way through the constructors above.
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{where}: not a dataset description ({type(error).__name__}: {error}). {remedy}"
        ) from error
    _check_sums(info, where, remedy)
    return info


def _checked_columns(columns: Columns) -> Columns:
    length = len(columns["name"])
    for name, kind in _COLUMNS:
        values = columns[name]
        if not isinstance(values, list) or len(values) != length:
            raise TypeError(f"shards.{name} is not a list of {length} values")
        # Not `isinstance`: JSON's true is an int to Python.
        if not all(type(value) is kind for value in values):
            raise TypeError(f"shards.{name} holds a value that is not {kind.__name__}")
    # Names are joined to the dataset's folder: none may lead out of it.
    for name in columns["name"]:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(f"shard name {name!r} is not a plain file name")
    checked = {}
    for name, _ in _COLUMNS:
        checked[name] = columns[name]
    return checked


def _check_sums(info: DatasetInfo, where: str, remedy: str) -> None:
    counts = info.shards.columns["num_samples"]
    fingerprint = fingerprint_of(info.shards.columns["content_hash"])
    num_listed = sum(file.num_shards for file in info.manifest)
    # Two people's edits, or a half-done copy, agree in one figure and not in all of them.
    found = {
        "num_shards": (info.num_shards, len(counts)),
        "num_samples": (info.num_samples, sum(counts)),
        "fingerprint": (info.fingerprint, fingerprint),
        "shards listed in manifest": (num_listed, len(counts)),
    }
    for what, (said, is_) in found.items():
        if said != is_:
            raise DataError(
                f"{where}: {what} is given as {said}, but its shards give {is_}. {remedy}"
            )

    # Without gaps and in order: the file of a shard is found by bisection.
    first = 0
    for file in info.manifest:
        if file.first_shard != first or "/" in file.name:
            raise DataError(
                f"{where}: manifest file {file.name!r} starts at shard {file.first_shard}, not "
                f"{first}. {remedy}"
            )
        first += file.num_shards

    # A negative count may hide behind a right sum, and would send ids to the wrong shard.
    if any(count < 0 for count in counts):
        raise DataError(f"{where}: a shard has a negative number of samples. {remedy}")


PLAN_FILE = "_plan.json"
"""Marks a folder whose conversion has not finished."""
