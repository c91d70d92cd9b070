"""Initial weights, as published for MAE: Xavier-uniform matrices, small normal tokens.

Shapes: D width, C channels, P = patch_size^2 * C.
"""

from __future__ import annotations

import math

import torch
from torch import nn

TOKEN_STD = 0.02
"""Standard deviation of class and mask tokens. Source: He et al. 2022, released configuration."""


@torch.no_grad()
def init_patch_projection(
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Fill a patch projection: the kernel as the matrix it is, the bias as a convolution's.

    The kernel is Xavier-uniform over its (D, P) view. The bias keeps the usual convolution range,
    plus or minus 1 / sqrt(P), because published models left it there.

    Args:
        weight: Kernel of shape (D, C, patch_size, patch_size), changed in place.
        bias: Shape (D,), changed in place.
        generator: Source of random numbers; torch's global one if absent.
    """
    # A view, so that the kernel itself is filled. As four dimensions it would count as a
    # convolution, whose range is another one.
    nn.init.xavier_uniform_(weight.flatten(1), generator=generator)
    inputs = weight[0].numel()
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(bias, -bound, bound, generator=generator)


@torch.no_grad()
def init_layers(module: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Fill every Linear and LayerNorm below a module, in the order of registration.

    Linear weights are Xavier-uniform and biases zero; the fused query-key-value weight counts as
    one matrix. LayerNorm starts as the identity.

    Args:
        module: Changed in place.
        generator: Source of random numbers; torch's global one if absent.
    """
    # Every draw moves the generator: another order of layers would give another first model, and
    # runs with the same seed would no longer compare.
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_token(
    token: torch.Tensor, *, generator: torch.Generator | None = None
) -> None:
    """Fill a class or mask token with small normal numbers.

    Args:
        token: Changed in place.
        generator: Source of random numbers; torch's global one if absent.
    """
    nn.init.normal_(token, std=TOKEN_STD, generator=generator)
