"""Does a run fit its GPUs, and how would it fit best? Estimates before anything is started; no
torch, no process.

Counted: weights, gradients, optimizer state, what the forward pass keeps for the backward pass,
DeepSpeed's buffers, and what CUDA and NCCL take themselves. Not counted: what a compiler saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from model.config import CHANNELS, ModelConfig
from model.flops import activation_bytes, parameter_counts, recompute_flops, train_flops
from train.config import ActivationCheckpointing, RunConfig
from train.settings.devices import list_gpus

GIB = 2**30
CONTEXT_BYTES = GIB
"""CUDA's and NCCL's own memory on a rank; an assumption, 0.6 to 1.2 GiB are usual."""
USABLE_SHARE = 0.92
"""Part of a device that an estimate may fill: the allocator's gaps need the rest."""
LIVE_PARAMETERS = 10**9
"""Weights that DeepSpeed leaves gathered at stage 3, its default: all those of the models here."""
BUCKETS_NUMEL = 2 * 50_000_000
"""Elements of the reduce and gather buckets; train/engine/deepspeed_config.py sets their size."""
ZeroStage = Literal[0, 1, 2, 3]
STAGE_COST: dict[ZeroStage, float] = {
    0: 0.01,
    1: 0.0,
    2: 0.02,
    3: 0.15,
}
"""Share of a step that a stage adds, for the order of the recommendation only: stages 0 and 2 send
as much as stage 1, whose update is shared out; stage 3 sends half as much again. Assumed, not
measured."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Device memory of one rank at its peak, in bytes.

    Args:
        weights: what the forward pass computes with.
        gradients: with their sums over micro-batches.
        optimizer: fp32 masters, if there are any, and both moments.
        activations: of one micro-batch, with its images.
        workspace: DeepSpeed's buckets, CUDA, NCCL.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.workspace
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run, and what it takes.

    Args:
        zero_stage: ZeRO stage.
        checkpointing: activation checkpointing of encoder and decoder.
        memory: of one rank.
        cost: time of a step beside that of stage 1 without checkpointing, 0 for the same; for
            ordering only.
    """

    zero_stage: ZeroStage
    checkpointing: ActivationCheckpointing
    memory: MemoryEstimate
    cost: float


def estimate_memory(
    config: RunConfig,
    *,
    world_size: int,
    zero_stage: ZeroStage,
    encoder: ActivationCheckpointing,
    decoder: ActivationCheckpointing,
) -> MemoryEstimate:
    """Estimate what one rank needs.

    Args:
        config: settings of the run; model, micro batch, precision and offloading are read.
        world_size: ranks that share what the stage shards.
        zero_stage: stage in place of the settings'.
        encoder: checkpointing of the encoder's blocks in place of the settings'.
        decoder: the same for the decoder's.

    Returns:
        The parts of the estimate.
    """
    engine = config.engine
    trained = parameter_counts(config.model).trainable
    low = engine.precision in ("bf16", "fp16")
    value_bytes = 2 if low else 4
    # Ranks that share what a stage shards: 1 the optimizer, 2 gradients too, 3 weights too.
    shards = {stage: world_size if zero_stage >= stage else 1 for stage in (1, 2, 3)}

    weights = value_bytes * trained
    if zero_stage == 3:
        # A rank's own part, and what DeepSpeed leaves gathered for the layers at work.
        gathered = value_bytes * min(trained, LIVE_PARAMETERS)
        weights = gathered + value_bytes * trained // shards[3]
        if engine.offload_parameters == "cpu":
            weights = gathered

    gradients = value_bytes * trained // shards[2]
    if low:
        # In fp32 for the update and, if ZeRO sums several micro-batches, for the sums.
        grad_accum_steps = config.train.grad_accum_steps(world_size=world_size)
        sums = zero_stage > 0 and grad_accum_steps > 1
        gradients += 4 * trained // shards[2 if sums else 1]

    # Stage 0 in fp32 optimises the weights themselves; everything else keeps fp32 masters apart.
    masters = 0 if zero_stage == 0 and not low else 4
    optimizer = (masters + 8) * trained // shards[1]
    if zero_stage and engine.offload_optimizer == "cpu":
        optimizer = 0

    buckets = value_bytes * BUCKETS_NUMEL if zero_stage else 0
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(config, encoder=encoder, decoder=decoder),
        workspace=CONTEXT_BYTES + buckets,
    )


def _activations(
    config: RunConfig,
    *,
    encoder: ActivationCheckpointing,
    decoder: ActivationCheckpointing,
) -> int:
    model = config.model
    # Under autocast norms and the residual stream stay fp32 while products save bf16 copies.
    value_bytes = {
        "bf16": 2,
        "fp16": 2,
        "autocast": 4,
        "fp32": 4,
    }[config.engine.precision]
    kept = activation_bytes(
        model, encoder=encoder, decoder=decoder, value_bytes=value_bytes
    )
    # One block at a time is computed again, so only the largest counts.
    again = 0
    if encoder != "none":
        again = max(again, _block_bytes(model, "encoder", value_bytes=value_bytes))
    if decoder != "none":
        again = max(again, _block_bytes(model, "decoder", value_bytes=value_bytes))
    images = 4 * CHANNELS * model.image_height * model.image_width
    return config.train.micro_batch_size * (kept + again + images)


def _block_bytes(
    model: ModelConfig,
    stack: str,
    *,
    value_bytes: int,
) -> int:
    """What one block keeps while it is recomputed, per image."""
    everything = activation_bytes(model, value_bytes=value_bytes)
    if stack == "encoder":
        without = activation_bytes(model, encoder="full", value_bytes=value_bytes)
        return (everything - without) // model.depth
    without = activation_bytes(model, decoder="full", value_bytes=value_bytes)
    return (everything - without) // model.decoder_depth


def list_choices(config: RunConfig, *, world_size: int) -> list[Choice]:
    """Estimate every ZeRO stage with every mode of activation checkpointing (encoder and decoder
    alike).

    Args:
        config: settings of the run.
        world_size: ranks.
    """
    step_flops = train_flops(config.model)
    choices = []
    for stage in get_args(ZeroStage):
        # DeepSpeed does not scale the loss there; see engine_rules.
        if stage == 0 and config.engine.precision == "fp16":
            continue
        for mode in get_args(ActivationCheckpointing):
            memory = estimate_memory(
                config,
                world_size=world_size,
                zero_stage=stage,
                encoder=mode,
                decoder=mode,
            )
            again_flops = recompute_flops(config.model, encoder=mode, decoder=mode)
            cost = STAGE_COST[stage] + again_flops / step_flops
            choices.append(Choice(stage, mode, memory, cost))
    return choices


def recommend(choices: Iterable[Choice], *, device_bytes: int) -> Choice | None:
    """Pick the fastest choice that fits.

    Args:
        choices: what there is.
        device_bytes: memory of one device.

    Returns:
        The choice; None if none fits.
    """
    fitting = [
        choice
        for choice in choices
        if choice.memory.total <= USABLE_SHARE * device_bytes
    ]
    return min(
        fitting,
        key=lambda choice: (choice.cost, choice.memory.total),
        default=None,
    )


def describe_fit(
    config: RunConfig,
    *,
    world_size: int,
    device_bytes: int | None,
) -> list[str]:
    """Lay the estimates out for people.

    Args:
        config: settings of the run.
        world_size: ranks.
        device_bytes: memory of one device; None if it is not known.

    Returns:
        Lines; the settings' own combination, a table, and a recommendation.
    """
    engine = config.engine
    own = estimate_memory(
        config,
        world_size=world_size,
        zero_stage=engine.zero_stage,
        encoder=engine.activation_checkpointing,
        decoder=engine.decoder_activation_checkpointing,
    )
    choices = list_choices(config, world_size=world_size)
    modes = get_args(ActivationCheckpointing)
    parts = ("weights", "gradients", "optimizer", "activations", "workspace")
    lines = [
        f"memory of a rank as set: {own.total / GIB:.1f} GiB = "
        + " + ".join(f"{part} {getattr(own, part) / GIB:.1f}" for part in parts),
        f"GiB a rank ({world_size} ranks, micro batch {config.train.micro_batch_size}, "
        f"{engine.precision}; estimates) "
        "by ZeRO stage and activation checkpointing:",
        f"{'':>8}" + "".join(f"{mode:>11}" for mode in modes),
    ]
    for stage in sorted({choice.zero_stage for choice in choices}):
        row = [
            choice.memory.total / GIB
            for choice in choices
            if choice.zero_stage == stage
        ]
        lines.append(f"  ZeRO {stage}" + "".join(f"{size:>11.1f}" for size in row))
    return [*lines, _recommendation(choices, device_bytes)]


def _recommendation(choices: list[Choice], device_bytes: int | None) -> str:
    if device_bytes is None:
        return (
            "no GPU is seen here: --engine.device-memory-gib 80 says what they have, "
            "for a recommendation"
        )
    best = recommend(choices, device_bytes=device_bytes)
    size = f"{device_bytes / GIB:.0f} GiB a device"
    if best is None:
        smallest = min(choice.memory.total for choice in choices) / GIB
        remedy = "lower train.micro_batch_size or use more ranks"
        return f"nothing fits {size}: the smallest takes {smallest:.1f} GiB; {remedy}"
    mode = best.checkpointing
    return (
        f"fastest that fits {size}: --engine.zero-stage {best.zero_stage} "
        f"--engine.activation-checkpointing {mode} "
        f"--engine.decoder-activation-checkpointing {mode}"
    )


def device_bytes_of(config: RunConfig) -> int | None:
    """Tell the memory of one device: as set, or of the smallest GPU that nvidia-smi sees; None
    without either."""
    if config.engine.device_memory_gib:
        return round(config.engine.device_memory_gib * GIB)
    return min((gpu.memory_bytes for gpu in list_gpus()), default=None)
