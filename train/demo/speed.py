"""One process that times this machine for the demo; `train.demo.machine` starts it.

It imports torch, so that the demo itself need not: Ctrl-C ends the demo at once. It writes one JSON
line when it is ready, waits for a line with the precision, and writes one JSON line of seconds.

Shapes: B images, C channels, H height, W width, N patches, D encoder width.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from model.objectives.mae import MaskedAutoencoder
from train.config import RunConfig
from train.engine.plain import TorchEngine
from train.evaluation.held_out import BATCH_SIZE
from train.process.world import World
from train.recipes import RECIPES

WARM_UP_STEPS = 2
"""Steps that are not counted: they allocate, and make the optimizer's state."""
TIMED_S = 4.0
"""Seconds that steps are timed for: long enough to see a busy machine, short beside the demo."""
FEWEST_TIMED = 3
"""Steps that are timed at least, however long they take."""
PRODUCTS = 20
"""Matrix products that are timed for each precision at most; the shortest counts."""
PRODUCTS_S = 0.5
"""Seconds after which no further product is timed: without the instructions twenty take seconds."""


def bf16_over_fp32() -> float:
    """Time bf16 matrix products against fp32 ones of the demo's size.

    On a GPU bf16 is faster. CPUs differ: with AVX512-BF16 or AMX bf16 is up to five times as fast,
    without them many times slower.

    Returns:
        Time of a bf16 product in times of an fp32 product.
    """
    bf16_s = _product_s(torch.bfloat16)
    fp32_s = _product_s(torch.float32)
    return bf16_s / fp32_s


def _product_s(dtype: torch.dtype) -> float:
    # Tokens of a micro-batch by the encoder's width, and that by the width of a hidden layer.
    left_ND = torch.ones(1024, 192, dtype=dtype)
    right = torch.ones(192, 768, dtype=dtype)
    times = []
    for _ in range(PRODUCTS):
        start_s = time.perf_counter()
        left_ND @ right
        times.append(time.perf_counter() - start_s)
        if sum(times) > PRODUCTS_S:
            break
    # The first product picks a kernel and allocates; the shortest is none of these.
    return min(times)


def speed_config(precision: str, *, images: int) -> RunConfig:
    """Give the demo's settings for one process that trains alone.

    Args:
        precision: autocast or fp32.
        images: this process's images of a step.
    """
    # Copies: recipes are shared, and changed below.
    recipe = {}
    for name, section in RECIPES["demo"].items():
        recipe[name] = dict(section)
    micro_batch_size = min(images, recipe["train"]["micro_batch_size"])
    recipe["train"] |= {
        "global_batch_size": images,
        "micro_batch_size": micro_batch_size,
    }
    # Several processes are timed side by side without talking to each other.
    recipe["engine"] |= {"kind": "torch", "zero_stage": 0, "precision": precision}
    return RunConfig.model_validate(recipe)


def time_steps(config: RunConfig, *, device: torch.device) -> dict[str, float]:
    """Train on random pixels, and read features as the evaluation does.

    Args:
        config: settings of one process.
        device: where to compute.

    Returns:
        step_s: mean seconds of an optimizer step. features_per_s: images per second whose features
            are computed in fp32.
    """
    torch.manual_seed(0)
    model = MaskedAutoencoder(config.model)
    model.set_activation_checkpointing(
        encoder=config.engine.activation_checkpointing,
        decoder=config.engine.decoder_activation_checkpointing,
    )
    model.to(device)
    world = World(device=device)
    engine = TorchEngine(model=model, config=config, world=world)
    sides = (config.model.image_height, config.model.image_width)
    images_BCHW = torch.randn(BATCH_SIZE, 3, *sides, device=device)
    micro_BCHW = images_BCHW[: config.train.micro_batch_size]
    num_patches = config.model.num_patches
    noise_BN = torch.rand(len(micro_BCHW), num_patches, device=device)

    def step() -> None:
        for _ in range(engine.grad_accum_steps):
            engine.forward_backward(micro_BCHW, noise_BN)
        # The rate is tiny, so that random pixels do not drive the weights anywhere.
        engine.step(1e-6)

    for _ in range(WARM_UP_STEPS):
        step()
    step_s = _mean_seconds(step, device=device)

    model.eval()
    with torch.no_grad():
        # Once before it is timed, as with the steps.
        model.features(images_BCHW)
        read_features = partial(model.features, images_BCHW)
        features_s = _mean_seconds(read_features, device=device, limit_s=1.0)
    return {"step_s": step_s, "features_per_s": BATCH_SIZE / features_s}


def _mean_seconds(
    work: Callable[[], Any], *, device: torch.device, limit_s: float = TIMED_S
) -> float:
    """Repeat work for some seconds; the mean, not the best: a busy machine stays busy."""
    start_s = time.perf_counter()
    count = 0
    elapsed_s = 0.0
    while count < FEWEST_TIMED or elapsed_s < limit_s:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
        elapsed_s = time.perf_counter() - start_s
    return elapsed_s / count


def main() -> int:
    """Say what is here, wait to be told, time it."""
    gpus = torch.cuda.device_count()
    ratio = None
    if not gpus:
        ratio = bf16_over_fp32()
    _answer({"gpus": gpus, "bf16_over_fp32": ratio})
    told = sys.stdin.readline()
    if not told:
        # The demo needs no times: the run's number of steps is known already.
        return 0
    asked = json.loads(told)
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda")
    config = speed_config(asked["precision"], images=asked["images"])
    speed = time_steps(config, device=device)
    _answer(speed)
    return 0


def _answer(content: dict[str, Any]) -> None:
    # One line each: the demo reads by lines.
    text = json.dumps(content)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
