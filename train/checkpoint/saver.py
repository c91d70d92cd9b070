"""Saving beside training: the loop waits for the copy to host memory, a thread writes, hashes and
uploads.

One save at a time: the next one waits for the one before, whose bytes it would overwrite. All ranks
call every method together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.checkpoint.store import Captured, CheckpointStore, StateExporter
from train.process.world import World

WRITE_LIMIT_S = 1800.0
"""Longest wait of a rank's writer for those of the others: uploads differ in speed far more than
steps do."""
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished save.

    Args:
        step: optimizer steps done.
        uri: the step's folder.
        stall_s: seconds that training waited for the copy (and, in sync mode, for the writing).
        write_s: seconds from the copy's end to the commit.
    """

    step: int
    uri: str
    stall_s: float
    write_s: float


class Saver:
    """Saves the checkpoints of a run.

    Args:
        store: where to.
        world: the processes of the run; all ranks make their saver together.
        mode: `async` writes in a thread, `sync` before `start` returns.
        on_wait: called about every second while `finish` waits; the watchdog's beat.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        world: World,
        mode: Literal["async", "sync"],
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.on_wait = on_wait
        self._mode = mode
        self._world = world
        # A group of its own: an agreement of the writers must never meet one of the training loop.
        self._writers = (
            world.for_a_thread(timeout_s=WRITE_LIMIT_S) if mode == "async" else world
        )
        self._thread: threading.Thread | None = None
        self._pending: int | None = None
        self._error: BaseException | None = None
        self._stall_s = self._write_s = 0.0

    @property
    def pending(self) -> int | None:
        """Step of a save whose outcome has not been taken in by `finish`."""
        return self._pending

    def start(
        self,
        step: int,
        engine: StateExporter,
        client: Mapping[str, Any],
    ) -> None:
        """Begin to save the state after `step` optimizer steps; a step that is saved
        already is not saved again.

        Args:
            step: optimizer steps done.
            engine: whose state.
            client: what the loop needs to go on, JSON types; rank 0's is written.
        """
        if self._pending is not None:
            raise RuntimeError(
                f"step {self._pending} is still being saved: call finish() before start()"
            )
        if self.store.has(step):
            return
        begun = time.perf_counter()
        # In the loop's thread: the next step changes what is copied here.
        captured = self.store.capture(
            step,
            engine,
            client,
            world=self._world,
        )
        self._stall_s = time.perf_counter() - begun
        self._pending, self._error = step, None
        if self._mode == "sync":
            self._write(captured)
            self._stall_s += self._write_s
            return
        # A daemon: a run that fails must end although an upload hangs.
        self._thread = threading.Thread(
            target=self._write, args=(captured,), name="checkpoint-writer", daemon=True
        )
        self._thread.start()

    def _write(self, captured: Captured) -> None:
        # Not the loop's clock: in a thread this time overlaps the steps.
        begun = time.perf_counter()
        try:
            self.store.write(captured, world=self._writers)
        except BaseException as error:  # noqa: BLE001 - the loop must meet it, whatever it is
            self._error = error
        self._write_s = time.perf_counter() - begun

    def is_ready(self) -> bool:
        """Tell whether `finish` would return at once, on every rank; False if no save is under
        way.

        Costs one small agreement while a save is under way, and otherwise no time.
        """
        if self._pending is None:
            return False
        busy = self._thread is not None and self._thread.is_alive()
        return self._world.highest(int(busy)) == 0

    def finish(self) -> Saved | None:
        """Wait for the save that is under way and give its outcome.

        Returns:
            What was saved; None if no save was under way.

        Raises:
            CheckpointWriteError: on every rank alike, it could not be written; earlier checkpoints
                are untouched.
        """
        if self._pending is None:
            return None
        while self._thread is not None and self._thread.is_alive():
            # In pieces: a long upload is no hang, and the watchdog must hear so.
            self._thread.join(_LOOK_S)
            self.on_wait()
        step, error = self._pending, self._error
        # Before the error is raised: the loop may go on after it and save again.
        self._pending = self._thread = self._error = None
        if error is not None:
            raise error
        return Saved(
            step,
            self.store.uri_of(step),
            self._stall_s,
            self._write_s,
        )
