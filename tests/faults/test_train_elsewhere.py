"""A run that loses a rank under the deepspeed launcher goes on exactly; elsewhere it goes on with
the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.faults.train_runs import final_state, losses, start

pytestmark = pytest.mark.slow

STEPS = 20
SETTINGS = {"train.steps": str(STEPS), "checkpoint.every-steps": "4"}


def train(
    folder: Path,
    data: str,
    *,
    stage: int,
    precision: str = "fp32",
    ranks: int = 2,
    kill: int = 0,
    launcher: Literal["none", "deepspeed"] = "none",
) -> None:
    """Go on in a folder to the end, or until a rank is killed after a step."""
    plan = {"kill": {"rank": ranks - 1, "step": kill}} if kill else {}
    settings = {
        **SETTINGS,
        "engine.zero-stage": str(stage),
        "engine.precision": precision,
    }
    done = start(
        folder, plan, data=data, ranks=ranks, settings=settings, launcher=launcher
    )
    assert (done.returncode == 0) == (not kill), done.stdout + done.stderr


@pytest.mark.parametrize(("stage", "precision"), [(2, "fp32"), (3, "bf16")])
def test_a_rank_killed_under_the_deepspeed_launcher(
    make_dataset: Callable[..., str], tmp_path: Path, stage: int, precision: str
):
    data = make_dataset()
    train(tmp_path / "whole", data, stage=stage, precision=precision)
    train(
        tmp_path / "broken",
        data,
        stage=stage,
        precision=precision,
        kill=11,
        launcher="deepspeed",
    )
    assert list(losses(tmp_path / "broken" / "run"))[-1] < STEPS
    train(tmp_path / "broken", data, stage=stage, precision=precision)
    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    assert losses(broken) == losses(whole)
    expected, found = final_state(whole, step=STEPS), final_state(broken, step=STEPS)
    assert len(found) > 100
    assert not [
        name for name, value in expected.items() if not torch.equal(found[name], value)
    ]
    if stage == 2:
        elsewhere(tmp_path / "elsewhere", data, expected=losses(whole))


def elsewhere(folder: Path, data: str, *, expected: dict[int, float]) -> None:
    """The same run on two ranks at stage 1, then on one at stage 3, then on two at stage 2, killed
    in between.

    A crop box, a flip, a mask or an image of another sample would change the loss by far more than
    rounding.
    """
    train(folder, data, stage=1, kill=6)
    train(folder, data, stage=3, ranks=1, kill=14)
    train(folder, data, stage=2)
    found = losses(folder / "run")
    assert list(found) == list(expected)
    assert (
        max(abs(found[step] - loss) / loss for step, loss in expected.items()) <= 1e-6
    )
