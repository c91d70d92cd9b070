"""What a decoder is, and the slow path that every decoder falls back to for a single image.

Shapes: B images, H W height and width of the output.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from pipeline.config import ViewConfig
from pipeline.images.encode import to_rgb
from pipeline.images.refused import Reason, Refused, RefusedError
from pipeline.sampling.boxes import Boxes

U8 = npt.NDArray[np.uint8]
Bad = dict[int, Refused]
"""Why some images of a batch cannot be used, by their numbers in it."""
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
}


@dataclass
class Decoded:
    """A batch of pixels.

    Attributes:
        pixels_BHW3: uint8 RGB, on the decoder's device. Rows of bad images are zero.
        bad: why an image could not be decoded, by its index in the batch.
    """

    pixels_BHW3: torch.Tensor
    bad: Bad = field(default_factory=dict)


Pending = Callable[[], Decoded]
"""A batch that is being decoded: waits for it and returns it. To be called once."""


class Decoder(Protocol):
    """Turns encoded images and boxes into one batch of equal size.

    Attributes:
        depth: batches that are worth submitting before the first of them is waited for.
        device: device on which the pixels come out.
    """

    depth: int
    device: torch.device

    def submit(
        self, images_B: Sequence[U8], boxes: Boxes, out_BHW3: torch.Tensor | None = None
    ) -> Pending:
        """Begin to decode, cut, resize and mirror a batch.

        Batches are waited for in the order in which they were submitted.

        Args:
            images_B: each image as a uint8 array: encoded bytes (one dimension), or the pixels
                themselves if they are stored raw, (height, width, 3).
            boxes: one box and flip per image, in pixels of the stored image.
            out_BHW3: uint8 host memory for the pixels, if they come out on the host. None: new
                memory.
        """
        ...

    def decode(self, images_B: Sequence[U8], boxes: Boxes) -> Decoded:
        """Decode a batch now, into new memory; allowed while others are pending."""
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...


def decode_single(image: U8, boxes: Boxes, view: ViewConfig) -> U8:
    """Decode one image with Pillow: slow, but it reads every format and says what is wrong.

    Args:
        image: encoded bytes, or pixels of shape (height, width, 3).
        boxes: exactly one box.
        view: output size and filter.

    Returns:
        uint8 RGB of shape (H, W, 3).

    Raises:
        RefusedError: the image cannot be decoded, or the box does not lie inside it.
    """
    try:
        # Pillow warns of sizes that the screen has let through, and of broken metadata.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.ndim == 3:
                rgb = Image.fromarray(image)
            else:
                encoded = io.BytesIO(image.tobytes())
                opened = Image.open(encoded)
                # Opening reads the header only: damage behind it shows here.
                opened.load()
                rgb = to_rgb(opened)
    except UnidentifiedImageError as error:
        raise RefusedError(Refused(Reason.NOT_AN_IMAGE)) from error
    # What Pillow's plugins are known to raise for damaged files; anything else is a defect here.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        refused = Refused(Reason.UNDECODABLE, str(error))
        raise RefusedError(refused) from error
    top = int(boxes.tops_B[0])
    left = int(boxes.lefts_B[0])
    height = int(boxes.heights_B[0])
    width = int(boxes.widths_B[0])
    bottom = top + height
    right = left + width
    # Pillow would fill what is missing with black.
    if bottom > rgb.height or right > rgb.width:
        raise too_small(rgb.width, rgb.height)
    # Cut before the resize: the filter must not see pixels outside of the box.
    cut = rgb.crop((left, top, right, bottom))
    cut_HW3 = np.asarray(cut)
    pixels_HW3 = resize_with_pillow(cut_HW3, view)
    if not boxes.flips_B[0]:
        return pixels_HW3
    # Mirrored after the resize, as every decoder does: the filter rounds the two ways apart.
    mirrored_HW3 = pixels_HW3[:, ::-1]
    return np.ascontiguousarray(mirrored_HW3)


def too_small(width: int, height: int) -> RefusedError:
    """Return the error about an image that its box does not lie inside."""
    detail = f"{width} x {height} pixels, smaller than the manifest says"
    return RefusedError(Refused(Reason.SIZE_DIFFERS, detail))


def resize_with_pillow(cut_HW3: U8, view: ViewConfig) -> U8:
    """Resize RGB pixels to the view's size with the view's filter."""
    cut = Image.fromarray(cut_HW3)
    size = (view.width, view.height)
    resize_filter = _FILTERS[view.interpolation]
    return np.asarray(cut.resize(size, resize_filter))
