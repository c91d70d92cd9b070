"""Held-out losses next to what an objective compares them with."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.dataset import Manifest
from train.evaluation.held_out import iterate_held_out
from train.evaluation.saved_model import SavedModel


@torch.no_grad()
def held_out_losses(
    saved: SavedModel,
    dataset: Manifest,
    *,
    device: torch.device,
    limit: int | None = None,
) -> dict[str, Any]:
    """Average the losses that the objective names, e.g. a model's and its baselines' on the same
    masks.

    Args:
        saved: the model.
        dataset: held-out images.
        device: where to compute.
        limit: images to read at most.

    Returns:
        num_images, and for each loss of `Objective.held_out_losses` its mean over the images.
    """
    objective = saved.objective
    sums: dict[str, float] = {}
    count = 0
    batches = iterate_held_out(
        saved.config,
        objective,
        dataset,
        device=device,
        limit=limit,
        label="held-out losses",
    )
    # Summed by image and divided once: the last batch is shorter, and its mean would weigh more.
    for batch in batches:
        losses = objective.held_out_losses(saved.model, batch)
        for name, losses_B in losses.items():
            total = float(losses_B.sum())
            so_far = sums.get(name, 0.0)
            sums[name] = so_far + total
        count += len(batch.labels_B)
    means = {name: summed / count for name, summed in sums.items()}
    return {"num_images": count, **means}
