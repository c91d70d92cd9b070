"""What MAE needs of a batch, and the pictures it makes."""

from __future__ import annotations

import torch
from torch import Tensor

from model.objectives.mae import (
    MAEOutput,
    MaskedAutoencoder,
    masked_loss,
    reconstruct,
    reconstruction_target,
)
from model.patches import patchify
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.loader import Batch
from pipeline.sampling.boxes import mask_noise
from train.config import RunConfig
from train.report.drawing import Completion


def _noise(config: RunConfig, batch: Batch, *, device: torch.device) -> torch.Tensor:
    noise_BN = mask_noise(
        config.train.seed, batch.epochs_B, batch.sample_ids_B, config.model.num_patches
    )
    return torch.from_numpy(noise_BN).to(device, non_blocking=True)


def to_display(images_BCHW: Tensor) -> Tensor:
    """Undo the normalisation: colours in [0, 1], float32, on the host."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (images_BCHW.float().cpu() * std + mean).clamp(0, 1)


@torch.no_grad()
def complete(model: MaskedAutoencoder, images_BCHW: Tensor, noise_BN: Tensor) -> Completion:
    """Let a model complete masked images.

    Args:
        model: in eval mode, on the images' device.
        images_BCHW: normalised images.
        noise_BN: mask noise; the smallest of each image stay visible.

    Returns:
        The pictures and the loss of each image. For a model of normalised pixels each patch is
        scaled back by the true patch's mean and deviation, which the model was not given: such
        pictures and losses flatter it.
    """
    output = model(images_BCHW, noise_BN)
    pictures = model.reconstruct(images_BCHW, output)
    losses_B = raw_losses(model, images_BCHW, output)
    masked = to_display(pictures.masked_BCHW)
    hidden_BCHW = torch.repeat_interleave(
        torch.repeat_interleave(
            output.mask_BN.view(len(images_BCHW), 1, *model.grid).cpu(), model.patch_size, dim=2
        ),
        model.patch_size,
        dim=3,
    ).bool()
    masked = torch.where(hidden_BCHW, torch.tensor(0.5), masked)
    note = (
        "patches scaled back by the true patch's mean and deviation"
        if model.config.norm_pix_loss
        else "plain pixels"
    )
    return Completion(
        original_BCHW=to_display(images_BCHW),
        masked_BCHW=masked,
        pasted_BCHW=to_display(pictures.pasted_BCHW),
        losses_B=losses_B.cpu(),
        loss=float(losses_B.mean()),
        note=note,
    )


@torch.no_grad()
def raw_losses(model: MaskedAutoencoder, images_BCHW: Tensor, output: MAEOutput) -> Tensor:
    """Score a prediction in raw (dataset-normalised) pixels, whatever the model was trained on.

    Args:
        model: whose prediction it is.
        images_BCHW: normalised images.
        output: what its forward pass returned.

    Returns:
        losses_B: mean squared error over each image's masked patches, float32.
    """
    prediction_BNP = output.prediction_BNP
    if model.config.norm_pix_loss:
        pictures = reconstruct(
            images_BCHW,
            prediction_BNP,
            output.mask_BN,
            patch_size=model.patch_size,
            norm_pix_loss=True,
        )
        prediction_BNP = patchify(pictures.predicted_BCHW, model.patch_size)
    target_BNP = reconstruction_target(patchify(images_BCHW, model.patch_size), norm_pix_loss=False)
    rows = zip(prediction_BNP, target_BNP, output.mask_BN, strict=True)
    return torch.stack([masked_loss(p[None], t[None], m[None]) for p, t, m in rows])
