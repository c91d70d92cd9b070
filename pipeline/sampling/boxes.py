"""Crop boxes and flips: pure functions of (seed, epoch, sample, view).

Shapes: B images, T tries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import ViewConfig
from pipeline.sampling.philox import I64, Purpose, random_words, unit_float64

_TRIES = 10
"""Boxes that are drawn before falling back to a centred one, as torchvision's RandomResizedCrop
does."""


@dataclass(frozen=True)
class Boxes:
    """How to cut each image, in pixels of the stored image, and whether to mirror the result.

    Attributes:
        tops_B, lefts_B, heights_B, widths_B: int32, a box that lies inside its image.
        flips_B: bool, True if the output is mirrored left to right.
    """

    tops_B: npt.NDArray[np.int32]
    lefts_B: npt.NDArray[np.int32]
    heights_B: npt.NDArray[np.int32]
    widths_B: npt.NDArray[np.int32]
    flips_B: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tops_B)

    def take(self, index: npt.NDArray[np.int64] | slice) -> Boxes:
        """Select some of the boxes."""
        return Boxes(
            self.tops_B[index],
            self.lefts_B[index],
            self.heights_B[index],
            self.widths_B[index],
            self.flips_B[index],
        )


def draw_boxes(
    view: ViewConfig,
    *,
    seed: int,
    epochs_B: I64,
    sample_ids_B: I64,
    widths_B: npt.ArrayLike,
    heights_B: npt.ArrayLike,
    view_number: int = 0,
) -> Boxes:
    """Compute the box and the flip of each image.

    `random` draws a share of the area and a log-uniform aspect up to ten times and takes the first
    box that fits, at a uniform place; if none fits, the largest centred box within the aspect
    limits. `center` takes the largest centred box of the output's aspect and never flips.

    Args:
        view: how boxes are drawn.
        seed: key of the run.
        epochs_B, sample_ids_B: what names the draw.
        widths_B, heights_B: sizes of the stored images in pixels, at least 1.
        view_number: names the view's random words; views with one number share box and flip.

    Returns:
        One box and flip per image.

    Source: the distribution is that of torchvision's RandomResizedCrop, which MAE pre-training uses
    (He et al. 2022, appendix A.1).
    """
    image_widths_B = np.asarray(widths_B, dtype=np.int64)
    image_heights_B = np.asarray(heights_B, dtype=np.int64)
    if view.crop == "center":
        aspect = view.width / view.height
        return _largest_centred(image_widths_B, image_heights_B, aspect=aspect)

    # All tries are drawn at once, one block of four words for each: which one is taken depends on
    # the image's size, but the words of a sample do not.
    words = random_words(
        seed=seed,
        purpose=Purpose.CROP,
        epochs_n=epochs_B,
        streams_n=sample_ids_B,
        num_blocks=_TRIES,
        view=view_number,
    )
    words_BT4 = words.reshape(-1, _TRIES, 4)
    units_BT4 = unit_float64(words_BT4)

    # In 64 bits, as all sizes here: a large image has more pixels than 32 bits count.
    pixels_B = image_widths_B * image_heights_B
    widths_BT, heights_BT = _draw_sizes(view, units_BT4, pixels_B)

    # The first try that fits; argmax gives 0 if none does, which is put right below.
    fits_BT = (widths_BT > 0) & (heights_BT > 0)
    fits_BT &= widths_BT <= image_widths_B[:, None]
    fits_BT &= heights_BT <= image_heights_B[:, None]
    first_B = np.argmax(fits_BT, axis=1)
    rows_B = np.arange(len(first_B))
    box_widths_B = widths_BT[rows_B, first_B]
    box_heights_B = heights_BT[rows_B, first_B]

    # The other two words of the same try decide the corner.
    corner_words_B2 = words_BT4[rows_B, first_B, 2:].astype(np.uint64)
    num_tops_B = image_heights_B - box_heights_B + 1
    num_lefts_B = image_widths_B - box_widths_B + 1
    tops_B = _below(corner_words_B2[:, 0], num_tops_B)
    lefts_B = _below(corner_words_B2[:, 1], num_lefts_B)

    # Flips have a purpose of their own, so that a change of the crop leaves them as they are.
    flip_words_B = random_words(
        seed=seed,
        purpose=Purpose.FLIP,
        epochs_n=epochs_B,
        streams_n=sample_ids_B,
        num_blocks=1,
        view=view_number,
    )[:, 0]

    fallback = _largest_within(
        image_widths_B, image_heights_B, view.min_aspect, view.max_aspect
    )
    none_fits_B = ~fits_BT.any(axis=1)
    return Boxes(
        tops_B=np.where(none_fits_B, fallback.tops_B, tops_B).astype(np.int32),
        lefts_B=np.where(none_fits_B, fallback.lefts_B, lefts_B).astype(np.int32),
        heights_B=np.where(none_fits_B, fallback.heights_B, box_heights_B).astype(
            np.int32
        ),
        widths_B=np.where(none_fits_B, fallback.widths_B, box_widths_B).astype(
            np.int32
        ),
        flips_B=unit_float64(flip_words_B) < view.flip_probability,
    )


def _draw_sizes(
    view: ViewConfig, units_BT4: npt.NDArray[np.float64], pixels_B: I64
) -> tuple[I64, I64]:
    """Compute width and height of each try from its first two numbers in [0, 1)."""
    # Area and aspect decide the size, in float64: float32 would round some sizes otherwise.
    area_range = view.max_area - view.min_area
    areas_BT = view.min_area + area_range * units_BT4[:, :, 0]
    areas_BT *= pixels_B[:, None]
    log_low = np.log(view.min_aspect)
    log_high = np.log(view.max_aspect)
    log_aspects_BT = log_low + (log_high - log_low) * units_BT4[:, :, 1]
    aspects_BT = np.exp(log_aspects_BT)
    exact_widths_BT = np.sqrt(areas_BT * aspects_BT)
    exact_heights_BT = np.sqrt(areas_BT / aspects_BT)
    widths_BT = np.rint(exact_widths_BT).astype(np.int64)
    heights_BT = np.rint(exact_heights_BT).astype(np.int64)
    return widths_BT, heights_BT


def _below(words_B: npt.NDArray[np.uint64], limits_B: I64) -> I64:
    """Map 32-bit words to integers in [0, limit) by multiplication; the bias is below limit /
    2^32."""
    # A try that does not fit has a limit below 1; it is not used, but must not wrap around either.
    limits_above_0_B = np.maximum(limits_B, 1).astype(np.uint64)
    products_B = words_B * limits_above_0_B
    return (products_B >> np.uint64(32)).astype(np.int64)


def _largest_within(
    widths_B: I64, heights_B: I64, min_aspect: float, max_aspect: float
) -> Boxes:
    """Centre the largest box whose aspect lies within the limits."""
    aspects_B = np.clip(widths_B / heights_B, min_aspect, max_aspect)
    return _largest_centred(widths_B, heights_B, aspect=aspects_B)


def _largest_centred(widths_B: I64, heights_B: I64, *, aspect: npt.ArrayLike) -> Boxes:
    """Centre the largest box of the given width / height in each image."""
    # Each side is what the other allows; one of the two is clipped to the image.
    aspects = np.asarray(aspect)
    wanted_widths_B = np.rint(heights_B * aspects)
    wanted_heights_B = np.rint(widths_B / aspects)
    box_widths_B = np.clip(wanted_widths_B, 1, widths_B).astype(np.int32)
    box_heights_B = np.clip(wanted_heights_B, 1, heights_B).astype(np.int32)
    tops_B = (heights_B - box_heights_B) // 2
    lefts_B = (widths_B - box_widths_B) // 2
    return Boxes(
        tops_B=tops_B.astype(np.int32),
        lefts_B=lefts_B.astype(np.int32),
        heights_B=box_heights_B,
        widths_B=box_widths_B,
        flips_B=np.zeros(len(widths_B), dtype=bool),
    )
