"""What a loader yields.

Shapes: B images of one micro-batch, C H W channels, height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.loader.samples import Encoded
from pipeline.sampling.boxes import Boxes
from pipeline.sampling.philox import I64


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        views_BCHW: the views in the order of `Sampling.views`, normalised with ImageNet's mean and
            standard deviation, on the loader's device.
        labels_B: int64 class numbers on the same device, -1 if a sample has none.
        sample_ids_B: int64 numpy array; with the seed and the epoch it names every random choice
            made for an image.
        epochs_B: int64 numpy array; a batch may span two epochs.
        boxes: for each view, how each image was cut and whether it was mirrored.
        epoch, position: beginning of the global batch that this is a part of.
        draws: the arrays of `Sampling.draws` by name, on the same device.
    """

    views_BCHW: tuple[torch.Tensor, ...]
    labels_B: torch.Tensor
    sample_ids_B: I64
    epochs_B: I64
    boxes: tuple[Boxes, ...] = ()
    epoch: int = 0
    position: int = 0
    draws: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def images_BCHW(self) -> torch.Tensor:
        """The first view; of most objectives the only one."""
        return self.views_BCHW[0]


def labels_and_draws(
    encoded: Encoded, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Bring what stands beside a batch's pixels to the device.

    Args:
        encoded: the batch.
        device: the loader's.

    Returns:
        labels_B and the arrays by name.
    """
    labels = torch.from_numpy(encoded.labels_B)
    labels_B = labels.to(device)
    draws = {}
    for name, array in encoded.draws.items():
        # Contiguous, because a Draw may give a slice of what it drew; torch would keep its strides.
        host = torch.from_numpy(np.ascontiguousarray(array))
        draws[name] = host.to(device, non_blocking=True)
    return labels_B, draws
