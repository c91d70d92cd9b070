"""A plain vision transformer that can be shown all patches of an image or some of them.

It knows nothing of the objective it is trained with.

Shapes: B images, C channels, H height, W width, N patches, V patches shown, S = 1 + V tokens with
the class token, D width, P = patch_size^2 * C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import CHANNELS, ActivationCheckpointing
from model.init import init_layers, init_patch_projection, init_token
from model.masking import gather_rows
from model.patches import patchify
from model.pos_embed import sincos_table

NORM_EPS = 1e-6
"""Epsilon of every LayerNorm. Source: the released ViT and MAE configurations (torch's default is
1e-5)."""


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        """Let every token look at every other one.

        Args:
            tokens_BSD: Normalised tokens.

        Returns:
            tokens_BSD, to be added to the residual stream.
        """
        B, S, D = tokens_BSD.shape
        # Rows of the weight are query, key, value, each head by head: timm's order, which
        # published weights have.
        head_dim = D // self.num_heads
        qkv = self.qkv(tokens_BSD)
        qkv = qkv.view(B, S, 3, self.num_heads, head_dim)
        # Taken apart before the heads move forward: the gradients are then put together in the
        # projection's own order.
        parts = qkv.unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2)
        mixed_BSD = mixed.reshape(B, S, D)
        out_BSD: Tensor = self.proj(mixed_BSD)
        return out_BSD


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        """Transform each token by itself.

        Args:
            tokens_BSD: Normalised tokens.

        Returns:
            tokens_BSD, to be added to the residual stream.
        """
        hidden = self.fc1(tokens_BSD)
        # torch's default is the exact one; the tanh approximation is another model.
        out_BSD: Tensor = self.fc2(F.gelu(hidden))
        return out_BSD


class Block(nn.Module):
    """One pre-norm transformer block. No dropout, no layer scale, no stochastic depth."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        hidden = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, hidden)

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        """Apply attention and MLP, each around a residual.

        Args:
            tokens_BSD: Residual stream.

        Returns:
            tokens_BSD.
        """
        # Not in place: autograd needs the stream as it was before each sum.
        tokens_BSD = tokens_BSD + self.attn(self.norm1(tokens_BSD))
        tokens_BSD = tokens_BSD + self.mlp(self.norm2(tokens_BSD))
        return tokens_BSD


class PatchProjection(nn.Module):
    """The weights of a convolution with stride = kernel, applied to rows of pixels as one matrix
    product.

    The parameters have a convolution's shapes and names, so that published weights load. Working on
    rows lets the caller leave out hidden patches before the product instead of after it.
    """

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        kernel = torch.empty(embed_dim, CHANNELS, patch_size, patch_size)
        self.weight = nn.Parameter(kernel)
        bias = torch.empty(embed_dim)
        self.bias = nn.Parameter(bias)

    def forward(self, patches_BVP: Tensor) -> Tensor:
        """Project patches to tokens.

        Args:
            patches_BVP: Rows of pixels in the order of `patchify`; cast to the weight's type.

        Returns:
            tokens_BVD.
        """
        # The channel changes fastest, as `patchify` lays out pixels.
        kernel = self.weight.permute(0, 2, 3, 1)
        weight_DP = kernel.flatten(1)
        patches_BVP = patches_BVP.to(weight_DP.dtype)
        return F.linear(patches_BVP, weight_DP, self.bias)


class PatchEmbed(nn.Module):
    """Holder of the patch projection, for the sake of its published name `patch_embed.proj`."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size, embed_dim)

    def forward(self, patches_BVP: Tensor) -> Tensor:
        """Project patches to tokens.

        Args:
            patches_BVP: Rows of pixels.

        Returns:
            tokens_BVD.
        """
        tokens_BVD: Tensor = self.proj(patches_BVP)
        return tokens_BVD


class VisionTransformer(nn.Module):
    """Encoder: patches in, normalised tokens out.

    Args:
        image_size: Height and width in pixels, multiples of patch_size.
        patch_size: Side of a patch in pixels.
        embed_dim: D, a multiple of 4 and of num_heads.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Hidden width of the MLP over embed_dim.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        height, width = image_size
        rows = height // patch_size
        columns = width // patch_size
        self.grid = (rows, columns)
        self.encoder_checkpointing: ActivationCheckpointing = "none"
        cls_token = torch.empty(1, 1, embed_dim)
        self.cls_token = nn.Parameter(cls_token)
        # A parameter that is not trained, not a buffer: published state dicts hold it.
        table = sincos_table(self.grid, embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = Block(embed_dim, num_heads, mlp_ratio)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.init_encoder()

    def init_encoder(self, generator: torch.Generator | None = None) -> None:
        """Fill the encoder's parameters, position table included; also after `to_empty` from the
        meta device.

        Args:
            generator: Source of random numbers; torch's global one if absent. All ranks must use
                the same seed.
        """
        width = self.pos_embed.shape[-1]
        table = sincos_table(self.grid, width)
        with torch.no_grad():
            self.pos_embed.copy_(table)
        # The order of the draws is a part of what a seed means: see `init_layers`.
        init_token(self.cls_token, generator=generator)
        projection = self.patch_embed.proj
        init_patch_projection(projection.weight, projection.bias, generator=generator)
        init_layers(self.blocks, generator=generator)
        init_layers(self.norm, generator=generator)

    def patches(self, images_BCHW: Tensor) -> Tensor:
        """Cut images into patches, after checking that they are what the position table was made
        for.

        Args:
            images_BCHW: Normalised images.

        Returns:
            patches_BNP.

        Raises:
            ValueError: Channels, height or width differ from the model's.
        """
        shape = tuple(images_BCHW.shape)
        expected = (CHANNELS, *self.image_size)
        # A table of another grid might still broadcast, and train on wrong positions.
        if shape[1:] != expected:
            channels, height, width = expected
            raise ValueError(
                f"images of shape {shape} do not fit a model for (B, {channels}, {height}, "
                f"{width}): change the view's size or model.image_size"
            )
        return patchify(images_BCHW, self.patch_size)

    def encode(self, patches_BNP: Tensor, ids_keep_BV: Tensor | None = None) -> Tensor:
        """Encode all patches, or only some of each image.

        Hidden patches are left out before anything is computed for them.

        Args:
            patches_BNP: All patches of the images.
            ids_keep_BV: Patch numbers to show, in any order; all of them if absent.

        Returns:
            tokens_BSD after the final norm: the class token, then patches in the order shown.
        """
        positions_ND = self.pos_embed[0, 1:]
        if ids_keep_BV is None:
            tokens_BVD = self.patch_embed(patches_BNP) + positions_ND
        else:
            # Patches are picked before they are projected: a quarter of the work at a mask ratio
            # of 0.75.
            shown_BVP = gather_rows(patches_BNP, ids_keep_BV)
            shown_VD = positions_ND[ids_keep_BV]
            tokens_BVD = self.patch_embed(shown_BVP) + shown_VD

        # The table's first row belongs to the class token.
        cls_position = self.pos_embed[:, :1]
        cls_11D = self.cls_token + cls_position
        B = tokens_BVD.shape[0]
        cls_B1D = cls_11D.expand(B, -1, -1)
        tokens_BSD = torch.cat([cls_B1D, tokens_BVD], dim=1)

        tokens_BSD = run_blocks(self.blocks, tokens_BSD, self.encoder_checkpointing)
        encoded_BSD: Tensor = self.norm(tokens_BSD)
        return encoded_BSD

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Encode whole images.

        Args:
            images_BCHW: Normalised images.

        Returns:
            tokens_BSD after the final norm, S = 1 + N; the class token first.
        """
        patches_BNP = self.patches(images_BCHW)
        return self.encode(patches_BNP)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Describe whole images: the mean of all patch tokens after the final norm, class token
        left out.

        All patches are seen. This is the pooling to name beside a nearest-neighbour figure;
        fine-tuning normalises after the mean instead.

        Args:
            images_BCHW: Normalised images.

        Returns:
            features_BD, in the weights' type.
        """
        patches_BNP = self.patches(images_BCHW)
        tokens_BSD = self.encode(patches_BNP)
        patch_tokens_BND = tokens_BSD[:, 1:]
        return patch_tokens_BND.mean(dim=1)


def run_blocks(
    blocks: nn.ModuleList, tokens_BSD: Tensor, mode: ActivationCheckpointing
) -> Tensor:
    """Apply blocks in turn; some of them keep only their input and compute the rest again in the
    backward pass.

    Args:
        blocks: Transformer blocks.
        tokens_BSD: Residual stream.
        mode: `none`, `selective` (every second block, from the first on) or `full`.

    Returns:
        tokens_BSD.
    """
    for number, block in enumerate(blocks):
        is_even = number % 2 == 0
        is_chosen = mode == "selective" and is_even
        recompute = mode == "full" or is_chosen
        # Without gradients no block keeps more than its output.
        if recompute and torch.is_grad_enabled():
            # A block makes no random choice, so no generator's state has to be kept.
            tokens_BSD = checkpoint(
                block,
                tokens_BSD,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            tokens_BSD = block(tokens_BSD)
    return tokens_BSD
