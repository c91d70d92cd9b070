"""The model's training step beside that of transformers' ViTMAEForPreTraining, with the same
weights, in turn.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model.config import SIZES
from model.exchange.weights import to_hf
from model.objectives.mae import MaskedAutoencoder
from pipeline.errors import ConfigError

WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both models' steps (forward, backward, the same fused AdamW).

    Args:
        model, images, precision, compiled, device: what was measured and where.
        ours_s, theirs_s: median seconds of a step.
        ours_range_s, theirs_range_s: smallest and largest.
        ratio: median over the repeats of our time through theirs; below 1 ours is faster.
        ratio_range: its smallest and largest.
        loss_difference: relative, of the first step's losses: the same thing was computed.
    """

    model: str
    images: int
    precision: str
    compiled: bool
    device: str
    ours_s: float
    theirs_s: float
    ours_range_s: tuple[float, float]
    theirs_range_s: tuple[float, float]
    ratio: float
    ratio_range: tuple[float, float]
    loss_difference: float


def compare(
    name: str,
    *,
    images: int,
    precision: Literal["fp32", "autocast"],
    compiled: bool,
    repeats: int,
    threads: int,
) -> Comparison:
    """Take steps of both models in turn, the first of each pair changing every time.

    Args:
        name: model size.
        images: images of a step.
        precision: fp32, or bf16 by autocast.
        compiled: both through torch.compile.
        repeats: pairs that count.
        threads: of the CPU; 0 leaves torch's choice.

    Raises:
        ConfigError: transformers is not installed.
    """
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = SIZES[name]
    ours = MaskedAutoencoder(config)
    theirs = _build_theirs(ours).to(device).train()
    ours.to(device).train()
    images_BCHW = torch.randn(images, 3, config.image_height, config.image_width, device=device)
    noise_BN = torch.rand(images, config.num_patches, device=device)
    if compiled:
        ours.compile()
        theirs.compile()
    steps = [
        _stepper(
            ours, lambda: ours(images_BCHW, noise_BN).loss, device=device, precision=precision
        ),
        _stepper(
            theirs,
            lambda: theirs(pixel_values=images_BCHW, noise=noise_BN).loss,
            device=device,
            precision=precision,
        ),
    ]
    first = [step()[1] for step in steps]
    for _ in range(WARM_UP_STEPS):
        for step in steps:
            step()
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 else (1, 0):
            times[which].append(steps[which]()[0])
    ratios = [mine / other for mine, other in zip(*times, strict=True)]
    return Comparison(
        model=name,
        images=images,
        precision=precision,
        compiled=compiled,
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        ours_s=statistics.median(times[0]),
        theirs_s=statistics.median(times[1]),
        ours_range_s=(min(times[0]), max(times[0])),
        theirs_range_s=(min(times[1]), max(times[1])),
        ratio=statistics.median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        loss_difference=abs(first[0] - first[1]) / abs(first[1]),
    )


def _build_theirs(ours: MaskedAutoencoder) -> nn.Module:
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        raise ConfigError(
            "--peer transformers needs it installed: pip install -c constraints.txt transformers"
        ) from error
    state, settings = to_hf(ours.state_dict(), ours.config, names="v5")
    chosen = {**settings, "attn_implementation": "sdpa"}
    theirs: nn.Module = ViTMAEForPreTraining(ViTMAEConfig(**chosen))
    theirs.load_state_dict(state, strict=True)
    return theirs


def _stepper(
    model: nn.Module,
    forward: Callable[[], Tensor],
    *,
    device: torch.device,
    precision: Literal["fp32", "autocast"],
) -> Callable[[], tuple[float, float]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )

    def step() -> tuple[float, float]:
        begun = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "autocast"):
            loss = forward()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun, float(loss.detach())

    return step


def render_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Lay comparisons out as a Markdown table."""
    lines = [
        "| model | images | precision | compile | ours (range) | transformers (range) | ours / "
        "theirs (range) |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        ours, theirs = (
            f"{1e3 * median:,.0f} ms ({1e3 * low:,.0f}-{1e3 * high:,.0f})"
            for median, (low, high) in (
                (one.ours_s, one.ours_range_s),
                (one.theirs_s, one.theirs_range_s),
            )
        )
        lines.append(
            f"| {one.model} | {one.images} | {one.precision} | {'on' if one.compiled else 'off'} | "
            f"{ours} | {theirs} "
            f"| **{one.ratio:.3f}** ({one.ratio_range[0]:.3f}-{one.ratio_range[1]:.3f}) |"
        )
    devices = sorted({one.device for one in comparisons})
    return "\n".join(
        [
            *lines,
            "",
            f"Device: {'; '.join(devices)}. First losses differ by at most "
            f"{max(one.loss_difference for one in comparisons):.1e}.",
        ]
    )
