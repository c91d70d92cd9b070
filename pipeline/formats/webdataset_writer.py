"""Write WebDataset shards."""

from __future__ import annotations

import hashlib
import json
from types import TracebackType
from typing import Any

import xxhash

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats.records import ShardFile, ShardIndex
from pipeline.formats.table import NO_LABEL, TableBuilder
from pipeline.formats.tar_writer import end_mark, make_header
from pipeline.formats.webdataset import RESERVED_NAME, make_dali_index, split_key
from pipeline.images.header import Probe
from pipeline.storage.unfinished import UnfinishedFile

# Sorted keys, because a dict's order would decide the shard's bytes.
_to_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
_EXTENSION_OF = {"jpeg": "jpg", "png": "png", "webp": "webp"}


class WebDatasetWriter:
    """Write one shard: streamed to a temporary file, in place only when whole.

    The bytes depend on what is added and its order alone: no time, owner or machine is stored. Use
    it as a context manager; leaving it by an exception removes the temporary file.

    Args:
        uri: Where the finished shard goes.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._file = UnfinishedFile(uri)
        self._digest = hashlib.sha256()
        self._at = 0
        self._rows = TableBuilder()
        self._components: list[list[tuple[str, int, int, str]]] = []
        self._keys: set[str] = set()

    def __enter__(self) -> WebDatasetWriter:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        key: str,
        image: bytes,
        found: Probe,
        *,
        label: int = NO_LABEL,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Append one sample: `key.jpg` (by its format), `key.cls` if there is a label,
        `key.json` if given.

        Args:
            key: Path without dots or blanks, unique in the dataset.
            image: Encoded bytes, stored as they are.
            found: What the image's header says.
            label: Class number, -1 for none.
            metadata: Stored as JSON beside the image.

        Raises:
            DataError: The key cannot be stored, or the format has no place in a WebDataset.
            InfrastructureError: The disk is full or not writable.
        """
        extension = _EXTENSION_OF.get(found.format)
        if extension is None:
            raise DataError(
                f"{key}: a {found.format} image cannot be stored in a WebDataset; re-encode it "
                "(--resize)."
            )
        # The test is what a reader will do with the name, not a list of what it may not hold.
        is_split_back = split_key(f"{key}.{extension}") == (key, extension)
        has_blanks = key.split() != [key]
        if not is_split_back or has_blanks or RESERVED_NAME.match(key):
            raise DataError(
                f"{key!r} cannot be a WebDataset key: no dots in its last part, no blanks, no "
                "__name__."
            )
        if key in self._keys:
            raise DataError(
                f"{key!r} is already in {storage.name_of(self._uri)}: keys must be unique."
            )
        self._keys.add(key)

        # The image comes first; its offset is taken from the first component below.
        members = [(extension, image)]
        if label != NO_LABEL:
            number = str(label)
            members.append(("cls", number.encode()))
        if metadata is not None:
            text = _to_json(metadata)
            members.append(("json", text.encode()))

        # Each member is a header and its data, filled up with zeros to a block of 512 bytes.
        components = []
        # What stands around the image goes out in one piece: calls cost more than bytes here.
        small = b""
        for part, data in members:
            name = f"{key}.{part}"
            small += make_header(name, len(data))
            offset = self._at + len(small)
            components.append((part, offset, len(data), name))
            filling = bytes(-len(data) % 512)
            if data is image:
                # Not joined: a copy of every image would cost more than one call.
                self._write(small)
                self._write(data)
                small = filling
            else:
                small += data + filling
        self._write(small)
        self._components.append(components)
        _, image_offset, _, _ = components[0]
        self._rows.add(
            key,
            offset=image_offset,
            size=len(image),
            label=label,
            width=found.width,
            height=found.height,
            image_format=found.format,
            mode=found.mode,
            xxh3=xxhash.xxh3_64_intdigest(image),
        )

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._at += len(data)

    def close(self) -> ShardIndex:
        """End the archive and put it in place.

        Raises:
            InfrastructureError: The disk is full or not writable.
        """
        # Without the end mark a reader cannot tell a whole archive from one that was cut.
        self._write(end_mark(self._at))
        self._file.commit()
        table = self._rows.build()
        dali_index = make_dali_index(self._components)
        file = ShardFile.of(
            table,
            name=storage.name_of(self._uri),
            size_bytes=self._at,
            sha256=self._digest.hexdigest(),
        )
        return ShardIndex(file, table, dali_index)
