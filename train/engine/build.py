"""Build the engine that the settings name."""

from __future__ import annotations

import torch
from torch import nn

from train.config import RunConfig
from train.engine.base import Engine
from train.engine.deepspeed import DeepSpeedEngine
from train.engine.named_state import WEIGHT, StateSource, check_same_model, list_tensors
from train.engine.plain import TorchEngine
from train.process.world import World
from train.settings.devices import BF16_CAPABILITY, Device
from train.settings.engine_rules import refuse_engine_settings


def build_engine(
    config: RunConfig, *, model: nn.Module, resume: StateSource | None, world: World
) -> Engine:
    """Build the engine of a run and bring it to its saved state, if there is one.

    Activation checkpointing is switched on here, so that one section of the settings is read in one
    place.

    Args:
        config: settings of the run.
        model: the model with its first weights, equal on all ranks, on any device.
        resume: state to go on from; None starts afresh.
        world: the processes of the run.

    Returns:
        An engine that is ready for its next step.

    Raises:
        ConfigError: settings that this engine or device cannot do.
        CheckpointError: `resume` is of another model.
    """
    refuse_engine_settings(
        config, world_size=world.world_size, device=_device_of(world)
    )
    # Not every model has blocks to recompute, e.g. the small ones of tests.
    choose_checkpointing = getattr(model, "set_activation_checkpointing", None)
    if choose_checkpointing is not None:
        choose_checkpointing(
            encoder=config.engine.activation_checkpointing,
            decoder=config.engine.decoder_activation_checkpointing,
        )
    # Frozen tensors are taken over here alone: `restore` below writes what is trained.
    if resume is not None:
        _copy_weights(resume, model, world=world)
    model.to(world.device)
    kind = TorchEngine if config.engine.kind == "torch" else DeepSpeedEngine
    engine: Engine = kind(model=model, config=config, world=world)
    if resume is not None:
        engine.restore(resume)
    return engine


def _device_of(world: World) -> Device:
    if world.device.type == "cpu":
        return Device("cpu", has_bf16=True)
    # Not torch.cuda.is_bf16_supported: it counts emulation in fp32, many times slower.
    capability = torch.cuda.get_device_capability(world.device)
    return Device("cuda", has_bf16=capability[0] >= BF16_CAPABILITY)


def _copy_weights(source: StateSource, model: nn.Module, *, world: World) -> None:
    table = list_tensors(model, parts=world.world_size)
    check_same_model(source.table, table, where=getattr(source, "uri", "checkpoint"))
    targets = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for tensor in table:
            targets[tensor.name].copy_(source.tensor(tensor.name, WEIGHT))
