"""What is random about each image of a batch, in one place: boxes, flips, and what an objective
asks for.

All of it is a pure function of (seed, epoch, sample, view). The loader's read-ahead thread draws
it; no other part of the program draws anything while a run trains. Imports no torch.

Shapes: B images, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config import ViewConfig
from pipeline.sampling.boxes import Boxes, draw_boxes
from pipeline.sampling.philox import I64, Purpose, random_words, unit_float32


class Draw(Protocol):
    """One kind of random array that an objective needs, e.g. the noise that decides a mask.

    Whoever adds one gives it a `Purpose` of its own: two draws with one purpose would be equal.
    """

    def draw(self, *, seed: int, epochs_B: I64, sample_ids_B: I64) -> npt.NDArray[Any]:
        """Draw for each image of a batch.

        Args:
            seed: key of the run.
            epochs_B: epoch of each image; a batch may span two.
            sample_ids_B: sample id of each image.

        Returns:
            Array whose first axis is the images. A row may depend on its own seed, epoch and
            sample only: how images are shared out over batches and ranks must not show.
        """


@dataclass(frozen=True)
class MaskNoise:
    """Noise whose order decides which patches of an image are hidden.

    Attributes:
        num_patches: values per image.
        view: number of the view that is masked; masks of different views differ.
    """

    num_patches: int
    view: int = 0

    def draw(
        self, *, seed: int, epochs_B: I64, sample_ids_B: I64
    ) -> npt.NDArray[np.float32]:
        """Draw noise_BN, float32, uniform in [0, 1)."""
        words_BN = random_words(
            seed=seed,
            purpose=Purpose.MASK,
            epochs_n=epochs_B,
            streams_n=sample_ids_B,
            num_blocks=(self.num_patches + 3) // 4,
            view=self.view,
        )
        # Blocks hold four words each, so the last one may be longer than the image needs.
        return unit_float32(words_BN[:, : self.num_patches])


@dataclass(frozen=True)
class View:
    """One picture that is cut out of each image.

    Attributes:
        settings: how it is cut.
        number: names its random words, 0 to 255. Views with one number share box and flip, e.g.
            BEiT's, which cuts one box at two sizes. MoCo's two views have two numbers.
    """

    settings: ViewConfig
    number: int = 0


@dataclass(frozen=True)
class Sampling:
    """What is cut out of and drawn for each image.

    Attributes:
        views: at least one. Masked autoencoders need one, contrastive learning two.
        draws: further random arrays by name.
    """

    views: tuple[View, ...]
    draws: Mapping[str, Draw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("a sampling without views: give at least one")

    def centred(self) -> Sampling:
        """Cut the largest centred box and do not flip; for held-out images."""
        views = []
        for view in self.views:
            settings = view.settings.model_copy(update={"crop": "center"})
            views.append(View(settings, view.number))
        return Sampling(tuple(views), self.draws)

    def draw_boxes(
        self,
        *,
        seed: int,
        epochs_B: I64,
        sample_ids_B: I64,
        widths_B: npt.ArrayLike,
        heights_B: npt.ArrayLike,
    ) -> tuple[Boxes, ...]:
        """Draw the boxes and flips of each view.

        Args:
            seed: key of the run.
            epochs_B, sample_ids_B: what names the draws.
            widths_B, heights_B: sizes of the stored images in pixels, at least 1.
        """
        return tuple(
            draw_boxes(
                view.settings,
                seed=seed,
                epochs_B=epochs_B,
                sample_ids_B=sample_ids_B,
                widths_B=widths_B,
                heights_B=heights_B,
                view_number=view.number,
            )
            for view in self.views
        )

    def draw_arrays(
        self, *, seed: int, epochs_B: I64, sample_ids_B: I64
    ) -> dict[str, npt.NDArray[Any]]:
        """Draw the arrays of `draws`, by name."""
        return {
            name: one.draw(seed=seed, epochs_B=epochs_B, sample_ids_B=sample_ids_B)
            for name, one in self.draws.items()
        }


def as_sampling(wanted: Sampling | ViewConfig) -> Sampling:
    """Take the settings of a view for a sampling of that view alone."""
    return Sampling((View(wanted),)) if isinstance(wanted, ViewConfig) else wanted
