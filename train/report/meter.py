"""Count steps, images and waiting."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any


# -------------------------------------------------------------------------------------------- clock
@dataclasses.dataclass
class Window:
    """What happened since the last line: steps, images, seconds, and seconds waited for data."""

    steps: int
    images: int
    elapsed_s: float
    wait_s: float

    def rates(self) -> dict[str, float]:
        """Give images per second (over all ranks), the share of time waited for data, and seconds a
        step."""
        # A window without a step, e.g. at once after a resume, must not divide by 0.
        elapsed_s = max(self.elapsed_s, 1e-9)
        return {
            "images_per_s": self.images / elapsed_s,
            "data_wait_share": min(1.0, self.wait_s / elapsed_s),
            "step_s": elapsed_s / max(1, self.steps),
        }


class Meter:
    """Counts steps, images and waiting between two lines, and over the whole start of the program.

    What the run does besides training (saving, drawing) is left out of the rates by `pause`.

    Args:
        global_batch_size: images of a step, over all ranks.
    """

    def __init__(self, *, global_batch_size: int) -> None:
        self._batch = global_batch_size
        self._total = Window(0, 0, 0.0, 0.0)
        self._steps = 0
        self._started = time.perf_counter()
        self._wait_at_start_s = 0.0
        self._paused_at = 0.0

    def step(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    def pause(self) -> None:
        """Stop the clock, before something that is not training."""
        self._paused_at = time.perf_counter()

    def go_on(self) -> None:
        """Start the clock again after `pause`."""
        # Moving the start forward leaves the pause out of every later difference.
        self._started += time.perf_counter() - self._paused_at

    def close_window(self, *, wait_s: float) -> Window:
        """End the window and start the next.

        Args:
            wait_s: the loader's running total of seconds that the loop waited for batches.
        """
        # One reading of the clock ends this window and begins the next: no time falls between.
        now = time.perf_counter()
        window = Window(
            self._steps,
            self._steps * self._batch,
            now - self._started,
            wait_s - self._wait_at_start_s,
        )
        self._total = Window(
            self._total.steps + window.steps,
            self._total.images + window.images,
            self._total.elapsed_s + window.elapsed_s,
            self._total.wait_s + window.wait_s,
        )
        self._steps, self._started, self._wait_at_start_s = 0, now, wait_s
        return window

    @property
    def total(self) -> Window:
        """All windows closed so far."""
        return self._total


def format_duration(seconds: float) -> str:
    """Write seconds as people read them: 41 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ------------------------------------------------------------------------------------------ summary
def throughput_summary(
    total: Window, stages: Mapping[str, Mapping[str, float]], *, world_size: int
) -> dict[str, Any]:
    """Say where the time went: per stage of the loader, waiting for data, and the training step.

    Args:
        total: the training windows of this start.
        stages: the loader's counters: per stage items, busy_s, wait_s.
        world_size: ranks; `total` counts the images of all of them, `stages` those of rank 0.

    Returns:
        images_per_s, data_wait_share, step_s, seconds trained, and per stage items, busy and wait
        seconds, and the images per second of one rank that the stage alone could do.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, counters in stages.items():
        busy_s, items = (
            float(counters.get("busy_s", 0.0)),
            float(counters.get("items", 0)),
        )
        rows[name] = {
            "items": items,
            "busy_s": busy_s,
            "wait_s": float(counters.get("wait_s", 0.0)),
            "busy_ms_per_item": 1e3 * busy_s / items if items else 0.0,
        }
    # The step's share is what the loop did not wait for; pauses are in neither.
    step_busy_s = max(0.0, total.elapsed_s - total.wait_s)
    images_per_rank = total.images / max(1, world_size)
    rows["train step"] = {
        "items": images_per_rank,
        "busy_s": step_busy_s,
        "wait_s": total.wait_s,
        "busy_ms_per_item": 1e3 * step_busy_s / images_per_rank
        if images_per_rank
        else 0.0,
    }
    return {
        "steps": total.steps,
        "images": total.images,
        "trained_s": total.elapsed_s,
        **total.rates(),
        "stages": rows,
    }


def summary_table(summary: Mapping[str, Any]) -> str:
    """Lay a summary out as a plain table for a terminal."""
    lines = [
        f"{'stage (rank 0)':<16}{'images':>12}{'busy s':>10}{'wait s':>10}{'ms/image':>10}"
    ]
    for name, row in summary["stages"].items():
        lines.append(
            f"{name:<16}{row['items']:>12,.0f}{row['busy_s']:>10.1f}{row['wait_s']:>10.1f}{row['busy_ms_per_item']:>10.2f}"
        )
    lines.append(
        f"{summary['steps']} steps, {summary['images']:,} images in "
        f"{format_duration(summary['trained_s'])}: "
        f"{summary['images_per_s']:,.0f} images/s, {1e3 * summary['step_s']:.0f} ms a step, "
        f"{100 * summary['data_wait_share']:.1f}% of the time waiting for data"
    )
    return "\n".join(lines)
