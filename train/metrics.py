"""What a run reports: metrics.jsonl, TensorBoard events, a progress display and the closing summary.

Only rank 0 writes. Imports no torch at the top: the demo reads metrics without it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from train.trackers import Background

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LOSS_PICTURE = "loss.png"
RECONSTRUCTION_PICTURE = "reconstruction.png"


# ------------------------------------------------------------------------------------------------ the file


def truncate_after(path: Path, step: int) -> int:
    """Cut a metrics file after a step, so that a resumed run writes no step twice.

    Args:
        path: metrics.jsonl, which need not exist.
        step: last step to keep.

    Returns:
        How many lines went; half-written last lines count.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keep = int(json.loads(line)["step"]) <= step
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            keep = False
        if keep:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
    return dropped


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, oldest first; a half-written last line is left out."""
    path = run_dir / METRICS_FILE
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


# ------------------------------------------------------------------------------------------------ clock


@dataclasses.dataclass
class Window:
    """What happened since the last line: steps, images, seconds, and seconds waited for data."""

    steps: int
    images: int
    elapsed_s: float
    wait_s: float

    def rates(self) -> dict[str, float]:
        """Give images per second (over all ranks), the share of time waited for data, and seconds a step."""
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
        self._started += time.perf_counter() - self._paused_at

    def close_window(self, *, wait_s: float) -> Window:
        """End the window and start the next.

        Args:
            wait_s: the loader's running total of seconds that the loop waited for batches.
        """
        now = time.perf_counter()
        window = Window(self._steps, self._steps * self._batch, now - self._started, wait_s - self._wait_at_start_s)
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


# ------------------------------------------------------------------------------------------------ reporter


class Reporter:
    """Writes a run's lines and draws its progress, on rank 0; on other ranks every method does nothing.

    Args:
        run_dir: local folder of the run.
        rank: this process's rank.
        total_steps: steps of the whole run.
        resumed_step: step the run goes on from; lines after it are cut away, events after it are purged.
        tensorboard: whether event files are written.
        out: where lines for people go.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        total_steps: int,
        resumed_step: int = 0,
        tensorboard: Literal["on", "off"] = "on",
        out: TextIO | None = None,
    ) -> None:
        self._trackers: Sequence[Background] = ()
        self._out = out or sys.stdout
        self._writes = rank == 0
        self._total_steps = total_steps
        self._file: TextIO | None = None
        self._board: Any = None
        self._progress: Any = None
        self._started, self._first_step = time.perf_counter(), resumed_step
        self._run_dir, self._tensorboard = run_dir, tensorboard
        if not self._writes:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open_files(resumed_step)
        if self._out.isatty():
            self._start_progress(resumed_step)

    def show_on(self, trackers: Sequence[Background]) -> None:
        """Show what comes from here on in other places too; they are closed with the reporter."""
        self._trackers = trackers

    def _open_files(self, step: int) -> None:
        path = self._run_dir / METRICS_FILE
        truncate_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        if self._tensorboard == "on":
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(self._run_dir / "tensorboard"), purge_step=step + 1 if step or self._board is not None else None
            )

    def rewind(self, step: int) -> None:
        """Go back to a step: its later lines are cut away, as after a resume.

        Args:
            step: last step to keep.
        """
        if not self._writes:
            return
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        self._open_files(step)
        self.advance(step)

    def _start_progress(self, step: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(*columns, console=Console(file=self._out))
        self._task = self._progress.add_task("step", total=self._total_steps, completed=step, text="")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the progress display to a step; cheap, and without reading anything back from a device."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Print one line for people."""
        if not self._writes:
            return
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self._out.write(text + "\n")
            self._out.flush()

    def log(self, line: Mapping[str, float | int | None]) -> None:
        """Write one line of metrics.jsonl, the same to TensorBoard, and show it.

        Args:
            line: step, epoch, images_seen, loss, lr, grad_norm, images_per_s, data_wait_share, step_s, ...
        """
        if self._file is None:
            return
        # A NaN is no JSON: a reader in another language would stop at it.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        step = int(line["step"] or 0)
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"train/{name}", value, step)
        for tracker in self._trackers:
            tracker.log(step, clean)
        self._show(step, line)

    def _show(self, step: int, line: Mapping[str, float | int | None]) -> None:
        loss, rate, wait = line.get("loss"), line.get("images_per_s"), line.get("data_wait_share")
        text = f"loss {loss:.4f}  {rate:,.0f} images/s  data wait {100 * (wait or 0):.0f}%" if loss is not None else ""
        if line.get("mfu"):
            text += f"  MFU {100 * (line['mfu'] or 0):.1f}%"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
            return
        done = step - self._first_step
        left_s = (time.perf_counter() - self._started) / max(1, done) * (self._total_steps - step)
        lr = line.get("lr") or 0.0
        self.say(f"step {step}/{self._total_steps}  {text}  lr {lr:.2e}  ETA {format_duration(left_s)}")

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a written PNG in TensorBoard and the trackers too."""
        for tracker in self._trackers:
            tracker.picture(step, name, path)
        if self._board is None:
            return
        import numpy as np
        from PIL import Image

        self._board.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """End the display and close the files."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._board is not None:
            self._board.close()
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Reporter:
        """Give the reporter itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close whatever happened."""
        self.close()


def format_duration(seconds: float) -> str:
    """Write seconds as people read them: 41 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ------------------------------------------------------------------------------------------------ summary


def throughput_summary(total: Window, stages: Mapping[str, Mapping[str, float]], *, world_size: int) -> dict[str, Any]:
    """Say where the time went: per stage of the loader, waiting for data, and the training step.

    Args:
        total: the training windows of this start.
        stages: the loader's counters: per stage items, busy_s, wait_s.
        world_size: ranks; `total` counts the images of all of them, `stages` those of rank 0.

    Returns:
        images_per_s, data_wait_share, step_s, seconds trained, and per stage items, busy and wait seconds,
        and the images per second of one rank that the stage alone could do.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, counters in stages.items():
        busy_s, items = float(counters.get("busy_s", 0.0)), float(counters.get("items", 0))
        rows[name] = {
            "items": items,
            "busy_s": busy_s,
            "wait_s": float(counters.get("wait_s", 0.0)),
            "busy_ms_per_item": 1e3 * busy_s / items if items else 0.0,
        }
    step_busy_s = max(0.0, total.elapsed_s - total.wait_s)
    images_per_rank = total.images / max(1, world_size)
    rows["train step"] = {
        "items": images_per_rank,
        "busy_s": step_busy_s,
        "wait_s": total.wait_s,
        "busy_ms_per_item": 1e3 * step_busy_s / images_per_rank if images_per_rank else 0.0,
    }
    return {"steps": total.steps, "images": total.images, "trained_s": total.elapsed_s, **total.rates(), "stages": rows}


def summary_table(summary: Mapping[str, Any]) -> str:
    """Lay a summary out as a plain table for a terminal."""
    lines = [f"{'stage (rank 0)':<16}{'images':>12}{'busy s':>10}{'wait s':>10}{'ms/image':>10}"]
    for name, row in summary["stages"].items():
        lines.append(
            f"{name:<16}{row['items']:>12,.0f}{row['busy_s']:>10.1f}{row['wait_s']:>10.1f}{row['busy_ms_per_item']:>10.2f}"
        )
    lines.append(
        f"{summary['steps']} steps, {summary['images']:,} images in {format_duration(summary['trained_s'])}: "
        f"{summary['images_per_s']:,.0f} images/s, {1e3 * summary['step_s']:.0f} ms a step, "
        f"{100 * summary['data_wait_share']:.1f}% of the time waiting for data"
    )
    return "\n".join(lines)
