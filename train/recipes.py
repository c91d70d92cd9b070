"""Named runs, as data: the settings in which a recipe differs from the defaults. Imports no torch.

A recipe is a nested mapping of sections, like a TOML file. The values of a file and of the command
line take precedence over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from model.config import SIZES

DEMO_MINUTES = 4.0
"""About how many minutes the demo's steps take on two CPU cores."""
Recipe = Mapping[str, Mapping[str, Any]]


def _imagenet(size: str, *, micro_batch_size: int) -> Recipe:
    """Give the pre-training recipe of He et al. 2022, table 8, for one model size.

    Batch 4096, AdamW (0.9, 0.95), weight decay 0.05, base rate 1.5e-4 per 256 images, 40 epochs of
    warm-up, half cosine, normalised pixels, 75% masked, no gradient clipping. 800 epochs is the
    paper's ablation length; its best models take `--train.epochs 1600`.
    """
    return {
        "model": {**SIZES[size].model_dump(), "norm_pix_loss": True},
        "train": {
            "epochs": 800,
            "global_batch_size": 4096,
            "micro_batch_size": micro_batch_size,
        },
        "optim": {
            "base_lr": 1.5e-4,
            "min_lr": 0.0,
            "warmup_epochs": 40.0,
            "beta1": 0.9,
            "beta2": 0.95,
            "weight_decay": 0.05,
            "grad_clip": 0.0,
        },
        "engine": {"zero_stage": 1, "precision": "bf16"},
        # An epoch of ImageNet-1k is 312.8 steps: a checkpoint every four epochs, one kept for good
        # every hundred.
        "checkpoint": {"every_steps": 1250, "keep_last": 3, "keep_every": 31250},
        "log": {"every_steps": 50, "pictures_every_steps": 12500},
    }


def _demo() -> Recipe:
    """Give the recipe of `make demo`: a small model on 64-px photographs, minutes on two CPU cores.

    The targets are plain pixels, not normalised ones, so that the loss can be compared with that of
    the mean colour.
    """
    return {
        "model": {**SIZES["demo"].model_dump(), "norm_pix_loss": False},
        "view": {"min_area": 0.3},
        "order": {"lanes": 8, "window": 0},
        "loader": {"decoder": "dali", "num_threads": 1, "prefetch_batches": 4},
        "train": {"steps": 800, "global_batch_size": 64, "micro_batch_size": 32},
        "optim": {
            "base_lr": 8e-3,
            "warmup_steps": 80,
            "warmup_epochs": None,
            "grad_clip": 1.0,
        },
        "engine": {
            "zero_stage": 1,
            "precision": "autocast",
            "activation_checkpointing": "selective",
        },
        "checkpoint": {"every_steps": 150, "keep_last": 2},
        "log": {"every_steps": 20, "pictures_every_steps": 0, "num_pictures": 8},
    }


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "demo": _demo(),
        "mae_vit_b_16": _imagenet("vit_b_16", micro_batch_size=128),
        "mae_vit_l_16": _imagenet("vit_l_16", micro_batch_size=64),
        "mae_vit_h_14": _imagenet("vit_h_14", micro_batch_size=32),
    }
)
"""Every named run. Source of the mae_* ones: He et al. 2022, table 8 and appendix A.1."""
