"""Which containers there are, and what is known of one shard file of any of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.errors import DataError
from pipeline.formats.table import ShardTable
from pipeline.images.refused import Refused

# Containers are told by the ending alone, so that no two may share one.
SUFFIXES = {"webdataset": ".tar", "ffcv": ".beton"}
"""Ending of a shard's file name, by container."""


DEAD_LINK = "link to what is not in the archive (refused)"
"""Reason for which a link in a tar is left out."""


class EmptyShardError(DataError):
    """A whole archive without a member."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard file, as `dataset.json` lists it.

    Args:
        name: File name beside `dataset.json`.
        num_samples: Samples in it.
        size_bytes: Size of the file.
        sha256: Of the file, in hex.
        content_hash: Of the samples, whatever the container format (see `ShardTable.content_hash`).
    """

    name: str
    num_samples: int
    size_bytes: int
    sha256: str
    content_hash: str

    @classmethod
    def of(
        cls, table: ShardTable, *, name: str, size_bytes: int, sha256: str
    ) -> ShardFile:
        """Describe the file that holds the samples of a table."""
        # Reads every key; it is done once, when the shard is written or indexed.
        content_hash = table.content_hash()
        return cls(name, len(table), size_bytes, sha256, content_hash)


@dataclass(frozen=True)
class ShardIndex:
    """A shard file and where its samples lie in it.

    A writer returns the same as a later pass over the file that it wrote.

    Args:
        file: The file.
        table: One row per sample. An image whose header cannot be read has width 0 and format
            `bad`.
        dali_index: The file's index for DALI's webdataset reader; empty for betons, and for a tar
            with blanks in a name, which that format cannot express.
        ignored: What was skipped, counted by reason.
        bad: Key and reason of each image whose header cannot be read.
        dead_links: Links whose target is not in the archive, with the target; counted in `ignored`
            under `DEAD_LINK`.
    """

    file: ShardFile
    table: ShardTable
    dali_index: bytes = b""
    ignored: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[str, Refused]] = field(default_factory=list)
    dead_links: list[str] = field(default_factory=list)


def suffix_of(container: str) -> str:
    """Return the ending of a container's shard files.

    Raises:
        DataError: There is no such container.
    """
    if container not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise DataError(
            f"dataset: the format {container!r} is not one of {known}. "
            "Use the version of this program that made the dataset, or convert it again."
        )
    return SUFFIXES[container]
