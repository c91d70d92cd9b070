"""Being asked to stop: signals, a launcher that is gone, and all ranks agreeing on when.

A signal only sets a flag. The loop asks at step boundaries, saves, and exits with 75; the same
command goes on.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

import psutil

from train.process.world import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""TERM comes from schedulers, launchers and people, INT from a terminal, USR1 from `sbatch
--signal=USR1@120`, HUP from a terminal that was closed, such as that of an ssh that dropped.
torchrun passes HUP on to its ranks, even under nohup."""
REPEAT_AFTER_S = 1.0
"""Signals closer together than this count as one: a launcher that is interrupted passes a second
one on at once."""
POLL_S = 0.5
ORPHAN_GRACE_S = 300.0
"""How long ranks without a launcher may take to save; nobody else would end them."""
_TORCHRUN = (
    "torch.distributed.run",
    "torch/distributed/run",
    "torchrun",
    "torch.distributed.launch",
)
_DEEPSPEED_NODE = ("deepspeed.launcher.launch", "deepspeed/launcher/launch")


class Preemption:
    """Watches for reasons to stop; a context manager around the loop, entered in the main thread of
    every rank.

    Signals are seen by a thread of their own, so that a second one ends this process even while the
    main thread waits for another rank inside a collective.

    Args:
        world: the processes of the run.
        agree_every: calls of `requested` between agreements. Every call costs about 0.1 ms on one
            node.
    """

    def __init__(
        self,
        world: World,
        *,
        agree_every: int = 1,
    ) -> None:
        self._world = world
        self._agree_every = agree_every
        self._calls = 0
        self._agreed = False
        self._reason = ""
        self._first_hard_s: float | None = None
        self._orphaned_s: float | None = None
        self._armed = True
        self._closing = threading.Event()
        self._saved_handlers: dict[
            int, Callable[[int, FrameType | None], object] | int | None
        ] = {}
        self._thread: threading.Thread | None = None
        self._pipe = (-1, -1)

    def __enter__(self) -> Preemption:
        self._pipe = os.pipe()
        for end in self._pipe:
            # The interpreter writes to it from its signal handler, where it must not wait.
            os.set_blocking(end, False)
        self._launchers = find_launchers()
        for number in STOP_SIGNALS:
            # nohup has HUP ignored, and means it. A rank of torchrun is killed soon after it.
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if number == signal.SIGHUP and is_ignored and not self._is_under_torchrun():
                continue
            self._saved_handlers[number] = signal.signal(number, _noted)
        self._saved_wakeup = signal.set_wakeup_fd(
            self._pipe[1], warn_on_full_buffer=False
        )
        # A forked child shares the pipe: its signals would be taken for ours.
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(
            target=self._watch,
            name="preemption",
            daemon=True,
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        # The pipe first: a signal in between would write to a closed end.
        signal.set_wakeup_fd(self._saved_wakeup)
        for number, handler in self._saved_handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for end in self._pipe:
            os.close(end)

    @property
    def reason(self) -> str:
        """Why this rank wants to stop; empty if another one does, or none."""
        return self._reason

    def requested(self) -> bool:
        """Tell whether the run is to save and stop; the same answer on every rank.

        All ranks call it equally often, at step boundaries.
        """
        # Counted alike on all ranks, so that all of them agree at the same call.
        self._calls += 1
        if not self._agreed and self._calls % self._agree_every == 0:
            self._agreed = bool(self._world.highest(int(bool(self._reason))))
        return self._agreed

    def disarm(self) -> None:
        """Call once everything is saved: further signals no longer cut the orderly end short."""
        self._armed = False

    def _watch(self) -> None:
        while not self._closing.is_set():
            with suppress(InterruptedError):
                readable, _, _ = select.select(
                    [self._pipe[0]],
                    [],
                    [],
                    POLL_S,
                )
                if readable:
                    for number in os.read(self._pipe[0], 64):
                        self._note(number)
            self._check_launcher()

    def _note(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        now_s = time.monotonic()
        # The first reason counts: what follows is mostly a consequence of it.
        self._reason = self._reason or signal.Signals(number).name
        if (
            number == signal.SIGUSR1
        ):  # an early warning: the TERM that may follow it is the first one
            return
        if self._first_hard_s is None:
            self._first_hard_s = now_s
        elif self._armed and now_s - self._first_hard_s >= REPEAT_AFTER_S:
            _say(
                f"rank {self._world.rank}: second {signal.Signals(number).name}, ending without "
                "saving"
            )
            os._exit(128 + number)

    def _check_launcher(self) -> None:
        if self._orphaned_s is None:
            gone = next(
                (name for process, name in self._launchers if _is_gone(process)), None
            )
            if gone is not None:
                self._orphaned_s = time.monotonic()
                self._reason = self._reason or f"the launcher is gone ({gone})"
        elif time.monotonic() - self._orphaned_s > ORPHAN_GRACE_S:
            _say(
                f"rank {self._world.rank}: still here {ORPHAN_GRACE_S:g} s after its launcher, "
                "ending"
            )
            os._exit(128 + signal.SIGTERM)

    def _forget(self) -> None:
        if self._closing.is_set():
            return
        with suppress(ValueError, OSError):
            signal.set_wakeup_fd(-1)
            for number in self._saved_handlers:
                signal.signal(number, signal.SIG_DFL)

    def _is_under_torchrun(self) -> bool:
        return any(name == "torchrun" for _, name in self._launchers)


def _noted(number: int, frame: FrameType | None) -> None:
    """Leave it to the watching thread: the interpreter has written to the wake-up pipe."""


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _say(line: str) -> None:
    # print() may hang or fail in a process whose main thread is stuck and whose terminal is gone.
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())


def find_launchers() -> list[tuple[psutil.Process, str]]:
    """Find the launcher processes this rank depends on; a shell is none, so that nohup works.

    The deepspeed command starts one process a node that starts the ranks; ended with TERM it goes
    away alone and leaves both behind. So both are watched.

    Returns:
        Processes with a name for messages; empty for a plain `python -m`.
    """
    try:
        parent = psutil.Process().parent()
        # A container's first process, or one whose launcher has died already.
        if parent is None:
            return []
        command = " ".join(parent.cmdline())
        if any(mark in command for mark in _TORCHRUN):
            return [(parent, "torchrun")]
        if not any(mark in command for mark in _DEEPSPEED_NODE):
            return []
        found = [(parent, "deepspeed.launcher.launch")]
        grandparent = parent.parent()
        if grandparent is not None and "deepspeed" in " ".join(grandparent.cmdline()):
            found.append((grandparent, "deepspeed"))
        return found
    except psutil.Error:
        return []
