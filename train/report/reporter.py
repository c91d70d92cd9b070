"""What a run reports: metrics.jsonl, TensorBoard events, a progress display and the closing
summary.

Only rank 0 writes. Imports no torch at the top: the demo reads metrics without it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pipeline.errors import InfrastructureError
from pipeline.storage import redact
from train.report.meter import format_duration
from train.report.metrics_file import METRICS_FILE, truncate_after

if TYPE_CHECKING:
    from train.report.trackers import Background


# ----------------------------------------------------------------------------------------- reporter
class Reporter:
    """Writes a run's lines and draws its progress, on rank 0; on other ranks no method has an
    effect.

    Args:
        run_dir: local folder of the run.
        rank: this process's rank.
        total_steps: steps of the whole run.
        resumed_step: step the run goes on from; lines after it are cut away, events after it are
            purged.
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
        self._told: set[str] = set()
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

    @contextmanager
    def tolerating(self, what: str) -> Iterator[None]:
        """Let the block fail to write: told once for each thing, and the run goes on.

        A run's folder that is full must not end a run whose checkpoints have room.

        Args:
            what: file or folder that is written, for the message.
        """
        try:
            yield
        except (OSError, InfrastructureError) as error:
            if what not in self._told:
                self._told.add(what)
                self.say(
                    f"warning: {self._run_dir / what}: cannot be written: {redact(str(error))}; "
                    "training goes on without it. Free some space."
                )

    def _write_line(self, text: str) -> None:
        assert self._file is not None
        data = f"{text}\n".encode()
        written = os.write(self._file.fileno(), data)
        if written < len(data):
            # Half a line would end every reader's list: it is taken back.
            os.ftruncate(
                self._file.fileno(), os.fstat(self._file.fileno()).st_size - written
            )
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def show_on(self, trackers: Sequence[Background]) -> None:
        """Show what comes from here on in other places too; they are closed with the reporter."""
        self._trackers = trackers

    def _open_files(self, step: int) -> None:
        path = self._run_dir / METRICS_FILE
        # Before it is opened for appending: the cut replaces the file.
        truncate_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        if self._tensorboard == "on":
            from torch.utils.tensorboard import SummaryWriter

            # Events after the step would be drawn twice; the viewer leaves out what is purged.
            self._board = SummaryWriter(
                str(self._run_dir / "tensorboard"),
                purge_step=step + 1 if step or self._board is not None else None,
            )

    def rewind(self, step: int) -> None:
        """Go back to a step: its later lines are cut away, as after a resume.

        Args:
            step: last step to keep.
        """
        if not self._writes:
            return
        # The cut replaces the file: an open one would go on writing to what is no longer there.
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
        self._task = self._progress.add_task(
            "step", total=self._total_steps, completed=step, text=""
        )
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the progress display to a step; cheap, and without reading anything back from a
        device."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Print one line for people."""
        if not self._writes:
            return
        if self._progress is not None:
            self._progress.console.print(
                text,
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        else:
            self._out.write(text + "\n")
            self._out.flush()

    def log(self, line: Mapping[str, float | int | None]) -> None:
        """Write one line of metrics.jsonl, the same to TensorBoard, and show it.

        Args:
            line: step, epoch, images_seen, loss, lr, grad_norm, images_per_s, data_wait_share,
                step_s, ...
        """
        if self._file is None:
            return
        # NaN is not valid JSON: a reader in another language would stop at it.
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in line.items()
        }
        with self.tolerating(METRICS_FILE):
            # In one write and at once: others follow the file while the run goes on, and what does
            # not fit on a full disk must not stay in a buffer and fail again when it is closed.
            self._write_line(json.dumps(clean))
        step = int(line["step"] or 0)
        with self.tolerating("tensorboard"):
            for name, value in line.items():
                if self._board is not None and name != "step" and value is not None:
                    self._board.add_scalar(f"train/{name}", value, step)
        for tracker in self._trackers:
            tracker.log(step, clean)
        self._show(step, line)

    def _show(
        self,
        step: int,
        line: Mapping[str, float | int | None],
    ) -> None:
        loss, rate, wait = (
            line.get("loss"),
            line.get("images_per_s"),
            line.get("data_wait_share"),
        )
        # Without a loss every step since the last line was skipped.
        text = f"loss {loss:.4f}" if loss is not None else "no step taken"
        if rate is not None:
            text += f"  {rate:,.0f} images/s  data wait {100 * (wait or 0):.0f}%"
        if line.get("mfu"):
            text += f"  MFU {100 * (line['mfu'] or 0):.1f}%"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
            return
        # From this start's own steps: earlier ones may have run on other machines.
        done = step - self._first_step
        left_s = (
            (time.perf_counter() - self._started)
            / max(1, done)
            * (self._total_steps - step)
        )
        lr = line.get("lr") or 0.0
        self.say(
            f"step {step}/{self._total_steps}  {text}  lr {lr:.2e}  ETA {format_duration(left_s)}"
        )

    def picture(
        self,
        name: str,
        path: Path,
        step: int,
    ) -> None:
        """Show a written PNG in TensorBoard and the trackers too."""
        for tracker in self._trackers:
            tracker.picture(step, name, path)
        if self._board is None:
            return
        import numpy as np
        from PIL import Image

        self._board.add_image(
            name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC"
        )

    def close(self) -> None:
        """End the display and close the files."""
        # First: the last lines must not be drawn over by the bar.
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._board is not None:
            with self.tolerating("tensorboard"):
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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close whatever happened."""
        self.close()
