"""A pool of threads that decodes batches image by image: what the decoders on the CPU share.

Shapes: B images, H W height and width of the output, 3 RGB.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from pipeline.config import ViewConfig
from pipeline.decoders.base import U8, Bad, Decoded, Pending, decode_single, too_small
from pipeline.images.refused import refused_by
from pipeline.sampling.boxes import Boxes

_PIECES_PER_THREAD = 4
"""More pieces than threads, so that one with large images does not leave the others idle."""


class Kernels(Protocol):
    """What one thread decodes and resizes with."""

    def cut(
        self, image: U8, *, top: int, left: int, height: int, width: int
    ) -> U8 | None:
        """Return a box of an encoded image as RGB, None if Pillow must have a look; see
        `JpegCutter.cut`."""
        ...

    def resize(self, cut_HW3: U8, out_HW3: U8, *, flip: bool) -> None:
        """Resize a cut into its row of the batch, mirrored if asked for."""
        ...


class ThreadedDecoder:
    """Decode batches on a pool of threads; what its kernels do not read is left to Pillow.

    Args:
        view: output size and filter.
        num_threads: decoding threads.
        kernels: makes what one thread works with.
    """

    # So that no thread idles while a batch's last images are decoded.
    depth = 2
    device = torch.device("cpu")

    def __init__(
        self, *, view: ViewConfig, num_threads: int, kernels: Callable[[], Kernels]
    ) -> None:
        self._view = view
        self._num_threads = num_threads
        self._kernels = kernels
        # Kernels hold scratch memory and a codec: each thread has its own.
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="decode", initializer=self._begin_thread
        )

    def submit(
        self, images_B: Sequence[U8], boxes: Boxes, out_BHW3: torch.Tensor | None = None
    ) -> Pending:
        """Begin to decode a batch (see `Decoder.submit`)."""
        count = len(images_B)
        if out_BHW3 is None:
            out_BHW3 = torch.empty(
                (count, self._view.height, self._view.width, 3), dtype=torch.uint8
            )
        pixels_BHW3 = out_BHW3
        # The same memory: the kernels write to rows of numpy's view of it.
        array_BHW3 = out_BHW3.numpy()
        num_pieces = _PIECES_PER_THREAD * self._num_threads
        # Rounded up; an empty batch has no pieces, but its step must not be 0.
        size = -(-count // num_pieces) or 1
        pieces = []
        for first in range(0, count, size):
            behind = min(first + size, count)
            piece = range(first, behind)
            future = self._pool.submit(
                self._decode_piece, piece, images_B, boxes, array_BHW3
            )
            pieces.append(future)

        def wait() -> Decoded:
            # Every piece is waited for, so that no thread writes to memory that is given back.
            bad: Bad = {}
            for future in pieces:
                bad.update(future.result())
            return Decoded(pixels_BHW3, bad)

        return wait

    def decode(self, images_B: Sequence[U8], boxes: Boxes) -> Decoded:
        """Decode a batch now (see `Decoder.decode`)."""
        return self.submit(images_B, boxes)()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin_thread(self) -> None:
        # Autograd's bookkeeping is switched off by thread, and would cost as much as the flip.
        torch.set_grad_enabled(False)
        self._local.kernels = self._kernels()

    def _decode_piece(
        self, piece: range, images_B: Sequence[U8], boxes: Boxes, out_BHW3: U8
    ) -> Bad:
        kernels: Kernels = self._local.kernels
        bad: Bad = {}
        part = slice(piece.start, piece.stop)
        # As Python's numbers: arithmetic and slices with numpy's scalars are slower.
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
            image = images_B[i]
            try:
                if image.ndim == 3:
                    cut_HW3: U8 | None = _cut_raw(image, top, left, height, width)
                else:
                    cut_HW3 = kernels.cut(
                        image, top=top, left=left, height=height, width=width
                    )
                if cut_HW3 is None:
                    box = boxes.take(slice(i, i + 1))
                    out_BHW3[i] = decode_single(image, box, self._view)
                else:
                    kernels.resize(cut_HW3, out_BHW3[i], flip=flip)
            except ValueError as error:
                # Memory that was used before: a bad image must not show an earlier batch's pixels.
                out_BHW3[i] = 0
                bad[i] = refused_by(error)
        return bad


def _cut_raw(image_HW3: U8, top: int, left: int, height: int, width: int) -> U8:
    bottom = top + height
    right = left + width
    # numpy would give a smaller cut without a word, and the resize would stretch it.
    if bottom > image_HW3.shape[0] or right > image_HW3.shape[1]:
        raise too_small(image_HW3.shape[1], image_HW3.shape[0])
    return image_HW3[top:bottom, left:right]
