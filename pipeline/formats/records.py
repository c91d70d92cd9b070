"""Which containers there are: their file names, and how a shard of each is indexed."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.formats.table import ShardTable

SUFFIXES = {"webdataset": ".tar", "ffcv": ".beton"}
"""Ending of a shard's file name, by container."""


@dataclass(frozen=True)
class IndexedShard:
    """What one pass over a shard file found.

    Args:
        name: File name.
        size_bytes: Size of the file.
        sha256: Of the file, in hex.
        table: One row a sample. An image whose header cannot be read has width 0 and format `bad`.
        dali_index: The file's index for DALI's webdataset reader; empty where a name holds blanks,
            which that format cannot express, and for betons.
        ignored: What was passed over, counted by reason.
        bad: (key, reason) of images whose header cannot be read.
    """

    name: str
    size_bytes: int
    sha256: str
    table: ShardTable
    dali_index: bytes
    ignored: dict[str, int]
    bad: list[tuple[str, str]]


@dataclass(frozen=True)
class WrittenShard:
    """A shard file that has just been put in place."""

    name: str
    size_bytes: int
    sha256: str
    table: ShardTable
    dali_index: bytes


def suffix_of(container: str) -> str:
    """Return the ending of a container's shard files.

    Raises:
        DataError: There is no such container.
    """
    if container not in SUFFIXES:
        raise DataError(
            f"dataset: the format {container!r} is not one of {', '.join(SUFFIXES)}. "
            "Use the version of this program that made the dataset, or convert it again."
        )
    return SUFFIXES[container]
