"""A block that every rank runs, and that fails on all of them if it fails on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import MaelstromError
from train.process.world import World


@contextmanager
def agreed(
    world: World,
    what: str,
    *,
    raises: type[MaelstromError],
) -> Iterator[None]:
    """Run a block on every rank; if it fails on any, raise the same error on all.

    A rank that failed alone would leave the others waiting for it in their next agreement.

    Args:
        world: the processes of the run; all enter together.
        what: what failed, for the message.
        raises: kind of the error.
    """
    problem = None
    try:
        yield
    except (MaelstromError, OSError) as error:
        problem = f"rank {world.rank}: {error}"
    problems = [text for text in world.gather(problem) if text]
    if problems:
        # All ranks may meet the same full disk.
        unique = list(dict.fromkeys(problems))
        raise raises(f"{what}. {'; '.join(unique)}")
