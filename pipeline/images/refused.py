"""Why an image is not used: one list of reasons for headers, decoders, sources and reports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Every reason for which an image is refused; reports count by these texts.

    `rejected.parquet`, `data_report.json` and `pipeline.verify` write them: a text that is changed
    here is counted as another reason than in the reports of older versions.
    """

    NOT_AN_IMAGE = "not an image"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    TOO_MANY_PIXELS = "too many pixels"
    TOO_MANY_BYTES = "too many bytes"
    ASPECT = "aspect"
    UNDECODABLE = "cannot be decoded"
    SIZE_DIFFERS = "not of the declared size"
    HASH_DIFFERS = "hash mismatch"
    NEEDS_RESIZE = "format needs --resize"
    NOT_FOUND = "not found"
    NO_PERMISSION = "no permission to read"
    NOT_A_FILE = "not a file"
    BAD_ROW = "row cannot be read"
    NO_PATH = "no path or URL"
    BAD_PATH = "not a valid path or URL"


@dataclass(frozen=True, slots=True)
class Refused:
    """Stands for an image that is not used; takes the place of its header, bytes or pixels.

    Args:
        reason: What it is counted as.
        detail: What more is known of this one image, for example "5 x 4 pixels, the beton says
            6 x 4"; empty if there is no more.
    """

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class RefusedError(ValueError):
    """Carries a `Refused` out of a decoder.

    Args:
        refused: Why the image is not used.
    """

    def __init__(self, refused: Refused) -> None:
        super().__init__(str(refused))
        self.refused = refused


def refused_by(error: ValueError) -> Refused:
    """Return what a decoder's exception says; one that is not ours counts as undecodable."""
    if isinstance(error, RefusedError):
        return error.refused
    return Refused(Reason.UNDECODABLE, str(error))
