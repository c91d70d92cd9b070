"""Decode with FFCV's compiled CPU kernels, called by a pool of threads: no Loader, no compiling, no
ring of its own.

They read any JPEG, a tar's as well as a beton's, and pixels that are stored raw. JPEG is decoded
whole, with libjpeg-turbo's faster and coarser transforms: on average 1.3 of 255 levels from what
every other decoder gives.

Shapes: H W height and width of the output, 3 RGB.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from pipeline.config import ViewConfig
from pipeline.decoders.base import U8
from pipeline.decoders.jpeg import read_header
from pipeline.decoders.threads import ThreadedDecoder
from pipeline.errors import ConfigError


class FfcvDecoder(ThreadedDecoder):
    """Decode JPEG and raw pixels with the kernels of FFCV's library; other formats with Pillow.

    Args:
        view: output size; the filter is `area`, the only one that FFCV has.
        num_threads: decoding threads.

    Raises:
        ConfigError: FFCV is not installed, or it does not have the filter.
    """

    def __init__(self, *, view: ViewConfig, num_threads: int) -> None:
        if view.interpolation != "area":
            raise ConfigError(
                f"view.interpolation {view.interpolation!r}: FFCV has only area; choose it, or "
                "loader.decoder 'turbo' or 'dali'"
            )
        _library()  # a missing FFCV is a mistake of the configuration, to be met now
        super().__init__(view=view, num_threads=num_threads, kernels=_FfcvKernels)


class _FfcvKernels:
    def __init__(self) -> None:
        self._library = _library()
        self._scratch = np.empty(0, dtype=np.uint8)

    def cut(
        self, image: U8, *, top: int, left: int, height: int, width: int
    ) -> U8 | None:
        """Decode an image whole into scratch memory and return its box (see `Kernels.cut`)."""
        header = read_header(image, bottom=top + height, right=left + width)
        if header is None:
            return None
        image_height, image_width, colours = header
        # libjpeg-turbo does not make RGB of CMYK; Pillow does.
        if colours not in ("YCbCr", "Gray"):
            return None
        # Too little memory would not be an error: the kernel writes past its end.
        num_bytes = image_height * image_width * 3
        if self._scratch.size < num_bytes:
            self._scratch = np.empty(num_bytes, dtype=np.uint8)
        failed = self._library.imdecode(
            *(
                image.ctypes.data,
                image.size,
                image_height,
                image_width,
                self._scratch.ctypes.data,
            ),
            *(image_height, image_width, 0, 0, 1, 1, False, False),
        )
        # Damaged: Pillow has the last word, so that every decoder gives up on the same images.
        if failed:
            return None
        whole_HW3 = self._scratch[:num_bytes].reshape(image_height, image_width, 3)
        cut_HW3: U8 = whole_HW3[top : top + height, left : left + width]
        return cut_HW3

    def resize(self, cut_HW3: U8, out_HW3: U8, *, flip: bool) -> None:
        """Average over areas with FFCV's kernel (see `Kernels.resize`)."""
        height, width = cut_HW3.shape[:2]
        # The kernel takes the width of the whole image and a range of columns: the cut is a view
        # into scratch memory or a mapped shard, whose rows are further apart than it is wide.
        row_pixels = cut_HW3.strides[0] // 3
        self._library.resize(
            *(0, cut_HW3.ctypes.data, height, row_pixels, 0, height, 0, width),
            *(out_HW3.ctypes.data, out_HW3.shape[0], out_HW3.shape[1]),
        )
        if flip:
            cv2.flip(out_HW3, 1, dst=out_HW3)


@cache
def _library() -> ctypes.CDLL:
    """Load FFCV's compiled part without importing FFCV, which takes seconds and brings numba
    along."""
    spec = find_spec("ffcv")
    files: list[Path] = []
    if spec is not None and spec.origin:
        folder = Path(spec.origin).parent
        files = sorted(folder.glob("_libffcv*.so"))
    # Installed, but not built here, is as good as missing.
    if not files:
        raise ConfigError(
            "loader.decoder 'ffcv' needs FFCV, which is not installed. Run deploy/setup.sh with "
            "ffcv among its EXTRAS, "
            "or choose loader.decoder 'turbo', which reads betons too"
        )
    # CDLL, not PyDLL: it lets go of the GIL during a call, which is what the threads are for.
    library = ctypes.CDLL(str(files[0]))
    u32 = ctypes.c_uint32
    # (source, its bytes, height, width, destination, crop height and width, x, y, scale as a
    # fraction, crop, flip)
    library.imdecode.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint64, u32, u32, ctypes.c_void_p),
        *(u32, u32, u32, u32, u32, u32, ctypes.c_bool, ctypes.c_bool),
    ]
    # (0, source, height, width, first and last row, first and last column, destination, height,
    # width)
    library.resize.argtypes = [ctypes.c_int64] * 11
    return library
