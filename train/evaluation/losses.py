"""Held-out losses beside two paintings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.objectives.baselines import paint_mean, paint_nearby
from model.objectives.mae import MAEOutput, MaskedAutoencoder, reconstruction_target
from model.patches import patchify
from pipeline.dataset import Manifest
from train.evaluation.held_out import HeldOut, iterate_held_out
from train.evaluation.saved_model import SavedModel
from train.objectives.mae import raw_losses


def held_out_losses(
    saved: SavedModel, dataset: Manifest, *, device: torch.device, limit: int | None = None
) -> dict[str, Any]:
    """Score a model and the two paintings on the same masks, in raw (dataset-normalised) pixels.

    Args:
        saved: the model.
        dataset: held-out images.
        device: where to compute.
        limit: images to read at most.

    Returns:
        num_images, model_loss, mean_colour_loss, nearby_colours_loss: means over images.
    """
    sums: dict[str, float] = {
        "model_loss": 0.0,
        "mean_colour_loss": 0.0,
        "nearby_colours_loss": 0.0,
    }
    count = 0
    batches = iterate_held_out(
        saved.config, dataset, device=device, limit=limit, label="held-out losses"
    )
    for held_out in batches:
        for name, losses_B in _three_losses(saved.model, held_out).items():
            sums[name] += float(losses_B.sum())
        count += len(held_out.images_BCHW)
    return {"num_images": count, **{name: total / count for name, total in sums.items()}}


@torch.no_grad()
def _three_losses(model: MaskedAutoencoder, held_out: HeldOut) -> dict[str, Tensor]:
    images_BCHW = held_out.images_BCHW
    output: MAEOutput = model(images_BCHW, held_out.noise_BN)
    target_BNP = reconstruction_target(patchify(images_BCHW, model.patch_size), norm_pix_loss=False)
    losses = {"model_loss": raw_losses(model, images_BCHW, output)}
    for name, paint in (("mean_colour_loss", paint_mean), ("nearby_colours_loss", paint_nearby)):
        painted_BNP = paint(images_BCHW, output.mask_BN, patch_size=model.patch_size)
        error_BN = (painted_BNP - target_BNP).square().mean(dim=-1)
        losses[name] = (error_BN * output.mask_BN).sum(dim=1) / output.mask_BN.sum(dim=1)
    return losses
