"""One shard of a conversion: a pure function of a slice of the source, run in a process of its own.

A finished shard leaves its file, for a tar its DALI index, and its part, a small Parquet file with
the shard's rows. The part is written last: a shard is done when its part exists and carries this
plan's identity.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Event

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.convert.settings import ConvertSettings
from pipeline.errors import DataError, MaelstromError
from pipeline.formats.beton_writer import BetonWriter, storable
from pipeline.formats.records import ShardFile, ShardIndex, suffix_of
from pipeline.formats.table import ShardTable, TableBuilder
from pipeline.formats.webdataset_writer import WebDatasetWriter
from pipeline.images.encode import reencode, shrunk_size, to_pixels
from pipeline.images.header import Probe, screen
from pipeline.images.pixel_sums import PixelSums
from pipeline.images.refused import Reason, Refused
from pipeline.images.upright import Unturned, make_upright
from pipeline.sources.choose import open_source
from pipeline.sources.listing import Source, SourceKind, Wanted

PARTS_FOLDER = "_parts"
"""Folder in the target for what is known of finished shards until the dataset is committed."""
_STORED_FORMATS = ("jpeg", "png", "webp")
"""Formats that every reader of a WebDataset decodes."""
_PART_KEY = b"maelstrom"


class StoppedError(MaelstromError):
    """Another task failed or the user stopped the conversion; this one has cleaned up behind
    itself."""


@dataclass(frozen=True)
class ShardTask:
    """What one shard is made of.

    Args:
        source: URI of the source.
        source_kind: What the source is.
        target: URI of the dataset's folder.
        stem: The shard's name without extension.
        identity: Of the plan it belongs to.
        settings: Of the conversion.
        wanted: Images in stored order.
        keys: Their keys.
        labels: Their class numbers.
        classes: Class names.
    """

    source: str
    source_kind: SourceKind
    target: str
    stem: str
    identity: str
    settings: ConvertSettings
    wanted: Wanted
    keys: list[str]
    labels: list[int]
    classes: list[str] | None


@dataclass(frozen=True)
class Part:
    """A shard that is done.

    Args:
        stem: The shard's name without extension.
        file: The shard file; None if every image of its slice was refused, so that there is none.
        num_images: Images looked at.
        read_bytes: Bytes of those images.
        rejected: File name and reason of each that was refused.
        pixels: Sums over the stored images; None if the settings do not ask for them.
        unturned: File name of each image that keeps its EXIF orientation although the settings ask
            to apply it, and why.
    """

    stem: str
    file: ShardFile | None
    num_images: int
    read_bytes: int
    rejected: list[tuple[str, Reason]]
    pixels: PixelSums | None = None
    unturned: list[tuple[str, str]] = field(default_factory=list)


def part_uri(target: str, stem: str) -> str:
    """Return the URI of a shard's part."""
    return storage.join(
        target,
        PARTS_FOLDER,
        f"{stem}.parquet",
    )


def read_part(
    target: str, stem: str, *, identity: str, container: str
) -> tuple[Part, ShardTable] | None:
    """Return a finished part and its rows, or None if it belongs to another plan or cannot be
    read."""
    try:
        data = storage.read_bytes(part_uri(target, stem))
        rows = pq.read_table(pa.BufferReader(data))
        head = json.loads((rows.schema.metadata or {})[_PART_KEY])
        if head["identity"] != identity:
            return None
        table = ShardTable.from_arrow(rows)
        file = None
        if head["num_samples"]:
            # A part that version 0.1.0 wrote has no content hash.
            content_hash = head.get("content_hash") or table.content_hash()
            name = stem + suffix_of(container)
            file = ShardFile(
                name,
                head["num_samples"],
                head["size_bytes"],
                head["sha256"],
                content_hash,
            )
        part = Part(
            stem=head["stem"],
            file=file,
            num_images=head["num_images"],
            read_bytes=head["read_bytes"],
            rejected=[(name, Reason(reason)) for name, reason in head["rejected"]],
            pixels=PixelSums(**head["pixels"]) if head.get("pixels") else None,
            unturned=[(name, why) for name, why in head.get("unturned", [])],
        )
    except (DataError, pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        # Whatever is wrong with it, making the shard again puts it right.
        return None
    return part, table


def finished_shard(
    target: str,
    stem: str,
    *,
    identity: str,
    container: str,
) -> ShardIndex | None:
    """Return a finished part as the dataset's shard; None if it has no shard file."""
    finished = read_part(
        target,
        stem,
        identity=identity,
        container=container,
    )
    if finished is None:
        raise DataError(
            f"convert: {part_uri(target, stem)} has vanished or changed. Run the same command "
            "again."
        )
    part, table = finished
    return None if part.file is None else ShardIndex(part.file, table)


def make_shard(task: ShardTask, stop: Event | None = None) -> Part:
    """Make one shard file, its index and its part.

    Args:
        task: What it is made of.
        stop: When set, give up at the next image.

    Raises:
        DataError: An image has vanished, or one was refused and the settings say strict.
        InfrastructureError: The source cannot be read, or the target not written.
        StoppedError: `stop` was set.
    """
    source = open_source(
        task.source,
        task.settings,
        kind=task.source_kind,
    )
    uri = storage.join(task.target, task.stem + suffix_of(task.settings.format))
    with (
        BetonWriter(uri)
        if task.settings.format == "ffcv"
        else WebDatasetWriter(uri) as writer
    ):
        filling = _Filling(
            task,
            source,
            writer,
        )
        for row, data in enumerate(source.read_all(task.wanted)):
            if stop is not None and stop.is_set():
                raise StoppedError("stopped")
            filling.add(row, data)

        # A writer that is not closed leaves no file: a shard of refused images is no shard.
        file = None
        table = TableBuilder().build()
        if len(writer):
            written = writer.close()
            file = written.file
            table = written.table
            if written.dali_index:
                index_uri = storage.join(task.target, f"{task.stem}.idx")
                storage.write_atomic(index_uri, written.dali_index)

    part = Part(
        stem=task.stem,
        file=file,
        num_images=len(task.wanted),
        read_bytes=filling.read_bytes,
        rejected=filling.rejected,
        pixels=filling.pixels,
        unturned=filling.unturned,
    )
    # Last: a run that finds the part takes the shard as it is.
    _write_part(
        task,
        part,
        table,
    )
    return part


class _Filling:
    """Puts images into a shard's writer, and counts what it is given.

    Args:
        task: What the shard is made of.
        source: Where the images come from.
        writer: Of the shard file.
    """

    def __init__(
        self, task: ShardTask, source: Source, writer: BetonWriter | WebDatasetWriter
    ) -> None:
        self.read_bytes = 0
        self.rejected: list[tuple[str, Reason]] = []
        self.unturned: list[tuple[str, str]] = []
        self.pixels = PixelSums() if task.settings.stats else None
        self._task = task
        self._source = source
        self._writer = writer

    def add(self, row: int, data: bytes | Refused) -> None:
        """Store one image, or note why it is refused.

        Raises:
            DataError: It is refused and the settings say strict.
        """
        task = self._task
        if not isinstance(data, Refused):
            self.read_bytes += len(data)
        stored = data if isinstance(data, Refused) else prepare(data, task.settings)
        if isinstance(stored, Refused):
            self._reject(task.wanted.names[row], stored)
            return

        header, encoded = stored
        if task.settings.turns and header.format != "raw":
            header, encoded = self._turn(task.wanted.names[row], header, encoded)
        if self.pixels is not None:
            self.pixels.add(encoded, header)
        label = task.labels[row]
        about = self._source.about(
            task.wanted.names[row], class_name=self._class_name(label)
        )
        self._writer.add(
            task.keys[row],
            encoded,
            header,
            label=label,
            metadata=about,
        )

    def _turn(self, name: str, header: Probe, encoded: bytes) -> tuple[Probe, bytes]:
        """Turn an image upright, or note why it stays as it is."""
        upright = make_upright(encoded, header)
        if isinstance(upright, Unturned):
            self.unturned.append((_shown(name), upright.why))
            return header, encoded
        if upright is encoded:
            return header, encoded
        # The manifest must describe what is stored.
        turned = screen(upright, self._task.settings.limits)
        if isinstance(turned, Refused):
            self.unturned.append(
                (_shown(name), f"what was turned is refused: {turned}")
            )
            return header, encoded
        return turned, upright

    def _reject(self, name: str, refused: Refused) -> None:
        shown = _shown(name)
        if self._task.settings.strict:
            raise DataError(
                f"convert: {shown}: {refused}. Without --strict it would be left out."
            )
        self.rejected.append((shown, refused.reason))

    def _class_name(self, label: int) -> str | None:
        classes = self._task.classes
        # Labels of a table may lie outside the names that it gives them.
        if classes is None or not 0 <= label < len(classes):
            return None
        return classes[label]


def _shown(name: str) -> str:
    # It may be a URI with a signature, and lists of names are published with the shards.
    return storage.redact(name) if "://" in name else name


def prepare(data: bytes, settings: ConvertSettings) -> tuple[Probe, bytes] | Refused:
    """Return what the header says and the bytes to store, or why the image is refused."""
    header = screen(data, settings.limits)
    if isinstance(header, Refused):
        return header
    if settings.format == "ffcv" and _as_pixels(header, settings):
        return to_pixels(
            data,
            short_side=settings.resize,
            long_side=settings.max_resolution,
        )

    if settings.resizes:
        smaller = reencode(
            data,
            header,
            short_side=settings.resize,
            long_side=settings.max_resolution,
            quality=settings.quality,
        )
        if isinstance(smaller, Refused):
            return smaller
        # The manifest must describe what is stored, not what came in.
        data = smaller
        header = screen(data, settings.limits)
        if isinstance(header, Refused):
            return header

    # A WebDataset cannot hold GIF, BMP and TIFF; a beton stores only RGB and grey JPEG.
    if settings.format == "ffcv":
        fits = storable(header)
    else:
        fits = header.format in _STORED_FORMATS
    return (header, data) if fits else Refused(Reason.NEEDS_RESIZE)


def _as_pixels(header: Probe, settings: ConvertSettings) -> bool:
    """Return whether a beton stores this image as pixels."""
    if settings.write_mode != "smart":
        return settings.write_mode == "raw"
    width, height = shrunk_size(
        header.width,
        header.height,
        short_side=settings.resize,
        long_side=settings.max_resolution,
    )
    return width * height * 3 <= settings.smart_threshold_bytes


def _write_part(
    task: ShardTask,
    part: Part,
    table: ShardTable,
) -> None:
    # Named one by one: `read_part` of every later version must understand this.
    file = part.file
    head = {
        "identity": task.identity,
        "stem": part.stem,
        "num_samples": file.num_samples if file else 0,
        "size_bytes": file.size_bytes if file else 0,
        "sha256": file.sha256 if file else "",
        "content_hash": file.content_hash if file else "",
        "num_images": part.num_images,
        "read_bytes": part.read_bytes,
        "rejected": part.rejected,
        # Only if there are some: a part without keeps the bytes that it has always had.
        **({"unturned": part.unturned} if part.unturned else {}),
        "pixels": None if part.pixels is None else asdict(part.pixels),
    }
    rows = table.to_arrow().replace_schema_metadata(
        {_PART_KEY: json.dumps(head).encode()}
    )
    buffer = io.BytesIO()
    pq.write_table(
        rows,
        buffer,
        compression="zstd",
        write_statistics=False,
    )
    storage.write_atomic(part_uri(task.target, task.stem), buffer.getvalue())
