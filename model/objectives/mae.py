"""The masked autoencoder: see a quarter of an image, predict the rest.

Shapes: B images, C channels, H height, W width, N patches, V visible patches, S = 1 + V or 1 + N
tokens with the class token, D encoder width, E decoder width, P = patch_size^2 * C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ActivationCheckpointing, ModelConfig
from model.init import init_layers, init_token
from model.masking import PatchMask, mask_patches, unshuffle
from model.patches import patchify, unpatchify
from model.pos_embed import sincos_table
from model.vit import NORM_EPS, Block, VisionTransformer, run_blocks

VARIANCE_EPS = 1e-6
"""Added to a patch's variance before the square root, so that flat patches stay finite. Source: the
released MAE."""


class MAEOutput(NamedTuple):
    """What a forward pass gives back."""

    loss: Tensor
    """Mean squared error over masked patches, a float32 scalar."""
    prediction_BNP: Tensor
    """Predicted patches, visible ones included; normalised ones under norm_pix_loss. In the
    weights' type."""
    mask_BN: Tensor
    """1 for a removed patch, 0 for a kept one; float32."""


class Reconstruction(NamedTuple):
    """A prediction made visible, in the colour space of the input."""

    masked_BCHW: Tensor
    """What the encoder saw: removed patches are 0, the dataset's mean colour."""
    predicted_BCHW: Tensor
    """The prediction for every patch."""
    pasted_BCHW: Tensor
    """Visible patches from the image, removed ones from the prediction."""


class MaskedAutoencoder(VisionTransformer):
    """A vision transformer with a light decoder that predicts the pixels of hidden patches.

    The encoder's parameters keep their plain names (`blocks.0...`) beside the decoder's
    (`decoder_...`): the state dict has the published keys. Initialised on construction from torch's
    global generator.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners".

    Args:
        config: Sizes, mask ratio and kind of loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            image_size=(config.image_height, config.image_width),
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
        )
        self.config = config
        # Exact arithmetic, which a compiler cannot trace: done once.
        self.num_visible = config.num_visible
        self.decoder_checkpointing: ActivationCheckpointing = "none"
        width = config.decoder_embed_dim
        mask_token = torch.empty(1, 1, width)
        self.mask_token = nn.Parameter(mask_token)
        table = sincos_table(self.grid, width)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_embed = nn.Linear(config.embed_dim, width)
        self.decoder_blocks = nn.ModuleList()
        for _ in range(config.decoder_depth):
            block = Block(width, config.decoder_num_heads, config.mlp_ratio)
            self.decoder_blocks.append(block)
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.patch_dim)
        self.init_decoder()

    def init_decoder(self, generator: torch.Generator | None = None) -> None:
        """Fill the decoder's parameters, position table included.

        Args:
            generator: Source of random numbers; torch's global one if absent. All ranks must use
                the same seed.
        """
        width = self.decoder_pos_embed.shape[-1]
        table = sincos_table(self.grid, width)
        with torch.no_grad():
            self.decoder_pos_embed.copy_(table)
        # The order of the draws is a part of what a seed means: see `init_layers`.
        init_token(self.mask_token, generator=generator)
        init_layers(self.decoder_embed, generator=generator)
        init_layers(self.decoder_blocks, generator=generator)
        init_layers(self.decoder_norm, generator=generator)
        init_layers(self.decoder_pred, generator=generator)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill all parameters anew; what a model built on the meta device needs after `to_empty`.

        Args:
            generator: Source of random numbers; torch's global one if absent. All ranks must use
                the same seed.
        """
        self.init_encoder(generator)
        self.init_decoder(generator)

    def set_activation_checkpointing(
        self,
        *,
        encoder: ActivationCheckpointing = "none",
        decoder: ActivationCheckpointing = "none",
    ) -> None:
        """Choose which blocks recompute their activations in the backward pass. Results do not
        change.

        The decoder sees four times the tokens, so for small encoders most of the memory is there.

        Args:
            encoder: `none`, `selective` (every second block) or `full`.
            decoder: The same for the decoder's blocks.
        """
        self.encoder_checkpointing = encoder
        self.decoder_checkpointing = decoder

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> MAEOutput:  # type: ignore[override]
        """Hide patches, encode the visible ones, predict all, and score the hidden ones.

        Args:
            images_BCHW: Normalised images, float32 or bfloat16. The target is computed from them in
                float32.
            noise_BN: One number per patch, drawn by the caller; the smallest stay visible.

        Returns:
            Loss, prediction and mask.
        """
        # Cut once: the encoder's input and the target are the same patches.
        patches_BNP = self.patches(images_BCHW)
        mask = mask_patches(noise_BN, self.num_visible)
        tokens_BSD = self.encode(patches_BNP, mask.ids_keep_BV)
        prediction_BNP = self.decode(tokens_BSD, mask)
        target_BNP = reconstruction_target(
            patches_BNP, norm_pix_loss=self.config.norm_pix_loss
        )
        loss = masked_loss(prediction_BNP, target_BNP, mask.mask_BN)
        return MAEOutput(loss, prediction_BNP, mask.mask_BN)

    def decode(self, tokens_BSD: Tensor, mask: PatchMask) -> Tensor:
        """Predict every patch from the encoded visible ones.

        Args:
            tokens_BSD: Encoder output, class token first, then V patches in the order of
                `mask.ids_keep_BV`.
            mask: The split that chose them.

        Returns:
            prediction_BNP.
        """
        tokens_BSE = self.decoder_embed(tokens_BSD)
        B, S, _ = tokens_BSE.shape
        num_visible = S - 1
        num_hidden = mask.mask_BN.shape[1] - num_visible

        # Mask tokens stand behind the visible patches, as the hidden ones do in the shuffled order.
        # Their type is the tokens': under autocast the projection above gives 16 bits.
        mask_token = self.mask_token.to(tokens_BSE.dtype)
        mask_tokens_BHE = mask_token.expand(B, num_hidden, -1)
        visible_BVE = tokens_BSE[:, 1:]
        shuffled_BNE = torch.cat([visible_BVE, mask_tokens_BHE], dim=1)
        patches_BNE = unshuffle(shuffled_BNE, mask)

        # The class token is not shuffled; it comes first in both orders.
        cls_B1E = tokens_BSE[:, :1]
        tokens_BSE = torch.cat([cls_B1E, patches_BNE], dim=1)
        tokens_BSE = tokens_BSE + self.decoder_pos_embed
        tokens_BSE = run_blocks(
            self.decoder_blocks, tokens_BSE, self.decoder_checkpointing
        )
        # The class token is dropped before the head: nothing is predicted from it.
        tokens_BNE = tokens_BSE[:, 1:]
        normed_BNE = self.decoder_norm(tokens_BNE)
        prediction_BNP: Tensor = self.decoder_pred(normed_BNE)
        return prediction_BNP

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """Return the encoder's part of the state dict, under its published names.

        Returns:
            Tensors by name; they share memory with the model.
        """
        state = self.state_dict()
        return {
            name: value for name, value in state.items() if not is_decoder_name(name)
        }

    def reconstruct(self, images_BCHW: Tensor, output: MAEOutput) -> Reconstruction:
        """Turn a prediction into pictures; see `reconstruct`.

        Args:
            images_BCHW: The images that were given to `forward`.
            output: What `forward` returned.

        Returns:
            Three pictures per image, float32.
        """
        return reconstruct(
            images_BCHW,
            output.prediction_BNP,
            output.mask_BN,
            patch_size=self.patch_size,
            norm_pix_loss=self.config.norm_pix_loss,
        )


def is_decoder_name(name: str) -> bool:
    """Tell whether a parameter belongs to the decoder and is thrown away after pre-training.

    Args:
        name: Name in the state dict.

    Returns:
        True for the mask token and everything that starts with `decoder_`.
    """
    return name == "mask_token" or name.startswith("decoder_")


def patch_statistics(patches_BNP: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each patch's mean and standard deviation over all its values, channels together.

    Args:
        patches_BNP: Patches, float32.

    Returns:
        mean_BN1 and std_BN1; the variance is the unbiased one, with `VARIANCE_EPS` added.
    """
    variance_BN1, mean_BN1 = torch.var_mean(
        patches_BNP, dim=-1, keepdim=True, correction=1
    )
    return mean_BN1, (variance_BN1 + VARIANCE_EPS).sqrt()


def reconstruction_target(patches_BNP: Tensor, *, norm_pix_loss: bool) -> Tensor:
    """Compute what the decoder should predict.

    Args:
        patches_BNP: Patches of the normalised images.
        norm_pix_loss: Normalise every patch by its own mean and standard deviation.

    Returns:
        target_BNP, float32.
    """
    target_BNP = patches_BNP.to(torch.float32)
    if not norm_pix_loss:
        return target_BNP
    mean_BN1, std_BN1 = patch_statistics(target_BNP)
    return (target_BNP - mean_BN1) / std_BN1


def masked_loss(prediction_BNP: Tensor, target_BNP: Tensor, mask_BN: Tensor) -> Tensor:
    """Average the squared error over masked patches only.

    Scoring visible patches too costs accuracy (He et al. 2022, footnote 1). Also for painting
    baselines, so that their figures compare with a model's.

    Args:
        prediction_BNP: Predicted patches, any floating type.
        target_BNP: From `reconstruction_target`.
        mask_BN: 1 for a masked patch; at least one.

    Returns:
        A float32 scalar.
    """
    # In float32: 16 bits are too few digits for a mean of squares, and fp16 overflows at 256^2.
    prediction_BNP = prediction_BNP.to(torch.float32)
    difference_BNP = prediction_BNP - target_BNP
    error_BN = difference_BNP.square().mean(dim=-1)
    # All images hide as many patches, so that this is the plain mean over them.
    masked_error = (error_BN * mask_BN).sum()
    return masked_error / mask_BN.sum()


@torch.no_grad()
def reconstruct(
    images_BCHW: Tensor,
    prediction_BNP: Tensor,
    mask_BN: Tensor,
    *,
    patch_size: int,
    norm_pix_loss: bool,
) -> Reconstruction:
    """Turn a prediction into pictures.

    A model trained with norm_pix_loss predicts contrast, not colour: each patch is scaled back with
    the mean and standard deviation of the true patch, which the model never saw. Such pictures
    flatter the model; say so.

    Args:
        images_BCHW: Normalised images.
        prediction_BNP: Predicted patches.
        mask_BN: 1 for a masked patch.
        patch_size: Side of a patch in pixels.
        norm_pix_loss: Whether the prediction is of normalised patches.

    Returns:
        Three pictures per image, float32, in the colour space of the input.
    """
    _, _, height, width = images_BCHW.shape
    rows = height // patch_size
    columns = width // patch_size
    grid = (rows, columns)
    patches_BNP = patchify(images_BCHW, patch_size)
    patches_BNP = patches_BNP.to(torch.float32)
    predicted_BNP = prediction_BNP.to(torch.float32)
    if norm_pix_loss:
        mean_BN1, std_BN1 = patch_statistics(patches_BNP)
        predicted_BNP = predicted_BNP * std_BN1 + mean_BN1
    # Images are normalised, so that 0 is the dataset's mean colour, a grey.
    removed_BN1 = mask_BN.unsqueeze(-1).to(torch.bool)
    masked_BNP = patches_BNP.masked_fill(removed_BN1, 0)
    pasted_BNP = torch.where(removed_BN1, predicted_BNP, patches_BNP)
    return Reconstruction(
        masked_BCHW=unpatchify(masked_BNP, patch_size, grid),
        predicted_BCHW=unpatchify(predicted_BNP, patch_size, grid),
        pasted_BCHW=unpatchify(pasted_BNP, patch_size, grid),
    )
