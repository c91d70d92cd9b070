"""Decode with NVIDIA DALI: on the GPU if there is one, with the same code on the CPU.

DALI's own readers and random crops are not used: our readers hand it the bytes, our boxes say where
to cut, so that what comes out does not depend on DALI's state. `image_slice` decodes no further
than the box needs.

Shapes: B images, H W height and width of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
import torch.utils.dlpack

from pipeline.config import ViewConfig
from pipeline.decoders.base import U8, Decoded, Pending, decode_single
from pipeline.decoders.jpeg import is_whole_jpeg
from pipeline.errors import ConfigError
from pipeline.images.header import Probe, probe
from pipeline.images.jpeg_header import JPEG_START
from pipeline.images.refused import refused_by
from pipeline.sampling.boxes import Boxes

Stored = Literal["encoded", "raw"]
"""How an image lies in its shard: as a file, or as bare pixels."""
_STORED: tuple[Stored, ...] = ("encoded", "raw")
Route = Literal["encoded", "raw", "pillow"]
"""Which pipeline takes an image, or Pillow, which takes what DALI must not see."""
_FILTERS = {"bicubic": "INTERP_CUBIC", "bilinear": "INTERP_LINEAR"}


def _route(image: U8) -> Route:
    """Decide who decodes an image, from its header and its last bytes.

    DALI 2.4 hangs on an empty sample, and JPEGs whose header is damaged end the process with a
    segmentation fault: 16 of 1,863 single changes of a header did, all of them changes that
    libjpeg-turbo's header parser refuses (in 1.3 microseconds). Such a JPEG, one without its end
    marker, and any other file that does not look whole, is Pillow's.
    """
    if image.ndim == 3:
        return "raw"
    if image[:3].tobytes() == JPEG_START:
        is_whole = is_whole_jpeg(image)
    else:
        probed = probe(image.tobytes())
        is_whole = isinstance(probed, Probe)
    if is_whole:
        return "encoded"
    return "pillow"


@dataclass
class _Ahead:
    """A pipeline that has several batches in hand."""

    pipeline: Any
    is_broken: bool = False


class DaliDecoder:
    """Decode batches with a DALI pipeline that is fed from outside.

    One bad image makes DALI lose the whole batch without saying which it was. Such a batch is run
    again image by image, so that only the bad one is lost; what was submitted behind it is run
    again too.

    Args:
        view: output size and filter.
        max_batch_size: most images that are decoded at once.
        num_threads: DALI's CPU threads.
        device: device on which the pixels are wanted; a CUDA device decodes there ("mixed").
        depth: batches in DALI's hands at once.
        hw_decoder_load: share of the JPEGs that the GPU's own JPEG engine decodes, if it has one.

    Raises:
        ConfigError: DALI is not installed, or it does not have the filter.
    """

    def __init__(
        self,
        *,
        view: ViewConfig,
        max_batch_size: int,
        num_threads: int,
        device: torch.device,
        depth: int = 2,
        hw_decoder_load: float = 0.65,
    ) -> None:
        if view.interpolation not in _FILTERS:
            raise ConfigError(
                f"view.interpolation {view.interpolation!r}: DALI has bicubic and bilinear; "
                "choose one of them, or loader.decoder 'turbo'"
            )
        self._view = view
        self._max_batch_size = max_batch_size
        self._num_threads = num_threads
        self._hw_decoder_load = hw_decoder_load
        self.depth = depth
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        # Built now, so that a missing DALI is met before the first batch. The one for raw pixels
        # is built when a dataset turns out to have them.
        encoded = self._build("encoded", depth)
        self._ahead: dict[Stored, _Ahead] = {"encoded": _Ahead(encoded)}
        # Pipelines of depth 1 for single images and repeats: one that has batches in hand would
        # give those first.
        self._alone: dict[Stored, Any] = {}

    def submit(
        self, images_B: Sequence[U8], boxes: Boxes, out_BHW3: torch.Tensor | None = None
    ) -> Pending:
        """Begin to decode a batch (see `Decoder.submit`). One that DALI must not see whole is
        decoded at once."""
        # One image for Pillow, or both ways of storing, and the batch cannot go through one
        # pipeline.
        routes = {_route(image) for image in images_B}
        stored: Route = "pillow"
        if len(routes) == 1:
            (stored,) = routes
        if stored == "pillow":
            decoded = self.decode(images_B, boxes)
            return lambda: decoded
        if stored not in self._ahead:
            pipeline = self._build(stored, self.depth)
            self._ahead[stored] = _Ahead(pipeline)
        ahead = self._ahead[stored]
        _feed(ahead.pipeline, images_B, boxes)

        def wait() -> Decoded:
            if not ahead.is_broken:
                try:
                    return Decoded(self._outputs(ahead.pipeline, out_BHW3))
                except RuntimeError:
                    # What was submitted behind this batch is lost with it, and is run again when it
                    # is waited for.
                    ahead.is_broken = True
                    self._ahead.pop(stored, None)
            return self._decode_alike(images_B, boxes, stored)

        return wait

    def decode(self, images_B: Sequence[U8], boxes: Boxes) -> Decoded:
        """Decode a batch now (see `Decoder.decode`)."""
        indices: dict[Route, list[int]] = {"encoded": [], "raw": [], "pillow": []}
        for i, image in enumerate(images_B):
            indices[_route(image)].append(i)
        # The usual case, without a copy of the batch.
        for stored in _STORED:
            if len(indices[stored]) == len(images_B):
                return self._decode_alike(images_B, boxes, stored)

        decoded = self._zeros(len(images_B))
        for stored in _STORED:
            some = indices[stored]
            if not some:
                continue
            some_images = [images_B[i] for i in some]
            some_indices = np.array(some)
            some_boxes = boxes.take(some_indices)
            part = self._decode_alike(some_images, some_boxes, stored)
            rows = torch.tensor(some, device=self.device)
            decoded.pixels_BHW3[rows] = part.pixels_BHW3
            # A part counts its images from 0.
            for index, refused in part.bad.items():
                decoded.bad[some[index]] = refused
        for i in indices["pillow"]:
            box = boxes.take(slice(i, i + 1))
            self._with_pillow(images_B[i], box, decoded, i)
        return decoded

    def close(self) -> None:
        """Release the pipelines."""
        self._ahead.clear()
        self._alone.clear()

    def _zeros(self, count: int) -> Decoded:
        shape = (count, self._view.height, self._view.width, 3)
        zeros_BHW3 = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        return Decoded(zeros_BHW3)

    def _decode_alike(
        self, images_B: Sequence[U8], boxes: Boxes, stored: Stored
    ) -> Decoded:
        # DALI's error says that some image is bad, not which: then every image runs alone.
        with suppress(RuntimeError):
            return Decoded(self._run_alone(images_B, boxes, stored))
        decoded = self._zeros(len(images_B))
        for i, image in enumerate(images_B):
            box = boxes.take(slice(i, i + 1))
            try:
                alone_1HW3 = self._run_alone([image], box, stored)
                decoded.pixels_BHW3[i] = alone_1HW3[0]
            except RuntimeError:
                self._with_pillow(image, box, decoded, i)
        return decoded

    def _with_pillow(self, image: U8, box: Boxes, decoded: Decoded, i: int) -> None:
        """Have the last word on an image: what Pillow can read is not lost, and every decoder gives
        up on the same."""
        try:
            pixels_HW3 = decode_single(image, box, self._view)
            # A copy, because Pillow's memory cannot be written, which torch warns of.
            copy_HW3 = torch.from_numpy(pixels_HW3.copy())
            decoded.pixels_BHW3[i] = copy_HW3
        except ValueError as error:
            decoded.bad[i] = refused_by(error)

    def _run_alone(
        self, images_B: Sequence[U8], boxes: Boxes, stored: Stored
    ) -> torch.Tensor:
        """Run a batch on a pipeline that has nothing else in hand."""
        if stored not in self._alone:
            self._alone[stored] = self._build(stored, 1)
        pipeline = self._alone[stored]
        try:
            _feed(pipeline, images_B, boxes)
            return self._outputs(pipeline, None)
        except RuntimeError:
            # A pipeline that has failed gives no more batches.
            del self._alone[stored]
            raise

    def _outputs(self, pipeline: Any, out_BHW3: torch.Tensor | None) -> torch.Tensor:
        """Wait for a pipeline's next batch. The buffer is DALI's and is used again, so the pixels
        are copied out."""
        (output,) = pipeline.share_outputs()
        try:
            if self._stream is not None:
                # On a stream of its own, not behind the step that is running; and over before the
                # buffer goes back.
                with torch.cuda.stream(self._stream):
                    shared_BHW3 = torch.utils.dlpack.from_dlpack(output.as_tensor())
                    copy_BHW3 = shared_BHW3.clone()
                self._stream.synchronize()
                return copy_BHW3
            pixels_BHW3 = np.asarray(output.as_tensor())
            if out_BHW3 is None:
                return torch.from_numpy(pixels_BHW3.copy())
            np.copyto(out_BHW3.numpy(), pixels_BHW3)
            return out_BHW3
        finally:
            pipeline.release_outputs()

    def _build(self, stored: Stored, depth: int) -> Any:
        try:
            dali: Any = import_module("nvidia.dali")
            fn: Any = import_module("nvidia.dali.fn")
            types: Any = import_module("nvidia.dali.types")
        except ImportError as error:
            raise ConfigError(
                "loader.decoder 'dali' needs NVIDIA DALI, which is not installed. "
                "Install the extra: pip install -e '.[dali]' -c constraints.txt, or choose "
                "loader.decoder 'turbo'"
            ) from error
        on_gpu = self.device.type == "cuda"
        # What the two devices do not share. The CPU has no JPEG engine, and refuses its option.
        engine = {}
        device_id = None
        backend = "cpu"
        if on_gpu:
            engine["hw_decoder_load"] = self._hw_decoder_load
            device_id = self.device.index or 0
            backend = "mixed"
        # Without a device a pipeline needs neither a GPU nor its driver.
        pipeline = dali.Pipeline(
            batch_size=self._max_batch_size,
            num_threads=self._num_threads,
            device_id=device_id,
            prefetch_queue_depth=depth,
        )
        layout: dict[str, Any] = {"ndim": 1}
        if stored == "raw":
            layout = {"layout": "HWC"}
        with pipeline:
            images = fn.external_source(name="images", dtype=types.UINT8, **layout)
            starts = fn.external_source(name="starts", dtype=types.INT32, ndim=1)
            sizes = fn.external_source(name="sizes", dtype=types.INT32, ndim=1)
            flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
            if stored == "encoded":
                pixels = fn.decoders.image_slice(
                    images,
                    starts,
                    sizes,
                    axes=[0, 1],
                    device=backend,
                    output_type=types.RGB,
                    # Boxes are in stored pixels, as the manifest counts them.
                    adjust_orientation=False,
                    **engine,
                )
            else:
                # Cut on the host, so that only the box crosses the bus.
                pixels = fn.slice(images, starts, sizes, axes=[0, 1])
                if on_gpu:
                    pixels = pixels.gpu()
            # Antialiased, as the published recipes shrink images.
            filter_name = _FILTERS[self._view.interpolation]
            pixels = fn.resize(
                pixels,
                size=[self._view.height, self._view.width],
                interp_type=getattr(types, filter_name),
                antialias=True,
            )
            # Mirrored last, as by every decoder: see `decode_single`.
            mirrored = fn.flip(pixels, horizontal=flips)
            pipeline.set_outputs(mirrored)
        pipeline.build()
        _start(pipeline, stored, depth)
        return pipeline


def _start(pipeline: Any, stored: Stored, depth: int) -> None:
    """Run small images through a new pipeline: its first `schedule_run` wants all the batches it
    may hold at once."""
    pixels_HW3 = np.full((16, 16, 3), 128, dtype=np.uint8)
    image = pixels_HW3
    if stored == "encoded":
        jpeg = simplejpeg.encode_jpeg(pixels_HW3)
        image = np.frombuffer(jpeg, dtype=np.uint8)
    zero = np.zeros(1, dtype=np.int32)
    side = np.full(1, 16, dtype=np.int32)
    no_flip = zero.astype(np.bool_)
    whole = Boxes(zero, zero, side, side, no_flip)
    for _ in range(depth):
        _feed_inputs(pipeline, [image], whole)
    pipeline.schedule_run()
    for _ in range(depth):
        pipeline.share_outputs()
        pipeline.release_outputs()


def _feed(pipeline: Any, images_B: Sequence[U8], boxes: Boxes) -> None:
    _feed_inputs(pipeline, images_B, boxes)
    pipeline.schedule_run()


def _feed_inputs(pipeline: Any, images_B: Sequence[U8], boxes: Boxes) -> None:
    # Rows before columns: `axes` of the pipeline's slice are (height, width).
    starts_B2 = np.stack([boxes.tops_B, boxes.lefts_B], axis=1)
    sizes_B2 = np.stack([boxes.heights_B, boxes.widths_B], axis=1)
    pipeline.feed_input("images", list(images_B))
    pipeline.feed_input("starts", starts_B2)
    pipeline.feed_input("sizes", sizes_B2)
    flips_B = boxes.flips_B.astype(np.int32)
    pipeline.feed_input("flips", flips_B)
