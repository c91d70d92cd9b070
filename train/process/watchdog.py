"""Ends a rank that makes no progress, after writing down what all its threads were doing."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from pipeline.errors import InfrastructureError
from train.process.roll import GOES_ON, Roll, describe_stopped

REPORT_LIMIT_S = 20.0
"""Longest time for the report of the end: the disk it goes to may be what hangs."""


class Watchdog:
    """A context manager around the loop, which calls `beat` once a step.

    If one rank hangs, all others wait for it inside a collective, in which no Python code runs;
    so a thread looks.

    Args:
        timeout_s: longest time between two beats.
        folder: local folder for `stacks-rank-00000.txt`.
        rank: this process's rank.
        roll: the ranks of this node: those that somebody has stopped are named.
        conclude: reports the end and gives the exit code; by default the message goes to stderr.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        folder: Path,
        rank: int,
        roll: Roll | None = None,
        conclude: Callable[[BaseException], int] | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self.path = folder / f"stacks-rank-{rank:05d}.txt"
        self._rank = rank
        self._roll = roll or Roll("", rank=rank, world_size=1)
        self._conclude = conclude or _say_only
        self._last_s = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._watch,
            name="watchdog",
            daemon=True,
        )

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join()

    def beat(self) -> None:
        """Say that a step is done."""
        # One assignment, without a lock: the thread reads the old time or the new one.
        self._last_s = time.monotonic()

    def beat_while_waiting(self) -> None:
        """Say that what is waited for may take longer than a step, such as an upload; without
        effect while another rank of this node is stopped, which would be waited for in vain."""
        if not self._roll.stopped():
            self.beat()

    def _watch(self) -> None:
        # A fraction of the limit, so that short limits of tests are kept too.
        while not self._closing.wait(min(1.0, self.timeout_s / 4)):
            silent_s = time.monotonic() - self._last_s
            if silent_s > self.timeout_s:
                self._end(silent_s)

    def _end(self, silent_s: float) -> None:
        message = (
            f"rank {self._rank}: no step for {silent_s:.0f} s, more than engine.timeout_s "
            f"{self.timeout_s:g}; ending. Stacks are in {self.path}."
        )
        # Naming the rank that is stopped tells how to let it go on, and that the run will.
        message += describe_stopped(self._roll) or f" {GOES_ON}"
        # Writing may hang in its turn, and this process must end all the same.
        limit = threading.Timer(
            REPORT_LIMIT_S, os._exit, [InfrastructureError.exit_code]
        )
        limit.daemon = True
        limit.start()
        # A full disk must not keep this process from ending.
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w") as file:
                file.write(f"{message}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        code = self._conclude(InfrastructureError(message))
        # The main thread cannot be reached: it waits for a rank that will not answer.
        os._exit(code)


def _say_only(error: BaseException) -> int:
    with suppress(OSError):
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"error: {error}\n".encode(),
        )
    return InfrastructureError.exit_code
