"""What a model costs, in closed form: operations, parameters and memory. Imports no torch.

A multiply-add counts as two operations. Matrix products are counted, attention's two included;
norms, activations, softmax and the loss are not (under 2% of the work). This is the usual
convention for model FLOPs utilisation.
"""

from __future__ import annotations

from typing import NamedTuple

from model.config import ActivationCheckpointing, ModelConfig


class ForwardFlops(NamedTuple):
    """Operations of one forward pass over one image, by part."""

    patch_embed: int
    """Projection of visible patches; hidden ones are never projected."""
    encoder_blocks: int
    """Encoder over visible patches and the class token."""
    decoder_embed: int
    """Projection from the encoder's width to the decoder's."""
    decoder_blocks: int
    """Decoder over all patches and the class token."""
    decoder_pred: int
    """Projection of all patches to pixels."""

    @property
    def total(self) -> int:
        """Operations of the whole forward pass."""
        return sum(self)

    @property
    def decoder_share(self) -> float:
        """Share of the operations that is spent after the encoder, from 0 to 1."""
        decoder = self.decoder_embed + self.decoder_blocks + self.decoder_pred
        return decoder / self.total


class ParameterCounts(NamedTuple):
    """Numbers of parameters, position tables apart because they are not trained."""

    encoder: int
    """Trained parameters of the encoder."""
    decoder: int
    """Trained parameters of the decoder, mask token included."""
    encoder_pos_embed: int
    """Fixed position table of the encoder."""
    decoder_pos_embed: int
    """Fixed position table of the decoder."""

    @property
    def trainable(self) -> int:
        """Parameters that the optimiser changes."""
        return self.encoder + self.decoder

    @property
    def total(self) -> int:
        """All parameters, tables included."""
        return sum(self)


def forward_flops(config: ModelConfig) -> ForwardFlops:
    """Count the operations of one pre-training forward pass.

    Args:
        config: The model.

    Returns:
        Operations per image, by part.
    """
    N = config.num_patches
    V = config.num_visible
    D = config.embed_dim
    E = config.decoder_embed_dim
    P = config.patch_dim
    # The class token goes through the blocks and between the widths, but is neither projected from
    # pixels nor to them.
    encoder_block = _block_flops(1 + V, D, _hidden(config, D))
    decoder_block = _block_flops(1 + N, E, _hidden(config, E))
    return ForwardFlops(
        patch_embed=2 * V * P * D,
        encoder_blocks=config.depth * encoder_block,
        decoder_embed=2 * (1 + V) * D * E,
        decoder_blocks=config.decoder_depth * decoder_block,
        decoder_pred=2 * N * E * P,
    )


def recompute_flops(
    config: ModelConfig,
    *,
    encoder: ActivationCheckpointing = "none",
    decoder: ActivationCheckpointing = "none",
) -> int:
    """Count the operations that activation checkpointing repeats in the backward pass.

    A block is repeated up to the last value its backward pass needs, so its last matrix product is
    not.

    Args:
        config: The model.
        encoder: Mode of the encoder's blocks.
        decoder: Mode of the decoder's blocks.

    Returns:
        Extra operations per image.
    """
    total = 0
    for mode, depth, tokens, width in _stacks(config, encoder, decoder):
        hidden = _hidden(config, width)
        last_product = 2 * tokens * width * hidden
        repeated = _block_flops(tokens, width, hidden) - last_product
        total += _checkpointed(mode, depth) * repeated
    return total


def train_flops(
    config: ModelConfig,
    *,
    encoder: ActivationCheckpointing = "none",
    decoder: ActivationCheckpointing = "none",
) -> int:
    """Count the operations of one training step per image: three forward passes, and what is
    recomputed.

    With both modes at `none` these are the model FLOPs that utilisation (MFU) is measured by; with
    other modes they are hardware FLOPs.

    Args:
        config: The model.
        encoder: Mode of the encoder's blocks.
        decoder: Mode of the decoder's blocks.

    Returns:
        Operations per image.
    """
    # The backward pass costs two forward ones: the gradients of inputs and those of weights.
    forward = forward_flops(config).total
    recomputed = recompute_flops(config, encoder=encoder, decoder=decoder)
    return 3 * forward + recomputed


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count parameters without building the model.

    Args:
        config: The model.

    Returns:
        Numbers of parameters, by part.
    """
    N = config.num_patches
    D = config.embed_dim
    E = config.decoder_embed_dim
    P = config.patch_dim
    # Class token, patch projection with its bias, blocks, the final norm's weight and bias.
    encoder = D
    encoder += P * D + D
    block_D = _block_parameters(D, _hidden(config, D))
    encoder += config.depth * block_D
    encoder += 2 * D
    # Mask token, projection to the decoder's width, blocks, final norm, projection to pixels.
    decoder = E
    decoder += D * E + E
    block_E = _block_parameters(E, _hidden(config, E))
    decoder += config.decoder_depth * block_E
    decoder += 2 * E
    decoder += E * P + P
    return ParameterCounts(
        encoder=encoder,
        decoder=decoder,
        encoder_pos_embed=(1 + N) * D,
        decoder_pos_embed=(1 + N) * E,
    )


def activation_bytes(
    config: ModelConfig,
    *,
    encoder: ActivationCheckpointing = "none",
    decoder: ActivationCheckpointing = "none",
    value_bytes: int = 2,
) -> int:
    """Estimate the memory that one image's forward pass leaves for its backward pass.

    Counts what autograd saves in eager mode with fused attention, weights not included. A compiler
    may save less, and recomputation needs one block's activations on top for a moment.

    Args:
        config: The model.
        encoder: Mode of the encoder's blocks.
        decoder: Mode of the decoder's blocks.
        value_bytes: Bytes of one activation: 2 for bf16 weights, 4 for fp32.

    Returns:
        Bytes per image.
    """
    N = config.num_patches
    V = config.num_visible
    D = config.embed_dim
    E = config.decoder_embed_dim
    P = config.patch_dim
    # Patches shown, the encoder's last norm (in and out), the decoder's last norm.
    values = V * P
    values += 2 * (1 + V) * D
    values += 2 * N * E
    # The loss's differences; mean and deviation of those two norms. Always float32, whatever the
    # weights are.
    float32_values = N * P
    float32_values += 2 * (1 + V)
    float32_values += 2 * N

    heads = (config.num_heads, config.decoder_num_heads)
    stacks = zip(_stacks(config, encoder, decoder), heads, strict=True)
    for (mode, depth, tokens, width), num_heads in stacks:
        # A block that recomputes keeps its input alone.
        kept = _checkpointed(mode, depth)
        whole = depth - kept
        # Two norms (in and out), query, key and value, attention's result; the hidden layer before
        # and after GELU.
        values_of_block = 8 * width + 2 * _hidden(config, width)
        values += tokens * kept * width
        values += tokens * whole * values_of_block
        # Statistics of two norms and of the softmax.
        float32_values += whole * tokens * (4 + num_heads)
    return values * value_bytes + float32_values * 4


def _stacks(
    config: ModelConfig,
    encoder: ActivationCheckpointing,
    decoder: ActivationCheckpointing,
) -> list[tuple[ActivationCheckpointing, int, int, int]]:
    """Mode, depth, tokens and width of the two stacks of blocks."""
    return [
        (encoder, config.depth, 1 + config.num_visible, config.embed_dim),
        (
            decoder,
            config.decoder_depth,
            1 + config.num_patches,
            config.decoder_embed_dim,
        ),
    ]


def _checkpointed(mode: ActivationCheckpointing, depth: int) -> int:
    """Blocks of a stack that keep only their input; `selective` takes the first, third, ..."""
    return {"none": 0, "selective": (depth + 1) // 2, "full": depth}[mode]


def _hidden(config: ModelConfig, width: int) -> int:
    return int(width * config.mlp_ratio)


def _block_flops(tokens: int, width: int, hidden: int) -> int:
    """Query-key-value (3 width^2), output (width^2) and MLP, then attention's QK^T and AV."""
    attention = 4 * width**2
    mlp = 2 * width * hidden
    products_with_weights = attention + mlp
    products_of_tokens = 4 * tokens**2 * width
    return 2 * tokens * products_with_weights + products_of_tokens


def _block_parameters(width: int, hidden: int) -> int:
    """Four attention matrices, two MLP matrices, their biases, two norms."""
    attention = 4 * width**2
    mlp = 2 * width * hidden
    matrices = attention + mlp
    biases = 4 * width + hidden + width
    norms = 4 * width
    return matrices + biases + norms
