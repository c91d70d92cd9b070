"""Decode with a pool of threads over libjpeg-turbo and OpenCV or Pillow: always there, on any machine.

Shapes: B images, H W height and width of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from pipeline.augment import Boxes
from pipeline.config import ViewConfig
from pipeline.decoders.base import U8, Decoded, decode_single

_JPEG_START = b"\xff\xd8\xff"
_PILLOW_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class TurboDecoder:
    """Decode JPEG with libjpeg-turbo on a thread pool; everything else with Pillow.

    `area` resizes with OpenCV, `bicubic` and `bilinear` with Pillow, whose filters widen when they shrink an image as
    those of the published recipes do; OpenCV's do not.

    Args:
        view: output size and filter.
        num_threads: decoding threads.
    """

    def __init__(self, *, view: ViewConfig, num_threads: int) -> None:
        self._view = view
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="turbo")

    def decode(self, images_B: Sequence[U8], boxes: Boxes) -> Decoded:
        """Decode, cut, resize and mirror (see `Decoder.decode`)."""
        pixels_BHW3 = torch.empty((len(images_B), self._view.height, self._view.width, 3), dtype=torch.uint8)
        out_BHW3 = pixels_BHW3.numpy()
        # More pieces than threads, so that one with large images does not leave the others idle.
        pieces = np.array_split(np.arange(len(images_B)), min(len(images_B), 4 * self._num_threads) or 1)
        bad: dict[int, str] = {}
        for found in self._pool.map(
            lambda piece: self._decode_piece(piece.tolist(), images_B, boxes, out_BHW3), pieces
        ):
            bad.update(found)
        return Decoded(pixels_BHW3, bad)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _decode_piece(self, piece: list[int], images_B: Sequence[U8], boxes: Boxes, out_BHW3: U8) -> dict[int, str]:
        bad: dict[int, str] = {}
        for i in piece:
            try:
                self._decode_one(images_B[i], boxes, i, out_BHW3[i])
            except ValueError as error:
                out_BHW3[i] = 0
                bad[i] = str(error)
        return bad

    def _decode_one(self, image: U8, boxes: Boxes, i: int, out_HW3: U8) -> None:
        try:
            if image[:3].tobytes() != _JPEG_START:
                raise ValueError("not a JPEG")
            whole = simplejpeg.decode_jpeg(image, colorspace="RGB")
        except ValueError:
            # Not a JPEG, or one that libjpeg-turbo's own interface refuses, such as CMYK.
            out_HW3[:] = decode_single(image, boxes.take(slice(i, i + 1)), self._view)
            return
        top, left = int(boxes.tops_B[i]), int(boxes.lefts_B[i])
        bottom, right = top + int(boxes.heights_B[i]), left + int(boxes.widths_B[i])
        if bottom > whole.shape[0] or right > whole.shape[1]:
            raise ValueError(f"is {whole.shape[1]} x {whole.shape[0]} pixels, smaller than the manifest says")
        size = (self._view.width, self._view.height)
        if self._view.interpolation == "area":
            resized = cv2.resize(whole[top:bottom, left:right], size, interpolation=cv2.INTER_AREA)
        else:
            kind = _PILLOW_FILTERS[self._view.interpolation]
            resized = np.asarray(Image.fromarray(whole[top:bottom, left:right]).resize(size, kind))
        out_HW3[:] = resized[:, ::-1] if boxes.flips_B[i] else resized
