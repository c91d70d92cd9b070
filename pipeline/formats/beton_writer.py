"""Writes `.beton` files that FFCV's own Loader reads, without FFCV: given bytes are stored as they
are.

FFCV's DatasetWriter encodes images again, waits for ever for a worker that has died, and starts
processes. This writer lays the same bytes out as that one does with one worker;
tests/integration/test_ffcv_interop.py holds the two together.
"""

from __future__ import annotations

import hashlib
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats import beton
from pipeline.formats.records import ShardFile, ShardIndex
from pipeline.formats.table import NO_LABEL, TableBuilder
from pipeline.images.header import Probe
from pipeline.storage.retry import explain
from pipeline.storage.unfinished import UnfinishedFile

_CHUNK_BYTES = 2**20


def storable(found: Probe) -> bool:
    """Tell whether FFCV's readers can decode an image of this kind: a JPEG in RGB or grey, or raw
    RGB."""
    small = max(found.width, found.height) <= beton.MAX_SIDE
    return small and (
        (found.format == "jpeg" and found.mode in ("RGB", "L")) or found.format == "raw"
    )


class BetonWriter:
    """Write one shard: samples go to a temporary file, and are laid out in pages when all are
    known.

    A page must hold a whole sample, and pages begin behind a table that has a row a sample: neither
    is known before the last. The bytes depend on what is added and its order alone. Use it as a
    context manager; leaving it by an exception removes the temporary files.

    Fields: `image` (RGBImageField), `label` (IntField, -1 for none), `meta` (JSONField: `key`, and
        `about` if given).

    Args:
        uri: Where the finished shard goes.
        page_bytes: Smallest page, a power of two of 2 MiB or more; larger samples make it larger.
    """

    def __init__(self, uri: str, *, page_bytes: int = beton.DEFAULT_PAGE_BYTES) -> None:
        self._uri = uri
        self._page_bytes = page_bytes
        # Images as they come; never committed, only read back when all places are known.
        self._spool = UnfinishedFile(uri)
        self._file = UnfinishedFile(uri)
        self._images: list[tuple[Probe, int, int, int]] = []
        self._metas: list[bytes] = []
        self._labels: list[int] = []
        self._keys: dict[str, None] = {}

    def __enter__(self) -> BetonWriter:
        self._spool.__enter__()
        try:
            self._file.__enter__()
        except BaseException:
            self._spool.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spool.__exit__(kind, error, trace)
        self._file.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._images)

    def add(
        self,
        key: str,
        image: bytes,
        found: Probe,
        *,
        label: int = NO_LABEL,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Append one sample.

        Args:
            key: Unique in the dataset.
            image: A JPEG file, stored as it is, or the pixels of a `raw` image: height x width x 3
                bytes.
            found: What the image is.
            label: Class number, -1 for none.
            metadata: Stored as `about` in the field `meta`.

        Raises:
            DataError: The key is taken, or FFCV cannot read such an image.
            InfrastructureError: The disk is full or not writable.
        """
        if not storable(found):
            raise DataError(
                f"{key}: a {found.mode} {found.format} of {found.width} x {found.height} pixels "
                "cannot be stored in a "
                "beton, which holds JPEG or raw pixels; re-encode it (--resize, or --write-mode "
                "raw)."
            )
        if found.format == "raw" and len(image) != found.width * found.height * 3:
            raise ValueError(
                f"{key}: {len(image)} bytes are not {found.height} x {found.width} x 3 pixels"
            )
        if key in self._keys:
            raise DataError(
                f"{key!r} is already in {storage.name_of(self._uri)}: keys must be unique."
            )
        known = {} if metadata is None else {"about": dict(sorted(metadata.items()))}
        meta = beton.json_bytes({"key": key, **known})
        if len(image) + len(meta) > beton.MAX_PAGE_BYTES:
            raise DataError(
                f"{key}: {len(image)} bytes do not fit in a beton's page of at most 2 GiB; use "
                "--resize."
            )
        self._spool.write(image)
        self._keys[key] = None
        self._images.append((found, len(image), label, xxhash.xxh3_64_intdigest(image)))
        self._metas.append(meta)

    def close(self) -> ShardIndex:
        """Lay the samples out and put the file in place.

        Raises:
            InfrastructureError: The disk is full or not writable.
        """
        needed = max(
            size + len(meta)
            for (_, size, _, _), meta in zip(self._images, self._metas, strict=True)
        )
        while self._page_bytes < needed:
            self._page_bytes *= 2
        head, places, end = self._lay_out()
        try:
            sha256, size_bytes = self._write(head, places, end)
        except OSError as error:
            raise explain("write", self._uri, error) from error
        self._file.commit()
        rows = TableBuilder()
        for key, (found, size, label, digest), (offset, _) in zip(
            self._keys, self._images, places, strict=True
        ):
            rows.add(
                key,
                offset=offset,
                size=size,
                label=label,
                width=found.width,
                height=found.height,
                image_format=found.format,
                mode=found.mode,
                xxh3=digest,
            )
        table = rows.build()
        name = storage.name_of(self._uri)
        return ShardIndex(
            ShardFile.of(table, name=name, size_bytes=size_bytes, sha256=sha256), table
        )

    def _lay_out(self) -> tuple[bytes, list[tuple[int, int]], int]:
        """Return (all that stands before the pages, where each sample's image and meta go, where
        the pages end)."""
        row = beton.row_dtype([type_id for _, type_id in beton.OUR_FIELDS])
        fields = beton.describe_fields(beton.OUR_FIELDS)
        samples = np.zeros(len(self._images), row)
        image_name, label_name, meta_name = row.names or ()
        first_page = beton.align(
            beton.HEADER.itemsize + fields.nbytes + samples.nbytes, self._page_bytes
        )
        at, left = first_page, self._page_bytes
        places = []
        for sample, (found, size, label, _), meta in zip(
            samples, self._images, self._metas, strict=True
        ):
            if size + len(meta) > left:
                at, left = at + left, self._page_bytes
            places.append((at, at + size))
            mode = beton.MODE_RAW if found.format == "raw" else beton.MODE_JPEG
            sample[image_name] = (mode, found.width, found.height, at)
            sample[label_name] = label
            sample[meta_name] = (at + size, len(meta))
            at, left = at + size + len(meta), left - size - len(meta)
        end = at + left
        header = np.zeros(1, beton.HEADER)
        header[0] = (beton.VERSION, len(fields), self._page_bytes, len(samples), end)
        return header.tobytes() + fields.tobytes() + samples.tobytes(), places, end

    def _write(self, head: bytes, places: list[tuple[int, int]], end: int) -> tuple[str, int]:
        spool = self._spool.file
        file = self._file.file
        spool.seek(0)
        digest = hashlib.sha256()
        at = 0

        def put(data: bytes) -> None:
            nonlocal at
            file.write(data)
            digest.update(data)
            at += len(data)

        def fill(until: int) -> None:
            while at < until:
                put(bytes(min(_CHUNK_BYTES, until - at)))

        put(head)
        allocations = np.zeros(2 * len(places), beton.ALLOCATION)
        for i, ((offset, meta_offset), (_, size, _, _), meta) in enumerate(
            zip(places, self._images, self._metas, strict=True)
        ):
            fill(offset)
            put(spool.read(size))
            put(meta)
            allocations[2 * i] = (i, offset, size)
            allocations[2 * i + 1] = (i, meta_offset, len(meta))
        fill(end)
        put(allocations.tobytes())
        return digest.hexdigest(), at
