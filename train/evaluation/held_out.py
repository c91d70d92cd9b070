"""Held-out images with fixed boxes and fixed masks: what pictures and held-out losses are made
from.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.objectives.mae import MaskedAutoencoder
from pipeline.config import LoaderConfig, ViewConfig
from pipeline.console import Progress
from pipeline.dataset import Manifest
from pipeline.loader import read_samples
from pipeline.sampling.boxes import mask_noise
from train.config import RunConfig
from train.objectives.mae import raw_losses

MASK_SEED = 0
"""Key of the masks of every held-out measurement, whatever the run's seed: two runs are scored on
the same masks."""
BATCH_SIZE = 128
"""Images that are read and measured together."""
SHOW_AFTER_S = 2.0
"""A pass over the images that is done sooner shows no progress."""


class HeldOut(NamedTuple):
    """Some held-out images."""

    images_BCHW: Tensor
    """Normalised centre crops, float32."""
    noise_BN: Tensor
    """Mask noise; the smallest stay visible."""
    labels_B: Tensor
    """Class numbers, -1 where there are none."""


def center_view(config: RunConfig) -> ViewConfig:
    """Give the run's view without its randomness: the largest centred box, not flipped."""
    return config.view.model_copy(update={"crop": "center"})


def measuring_loader(config: RunConfig) -> LoaderConfig:
    """Give the run's reading settings with the decoder that is always there, so that figures of
    machines compare."""
    return config.loader.model_copy(update={"decoder": "turbo"})


def read_held_out(
    config: RunConfig,
    dataset: Manifest,
    sample_ids_B: npt.NDArray[np.int64],
    *,
    device: torch.device,
) -> HeldOut:
    """Read some images of a dataset as they are measured.

    Args:
        config: settings of the run; view and loader are read.
        dataset: where from.
        sample_ids_B: which.
        device: where they are wanted.
    """
    batch = read_samples(
        dataset, sample_ids_B, center_view(config), measuring_loader(config), device=device
    )
    noise_BN = mask_noise(
        MASK_SEED, np.zeros_like(sample_ids_B), sample_ids_B, config.model.num_patches
    )
    return HeldOut(batch.images_BCHW, torch.from_numpy(noise_BN).to(device), batch.labels_B)


def iterate_held_out(
    config: RunConfig,
    dataset: Manifest,
    *,
    device: torch.device,
    limit: int | None = None,
    label: str,
) -> Iterator[HeldOut]:
    """Read a whole dataset as it is measured, or an even spread of it.

    Args:
        config: settings of the run.
        dataset: where from.
        device: where the images are wanted.
        limit: images to read at most.
        label: what is being done with them, for the progress shown after some seconds.
    """
    num_samples = dataset.info.num_samples
    count = min(num_samples, limit or num_samples)
    ids = np.arange(count, dtype=np.int64) * num_samples // count
    with Progress(label, total=count, after_s=SHOW_AFTER_S) as progress:
        for first in range(0, count, BATCH_SIZE):
            batch = ids[first : first + BATCH_SIZE]
            yield read_held_out(config, dataset, batch, device=device)
            # After the yield: a batch counts once it has been used, not once it has been read.
            progress.advance(len(batch))


@torch.no_grad()
def raw_loss(model: MaskedAutoencoder, held_out: HeldOut) -> Tensor:
    """Score a model on held-out images in raw pixels; see `pictures.raw_losses`.

    Returns:
        losses_B, float32.
    """
    return raw_losses(model, held_out.images_BCHW, model(held_out.images_BCHW, held_out.noise_BN))
