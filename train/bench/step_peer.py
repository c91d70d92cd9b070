"""The model's training step next to that of transformers' ViTMAEForPreTraining, with the same
weights, in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from model.config import SIZES
from model.exchange.weights import to_hf
from model.objectives.mae import MaskedAutoencoder
from pipeline.bench.rows import Row
from pipeline.bench.turns import Turns
from pipeline.errors import ConfigError
from train.bench.random_run import LEARNING_RATE, device_name, wait_for

WARM_UP_ROUNDS = 2
"""Rounds that are not counted, after one step of each for the losses: compiling, allocating."""
_OURS = "ours"
_THEIRS = "transformers"


def compare(
    name: str,
    *,
    images: int,
    precision: Literal["fp32", "autocast"],
    compiled: bool,
    repeats: int,
    threads: int,
) -> Row:
    """Take steps of both models in turns.

    Args:
        name: model size.
        images: images per step.
        precision: fp32, or bf16 by autocast.
        compiled: both through torch.compile.
        repeats: rounds that count.
        threads: of the CPU; 0 leaves torch's choice.

    Returns:
        ours_s and theirs_s: forward, backward and the same fused AdamW; ratio: of our time to
        theirs, round by round, below 1 if ours is faster; loss_difference: relative, of the first
        step's losses: the same was computed.

    Raises:
        ConfigError: transformers is not installed.
    """
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
    torch.manual_seed(0)
    config = SIZES[name]
    ours = MaskedAutoencoder(config)
    theirs = _build_theirs(ours).to(device).train()
    ours.to(device).train()
    sides = (config.image_height, config.image_width)
    images_BCHW = torch.randn(images, 3, *sides, device=device)
    num_patches = config.num_patches
    noise_BN = torch.rand(images, num_patches, device=device)
    # After the weights are shared: a compiled module's names have a prefix.
    if compiled:
        ours.compile()
        theirs.compile()

    def our_loss() -> Tensor:
        loss: Tensor = ours(images_BCHW, noise_BN).loss
        return loss

    def their_loss() -> Tensor:
        loss: Tensor = theirs(pixel_values=images_BCHW, noise=noise_BN).loss
        return loss

    steps = {
        _OURS: _stepper(ours, our_loss, device=device, precision=precision),
        _THEIRS: _stepper(theirs, their_loss, device=device, precision=precision),
    }
    # Before any update, while both have the same weights.
    our_first = steps[_OURS]()
    their_first = steps[_THEIRS]()

    turns = Turns("step_bench", rounds=repeats, warm_up_rounds=WARM_UP_ROUNDS)
    for _ in turns.rounds():
        turns.take_timed(steps)
    return {
        "model": name,
        "images": images,
        "precision": precision,
        "compiled": compiled,
        "device": device_name(device),
        "ours_s": turns.spread(_OURS, "wall_s"),
        "theirs_s": turns.spread(_THEIRS, "wall_s"),
        "ratio": turns.ratio(_OURS, _THEIRS, "wall_s"),
        "loss_difference": abs(our_first - their_first) / abs(their_first),
    }


def _build_theirs(ours: MaskedAutoencoder) -> nn.Module:
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        raise ConfigError(
            "--peer transformers needs it installed: pip install -c constraints.txt transformers"
        ) from error
    our_state = ours.state_dict()
    state, settings = to_hf(our_state, ours.config, names="v5")
    # The same fused attention as ours; its eager one would lose by that alone.
    chosen = {**settings, "attn_implementation": "sdpa"}
    config = ViTMAEConfig(**chosen)
    theirs: nn.Module = ViTMAEForPreTraining(config)
    theirs.load_state_dict(state, strict=True)
    return theirs


def _stepper(
    model: nn.Module,
    forward: Callable[[], Tensor],
    *,
    device: torch.device,
    precision: Literal["fp32", "autocast"],
) -> Callable[[], float]:
    """Give what takes a step, waits for it and returns its loss."""
    trained = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained.append(parameter)
    optimizer = torch.optim.AdamW(
        trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    is_autocast = precision == "autocast"
    autocast = partial(
        torch.autocast, device.type, dtype=torch.bfloat16, enabled=is_autocast
    )

    def step() -> float:
        with autocast():
            loss = forward()
        # Outside of autocast, as torch asks for: the backward pass has the types of the forward.
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Before the loss is read, which would wait by itself, and only for the forward pass.
        wait_for(device)
        return float(loss.detach())

    return step
