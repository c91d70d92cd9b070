"""What every command line here shares: errors in one paragraph on stderr, and the exit code that
says which kind."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pipeline.errors import MaelstromError
from pipeline.storage.uri import redact

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


def say(text: str) -> None:
    """Write a line for a person, to stderr: stdout is kept for what a program reads."""
    sys.stderr.write(f"{redact(text)}\n")
    sys.stderr.flush()


def say_json(data: dict[str, Any]) -> None:
    """Write one JSON object for a program, to stdout."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def run_command(command: Callable[[], int], *, interrupted: str) -> int:
    """Run a command's body and return its exit code.

    Args:
        command: Returns the exit code where nothing goes wrong.
        interrupted: What to tell after Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    try:
        return command()
    except MaelstromError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(interrupted)
        return EXIT_INTERRUPTED


_LINE_EVERY_S = 10.0


class Progress:
    """Shows how far a command is, how fast it goes and how long it will take. Use it as a context
    manager.

    Args:
        label: What is being done.
        total: Units in all.
        unit: What is counted, in the plural.
    """

    def __init__(self, label: str, *, total: int, unit: str = "images") -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._bytes = 0
        self._skipped = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start_s = self._said_s = time.monotonic()
        if sys.stderr.isatty():
            from rich import progress as bars
            from rich.console import Console

            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[speed]}"),
                bars.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, speed="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._done:
            self._say()

    def advance(self, count: int, *, size_bytes: int = 0) -> None:
        """Count units that are done, and the bytes they took."""
        self._done += count
        self._bytes += size_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, speed=self._speed())
        elif time.monotonic() - self._said_s > _LINE_EVERY_S:
            self._say()

    def skip(self, count: int) -> None:
        """Count units that were done before this run, and so say nothing about its speed."""
        self._done += count
        self._skipped += count

    def _speed(self) -> str:
        elapsed_s = max(time.monotonic() - self._start_s, 1e-6)
        text = f"{(self._done - self._skipped) / elapsed_s:,.0f} {self._unit}/s"
        return text + (f", {self._bytes / elapsed_s / 1e6:,.1f} MB/s" if self._bytes else "")

    def _say(self) -> None:
        self._said_s = time.monotonic()
        elapsed_s = self._said_s - self._start_s
        left_s = elapsed_s / max(1, self._done - self._skipped) * (self._total - self._done)
        ending = f", {left_s:,.0f} s left" if self._done < self._total else f", {elapsed_s:,.1f} s"
        sys.stderr.write(
            f"{self._label}: {self._done:,} of {self._total:,} {self._unit}, "
            f"{self._speed()}{ending}\n"
        )
        sys.stderr.flush()
