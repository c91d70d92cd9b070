"""Killed at any moment of a save, a run has its previous or its new checkpoint, whole, and goes on
exactly."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests import launch
from tests.limits import wait_until
from train.checkpoint.files import find_steps
from train.checkpoint.state import load_weights
from train.checkpoint.store import CheckpointStore
from train.engine.named_state import KINDS
from train.process.world import World

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("train_save_worker.py")


def run(
    folder: Path, *, phase: str, last: int, mode: str
) -> subprocess.CompletedProcess[str]:
    return launch.run([str(WORKER), str(folder), phase, str(last), mode])


def read_state(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    state = CheckpointStore(str(folder), keep_last=9).latest(World())
    assert state is not None
    tensors = {
        f"{row.name}/{kind}": state.tensor(row.name, kind)
        for row in state.table
        for kind in KINDS
    }
    assert state.client == {"position": state.step}
    return state.step, tensors


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(folder, phase="never", last=5, mode="sync")
    assert done.returncode == 0, done.stderr
    step, tensors = read_state(folder)
    assert step == 5
    return tensors


FOUND = {"captured": 2, "written": 2, "checked": 2, "committed": 3, "pruned": 3}
"""The step that is there after a kill in this phase of the save of step 3."""


@pytest.mark.parametrize(
    ("mode", "phase"),
    [
        *(("async", phase) for phase in FOUND),
        ("sync", "written"),
        ("sync", "committed"),
    ],
)
def test_killed_in_each_phase(
    tmp_path: Path, unbroken: dict[str, torch.Tensor], mode: str, phase: str
) -> None:
    found = FOUND[phase]
    assert run(tmp_path, phase=phase, last=3, mode=mode).returncode == -signal.SIGKILL
    assert read_state(tmp_path)[0] == found
    assert load_weights(str(tmp_path))[1]["step"] == found
    done = run(tmp_path, phase="never", last=5, mode=mode)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"from {found}\n")
    step, tensors = read_state(tmp_path)
    assert step == 5
    assert all(torch.equal(tensors[name], value) for name, value in unbroken.items())
    assert list(find_steps(str(tmp_path))) == [4, 5]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Kills at moments drawn from a seed, many of which fall inside a file's write."""
    moments = random.Random(20)
    seen = 0
    for _ in range(6):
        words = [str(WORKER), str(tmp_path), "never", "400", "async"]
        with launch.start(words) as child:
            saves = moments.randrange(1, 4)
            wait_until(
                lambda child=child, saves=saves: child.stdout.count("saved ") >= saves,
                what=f"{saves} saves",
                still_possible=child.is_running,
            )
            time.sleep(
                moments.random() * 0.1
            )  # no wait: it chooses where in a save the kill falls
            assert child.is_running()
        step, _ = read_state(tmp_path)
        assert step >= seen
        seen = step
    assert seen >= 6
