"""What the optimizer does: parameter groups, AdamW, and the learning rate as a pure function of the
step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from train.config import OptimSection, RunConfig
from train.settings.lengths import peak_lr


def warmup_length(config: RunConfig, *, steps_per_epoch: float) -> float:
    """Return the warm-up's length in steps; a fraction if epochs are not whole steps."""
    if config.optim.warmup_steps is not None:
        return float(config.optim.warmup_steps)
    assert config.optim.warmup_epochs is not None, (
        "the settings give exactly one of the two"
    )
    return config.optim.warmup_epochs * steps_per_epoch


def lr_at(
    step: float,
    *,
    config: RunConfig,
    steps_per_epoch: float,
    total_steps: int,
    global_batch_size: int | None = None,
) -> float:
    """Compute the learning rate of one step: a straight warm-up from 0, then the schedule down to
    min_lr.

    A pure function, so that a schedule has no state to save or restore. Step 0 has rate 0,
    and the last step is one short of the end of the schedule, as in the published recipe.

    Args:
        step: optimizer steps done before this one, from 0; a fraction if the batch size changed
            during the run, see `train.loop.progress`.
        config: settings of the run; the section `optim` is read.
        steps_per_epoch: optimizer steps of one epoch; only used if the warm-up is given in
            epochs.
        total_steps: steps of the whole run; later steps stay at min_lr.
        global_batch_size: the batch that the peak is scaled to; by default that of the settings.

    Returns:
        The rate for every parameter group.

    Source: He et al. 2022, table 8; the cosine is that of Goyal et al. 2017 and Loshchilov &
        Hutter 2017, the constant rate with a cooldown that of Zhai et al. 2022, section 3.5.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    # Warm-up and peak are the same for every schedule.
    peak = peak_lr(config, global_batch_size=global_batch_size)
    warmup = warmup_length(config, steps_per_epoch=steps_per_epoch)
    if step < warmup:
        return peak * step / warmup
    if step >= total_steps:
        return config.optim.min_lr
    low = config.optim.min_lr
    if config.optim.schedule == "constant_cooldown":
        # A cooldown that is longer than what the warm-up leaves begins right after the warm-up.
        begin = max(warmup, total_steps * (1 - config.optim.cooldown_share))
        if step <= begin:
            return peak
        return low + (peak - low) * (total_steps - step) / (total_steps - begin)
    progress = (step - warmup) / (total_steps - warmup)
    # Another order of operations would round otherwise, and a run that is resumed with it would no
    # longer be equal to the last bit.
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether weight decay applies: not to biases, norms and other vectors; tokens are
    decayed.

    Source: the grouping of the published runs, which decays the class and mask tokens (three
        dimensions).
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def build_param_groups(
    module: nn.Module, *, weight_decay: float
) -> list[dict[str, Any]]:
    """Sort trainable parameters into [not decayed, decayed]; frozen ones are in neither, an empty
    group is left out.

    Args:
        module: the unwrapped model.
        weight_decay: decay of the second group.

    Returns:
        Groups for a torch optimizer.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        # E.g. fixed position tables: an optimizer would keep moments for them.
        if not parameter.requires_grad:
            continue
        if is_decayed(name, parameter):
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, config: OptimSection, *, device: torch.device
) -> torch.optim.AdamW:
    """Make AdamW over both groups. The rate starts at 0: every step sets it.

    Args:
        module: the unwrapped model.
        config: optimizer settings.
        device: that the optimizer runs on, a GPU or the CPU; torch has a fused kernel for both.
            Plain loops take 2 to 6 times as long on the CPU (ViT-B).
    """
    return torch.optim.AdamW(
        build_param_groups(module, weight_decay=config.weight_decay),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type in ("cuda", "cpu"),
    )


def set_lr(param_groups: list[dict[str, Any]], lr: float) -> None:
    """Set the rate of every group."""
    for group in param_groups:
        group["lr"] = lr
