"""Index WebDataset shards: one pass over a tar."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import xxhash

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats.records import DEAD_LINK, EmptyShardError, ShardFile, ShardIndex
from pipeline.formats.table import NO_LABEL, ShardTable, TableBuilder, class_number
from pipeline.formats.tar import BADLY_GROUPED, TarMember, TarScanner
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
_CHUNK_BYTES = 2**20


@dataclass(slots=True)
class _Sample:
    """The members of one key, as they come."""

    key: str
    header_offset: int
    components: list[tuple[str, int, int, str]] = field(default_factory=list)
    images: dict[str, tuple[TarMember, int, Probe | Refused]] = field(
        default_factory=dict
    )
    texts: dict[str, bytes] = field(default_factory=dict)
    num_dead_links: int = 0


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


def index_shard(uri: str, *, image_component: str | None = None) -> ShardIndex:
    """Read a tar once, from end to end, and return its samples' places, sizes and hashes.

    Args:
        uri: The tar.
        image_component: Extension of the member that is a sample's image, such as `image.jpg`; None
            takes the first of `IMAGE_EXTENSIONS` that there is.

    Raises:
        EmptyShardError: The tar is whole and has no member.
        DataError: The tar is cut, damaged or badly made, or holds no sample. The message names the
            shard, the byte and how many members before it are whole.
    """
    name = storage.name_of(uri)
    with storage.open_read(uri) as file:
        stream = _HashingStream(file)
        scanner = TarScanner(
            stream,
            shard=storage.redact(uri),
            links="yield",
        )
        indexer = _Indexer(
            scanner,
            uri,
            image_component,
        )
        table = indexer.run()
    if not scanner.num_members:
        raise EmptyShardError(f"{storage.redact(uri)} is an archive without members.")
    if not len(table):
        raise DataError(
            f"{storage.redact(uri)}: no sample with an image ({', '.join(indexer.extensions)}) in "
            f"{scanner.num_members} members; passed over: {dict(indexer.ignored)}."
            f"{indexer.advice()}"
        )
    return ShardIndex(
        ShardFile.of(
            table,
            name=name,
            size_bytes=stream.size_bytes,
            sha256=stream.digest.hexdigest(),
        ),
        table,
        dali_index=make_dali_index(indexer.components),
        ignored=dict(indexer.ignored),
        bad=indexer.bad,
        dead_links=indexer.dead_links,
    )


class _Indexer:
    """Groups a tar's members into samples.

    Args:
        scanner: Of the tar, at its start.
        uri: The tar, from which the target of a link is read.
        image_component: As `index_shard` takes it.
    """

    def __init__(
        self,
        scanner: TarScanner,
        uri: str,
        image_component: str | None,
    ) -> None:
        self.scanner = scanner
        self.extensions: tuple[str, ...] = IMAGE_EXTENSIONS
        if image_component is not None:
            self.extensions = (image_component.lower().removeprefix("."),)
        self.components: list[list[tuple[str, int, int, str]]] = []
        self.ignored: Counter[str] = Counter()
        self.bad: list[tuple[str, Refused]] = []
        self.dead_links: list[str] = []
        self._uri = uri
        self._rows = TableBuilder()
        self._seen: set[str] = set()
        self._offered: Counter[str] = Counter()
        self._places: dict[str, tuple[int, int]] = {}

    def run(self) -> ShardTable:
        current: _Sample | None = None
        for member in self.scanner:
            parts = split_key(member.name)
            # macOS puts a ._file beside every file: its key would be that of no other member.
            if storage.is_hidden(member.name):
                self.ignored["hidden"] += 1
                continue
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
                        remedy=BADLY_GROUPED,
                    )
                self._seen.add(key)
                current = _Sample(key, member.header_offset)
            self._take(
                current,
                member,
                extension,
            )
        self._finish(current)
        return self._rows.build()

    def _take(
        self,
        sample: _Sample,
        member: TarMember,
        extension: str,
    ) -> None:
        if member.link_to is None:
            # As a link's target is written: without the `./` that `tar .` puts before all names.
            self._places[member.name.removeprefix("./")] = (member.offset, member.size)
        elif member.link_to in self._places:
            # Its bytes lie at the target: it counts as a member at that place.
            offset, size = self._places[member.link_to]
            member = replace(
                member,
                offset=offset,
                size=size,
            )
        else:
            sample.num_dead_links += 1
            self.ignored[DEAD_LINK] += 1
            self.dead_links.append(f"{member.name} -> {member.link_text}")
            return
        sample.components.append((extension, member.offset, member.size, member.name))
        if extension in sample.images or extension in sample.texts:
            raise self.scanner.error(
                f"the key {sample.key!r} has two members .{extension}",
                offset=member.header_offset,
                remedy=BADLY_GROUPED,
            )
        if extension in self.extensions:
            sample.images[extension] = self._take_image(member)
        elif extension in IMAGE_EXTENSIONS:
            self.ignored["further images of a key"] += 1
        elif extension in ("cls", "json") and member.size <= _MAX_TEXT_BYTES:
            sample.texts[extension] = self._read(member)
        else:
            # Of a caption there is no place in a dataset of images: it is counted.
            self.ignored[f"extension .{extension}"] += 1
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                self._offered[extension] += 1
            if extension in EXTENSIONS:
                sample.texts[extension] = b""

    def _take_image(self, member: TarMember) -> tuple[TarMember, int, Probe | Refused]:
        """Return an image's hash and what its header says."""
        if member.size <= _MAX_IMAGE_BYTES:
            data = self._read(member)
            return member, xxhash.xxh3_64_intdigest(data), probe(data)
        digest = xxhash.xxh3_64()
        chunks = (
            self.scanner.read_chunks()
            if member.link_to is None
            else self._chunks_of(member)
        )
        for part in chunks:
            digest.update(part)
        return member, digest.intdigest(), Refused(Reason.TOO_MANY_BYTES)

    def _read(self, member: TarMember) -> bytes:
        if member.link_to is None:
            return self.scanner.read()
        return storage.read_bytes(
            self._uri,
            member.offset,
            member.size,
        )

    def _chunks_of(self, member: TarMember) -> Iterator[bytes]:
        for start in range(
            0,
            member.size,
            _CHUNK_BYTES,
        ):
            length = min(_CHUNK_BYTES, member.size - start)
            yield storage.read_bytes(
                self._uri,
                member.offset + start,
                length,
            )

    def advice(self) -> str:
        """Return how to choose a member that may be the image; empty if there is none."""
        if not self._offered:
            return ""
        named = [extension for extension, _ in self._offered.most_common(5)]
        return (
            f" Members that look like images: {', '.join('.' + name for name in named)}. Choose "
            f"one: --image-component {named[0]} of pipeline.convert, or of pipeline.verify "
            "--write-manifest."
        )

    def _finish(self, sample: _Sample | None) -> None:
        if sample is None or not (sample.images or sample.texts):
            return
        chosen = next((name for name in self.extensions if name in sample.images), None)
        if chosen is None and sample.num_dead_links:
            self.ignored["member of a sample without its image"] += len(sample.texts)
            return
        if chosen is None:
            raise self.scanner.error(
                f"the key {sample.key!r} has no image ({', '.join(self.extensions)}), "
                f"only {', '.join('.' + component[0] for component in sample.components)},",
                offset=sample.header_offset,
                remedy=self.advice().strip() or BADLY_GROUPED,
            )
        if len(sample.images) > 1:
            self.ignored["further images of a key"] += len(sample.images) - 1
        member, digest, found = sample.images[chosen]
        if isinstance(found, Refused):
            self.bad.append((sample.key, found))
            found = Probe(
                "bad",
                0,
                0,
                "",
            )
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
        if "json" in sample.texts:
            parsed: object = None
            with suppress(ValueError, RecursionError):
                parsed = json.loads(sample.texts["json"])
            if isinstance(parsed, dict):
                value = parsed.get("label")
            else:
                # A conversion keeps objects only: a list or a damaged text has no keys.
                self.ignored["JSON that is not an object"] += 1
        if "cls" in sample.texts:
            value = sample.texts["cls"].decode(errors="replace")
        number = class_number(value)
        if number is None:
            self.ignored["labels that are no class number"] += 1
        return NO_LABEL if number is None else number
