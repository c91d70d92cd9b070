"""Samples by id: where they lie, their bytes and boxes, and what stands in for a bad one.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from pipeline.config import LoaderConfig
from pipeline.dataset.manifest import Manifest, Rows
from pipeline.decoders.base import Bad, Decoded, Decoder
from pipeline.errors import DataError
from pipeline.formats.table import FORMATS
from pipeline.images.header import probe
from pipeline.images.jpeg_header import JPEG_START
from pipeline.images.refused import Reason, Refused
from pipeline.loader.data_report import DataReport
from pipeline.reading.reader import U8, ShardReader
from pipeline.sampling.boxes import Boxes
from pipeline.sampling.draws import Sampling
from pipeline.sampling.philox import I64

_RAW = FORMATS.index("raw")


def shape_raw(images: list[npt.NDArray[np.uint8]], rows: Rows) -> None:
    """Give bare pixels their shape, (height, width, 3), in place: so a decoder knows them from
    encoded images.

    Args:
        images: Bytes of some samples, as a shard holds them; samples that could not be read are
            empty.
        rows: What the manifest says of them.
    """
    raw_rows = np.flatnonzero(rows.formats_B == _RAW)
    for i in raw_rows.tolist():
        # What could not be read is empty, and is refused already.
        if images[i].size:
            height = rows.heights_B[i]
            width = rows.widths_B[i]
            shape = (height, width, 3)
            images[i] = images[i].reshape(shape)


_SUBSTITUTES = 64
"""Samples that are tried in place of a bad one before giving up."""
# What a decoder is given for a sample that was refused: it reports it as bad at once.
_EMPTY = np.zeros(0, dtype=np.uint8)


@dataclass
class Encoded:
    """Encoded images with all that is decided about them before decoding.

    Attributes:
        sample_ids_B, epochs_B: int64; what names every random choice.
        labels_B: int64, -1 if there is none.
        images: encoded bytes.
        boxes: how each image is cut, for each view.
        bad: why a sample cannot be used, by its number in the batch.
        draws: the arrays that `Sampling.draws` asks for, by name.
    """

    sample_ids_B: I64
    epochs_B: I64
    labels_B: I64
    images: list[U8]
    boxes: tuple[Boxes, ...]
    bad: Bad = field(default_factory=dict)
    draws: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


class SampleSource:
    """Look up, read, screen and decode samples of one dataset.

    A bad sample is replaced by the next good one of its shard, cut with the random numbers that are
    the bad one's: the same substitute in every run, whatever the decoder or the world size.

    Args:
        dataset: an open dataset.
        reader: bytes of its samples.
        sampling: what is cut out of and drawn for each image.
        settings: limits on pixels and bytes.
        seed: key of the run.
    """

    def __init__(
        self,
        dataset: Manifest,
        reader: ShardReader,
        *,
        sampling: Sampling,
        settings: LoaderConfig,
        seed: int,
    ) -> None:
        self._dataset = dataset
        self._reader = reader
        self._sampling = sampling
        self._settings = settings
        self._seed = seed

    def fetch(self, sample_ids_B: I64, epochs_B: I64) -> Encoded:
        """Read samples and draw everything that is random about them."""
        encoded = self._fetch(sample_ids_B, named_by_B=sample_ids_B, epochs_B=epochs_B)
        # Drawn here and not in `_fetch`: a substitute keeps the draws of the sample it stands for.
        encoded.draws = self._sampling.draw_arrays(
            seed=self._seed, epochs_B=epochs_B, sample_ids_B=sample_ids_B
        )
        return encoded

    def decode(
        self, encoded: Encoded, decoders: Sequence[Decoder], report: DataReport
    ) -> list[torch.Tensor]:
        """Decode a batch; bad samples are replaced, counted and reported, and their labels with
        them.

        Args:
            encoded: the batch.
            decoders: one for each view.
            report: told what was bad.

        Returns:
            For each view, uint8 RGB of shape (B, H, W, 3).

        Raises:
            DataError: too much is bad (see `DataReport`), or no sample near a bad one is good.
        """
        decoded = _decode_views(encoded, decoders)
        return self.replace_bad(encoded, decoded, decoders, report)

    def replace_bad(
        self,
        encoded: Encoded,
        decoded: Sequence[Decoded],
        decoders: Sequence[Decoder],
        report: DataReport,
    ) -> list[torch.Tensor]:
        """Replace what is bad in a decoded batch, count and report it (see `decode`)."""
        # An image that is bad in one view is replaced in all of them: views of two images in one
        # row would be learned from as views of one.
        # Of two reasons the earlier one counts: what was refused was decoded as an empty image.
        bad = _bad_in_any(decoded) | encoded.bad
        for i in sorted(bad):
            pixels_of_views, label = self._substitute(encoded, i, decoders)
            encoded.labels_B[i] = label
            for view, pixels_HW3 in zip(decoded, pixels_of_views, strict=True):
                view.pixels_BHW3[i] = pixels_HW3
        pixels = [view.pixels_BHW3 for view in decoded]
        if not bad:
            report.good(len(encoded.images))
            return pixels
        self._tell(bad, encoded, report)
        return pixels

    def _tell(self, bad: Bad, encoded: Encoded, report: DataReport) -> None:
        """Report a batch that has bad samples, in the order of its samples."""
        shards_B, _ = self._dataset.locate(encoded.sample_ids_B)
        # Keys are read from the manifest's files, so only those of bad samples are.
        bad_ids = encoded.sample_ids_B[list(bad)]
        bad_keys = self._dataset.keys(bad_ids)
        keys = dict(zip(bad, bad_keys, strict=True))
        reasons: list[Refused | None] = []
        shards = []
        keys_or_none = []
        for i, shard in enumerate(shards_B.tolist()):
            reasons.append(bad.get(i))
            shards.append(self._dataset.shard_name(shard))
            keys_or_none.append(keys.get(i, ""))
        report.record(reasons, shards, keys_or_none)

    def _fetch(self, sample_ids_B: I64, *, named_by_B: I64, epochs_B: I64) -> Encoded:
        rows = self._dataset.lookup(sample_ids_B)
        bad = self._screen(rows)
        images, mismatched = self._reader.read(rows, skip=bad.keys())
        shape_raw(images, rows)
        # Of several reasons the first check's is kept, which depends on the manifest alone.
        wrong_headers = self._screen_headers(images, rows)
        bad = {**wrong_headers, **mismatched, **bad}
        for i in bad:
            images[i] = _EMPTY
        # From the manifest's sizes, not the images': order and boxes are known without a read. A
        # size of 0 belongs to a bad image, whose box is thrown away; it must only not fail.
        boxes = self._sampling.draw_boxes(
            seed=self._seed,
            epochs_B=epochs_B,
            sample_ids_B=named_by_B,
            widths_B=np.maximum(rows.widths_B, 1),
            heights_B=np.maximum(rows.heights_B, 1),
        )
        labels_B = rows.labels_B.astype(np.int64)
        return Encoded(sample_ids_B, epochs_B, labels_B, images, boxes, bad)

    def _screen(self, rows: Rows) -> Bad:
        """Refuse by what the manifest says, before a byte is read or decoded."""
        # In 64 bits: the product of two int32 sides may not fit in 32.
        widths_B = rows.widths_B.astype(np.int64)
        pixels_B = widths_B * rows.heights_B
        checks = {
            Reason.NOT_AN_IMAGE: pixels_B <= 0,
            Reason.TOO_MANY_PIXELS: pixels_B > self._settings.max_pixels,
            Reason.TOO_MANY_BYTES: rows.sizes_B > self._settings.max_bytes,
        }
        bad: Bad = {}
        for reason, is_bad_B in checks.items():
            numbers = np.flatnonzero(is_bad_B)
            for i in numbers.tolist():
                bad[i] = Refused(reason)
        return bad

    def _screen_headers(self, images: list[U8], rows: Rows) -> Bad:
        """Refuse what is not of the size that the manifest says, before it is decoded: 2
        microseconds a JPEG.

        A flipped bit or an exchanged file may declare gigabytes of pixels, and a larger image would
        be cut elsewhere.
        """
        bad = {}
        widths = rows.widths_B.tolist()
        heights = rows.heights_B.tolist()
        for i, image in enumerate(images):
            # Raw pixels have no header; their shape came from the manifest itself.
            if image.ndim != 1:
                continue
            declared = _declared_size(image)
            expected = (widths[i], heights[i])
            if declared is None or declared == expected:
                continue
            width, height = declared
            said = f"the manifest says {expected[0]} x {expected[1]}"
            detail = f"{width} x {height} pixels, {said}"
            bad[i] = Refused(Reason.SIZE_DIFFERS, detail)
        return bad

    def _substitute(
        self, encoded: Encoded, i: int, decoders: Sequence[Decoder]
    ) -> tuple[list[torch.Tensor], int]:
        """Give the pixels of each view, and the label, of the sample that stands in for one."""
        sample_id = encoded.sample_ids_B[i : i + 1]
        epoch = encoded.epochs_B[i : i + 1]
        shards, indices = self._dataset.locate(sample_id)
        shard = int(shards[0])
        index = int(indices[0])
        start = int(self._dataset.shard_starts[shard])
        size = int(self._dataset.shard_sizes[shard])
        # Of the same shard, which is open already, and round its end to its beginning. The order
        # of the tries is a promise of docs/formats.md: another one changes what a run sees.
        num_tries = min(size, _SUBSTITUTES + 1)
        for step in range(1, num_tries):
            candidate_index = (index + step) % size
            candidate_id = start + candidate_index
            candidate_ids = np.array([candidate_id], dtype=np.int64)
            candidate = self._fetch(candidate_ids, named_by_B=sample_id, epochs_B=epoch)
            if candidate.bad:
                continue
            decoded = _decode_views(candidate, decoders)
            if not _bad_in_any(decoded):
                pixels_of_views = [view.pixels_BHW3[0] for view in decoded]
                label = int(candidate.labels_B[0])
                return pixels_of_views, label
        number = int(sample_id[0])
        shard_name = self._dataset.shard_name(shard)
        num_tried = num_tries - 1
        raise DataError(
            f"data: sample {number} of {shard_name} cannot be used, nor can the {num_tried} after "
            "it: check the shard with pipeline.verify --full"
        )


def _decode_views(encoded: Encoded, decoders: Sequence[Decoder]) -> list[Decoded]:
    views = zip(decoders, encoded.boxes, strict=True)
    return [decoder.decode(encoded.images, boxes) for decoder, boxes in views]


def _bad_in_any(decoded: Sequence[Decoded]) -> Bad:
    """Collect what is bad in any view; of several reasons the first view's is told."""
    bad: Bad = {}
    for view in reversed(decoded):
        bad |= view.bad
    return bad


def _declared_size(image: U8) -> tuple[int, int] | None:
    """Return the width and height in an image's header; None if it cannot be read, which the
    decoder will say."""
    # The usual case, without a copy of the image and without Pillow.
    if image[:3].tobytes() == JPEG_START:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(image)
        except ValueError:
            return None
        return int(width), int(height)
    found = probe(image.tobytes())
    if isinstance(found, Refused):
        return None
    return (found.width, found.height)
