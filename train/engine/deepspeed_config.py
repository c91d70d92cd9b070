"""DeepSpeed's configuration, rendered from the settings of a run."""

from __future__ import annotations

from typing import Any

import torch

from train.config import RunConfig

BUCKET_NUMEL = 50_000_000
"""Elements that are reduced or gathered at a time (100 MB in bf16): DeepSpeed's 5e8 takes a
gigabyte for each of its two buffers, more than a ViT-B's whole state."""


def render_deepspeed_config(config: RunConfig, *, world_size: int) -> dict[str, Any]:
    """Translate the settings of a run into DeepSpeed's; nobody writes those by hand.

    Args:
        config: settings of the run.
        world_size: number of ranks.

    Returns:
        What deepspeed.initialize takes; JSON types only.
    """
    engine = config.engine
    grad_accum_steps = config.train.grad_accum_steps(world_size=world_size)
    rendered: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": config.optim.grad_clip,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        # The optimizer is torch's own AdamW: DeepSpeed's are compiled at start (80-95 s) and give
        # the same losses.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _render_zero(config),
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {
            "enabled": engine.precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
        },
    }
    if engine.precision == "autocast":
        rendered["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if engine.precision == "bf16" and grad_accum_steps > 1 and engine.zero_stage > 0:
        # Sums of many bf16 gradients lose their small terms.
        rendered["data_types"] = {"grad_accum_dtype": "fp32"}
    return rendered


def _render_zero(config: RunConfig) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 0:
        return zero
    zero |= {
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET_NUMEL,
        "allgather_bucket_size": BUCKET_NUMEL,
    }
    if engine.zero_stage == 3:
        # Its own linear layer rounds differently from torch's: the losses would not be those of the
        # other stages.
        zero |= {
            "memory_efficient_linear": False,
            "stage3_prefetch_bucket_size": BUCKET_NUMEL,
        }
        if engine.offload_parameters == "cpu":
            zero["offload_param"] = {
                "device": "cpu",
                "pin_memory": torch.cuda.is_available(),
            }
    if engine.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
    return zero
