"""Masked autoencoders: what they need of a batch, the pictures they make, what they are compared
with.

Shapes: B images, C channels, H height, W width, N patches, P values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.flops import train_flops
from model.objectives.baselines import paint_mean, paint_nearby
from model.objectives.mae import (
    MAEOutput,
    MaskedAutoencoder,
    masked_loss,
    reconstruct,
    reconstruction_target,
)
from model.patches import patchify
from model.vit import VisionTransformer
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.loader import Batch
from pipeline.sampling.draws import MaskNoise, Sampling, View
from train.config import RunConfig
from train.report.drawing import Completion

MASK_NOISE = "mask_noise"
"""Name of the noise among a batch's draws."""


@dataclass(frozen=True)
class MaskedAutoencoding:
    """The objective of He et al. 2022: predict the hidden patches of an image. See `Objective`.

    Attributes:
        config: settings of the run.
    """

    config: RunConfig

    def sampling(self) -> Sampling:
        """One view, and noise that orders its patches."""
        view = View(self.config.view)
        noise = MaskNoise(self.config.model.num_patches)
        return Sampling((view,), {MASK_NOISE: noise})

    def build(self) -> nn.Module:
        """Build encoder and decoder."""
        return MaskedAutoencoder(self.config.model)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Give images_BCHW and noise_BN."""
        return batch.images_BCHW, batch.draws[MASK_NOISE]

    def train_flops(self) -> int:
        """Count the operations of a training step per image, decoder included."""
        return train_flops(self.config.model)

    def encoder(self, model: nn.Module) -> VisionTransformer:
        """Give the model itself: it is an encoder with a decoder on top."""
        return _as_mae(model)

    def pictures(self, model: nn.Module, batch: Batch) -> Completion:
        """Let the model complete masked images."""
        autoencoder = _as_mae(model)
        images_BCHW, noise_BN = self.inputs(batch)
        return complete(autoencoder, images_BCHW, noise_BN)

    @torch.no_grad()
    def held_out_losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Score a model and two baselines that do not learn, on the same masks and the same raw
        (dataset-normalised) pixels.

        Returns:
            model_loss, mean_colour_loss, nearby_colours_loss.
        """
        autoencoder = _as_mae(model)
        patch_size = autoencoder.patch_size
        images_BCHW, noise_BN = self.inputs(batch)
        output: MAEOutput = autoencoder(images_BCHW, noise_BN)
        mask_BN = output.mask_BN
        model_losses_B = raw_losses(autoencoder, images_BCHW, output)
        losses = {"model_loss": model_losses_B}

        # Raw pixels, because a baseline that paints colours knows no normalised patch.
        patches_BNP = patchify(images_BCHW, patch_size)
        target_BNP = reconstruction_target(patches_BNP, norm_pix_loss=False)
        num_masked_B = mask_BN.sum(dim=1)
        baselines = (
            ("mean_colour_loss", paint_mean),
            ("nearby_colours_loss", paint_nearby),
        )
        for name, paint in baselines:
            painted_BNP = paint(images_BCHW, mask_BN, patch_size=patch_size)
            difference_BNP = painted_BNP - target_BNP
            error_BN = difference_BNP.square().mean(dim=-1)
            masked_error_B = (error_BN * mask_BN).sum(dim=1)
            losses[name] = masked_error_B / num_masked_B
        return losses


def _as_mae(model: nn.Module) -> MaskedAutoencoder:
    assert isinstance(model, MaskedAutoencoder), (
        "an objective is given the models that it built"
    )
    return model


def to_display(images_BCHW: Tensor) -> Tensor:
    """Undo the normalisation: colours in [0, 1], float32, on the host."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    on_host_BCHW = images_BCHW.float().cpu()
    colours_BCHW = on_host_BCHW * std + mean
    # A prediction may leave the range of colours.
    return colours_BCHW.clamp(0, 1)


@torch.no_grad()
def complete(
    model: MaskedAutoencoder, images_BCHW: Tensor, noise_BN: Tensor
) -> Completion:
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
    output: MAEOutput = model(images_BCHW, noise_BN)
    pictures = model.reconstruct(images_BCHW, output)
    losses_B = raw_losses(model, images_BCHW, output)

    # `masked_BCHW` is the dataset's mean colour in hidden patches, which looks like a picture of
    # fog; a middle grey is told from the photograph at once.
    num_images = len(images_BCHW)
    mask_B1GG = output.mask_BN.view(num_images, 1, *model.grid)
    mask_B1GG = mask_B1GG.cpu()
    rows_B1HG = torch.repeat_interleave(mask_B1GG, model.patch_size, dim=2)
    mask_B1HW = torch.repeat_interleave(rows_B1HG, model.patch_size, dim=3)
    hidden_B1HW = mask_B1HW.bool()
    grey = torch.tensor(0.5)
    masked_BCHW = to_display(pictures.masked_BCHW)
    masked_BCHW = torch.where(hidden_B1HW, grey, masked_BCHW)
    note = "plain pixels"
    if model.config.norm_pix_loss:
        note = "patches scaled back by the true patch's mean and deviation"
    return Completion(
        original_BCHW=to_display(images_BCHW),
        masked_BCHW=masked_BCHW,
        pasted_BCHW=to_display(pictures.pasted_BCHW),
        losses_B=losses_B.cpu(),
        loss=float(losses_B.mean()),
        note=note,
    )


@torch.no_grad()
def raw_losses(
    model: MaskedAutoencoder, images_BCHW: Tensor, output: MAEOutput
) -> Tensor:
    """Score a prediction in raw (dataset-normalised) pixels, whatever the model was trained on.

    Args:
        model: whose prediction it is.
        images_BCHW: normalised images.
        output: what its forward pass returned.

    Returns:
        losses_B: mean squared error over each image's masked patches, float32.
    """
    prediction_BNP = output.prediction_BNP
    # Scaled back by the true patch's statistics; otherwise losses of models trained with and
    # without norm_pix_loss would not compare.
    if model.config.norm_pix_loss:
        pictures = reconstruct(
            images_BCHW,
            prediction_BNP,
            output.mask_BN,
            patch_size=model.patch_size,
            norm_pix_loss=True,
        )
        prediction_BNP = patchify(pictures.predicted_BCHW, model.patch_size)
    patches_BNP = patchify(images_BCHW, model.patch_size)
    target_BNP = reconstruction_target(patches_BNP, norm_pix_loss=False)
    # Image by image, in batches of one: `masked_loss` averages over all that it is given.
    losses = []
    for i in range(len(prediction_BNP)):
        one = slice(i, i + 1)
        loss = masked_loss(prediction_BNP[one], target_BNP[one], output.mask_BN[one])
        losses.append(loss)
    return torch.stack(losses)
