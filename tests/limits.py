"""Every limit of time in the tests, in one place.

A limit ends what hangs; it never judges speed. A machine whose bf16 products take a hundred times
as long as here, with both cores busy elsewhere, must give the same outcome, only later. So each
limit is at least ten times what the slowest machine seen so far has taken. A test waits for an
event (a file, a line, the end of a process) and takes its limit from here; whoever writes a number
of seconds beside a wait decides an outcome by speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_S = 1200.0
"""Longest wait for one event: a file, a message, the end of a process that has been started."""
TEST_S = 3 * HANG_S
"""Longest time of one test, which may wait for several events."""
EXIT_S = 100.0
"""Time in which a process that a test leaves behind may end by itself, before the test fails."""
POLL_S = 0.02


def wait_until(
    condition: Callable[[], object],
    *,
    what: str,
    still_possible: Callable[[], object] = lambda: True,
    poll_s: float = POLL_S,
) -> None:
    """Wait until something is so, and fail as soon as it can no longer become so.

    Args:
        condition: asked again and again.
        what: what is waited for, for the message.
        still_possible: falsy once waiting is in vain, such as when a process has ended.
        poll_s: seconds between two questions.
    """
    deadline_s = time.monotonic() + HANG_S
    while not condition():
        # Asked again: what ended the wait may have happened between the two questions.
        assert still_possible() or condition(), f"{what}: can no longer happen"
        assert time.monotonic() < deadline_s, f"{what}: not within {HANG_S:g} s"
        time.sleep(poll_s)
