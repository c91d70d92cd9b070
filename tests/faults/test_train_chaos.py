"""Killed again and again, on any rank and in any phase of a save, a run ends with the weights of
the run left alone.

CHAOS_KILLS=20 in the environment kills more often than the default, CHAOS_SEED=1 elsewhere.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.train_runs import final_state, losses, start
from train.checkpoint.files import find_steps
from train.checkpoint.store import PHASES
from train.engine.named_state import KINDS
from train.process.outcome import read_status

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 200, 10
SETTINGS = {
    "train.steps": str(STEPS),
    "checkpoint.every-steps": str(SAVE_EVERY),
    "checkpoint.keep-last": "3",
}
KILLS = int(os.environ.get("CHAOS_KILLS", "6"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))


def draw_kill(dice: random.Random, *, done: int, number: int) -> dict[str, Any]:
    """Kill one of the ranks at a step after the newest checkpoint, or in a named phase of one of
    the next saves."""
    if number % 2:
        phase = dice.choice(PHASES)
        rank = 0 if phase == "checked" else dice.randrange(2)
        return {"rank": rank, "phase": phase, "save": dice.randrange(1, 3)}
    left = (STEPS - done) // max(1, KILLS - number)
    return {
        "rank": dice.randrange(2),
        "step": min(STEPS - 1, done + dice.randrange(1, max(2, 2 * left))),
    }


def newest(run_dir: Path) -> int:
    steps = find_steps(str(run_dir / "checkpoints"))
    return max(
        (step for step, names in steps.items() if "MANIFEST.json" in names), default=0
    )


def test_a_run_that_is_killed_again_and_again_ends_as_the_run_left_alone(
    make_dataset: Callable[..., str], tmp_path: Path
):
    data = make_dataset()
    alone = start(tmp_path / "alone", {}, data=data, settings=SETTINGS)
    assert alone.returncode == 0, alone.stdout + alone.stderr

    dice, folder, story, kills = random.Random(SEED), tmp_path / "chaos", [], 0
    while kills < KILLS:
        done = newest(folder / "run")
        kill = draw_kill(dice, done=done, number=kills)
        ended = start(folder, {"kill": kill}, data=data, settings=SETTINGS)
        assert ended.returncode != 0, (
            f"{kill} after step {done} did not happen: {story}"
        )
        story.append((done, kill, newest(folder / "run")))
        kills += 1
    left = start(folder, {}, data=data, settings=SETTINGS)
    assert left.returncode == 0, f"{story}\n{left.stdout}{left.stderr}"
    print(*story, sep="\n")

    assert read_status(folder / "run")["state"] == "done"
    expected, found = (
        final_state(path / "run", step=STEPS) for path in (tmp_path / "alone", folder)
    )
    assert set(found) == set(expected)
    assert len(found) > 100
    assert len(KINDS) == 3
    differing = [
        name for name, value in expected.items() if not torch.equal(found[name], value)
    ]
    assert not differing, f"{differing[:5]} differ after {story}"
    assert losses(folder / "run") == losses(tmp_path / "alone" / "run")
