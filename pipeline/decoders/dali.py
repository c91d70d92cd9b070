"""Decode with NVIDIA DALI: on the GPU where there is one, with the same code on the CPU.

DALI's own readers and random crops are not used: our readers hand it the bytes, our boxes say where to cut, so that
what comes out does not depend on DALI's state. `image_slice` decodes no further than the box needs.

Shapes: B images, H W height and width of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from pipeline.augment import Boxes
from pipeline.config import ViewConfig
from pipeline.decoders.base import U8, Decoded, decode_single
from pipeline.errors import ConfigError

_FILTERS = {"bicubic": "INTERP_CUBIC", "bilinear": "INTERP_LINEAR"}


class DaliDecoder:
    """Decode batches with a DALI pipeline that is fed from outside.

    One bad image makes DALI lose the whole batch without saying which it was. Such a batch is run again image by image
    on a fresh pipeline, so that only the bad one is lost.

    Args:
        view: output size and filter.
        max_batch_size: most images that are decoded at once.
        num_threads: DALI's CPU threads.
        device: where the pixels are wanted; a CUDA device decodes there ("mixed").

    Raises:
        ConfigError: DALI is not installed, or it does not have the filter.
    """

    def __init__(self, *, view: ViewConfig, max_batch_size: int, num_threads: int, device: torch.device) -> None:
        if view.interpolation not in _FILTERS:
            raise ConfigError(
                f"view.interpolation {view.interpolation!r}: DALI has bicubic and bilinear; "
                "choose one of them, or loader.decoder 'turbo'"
            )
        self._view = view
        self._max_batch_size = max_batch_size
        self._num_threads = num_threads
        self._device = device
        self._pipeline = self._build()

    def decode(self, images_B: Sequence[U8], boxes: Boxes) -> Decoded:
        """Decode, cut, resize and mirror (see `Decoder.decode`)."""
        # DALI hangs on an empty sample instead of refusing it.
        if all(len(image) for image in images_B):
            try:
                return Decoded(self._run(images_B, boxes))
            except RuntimeError:
                self._pipeline = self._build()
        return self._decode_one_by_one(images_B, boxes)

    def close(self) -> None:
        """Release the pipeline."""
        self._pipeline = None

    def _decode_one_by_one(self, images_B: Sequence[U8], boxes: Boxes) -> Decoded:
        shape = (len(images_B), self._view.height, self._view.width, 3)
        decoded = Decoded(torch.zeros(shape, dtype=torch.uint8, device=self._device))
        for i, image in enumerate(images_B):
            box = boxes.take(slice(i, i + 1))
            try:
                if not len(image):
                    raise ValueError("is empty")
                try:
                    decoded.pixels_BHW3[i] = self._run([image], box)[0]
                except RuntimeError:
                    self._pipeline = self._build()
                    # What Pillow can read is not lost: every decoder gives up on the same images.
                    decoded.pixels_BHW3[i] = torch.from_numpy(decode_single(image, box, self._view).copy())
            except ValueError as error:
                decoded.bad[i] = str(error)
        return decoded

    def _run(self, images_B: Sequence[U8], boxes: Boxes) -> torch.Tensor:
        pipeline = self._pipeline
        pipeline.feed_input("images", list(images_B))
        pipeline.feed_input("starts", np.stack([boxes.tops_B, boxes.lefts_B], axis=1))
        pipeline.feed_input("sizes", np.stack([boxes.heights_B, boxes.widths_B], axis=1))
        pipeline.feed_input("flips", boxes.flips_B.astype(np.int32))
        pipeline.schedule_run()
        (output,) = pipeline.share_outputs()
        try:
            # The buffer is DALI's and is used again, so the pixels are copied out of it.
            if self._device.type == "cuda":
                return torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()
            return torch.from_numpy(np.array(output.as_tensor()))
        finally:
            pipeline.release_outputs()

    def _build(self) -> Any:
        try:
            dali: Any = import_module("nvidia.dali")
            fn: Any = import_module("nvidia.dali.fn")
            types: Any = import_module("nvidia.dali.types")
        except ImportError as error:
            raise ConfigError(
                "loader.decoder 'dali' needs NVIDIA DALI, which is not installed. "
                "Install the extra: pip install -e '.[dali]' -c constraints.txt, or choose loader.decoder 'turbo'"
            ) from error
        on_gpu = self._device.type == "cuda"
        pipeline = dali.Pipeline(
            batch_size=self._max_batch_size,
            num_threads=self._num_threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            images = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
            starts = fn.external_source(name="starts", dtype=types.INT32, ndim=1)
            sizes = fn.external_source(name="sizes", dtype=types.INT32, ndim=1)
            flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
            pixels = fn.decoders.image_slice(
                images,
                starts,
                sizes,
                axes=[0, 1],
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
            )
            pixels = fn.resize(
                pixels,
                size=[self._view.height, self._view.width],
                interp_type=getattr(types, _FILTERS[self._view.interpolation]),
                antialias=True,
            )
            pipeline.set_outputs(fn.flip(pixels, horizontal=flips))
        pipeline.build()
        return pipeline
