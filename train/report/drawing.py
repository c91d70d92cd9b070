"""Pictures of a run: the loss curve, and held-out photographs as the model sees and completes them.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pipeline import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES_PER_PANEL = 1.7
DOTS_PER_INCH = 120


@dataclasses.dataclass(frozen=True)
class Completion:
    """Images, what was hidden of them, and what the model made of it, on the host.

    Attributes:
        original_BCHW: the images, in [0, 1].
        masked_BCHW: with grey where patches were hidden.
        pasted_BCHW: hidden patches painted by the model, visible ones kept.
        losses_B: the masked raw-pixel loss of each image.
        loss: their mean.
        note: how the pictures came about, for the caption.
    """

    original_BCHW: Tensor
    masked_BCHW: Tensor
    pasted_BCHW: Tensor
    losses_B: Tensor
    loss: float
    note: str


def draw_reconstruction(
    path: Path,
    completion: Completion,
    *,
    title: str,
) -> None:
    """Draw held-out images in rows of three: original, masked, completed.

    Args:
        path: PNG to write; replaced in one go.
        completion: what to draw.
        title: one line above.
    """
    count = len(completion.losses_B)
    # Two sets of three columns side by side, so that the picture is not a tower.
    blocks = 2 if count > 4 else 1
    rows = math.ceil(count / blocks)
    width = 3 * blocks * INCHES_PER_PANEL
    height = rows * (INCHES_PER_PANEL + 0.25) + 0.9
    figure = _figure(width, height)
    axes = figure.subplots(rows, 3 * blocks, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    panels = (completion.original_BCHW, completion.masked_BCHW, completion.pasted_BCHW)
    for number in range(count):
        row = number % rows
        block = number // rows
        loss = float(completion.losses_B[number])
        labels = ("original", "what the model sees", f"completed, loss {loss:.3f}")
        for column, (panel, label) in enumerate(
            zip(
                panels,
                labels,
                strict=True,
            )
        ):
            axis = axes[row, 3 * block + column]
            axis.imshow(
                panel[number]
                .permute(
                    1,
                    2,
                    0,
                )
                .numpy(),
                interpolation="nearest",
            )
            axis.set_title(label, fontsize=8)
    figure.suptitle(
        f"{title}\nmean loss {completion.loss:.4f} ({completion.note})", fontsize=10
    )
    _save(figure, path)


def draw_loss(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    *,
    references: Mapping[str, float] | None = None,
) -> None:
    """Draw the training loss over steps, and the learning rate below it.

    Args:
        path: PNG to write; replaced in one go.
        lines: lines of metrics.jsonl.
        references: named losses to draw as level lines, such as a baseline's.
    """
    # Lines without a loss are of steps that were all skipped.
    drawn = [line for line in lines if line.get("loss") is not None]
    steps = [line["step"] for line in drawn]
    losses = [line["loss"] for line in drawn]
    figure = _figure(8, 5)
    top, bottom = figure.subplots(
        2,
        1,
        sharex=True,
        height_ratios=[4, 1],
    )

    # Points of their own only as long as they can be told apart.
    marker = "." if len(drawn) < 40 else ""
    top.plot(steps, losses, marker=marker, label="training loss")
    for number, (name, value) in enumerate((references or {}).items()):
        top.axhline(
            value,
            linestyle="--",
            linewidth=1,
            color=f"C{number + 1}",
            label=f"{name} {value:.3f}",
        )
    if losses and max(losses) > 5 * min(losses) > 0:
        top.set_yscale("log")
    top.set_ylabel("loss")
    top.grid(alpha=0.3)
    top.legend()

    rates = [line["lr"] for line in drawn]
    bottom.plot(steps, rates, color="C7")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    _save(figure, path)


def spread_ids(num_samples: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Pick sample ids evenly over a dataset, so that every class folder has a chance to be
    shown."""
    count = min(count, num_samples)
    return (np.arange(count, dtype=np.int64) * num_samples + num_samples // 2) // max(
        1, count
    )


def _figure(width: float, height: float) -> Figure:
    # Figure without pyplot: no global state, no window system, safe beside other threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # Drawn in memory first: a viewer that has the file open never sees half a picture.
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH)
    storage.write_atomic(str(path), content.getvalue())
