"""What an objective is: all that the loop, the engines and the measurements know of one.

A new objective is one file in this folder that has these methods, its model in `model.objectives`,
and a line in `choose`. No other part of the trainer names one.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.vit import VisionTransformer
from pipeline.loader import Batch
from pipeline.sampling.draws import Sampling
from train.report.drawing import Completion


class Objective(Protocol):
    """What is learned from a batch. Holds the settings of a run, no weights and no state."""

    def sampling(self) -> Sampling:
        """Say what is cut out of and drawn for each image.

        An objective makes no random choice itself: a batch is a pure function of seed, epoch and
        samples, and `Sampling` is the only place that draws while a run trains.
        """

    def build(self) -> nn.Module:
        """Build the model, filled from torch's global generator.

        Its `forward(*inputs)` returns an object with `loss`, a scalar tensor averaged over the
        images. A tensor without a gradient is taken as constant: an engine saves it as it was
        when the engine was built.
        """

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Pick the arguments of the model's forward pass out of a batch, e.g. images and noise."""

    def train_flops(self) -> int:
        """Count the operations of one training step per image, without what is recomputed."""

    def encoder(self, model: nn.Module) -> VisionTransformer:
        """Give the part of a model that other tasks go on with."""

    def pictures(self, model: nn.Module, batch: Batch) -> Completion | None:
        """Draw what a model makes of some images; None if this objective makes no pictures.

        Args:
            model: in eval mode, on the batch's device.
            batch: held-out images.
        """

    def held_out_losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Score a model on held-out images, next to whatever it should be compared with.

        Returns:
            `model_loss`, and further losses by name: losses_B, float32, on the batch's device.
        """


def make_batch(
    sampling: Sampling,
    views_BCHW: Sequence[Tensor],
    *,
    seed: int = 0,
    first_id: int = 0,
) -> Batch:
    """Make a batch of pixels that come from no dataset, with draws as in the first epoch.

    Args:
        sampling: what is drawn.
        views_BCHW: one for each view, normalised, on the device that the draws are wanted on.
        seed: key of the draws.
        first_id: sample id of the first image; the others follow.

    Returns:
        A batch without labels (all -1).
    """
    device = views_BCHW[0].device
    count = len(views_BCHW[0])
    # Ids are made up, so that equal calls give equal draws.
    ids_B = np.arange(first_id, first_id + count, dtype=np.int64)
    epochs_B = np.zeros_like(ids_B)
    arrays = sampling.draw_arrays(seed=seed, epochs_B=epochs_B, sample_ids_B=ids_B)
    draws = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return Batch(
        views_BCHW=tuple(views_BCHW),
        labels_B=torch.full((count,), -1, device=device),
        sample_ids_B=ids_B,
        epochs_B=epochs_B,
        draws=draws,
    )


def random_batch(objective: Objective, *, images: int, device: torch.device) -> Batch:
    """Make a batch of random pixels, for measuring how fast a step is.

    Args:
        objective: whose views and draws.
        images: number of images.
        device: of the batch.
    """
    sampling = objective.sampling()
    views_BCHW = []
    for view in sampling.views:
        size = (view.settings.height, view.settings.width)
        views_BCHW.append(torch.randn(images, 3, *size, device=device))
    return make_batch(sampling, views_BCHW)
