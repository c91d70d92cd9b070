"""One shard's samples as columns: where each image lies, its label, size, format and hash."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pipeline.errors import DataError

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
# Only names are stored; the numbers below live in memory. Still "bad" stays first: an unknown name
# of a newer writer is read as 0.
FORMATS = ("bad", "jpeg", "png", "webp", "gif", "bmp", "tiff", "raw")
"""What an image member may be. `bad`: its header cannot be read; its width and height are 0."""
MODES = (
    "",
    "RGB",
    "L",
    "CMYK",
    "P",
    "RGBA",
    "LA",
    "I;16",
    "RGB;16",
    "RGBA;16",
    "LA;16",
    "1",
    "YCCK",
)
"""Colour layout of the stored pixels, in Pillow's names; `;16` is 16 bits a channel."""
NO_LABEL = -1
"""Label of a sample that has none."""
_NUMBER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?nan", re.ASCII | re.IGNORECASE
)
_NUMBER_CHARACTERS = 40
SCHEMA = pa.schema(
    (
        pa.field("key", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("label", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),
        pa.field("mode", pa.string()),
        pa.field("xxh3", pa.uint64()),
    )
)
"""Columns of `manifest.parquet`, one row a sample, one row group a shard."""


def class_number(value: object) -> int | None:
    """Return the label that a value of JSON or a text means; None if it is not one.

    Args:
        value: A whole number, also as a float or as text (4, 4.0, "4", "4.0"), or true or false. A
            missing value (null, NaN, empty text) means -1.
    """
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return NO_LABEL
        # Python refuses to read thousands of digits.
        if len(text) > _NUMBER_CHARACTERS or not _NUMBER.fullmatch(text):
            return None
        if text.lstrip("+-").isdigit():
            value = int(text)
        else:
            value = float(text)
    if isinstance(value, float):
        if math.isnan(value):
            return NO_LABEL
        if not value.is_integer():
            return None
        value = int(value)
    if value is None:
        return NO_LABEL
    # True and False are whole numbers to Python too.
    if isinstance(value, int) and NO_LABEL <= value < 2**31:
        return int(value)
    return None


@dataclass(frozen=True)
class ShardTable:
    """Columns of one shard; row i is the shard's sample i.

    Args:
        offsets: First byte of the image in the shard file.
        sizes: Bytes of the image.
        labels: Class numbers, -1 if there is none.
        widths: Pixels of the stored image, before any EXIF rotation; 0 if the header cannot be
            read.
        heights: Likewise.
        formats: Indices into `FORMATS`.
        modes: Indices into `MODES`.
        hashes: xxh3_64 of the image's bytes.
        key_source: The keys, or a function that reads them when they are first asked for.
    """

    offsets: Int64
    sizes: Int64
    labels: Int32
    widths: Int32
    heights: Int32
    formats: npt.NDArray[np.uint8]
    modes: npt.NDArray[np.uint8]
    hashes: npt.NDArray[np.uint64]
    key_source: Sequence[str] | Callable[[], Sequence[str]]

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def keys(self) -> list[str]:
        """Return the samples' keys."""
        # Training needs no keys, and they take more memory than all other columns together.
        if callable(self.key_source):
            return list(self.key_source())
        return list(self.key_source)

    def content_hash(self) -> str:
        """Return the xxh3_128 of what the shard holds, in order: the same whatever the container
        format.

        Hashed per sample: length of the key in bytes (uint32), key (UTF-8), label, width, height
        (int32 each) and xxh3_64 of the image (uint64), little-endian.
        """
        # Every fingerprint rests on these bytes: after a change no run could resume on its dataset.
        # Offsets stay out, because they belong to the container.
        digest = xxhash.xxh3_128()
        pack = struct.Struct("<iiiQ").pack
        rows = zip(
            self.keys,
            self.labels.tolist(),
            self.widths.tolist(),
            self.heights.tolist(),
            self.hashes.tolist(),
            strict=True,
        )
        for key, *values in rows:
            text = key.encode()
            # With its length in front, no key can run into the numbers behind it.
            length = len(text).to_bytes(4, "little")
            digest.update(length + text + pack(*values))
        return digest.hexdigest()

    def to_arrow(self) -> pa.Table:
        """Return the rows as an Arrow table with the columns of `SCHEMA`."""
        formats = []
        for code in self.formats.tolist():
            formats.append(FORMATS[code])
        modes = []
        for code in self.modes.tolist():
            modes.append(MODES[code])
        columns: list[pa.Array[Any]] = [
            pa.array(self.keys, pa.string()),
            pa.array(self.offsets),
            pa.array(self.sizes),
            pa.array(self.labels),
            pa.array(self.widths),
            pa.array(self.heights),
            pa.array(formats, pa.string()),
            pa.array(modes, pa.string()),
            pa.array(self.hashes),
        ]
        return pa.Table.from_arrays(columns, schema=SCHEMA)

    @classmethod
    def from_arrow(
        cls, table: pa.Table, keys: Callable[[], Sequence[str]] | None = None
    ) -> ShardTable:
        """Build the columns from an Arrow table, copying them out of Arrow's memory.

        Args:
            table: Columns of `SCHEMA`; `key` may be missing when `keys` is given.
            keys: Reads the keys later.
        """

        def column(name: str, dtype: str) -> npt.NDArray:
            # A copy: a view would keep the whole row group's buffers in memory.
            values = table.column(name).to_numpy()
            return np.array(values, dtype=dtype)

        if keys is None:
            keys = partial(key_list, table)
        return cls(
            offsets=column("offset", "int64"),
            sizes=column("size", "int64"),
            labels=column("label", "int32"),
            widths=column("width", "int32"),
            heights=column("height", "int32"),
            formats=_codes(table.column("format"), FORMATS),
            modes=_codes(table.column("mode"), MODES),
            hashes=column("xxh3", "uint64"),
            key_source=keys,
        )


def key_list(table: pa.Table) -> list[str]:
    """Return an Arrow table's column of keys."""
    return [str(key) for key in table.column("key").to_pylist()]


class TableBuilder:
    """Collects rows and turns them into a `ShardTable`."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._rows: list[tuple[int, int, int, int, int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(
        self,
        key: str,
        *,
        offset: int,
        size: int,
        label: int = NO_LABEL,
        width: int = 0,
        height: int = 0,
        image_format: str = "bad",
        mode: str = "",
        xxh3: int,
    ) -> None:
        """Append one sample."""
        format_code = _code(image_format, FORMATS)
        mode_code = _code(mode, MODES)
        row = (offset, size, label, width, height, format_code, mode_code, xxh3)
        self._keys.append(key)
        self._rows.append(row)

    def build(self) -> ShardTable:
        """Return what was added as columns."""
        if self._rows:
            columns = list(zip(*self._rows, strict=True))
        else:
            columns = [()] * 8
        # In the order of `ShardTable`'s fields, which they are handed to by position.
        dtypes = (
            "int64",
            "int64",
            "int32",
            "int32",
            "int32",
            "uint8",
            "uint8",
            "uint64",
        )
        arrays: list[Any] = []
        for values, dtype in zip(columns, dtypes, strict=True):
            arrays.append(np.array(values, dtype=dtype))
        return ShardTable(*arrays, key_source=self._keys)  # type: ignore[misc]


def _code(name: str, names: tuple[str, ...]) -> int:
    try:
        return names.index(name)
    except ValueError:
        known = ", ".join(repr(name) for name in names)
        raise DataError(f"manifest: {name!r} is not one of {known}.") from None


def _codes(column: pa.ChunkedArray, names: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """Return a text column as indices into the known names; an unknown name gets 0."""
    parts = [np.empty(0, np.uint8)]
    # Names are looked up once per distinct value, not once per row: rows may be millions.
    for chunk in column.chunks:
        encoded: Any = chunk
        if not isinstance(chunk, pa.DictionaryArray):
            encoded = chunk.dictionary_encode()
        codes = []
        for name in encoded.dictionary.to_pylist():
            code = 0
            if name in names:
                code = names.index(name)
            codes.append(code)
        lookup = np.array(codes, np.uint8)
        indices = encoded.indices.to_numpy()
        parts.append(lookup[indices])
    return np.concatenate(parts)
