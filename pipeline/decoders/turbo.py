"""Decode with a pool of threads over libjpeg-turbo, torch's and OpenCV's resize kernels: always there, on any machine.

Pixels that are stored raw (FFCV's `raw` mode) pass through the same code without the JPEG step.

Shapes: B images, H W height and width of the output, 3 RGB.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import simplejpeg
import torch

from pipeline.augment import Boxes
from pipeline.config import ViewConfig
from pipeline.decoders.base import U8, Decoded, decode_single, resize_with_pillow

_PIECES_PER_THREAD = 4
"""More pieces than threads, so that one with large images does not leave the others idle."""
_KEPT_SCRATCH_BYTES = 64 * 2**20
"""A thread keeps this much scratch memory; what a larger image needs is given back after it."""


class TurboDecoder:
    """Decode JPEG with libjpeg-turbo on a thread pool; formats that it does not read with Pillow.

    `bicubic` and `bilinear` are Pillow's filters, which widen when they shrink an image as those of the published
    recipes do. torch computes them on AVX2 to within rounding, bicubic in a fifth of Pillow's time or less
    (docs/benchmarks/loaders.md); where the CPU lacks AVX2, Pillow does. `area` is OpenCV's INTER_AREA, which is what
    FFCV's loader uses too.

    Args:
        view: output size and filter.
        num_threads: decoding threads.
    """

    def __init__(self, *, view: ViewConfig, num_threads: int) -> None:
        self._view = view
        self._num_threads = num_threads
        self._torch_resizes = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        self._local = threading.local()
        # Autograd's bookkeeping is switched off by thread, and would cost as much as the flip.
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="turbo", initializer=torch.set_grad_enabled, initargs=(False,)
        )

    def decode(self, images_B: Sequence[U8], boxes: Boxes) -> Decoded:
        """Decode, cut, resize and mirror (see `Decoder.decode`)."""
        count = len(images_B)
        pixels_BHW3 = torch.empty((count, self._view.height, self._view.width, 3), dtype=torch.uint8)
        out_BHW3 = pixels_BHW3.numpy()
        size = -(-count // (_PIECES_PER_THREAD * self._num_threads)) or 1
        pieces = [range(first, min(first + size, count)) for first in range(0, count, size)]
        bad: dict[int, str] = {}
        for found in self._pool.map(lambda piece: self._decode_piece(piece, images_B, boxes, out_BHW3), pieces):
            bad.update(found)
        return Decoded(pixels_BHW3, bad)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _decode_piece(self, piece: range, images_B: Sequence[U8], boxes: Boxes, out_BHW3: U8) -> dict[int, str]:
        bad: dict[int, str] = {}
        part = slice(piece.start, piece.stop)
        rows = zip(
            piece,
            boxes.tops_B[part].tolist(),
            boxes.lefts_B[part].tolist(),
            boxes.heights_B[part].tolist(),
            boxes.widths_B[part].tolist(),
            boxes.flips_B[part].tolist(),
            strict=True,
        )
        for i, top, left, height, width, flip in rows:
            try:
                whole_HW3 = self._pixels(images_B[i], bottom=top + height, right=left + width)
                if whole_HW3 is None:
                    out_BHW3[i] = decode_single(images_B[i], boxes.take(slice(i, i + 1)), self._view)
                else:
                    self._resize(whole_HW3[top : top + height, left : left + width], out_BHW3[i], flip=flip)
            except ValueError as error:
                out_BHW3[i] = 0
                bad[i] = str(error)
        return bad

    def _pixels(self, image: U8, *, bottom: int, right: int) -> U8 | None:
        """Return an image's pixels, in this thread's scratch memory; nothing where Pillow must have a look.

        Raises:
            ValueError: the image is smaller than its box.
        """
        if image.ndim == 3:
            height, width = image.shape[:2]
        else:
            try:
                height, width = simplejpeg.decode_jpeg_header(image)[:2]
            except ValueError:
                return None
        if bottom > height or right > width:
            raise ValueError(f"is {width} x {height} pixels, smaller than the manifest says")
        if image.ndim == 3:
            return image
        try:
            return simplejpeg.decode_jpeg(image, "RGB", buffer=self._scratch(height * width * 3))
        except ValueError:
            # Damaged: Pillow has the last word, so that every decoder gives up on the same images.
            return None

    def _scratch(self, num_bytes: int) -> U8:
        held: U8 | None = getattr(self._local, "scratch", None)
        if held is None or held.size < num_bytes:
            held = np.empty(num_bytes, dtype=np.uint8)
            if num_bytes <= _KEPT_SCRATCH_BYTES:
                self._local.scratch = held
        return held[:num_bytes]

    def _resize(self, cut_HW3: U8, out_HW3: U8, *, flip: bool) -> None:
        """Resize a cut into its place in the batch, mirrored where asked for."""
        if self._view.interpolation == "area":
            cv2.resize(cut_HW3, (self._view.width, self._view.height), dst=out_HW3, interpolation=cv2.INTER_AREA)
            if flip:
                cv2.flip(out_HW3, 1, dst=out_HW3)
            return
        resized_HW3 = self._resize_antialiased(cut_HW3)
        if flip:
            # numpy's reversed copy takes as long as the resize; OpenCV's a thirtieth of it.
            cv2.flip(resized_HW3, 1, dst=out_HW3)
        else:
            np.copyto(out_HW3, resized_HW3)

    def _resize_antialiased(self, cut_HW3: U8) -> U8:
        size = (self._view.height, self._view.width)
        if not self._torch_resizes:
            return resize_with_pillow(cut_HW3, self._view)
        if cut_HW3.shape[:2] == size:
            return cut_HW3
        # Packed channels-last is what the kernel works on in place; anything else it takes apart into planes, which
        # trebles the time. The batch axis must come first: torch tells the layout by its stride. Always a copy: a
        # mapped shard's raw pixels cannot be written, which torch warns of.
        cut_1CHW = torch.from_numpy(cut_HW3.copy()).unsqueeze(0).permute(0, 3, 1, 2)
        resized_1CHW = torch.nn.functional.interpolate(
            cut_1CHW, size=size, mode=self._view.interpolation, antialias=True
        )
        resized_HW3: U8 = resized_1CHW[0].permute(1, 2, 0).numpy()
        return resized_HW3
