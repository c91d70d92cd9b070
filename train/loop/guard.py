"""What a run does about numbers that go wrong: steps that are skipped, losses that jump. Imports no
torch.

An engine skips a step on all ranks together, so what is decided here is decided alike on every rank
without asking.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

Reaction = Literal["fine", "skipped", "roll-back", "stop"]
"""What follows from a step; see `SkipGuard.judge`."""
HISTORY = 20
"""Lines of the log that a loss is compared with: about a thousand steps at the default of 50 steps
a line."""
HISTORY_NEEDED = 5
"""Lines before the first comparison: the loss falls steeply at the start, and a median of few
values says little."""


class SkipGuard:
    """Counts skipped steps and says when the weights are to be taken back.

    Args:
        skipped_in_a_row: skipped steps in a row after which the run goes back to a checkpoint.
        roll_backs: how often it may go back before it stops.
    """

    def __init__(self, *, skipped_in_a_row: int, roll_backs: int) -> None:
        self._limit = skipped_in_a_row
        self._roll_backs_allowed = roll_backs
        self._in_a_row = 0
        self.roll_backs = 0
        """How often this start of the program has gone back."""
        self.target: int | None = None
        """Step that was gone back to last."""

    @property
    def in_a_row(self) -> int:
        """Steps skipped in a row up to now; while there are any, the weights are under
        suspicion."""
        return self._in_a_row

    def judge(self, step: Literal["taken", "skipped"]) -> Reaction:
        """Take note of one step.

        Args:
            step: whether the step changed the weights; a loss scaler's search counts as taken.

        Returns:
            fine: go on. skipped: go on, and write down the batch. roll-back: the weights are to be
                taken back.
            stop: that was done often enough.
        """
        if step == "taken":
            # Only a row of skips is suspicious: single ones come with a bad batch.
            self._in_a_row = 0
            return "fine"
        self._in_a_row += 1
        if self._in_a_row < self._limit:
            return "skipped"
        return "roll-back" if self.roll_backs < self._roll_backs_allowed else "stop"

    def rolled_back(self, step: int) -> None:
        """Take note that the weights are those of a checkpoint again.

        Args:
            step: the checkpoint's step.
        """
        # The restored weights are sound again; the limit on going back stays for the whole start.
        self._in_a_row = 0
        self.roll_backs += 1
        self.target = step


class SpikeGuard:
    """Finds a mean loss that is far above the recent ones.

    Args:
        factor: how far above their median; 0 does not look.
    """

    def __init__(self, *, factor: float) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=HISTORY)
        self._high = False

    @property
    def usual_loss(self) -> float:
        """Median of the recent losses."""
        return statistics.median(self._recent) if self._recent else math.nan

    def begins(self, loss: float) -> bool:
        """Look at the next line's loss.

        Args:
            loss: mean over the steps since the last line; one that is not finite is passed over.

        Returns:
            Whether a spike begins here. Its further lines are not told again, and do not become the
            usual.
        """
        if not self._factor or not math.isfinite(loss):
            return False
        high = (
            len(self._recent) >= HISTORY_NEEDED
            and loss > self._factor * self.usual_loss
        )
        begins = high and not self._high
        self._high = high
        # A plateau of high losses would otherwise raise the median until it looks usual.
        if not high:
            self._recent.append(loss)
        return begins
