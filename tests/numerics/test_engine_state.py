"""State by parameter name is exact: saved and taken up again at every stage, and across stages and
world sizes."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.engine_cases import Results, largest_difference, run_cases
from train.engine.deepspeed_state import CHECKED_VERSIONS

Case = dict[str, Any]


def test_deepspeed_is_a_version_this_was_checked_on() -> None:
    """train/engine/deepspeed_state.py touches internals: on a new release run all of this folder,
    then add it there."""
    assert importlib.metadata.version("deepspeed") in CHECKED_VERSIONS


def make_cases(pairs: tuple[tuple[str, int], ...]) -> list[Case]:
    """All stages with each pair of precision and micro-batches a step."""
    return [
        {
            "name": f"zero{stage}-{precision}-{accumulate}",
            "zero_stage": stage,
            "precision": precision,
            "grad_accum_steps": accumulate,
        }
        for stage in (0, 1, 2, 3)
        for precision, accumulate in pairs
    ]


def save_and_resume(
    folder: Path, cases: list[Case], *, world_size: int
) -> tuple[Results, Results]:
    """Train 8 steps, the third of them without an update, saving after 4, and go back there at the
    end; then, in new processes and from other first weights, 4 steps from what was saved."""
    first = [
        {
            **case,
            "steps": 8,
            "poison": [2],
            "hash_at": [2, 3, 4],
            "save": str(folder / case["name"]),
            "save_at": 4,
            "roll_back": str(folder / case["name"]),
        }
        for case in cases
    ]
    second = [
        {**case, "steps": 4, "resume": str(folder / case["name"]), "hash_first": True}
        for case in cases
    ]
    return (
        run_cases(first, folder / "first", world_size=world_size),
        run_cases(second, folder / "second", world_size=world_size),
    )


def check_exact(unbroken: Results, resumed: Results) -> None:
    for name, result in unbroken.items():
        assert resumed[name]["first_hashes"] == result["hashes_at"]["4"], (
            f"{name}: what was loaded"
        )
        assert resumed[name]["losses"] == result["losses"][4:], f"{name}: losses"
        assert resumed[name]["hashes"] == result["hashes"], (
            f"{name}: weights and moments after 8 steps"
        )
        assert resumed[name]["eval_loss"] == result["eval_loss"], f"{name}: evaluation"
        assert result["rolled_back"] == result["losses"][4:6], (
            f"{name}: losses after going back in place"
        )
        # Trained tensors of three kinds, two frozen tables and a buffer.
        assert len(result["hashes"]) > 100
        assert result["hashes"] != result["hashes_at"]["4"]


def check_skipped(results: Results) -> None:
    """The third step met a NaN in the last image of the batch, which is the last rank's."""
    for name, result in results.items():
        assert result["skipped_steps"] == 1, name
        assert math.isnan(result["losses"][2]), name
        assert result["norms"][2] == math.inf, name
        assert result["hashes_at"]["2"] == result["hashes_at"]["3"], (
            f"{name}: weights, moments or step count moved"
        )
        assert result["hashes_at"]["4"] != result["hashes_at"]["3"], (
            f"{name}: training went on"
        )
        assert result["losses"][7] < result["losses"][0], name


@pytest.mark.slow
def test_two_ranks_skip_together_resume_and_roll_back_exactly_at_every_stage(
    tmp_path: Path,
) -> None:
    cases = make_cases((("fp32", 1), ("bf16", 1), ("bf16", 2), ("autocast", 2)))
    cases += [
        {
            "name": f"offloaded-zero{stage}",
            "zero_stage": stage,
            "offload_optimizer": "cpu",
            "precision": precision,
        }
        for stage, precision in ((1, "bf16"), (2, "fp32"), (3, "bf16"))
    ]
    first, second = save_and_resume(tmp_path, cases, world_size=2)
    check_exact(first, second)
    check_skipped(first)


@pytest.mark.slow
def test_one_rank_resumes_exactly_at_every_stage(tmp_path: Path) -> None:
    cases = make_cases((("fp32", 2), ("bf16", 1), ("autocast", 1)))
    first, second = save_and_resume(tmp_path, cases, world_size=1)
    check_exact(first, second)
    check_skipped(first)


@pytest.mark.slow
def test_another_world_size_stage_and_precision_go_on_with_the_losses_of_the_unbroken_run(
    tmp_path: Path,
) -> None:
    """From two ranks to one; tests/faults/test_train_elsewhere.py goes back to two as well."""
    root = str(tmp_path / "checkpoints")
    first = {"name": "first", "zero_stage": 1, "steps": 6, "save": root, "save_at": 6}
    begun = run_cases([first], tmp_path / "a", world_size=2)["first"]["losses"]
    cases: list[Case] = [
        {"name": "oracle", "kind": "torch", "steps": 20},
        {"name": "zero3", "zero_stage": 3, "steps": 14, "resume": root},
        {"name": "zero2", "zero_stage": 2, "steps": 14, "resume": root},
        {"name": "plain", "kind": "torch", "steps": 14, "resume": root},
        {
            "name": "low",
            "zero_stage": 3,
            "precision": "bf16",
            "steps": 14,
            "resume": root,
        },
    ]
    results = run_cases(cases, tmp_path / "b", world_size=1)
    expected = results["oracle"]["losses"]
    for name in ("zero3", "zero2", "plain"):
        assert (
            largest_difference([*begun, *results[name]["losses"]], expected) <= 1e-6
        ), name
    assert largest_difference(results["low"]["losses"], expected[6:]) <= 5e-3
