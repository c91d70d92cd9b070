"""What ends a run before its loop: signals while torch is imported or ranks wait for each other,
and ranks that die meanwhile. Imports no torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from pipeline.console import EXIT_INTERRUPTED
from train.errors import Preempted
from train.process.outcome import Outcome
from train.process.roll import rank_died

EARLY_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
PATIENCE_LOOKS = 6
"""Looks at a rank that is gone before the run is ended for it: an error of the main thread, or a
signal that reached all ranks, says more."""
_LOOK_S = 0.5


def end_now(code: int) -> NoReturn:
    """End this process at once: exit handlers would wait for ranks that no longer answer."""
    # A reader of our output that is gone, or a full disk, must not change the code.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Start:
    """Ends the run in one line, with its exit code, if it is told to stop before training.

    Not by exceptions: raised inside the import of a C extension they come out as an ImportError,
    and a wait in C hears none.

    Args:
        outcome: reports the end.
    """

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._imports = True
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hear signals until the loop does, and watch the other ranks of this node to the end."""
        for number in EARLY_SIGNALS:
            # What `nohup` or a parent has set to be ignored stays ignored.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._on_signal)
        self._outcome.roll.sign()
        if self._outcome.roll.is_kept:
            threading.Thread(
                target=self._watch_ranks, name="ranks", daemon=True
            ).start()
        try:
            yield
        finally:
            self._over.set()

    def imported(self) -> None:
        """Say that the imports are done: from here on files may have been written."""
        self._imports = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        outcome = self._outcome
        # The loop's handlers are gone again: the run is ending in order, and shall.
        if outcome.began:
            return
        if number != signal.SIGINT:
            name = signal.Signals(number).name
            gone = outcome.roll.gone()
            # A launcher tells the other ranks to end when one has died.
            error = (
                rank_died(gone)
                if gone
                else Preempted(
                    f"stopped ({name}) before training began. The same command starts again."
                )
            )
            end_now(outcome.conclude(error))
        if not self._imports:
            end_now(outcome.conclude(KeyboardInterrupt()))
        outcome.roll.leave()
        if outcome.rank == 0:
            # Not sys.stderr: the interrupted code may be in the middle of writing to it.
            line = "train.pretrain: stopped before it began. Nothing was changed; run it again.\n"
            with suppress(OSError):
                os.write(2, line.encode())
        os._exit(EXIT_INTERRUPTED)

    def _watch_ranks(self) -> None:
        looks = 0
        while not self._over.wait(_LOOK_S):
            roll = self._outcome.roll
            gone = roll.gone()
            looks = looks + 1 if gone or roll.verdict() is not None else 0
            if looks > PATIENCE_LOOKS:
                # The main thread may wait for the other rank in C, where it hears of nothing. If
                # that one has reported why it ended, its code is taken over.
                end_now(self._outcome.conclude(rank_died(gone)))
