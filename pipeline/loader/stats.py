"""Where the time goes: what each stage of the data path did, and what it waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Stage = Literal["read", "decode", "copy", "wait"]


@dataclass
class StageCounter:
    """Totals of one stage.

    Attributes:
        items: images that passed.
        busy_s: seconds of work.
        wait_s: seconds spent waiting for the stage before, or for room behind.
        bytes: bytes that came out.
    """

    items: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    bytes: int = 0


class PipelineStats:
    """Counters of every stage, written by the loader's threads and read by whoever reports.

    `wait` is the caller's own waiting: if it is near zero, the loader keeps up and the model is
    the bottleneck.
    """

    def __init__(self) -> None:
        # Once per batch and stage, so that one lock for all of them costs little.
        self._lock = threading.Lock()
        self._stages: dict[Stage, StageCounter] = {
            name: StageCounter() for name in ("read", "decode", "copy", "wait")
        }

    def add(
        self,
        stage: Stage,
        *,
        items: int = 0,
        busy_s: float = 0.0,
        wait_s: float = 0.0,
        num_bytes: int = 0,
    ) -> None:
        """Add to one stage's totals."""
        with self._lock:
            counter = self._stages[stage]
            counter.items += items
            counter.busy_s += busy_s
            counter.wait_s += wait_s
            counter.bytes += num_bytes

    @contextmanager
    def busy(
        self, stage: Stage, *, items: int = 0, num_bytes: int = 0
    ) -> Iterator[None]:
        """Count the time of a block as work of one stage."""
        start_s = time.perf_counter()
        # Without `finally`: a block that failed has passed no images, and must not look like one.
        yield
        busy_s = time.perf_counter() - start_s
        self.add(stage, items=items, busy_s=busy_s, num_bytes=num_bytes)

    @contextmanager
    def waiting(self, stage: Stage) -> Iterator[None]:
        """Count the time of a block as waiting of one stage."""
        start_s = time.perf_counter()
        # With `finally`: a wait often ends by a closed channel, and was a wait all the same.
        try:
            yield
        finally:
            wait_s = time.perf_counter() - start_s
            self.add(stage, wait_s=wait_s)

    def snapshot(self) -> dict[str, dict[str, float]]:
        """Return the totals of every stage so far: items, busy_s, wait_s, bytes."""
        # Copies: who reports subtracts an earlier snapshot from a later one.
        totals = {}
        with self._lock:
            for name, counter in self._stages.items():
                counts = dict(vars(counter))
                totals[str(name)] = counts
        return totals
