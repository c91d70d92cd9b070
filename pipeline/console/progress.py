"""How far a command is: a bar on a terminal, a line now and then otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from pipeline.console.streams import say

_LINE_EVERY_S = 10.0


class Progress:
    """Shows how far a command is, how fast it goes and how long it will take. Use it as a context
    manager.

    Args:
        label: What is being done.
        total: Units in all.
        unit: What is counted, in the plural; bytes are shown as MB.
        after_s: Seconds without a word: what is done within them is not shown at all.
    """

    def __init__(
        self, label: str, *, total: int, unit: str = "images", after_s: float = 0.0
    ) -> None:
        self._label = label
        self._total = total
        self._unit, self._scale = (unit, 1) if unit != "bytes" else ("MB", 1_000_000)
        self._after_s = after_s
        self._done = 0
        self._bytes = 0
        self._skipped = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start_s = time.monotonic()
        # Without a terminal the first line comes after _LINE_EVERY_S, and so does every other.
        self._said_s = self._start_s
        if sys.stderr.isatty() and not self._after_s:
            self._show_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._done and self._elapsed_s() >= self._after_s:
            self._say()

    def advance(self, count: int, *, size_bytes: int = 0) -> None:
        """Count units that are done, and the bytes they took."""
        self._done += count
        self._bytes += size_bytes
        if (
            self._bar is None
            and sys.stderr.isatty()
            and self._elapsed_s() >= self._after_s
        ):
            self._show_bar()
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done,
                done=f"{self._shown(self._done)}/{self._shown(self._total)}",
                speed=self._speed(),
            )
        elif time.monotonic() - self._said_s > _LINE_EVERY_S:
            self._say()

    def skip(self, count: int) -> None:
        """Count units that were done before this run, and do not count for its speed."""
        self._done += count
        self._skipped += count

    def _show_bar(self) -> None:
        from rich import progress as bars
        from rich.console import Console

        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TextColumn("{task.fields[done]}"),
            bars.TextColumn("{task.fields[speed]}"),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(
            self._label,
            total=self._total,
            done="",
            speed="",
        )

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start_s

    def _speed(self) -> str:
        elapsed_s = max(self._elapsed_s(), 1e-6)
        rate = (self._done - self._skipped) / self._scale / elapsed_s
        text = f"{rate:,.0f} {self._unit}/s"
        if not self._bytes:
            return text
        return f"{text}, {self._bytes / elapsed_s / 1e6:,.1f} MB/s"

    def _say(self) -> None:
        self._said_s = time.monotonic()
        elapsed_s = self._elapsed_s()
        ending = f"{elapsed_s:,.1f} s"
        if self._done < self._total:
            done_now = max(1, self._done - self._skipped)
            left_s = elapsed_s / done_now * (self._total - self._done)
            ending = f"{left_s:,.0f} s left"
        say(
            f"{self._label}: {self._shown(self._done)} of {self._shown(self._total)} {self._unit}, "
            f"{self._speed()}, {ending}"
        )

    def _shown(self, count: int) -> str:
        return f"{count // self._scale:,}"
