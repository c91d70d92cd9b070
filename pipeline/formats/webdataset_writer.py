"""Write WebDataset shards."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import xxhash

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats.records import ShardFile, ShardIndex
from pipeline.formats.table import NO_LABEL, TableBuilder
from pipeline.formats.tar import end_mark, make_header
from pipeline.formats.webdataset import _META, SUFFIX, make_dali_index, split_key
from pipeline.images.header import Probe
from pipeline.storage import local as local_files
from pipeline.storage.retry import explain

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
        self._tmp: Path | None = None
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._at = 0
        self._rows = TableBuilder()
        self._components: list[list[tuple[str, int, int, str]]] = []
        self._keys: set[str] = set()

    def __enter__(self) -> WebDatasetWriter:
        try:
            if storage.is_local(self._uri):
                target = storage.local_path(self._uri)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._tmp = local_files.tmp_path(target)
                self._file = self._tmp.open("xb")
            else:
                file = tempfile.NamedTemporaryFile(prefix="maelstrom-", suffix=SUFFIX, delete=False)
                self._tmp, self._file = Path(file.name), file  # type: ignore[assignment]
        except OSError as error:
            raise explain("write", self._uri, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            if self._tmp is not None:
                self._tmp.unlink(missing_ok=True)

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
        """Append one sample: `key.jpg` (by its format), `key.cls` where there is a label,
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
        if (
            split_key(f"{key}.{extension}") != (key, extension)
            or key.split() != [key]
            or _META.match(key)
        ):
            raise DataError(
                f"{key!r} cannot be a WebDataset key: no dots in its last part, no blanks, no "
                "__name__."
            )
        if key in self._keys:
            raise DataError(
                f"{key!r} is already in {storage.name_of(self._uri)}: keys must be unique."
            )
        self._keys.add(key)
        members = [(extension, image)]
        if label != NO_LABEL:
            members.append(("cls", str(label).encode()))
        if metadata is not None:
            members.append(("json", _to_json(metadata).encode()))
        components = []
        # What stands around the image goes out in one piece: calls cost more than bytes here.
        small = b""
        for part, data in members:
            name = f"{key}.{part}"
            small += make_header(name, len(data))
            components.append((part, self._at + len(small), len(data), name))
            if data is image:
                self._write(small)
                self._write(data)
                small = bytes(-len(data) % 512)
            else:
                small += data + bytes(-len(data) % 512)
        self._write(small)
        self._components.append(components)
        self._rows.add(
            key,
            offset=components[0][1],
            size=len(image),
            label=label,
            width=found.width,
            height=found.height,
            image_format=found.format,
            mode=found.mode,
            xxh3=xxhash.xxh3_64_intdigest(image),
        )

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise RuntimeError("the writer is used outside its with block")
        try:
            self._file.write(data)
        except OSError as error:
            raise explain("write", self._uri, error) from error
        self._digest.update(data)
        self._at += len(data)

    def close(self) -> ShardIndex:
        """End the archive and put it in place.

        Raises:
            InfrastructureError: The disk is full or not writable.
        """
        self._write(end_mark(self._at))
        if self._file is None or self._tmp is None:
            raise RuntimeError("the writer is used outside its with block")
        try:
            self._file.close()
            if storage.is_local(self._uri):
                local_files.commit_file(self._tmp, storage.local_path(self._uri))
            else:
                storage.put_file(self._tmp, self._uri)
        except OSError as error:
            raise explain("write", self._uri, error) from error
        table = self._rows.build()
        file = ShardFile.of(
            table,
            name=storage.name_of(self._uri),
            size_bytes=self._at,
            sha256=self._digest.hexdigest(),
        )
        return ShardIndex(file, table, make_dali_index(self._components))
