"""Settings of the masked autoencoder. Imports no torch, so that they can be checked at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CHANNELS = 3
"""Colour channels of every image: red, green, blue."""
RATIO_DENOMINATOR = 1_000_000
"""Largest denominator of the fraction that a mask ratio stands for. Large enough for six decimals,
small enough that 0.8 is 4/5 and not the nearest binary number, which lies a little above."""
MAX_SIDE_PX = 65_535
"""Longest side of a JPEG."""
MAX_PATCHES = 2**16
"""Patches of an image, e.g. 4096 x 4096 pixels at 16: attention's work grows with their square."""
Side = Annotated[int, Field(ge=1, le=MAX_SIDE_PX)]
Width = Annotated[int, Field(ge=4, le=2**16)]
Depth = Annotated[int, Field(ge=1, le=1024)]
"""Blocks, or heads of a block."""
ActivationCheckpointing = Literal["none", "selective", "full"]
"""Which blocks recompute their activations in the backward pass.

`none`: no block. `full`: every block keeps only its input. `selective`: every second block,
starting with the first; half of the memory is saved for half of the recomputation.
"""


class ModelConfig(BaseModel):
    """Shape of a vision transformer with a masked-autoencoder decoder, and of its objective.

    The defaults are ViT-B/16 with the decoder of He et al. 2022 (8 blocks of width 512). Only
    `mask_ratio` and `norm_pix_loss` may change between two runs that share weights; everything else
    decides tensor shapes.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    image_size: int | tuple[int, int] = 224
    """Height and width of the input in pixels. One number for a square, e.g. `224`, or two, e.g.
    `[224, 448]` in a file and `224x448` on the command line."""
    patch_size: Side = 16
    """Side of a square patch in pixels. It must divide height and width."""
    embed_dim: Width = 768
    """Width of the encoder, a multiple of 4 and of `num_heads`."""
    depth: Depth = 12
    """Number of encoder blocks."""
    num_heads: Depth = 12
    """Attention heads per encoder block."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of a block's MLP, divided by the width of the block; in encoder and decoder."""
    decoder_embed_dim: Width = 512
    """Width of the decoder, a multiple of 4 and of `decoder_num_heads`."""
    decoder_depth: Depth = 8
    """Number of decoder blocks."""
    decoder_num_heads: Depth = 16
    """Attention heads per decoder block."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the patches that the encoder does not see, e.g. 0.75. At least one patch is hidden
    and at least one is kept."""
    norm_pix_loss: bool = False
    """Predict each patch normalised by its own mean and standard deviation, instead of plain
    pixels. This gives better features, but drawing a prediction needs the true patch's mean and
    deviation."""

    @field_validator("image_size", mode="before")
    @classmethod
    def _read_image_size(cls, value: Any) -> Any:
        # From a command line every value is a text.
        if isinstance(value, str) and "x" in value:
            value = value.split("x")
        if not isinstance(value, list | tuple) or len(value) != 2:
            return value
        # Two equal sides become one number, so that both ways to write a square are one setting.
        height, width = value
        if str(height).strip() == str(width).strip():
            return height
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        # All problems at once: a person who mends one setting should not meet the next.
        problems = [*self._image_problems(), *self._width_problems()]
        # Only if the sides divide is there a number of patches to speak of.
        if not problems and self.num_patches > MAX_PATCHES:
            problems.append(
                f"image_size {self.image_height} x {self.image_width} in patches of "
                f"{self.patch_size} makes {self.num_patches} patches: use at most {MAX_PATCHES}, "
                "with a larger patch_size or a smaller image_size"
            )
        if not problems and not 1 <= self.num_visible < self.num_patches:
            lowest = 1 / self.num_patches
            highest = 1 - lowest
            problems.append(
                f"mask_ratio {self.mask_ratio} keeps {self.num_visible} of {self.num_patches} "
                "patches: at least one patch must be kept and one masked, use "
                f"{lowest:.4g} to {highest:.4g}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _image_problems(self) -> list[str]:
        problems = []
        # Equal sides have one problem, not two.
        for side in dict.fromkeys((self.image_height, self.image_width)):
            if not 1 <= side <= MAX_SIDE_PX:
                problems.append(
                    f"image_size {side} is not a number of pixels: use 1 to {MAX_SIDE_PX}"
                )
            elif side % self.patch_size:
                below = side // self.patch_size * self.patch_size
                above = below + self.patch_size
                nearest = f"{above}"
                # Below the first multiple there is none.
                if below:
                    nearest = f"{below} or {above}"
                problems.append(
                    f"image_size {side} is not a multiple of patch_size {self.patch_size}: use "
                    f"{nearest}"
                )
        return problems

    def _width_problems(self) -> list[str]:
        problems = []
        stacks = (
            ("", self.embed_dim, self.num_heads),
            ("decoder_", self.decoder_embed_dim, self.decoder_num_heads),
        )
        for prefix, width, heads in stacks:
            if width % heads:
                # Near what was asked for: every divisor of 1,024 would be too long a list.
                at_most = min(width, 4 * heads)
                candidates = range(1, at_most + 1)
                divisors = []
                for n in candidates:
                    if width % n == 0:
                        divisors.append(str(n))
                problems.append(
                    f"{prefix}embed_dim {width} does not divide into {prefix}num_heads {heads}: "
                    f"use {', '.join(divisors)} heads"
                )
            # A quarter each for sine and cosine of column and row.
            if width % 4:
                below = width // 4 * 4
                problems.append(
                    f"{prefix}embed_dim {width} is not a multiple of 4, which the sine-cosine "
                    f"position table needs: use {below} or {below + 4}"
                )
            hidden = width * self.mlp_ratio
            if hidden < 1 or hidden != int(hidden):
                problems.append(
                    f"mlp_ratio {self.mlp_ratio} times {prefix}embed_dim {width} is not a whole "
                    "number"
                )
        return problems

    @classmethod
    def of_size(cls, name: str, **settings: Any) -> ModelConfig:
        """Take a named size and change some of its settings.

        Args:
            name: A key of `SIZES`.
            settings: Fields to replace; checked like any other setting.

        Returns:
            The new configuration.

        Raises:
            ValueError: The name is unknown or the settings do not fit together.
        """
        if name not in SIZES:
            known = ", ".join(SIZES)
            raise ValueError(f"model size {name!r} is unknown: use one of {known}")
        # Built anew, not copied: `model_copy` checks nothing.
        values = SIZES[name].model_dump()
        return cls(**{**values, **settings})

    @property
    def image_height(self) -> int:
        """Height of the input in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size
        return self.image_size[0]

    @property
    def image_width(self) -> int:
        """Width of the input in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size
        return self.image_size[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows = self.image_height // self.patch_size
        columns = self.image_width // self.patch_size
        return rows, columns

    @property
    def num_patches(self) -> int:
        """Patches of an image, without the class token."""
        rows, columns = self.grid
        return rows * columns

    @property
    def patch_dim(self) -> int:
        """Values of one patch: patch_size^2 pixels of three channels."""
        return self.patch_size**2 * CHANNELS

    @property
    def num_visible(self) -> int:
        """Patches that the encoder sees; see `count_visible`."""
        return count_visible(self.num_patches, self.mask_ratio)

    @property
    def num_masked(self) -> int:
        """Patches that are hidden and make up the loss."""
        return self.num_patches - self.num_visible


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Count the patches that stay visible: the floor of num_patches * (1 - mask_ratio), in exact
    arithmetic.

    In binary floating point 100 * (1 - 0.8) is 19.99..., so plain truncation would keep 19 patches
    instead of 20. The ratio is therefore read as the nearest fraction with a denominator of at most
    `RATIO_DENOMINATOR`. For 196 and 256 patches (every published model) both ways agree at all
    multiples of 0.05.

    Args:
        num_patches: Patches of an image, at least 1.
        mask_ratio: Share that is hidden, from 0 to 1.

    Returns:
        Patches kept, from 0 to num_patches.
    """
    hidden_share = Fraction(mask_ratio).limit_denominator(RATIO_DENOMINATOR)
    visible_share = 1 - hidden_share
    return math.floor(num_patches * visible_share)


SIZES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "vit_ti_16": ModelConfig(embed_dim=192, depth=12, num_heads=3),
        "vit_s_16": ModelConfig(embed_dim=384, depth=12, num_heads=6),
        "vit_b_16": ModelConfig(embed_dim=768, depth=12, num_heads=12),
        "vit_l_16": ModelConfig(embed_dim=1024, depth=24, num_heads=16),
        "vit_h_14": ModelConfig(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
        "demo": ModelConfig(
            image_size=64,
            patch_size=8,
            embed_dim=192,
            depth=6,
            num_heads=3,
            decoder_embed_dim=128,
            decoder_depth=2,
            decoder_num_heads=4,
        ),
    }
)
"""Named sizes. Source: He et al. 2022 and Dosovitskiy et al. 2021 table 1 (B, L, H), Touvron et al.
2021 table 1 (Ti, S); `demo` is our own, small enough to learn something on a laptop in minutes."""
