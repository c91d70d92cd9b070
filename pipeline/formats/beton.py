"""Layout of FFCV's `.beton` files, version 2: header, field descriptions, one row per sample,
pages, allocations.

FFCV is not needed to read or write one. All numbers are little-endian. Source: ffcv 1.0.2, whose
own reader and writer tests/integration/test_ffcv_interop.py compares with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VERSION = 2
# As FFCV's `types.py` has it: 24 bytes, with every number on a multiple of its size.
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
# All parts are single bytes, so that `align` adds none: 1,041 bytes a field.
FIELD = np.dtype(
    [("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True
)
# A sample may have several runs, or none: rows and allocations meet by `ptr` only.
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
"""One run of bytes that belongs to a sample, anywhere in the pages."""
# Packed, not aligned: FFCV aligns the row of all fields, and never the parts of one field.
IMAGE_ROW = np.dtype(
    [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]
)
BYTES_ROW = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_PTR_ROW = np.dtype("<u8")
# FFCV's type ids. 255 stands for a user's own class, whose row only that class knows.
INT, IMAGE, BYTES, JSON = 1, 2, 3, 5
FIELD_ROWS: dict[int, np.dtype] = {
    0: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    IMAGE: IMAGE_ROW,
    BYTES: BYTES_ROW,
    4: _PTR_ROW,
    JSON: BYTES_ROW,
    6: _PTR_ROW,
}
"""What one sample takes in the table of samples, by type id: float, int, image, bytes, array, JSON,
tensor."""
MODE_JPEG, MODE_RAW = 0, 1
MAX_SIDE = 2**16 - 1
"""Widths and heights are stored in 16 bits."""
MIN_PAGE_BYTES = 2**21
DEFAULT_PAGE_BYTES = 2**23
"""FFCV's own default. A sample lies in one page; the rest of a page that the next one does not fit
in stays empty."""
MAX_PAGE_BYTES = 2**31
"""Page sizes are powers of two in 32 bits."""
OUR_FIELDS = (("image", IMAGE), ("label", INT), ("meta", JSON))


@dataclass(frozen=True)
class Field:
    """One field of every sample.

    Args:
        name: Its name.
        type_id: Its kind, a key of `FIELD_ROWS`.
    """

    name: str
    type_id: int


def row_dtype(type_ids: list[int]) -> np.dtype:
    """Return the layout of one sample's row: the fields in order, aligned as a C compiler would."""
    columns = [("", FIELD_ROWS[type_id]) for type_id in type_ids]
    return np.dtype(columns, align=True)


def fields_of(descriptions: npt.NDArray) -> list[Field]:
    """Return names and kinds from the field descriptions."""
    fields = []
    for entry in descriptions:
        # Names are padded with zero bytes. A name only chooses a field, so a damaged one may pass.
        padded = bytes(entry["name"])
        stored_name, *_ = padded.split(b"\0")
        name = stored_name.decode("ascii", "replace")
        type_id = int(entry["type_id"])
        fields.append(Field(name, type_id))
    return fields


def describe_fields(fields: tuple[tuple[str, int], ...]) -> npt.NDArray:
    """Return the field descriptions of (name, type id) pairs; none of our kinds has arguments."""
    descriptions = np.zeros(len(fields), FIELD)
    for entry, (name, type_id) in zip(descriptions, fields, strict=True):
        entry["type_id"] = type_id
        encoded = np.frombuffer(name.encode("ascii"), np.uint8)
        entry["name"][: len(encoded)] = encoded
    return descriptions


def align(at: int, page_bytes: int) -> int:
    """Return the first page boundary at or behind a place."""
    # Rounded up in whole numbers: a float loses bytes beyond 2**53.
    num_pages = -(-at // page_bytes)
    return num_pages * page_bytes


def json_bytes(value: dict[str, object]) -> bytes:
    """Return an object as FFCV's JSONField stores it: ASCII, ended by a zero byte."""
    return json.dumps(value).encode() + b"\0"


def parse_json(data: bytes) -> dict[str, object] | None:
    """Return the object that a JSONField holds, or None if it is not valid."""
    text, *_ = data.split(b"\0")
    try:
        value = json.loads(text)
    # Deep nesting is a RecursionError, not a ValueError: a text from elsewhere must not end a scan.
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return value
    return None
