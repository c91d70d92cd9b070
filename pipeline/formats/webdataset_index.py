"""Index WebDataset shards: one pass over a tar."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

import xxhash

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats.records import ShardFile, ShardIndex
from pipeline.formats.table import NO_LABEL, ShardTable, TableBuilder, class_number
from pipeline.formats.tar import TarMember, TarScanner
from pipeline.formats.webdataset import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    RESERVED_NAME,
    make_dali_index,
    split_key,
)
from pipeline.images.header import Probe, probe
from pipeline.images.refused import Reason, Refused

_MAX_IMAGE_BYTES = 2**30
_MAX_TEXT_BYTES = 2**20


@dataclass(slots=True)
class _Sample:
    """The members of one key, as they come."""

    key: str
    header_offset: int
    components: list[tuple[str, int, int, str]] = field(default_factory=list)
    images: dict[str, tuple[TarMember, int, Probe | Refused]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


class _HashingStream:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.size_bytes += len(data)
        return data


def index_shard(uri: str) -> ShardIndex:
    """Read a tar once, from end to end, and return its samples' places, sizes and hashes.

    Raises:
        DataError: The tar is cut, damaged or badly made, or holds no sample. The message names the
            shard, the byte and how many members before it are whole.
    """
    name = storage.name_of(uri)
    with storage.open_read(uri) as file:
        stream = _HashingStream(file)
        indexer = _Indexer(TarScanner(stream, shard=storage.redact(uri)))
        table = indexer.run()
    if not len(table):
        raise DataError(
            f"{storage.redact(uri)}: no sample with an image ({', '.join(IMAGE_EXTENSIONS)}) in "
            f"{indexer.scanner.num_members} members; passed over: {dict(indexer.ignored)}."
        )
    return ShardIndex(
        ShardFile.of(
            table, name=name, size_bytes=stream.size_bytes, sha256=stream.digest.hexdigest()
        ),
        table,
        dali_index=make_dali_index(indexer.components),
        ignored=dict(indexer.ignored),
        bad=indexer.bad,
    )


class _Indexer:
    """Groups a tar's members into samples."""

    def __init__(self, scanner: TarScanner) -> None:
        self.scanner = scanner
        self.components: list[list[tuple[str, int, int, str]]] = []
        self.ignored: Counter[str] = Counter()
        self.bad: list[tuple[str, Refused]] = []
        self._rows = TableBuilder()
        self._seen: set[str] = set()

    def run(self) -> ShardTable:
        current: _Sample | None = None
        for member in self.scanner:
            parts = split_key(member.name)
            if parts is None or RESERVED_NAME.match(member.name):
                self.ignored["no key"] += 1
                continue
            key, extension = parts
            if current is None or current.key != key:
                self._finish(current)
                if key in self._seen:
                    raise self.scanner.error(
                        f"the key {key!r} comes again: its members are not adjacent, or two "
                        "samples share it,",
                        offset=member.header_offset,
                    )
                self._seen.add(key)
                current = _Sample(key, member.header_offset)
            self._take(current, member, extension)
        self._finish(current)
        return self._rows.build()

    def _take(self, sample: _Sample, member: TarMember, extension: str) -> None:
        sample.components.append((extension, member.offset, member.size, member.name))
        if extension not in EXTENSIONS:
            self.ignored[f"extension .{extension}"] += 1
            return
        if extension in sample.images or extension in sample.texts:
            raise self.scanner.error(
                f"the key {sample.key!r} has two members .{extension}", offset=member.header_offset
            )
        if extension in IMAGE_EXTENSIONS:
            if member.size > _MAX_IMAGE_BYTES:
                digest = xxhash.xxh3_64()
                for part in self.scanner.read_chunks():
                    digest.update(part)
                refused = Refused(Reason.TOO_MANY_BYTES)
                sample.images[extension] = member, digest.intdigest(), refused
            else:
                data = self.scanner.read()
                sample.images[extension] = member, xxhash.xxh3_64_intdigest(data), probe(data)
        elif extension in ("cls", "json") and member.size <= _MAX_TEXT_BYTES:
            sample.texts[extension] = self.scanner.read()
        else:
            sample.texts[extension] = b""

    def _finish(self, sample: _Sample | None) -> None:
        if sample is None or not (sample.images or sample.texts):
            return
        chosen = next((name for name in IMAGE_EXTENSIONS if name in sample.images), None)
        if chosen is None:
            raise self.scanner.error(
                f"the key {sample.key!r} has no image ({', '.join(IMAGE_EXTENSIONS)}), "
                f"only {', '.join('.' + component[0] for component in sample.components)},",
                offset=sample.header_offset,
            )
        if len(sample.images) > 1:
            self.ignored["further images of a key"] += len(sample.images) - 1
        member, digest, found = sample.images[chosen]
        if isinstance(found, Refused):
            self.bad.append((sample.key, found))
            found = Probe("bad", 0, 0, "")
        self._rows.add(
            sample.key,
            offset=member.offset,
            size=member.size,
            label=self._label(sample),
            width=found.width,
            height=found.height,
            image_format=found.format,
            mode=found.mode,
            xxh3=digest,
        )
        self.components.append(sample.components)

    def _label(self, sample: _Sample) -> int:
        """Return the number in `.cls`, or `label` in `.json`, or -1."""
        value: object = None
        if "cls" in sample.texts:
            value = sample.texts["cls"].decode(errors="replace")
        elif "json" in sample.texts:
            with suppress(ValueError, RecursionError):
                parsed = json.loads(sample.texts["json"])
                value = parsed.get("label") if isinstance(parsed, dict) else None
        number = class_number(value)
        if number is None:
            self.ignored["labels that are no class number"] += 1
        return NO_LABEL if number is None else number
