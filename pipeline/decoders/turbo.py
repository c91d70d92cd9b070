"""Decode with threads over libjpeg-turbo, torch's and OpenCV's resize kernels: always there, on any
machine.

Pixels that are stored raw (FFCV's `raw` mode) pass through the same code without the JPEG step.

Shapes: H W height and width of the output, 3 RGB.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch

from pipeline.config import ViewConfig
from pipeline.decoders.base import U8, resize_with_pillow
from pipeline.decoders.jpeg import JpegCutter
from pipeline.decoders.threads import ThreadedDecoder


class TurboDecoder(ThreadedDecoder):
    """Decode JPEG with libjpeg-turbo on a thread pool; formats that it does not read with Pillow.

    `bicubic` and `bilinear` are Pillow's filters, which widen when they shrink an image as those of
    the published recipes do. torch computes them on AVX2 to within rounding, bicubic in a fifth of
    Pillow's time or less (docs/benchmarks/loaders.md); if the CPU lacks AVX2, Pillow does.
    `area` is OpenCV's INTER_AREA, which is what FFCV's loader uses too.

    Args:
        view: output size and filter.
        num_threads: decoding threads.
        regions: whether nvImageCodec may decode parts of images if it is installed; the pixels
            are the same.
    """

    def __init__(
        self, *, view: ViewConfig, num_threads: int, regions: bool = True
    ) -> None:
        def make_kernels() -> _TurboKernels:
            return _TurboKernels(view, regions=regions)

        super().__init__(view=view, num_threads=num_threads, kernels=make_kernels)


class _TurboKernels:
    def __init__(self, view: ViewConfig, *, regions: bool) -> None:
        self._view = view
        # "AVX2" or "AVX512": only with them torch has the kernel that is fast here.
        capability = torch.backends.cpu.get_cpu_capability()
        self._torch_resizes = capability.startswith("AVX")
        self._cutter = JpegCutter(regions=regions)
        # Bound once: a method that passes the call on would cost one more call per image.
        self.cut = self._cutter.cut

    def resize(self, cut_HW3: U8, out_HW3: U8, *, flip: bool) -> None:
        """Resize a cut into its row of the batch (see `Kernels.resize`)."""
        if self._view.interpolation == "area":
            size = (self._view.width, self._view.height)
            cv2.resize(cut_HW3, size, dst=out_HW3, interpolation=cv2.INTER_AREA)
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
        # As Pillow does: nothing is resampled, so that no value changes.
        if cut_HW3.shape[:2] == size:
            return cut_HW3
        # Packed channels-last is what the kernel works on in place; anything else it takes apart
        # into planes, which trebles the time. The batch axis must come first: torch tells the
        # layout by its stride. A mapped shard's raw pixels cannot be written, which torch warns of.
        if not (cut_HW3.flags.c_contiguous and cut_HW3.flags.writeable):
            cut_HW3 = cut_HW3.copy()
        cut_1CHW = torch.from_numpy(cut_HW3).unsqueeze(0).permute(0, 3, 1, 2)
        resized_1CHW = torch.nn.functional.interpolate(
            cut_1CHW, size=size, mode=self._view.interpolation, antialias=True
        )
        resized_HW3: U8 = resized_1CHW[0].permute(1, 2, 0).numpy()
        return resized_HW3
