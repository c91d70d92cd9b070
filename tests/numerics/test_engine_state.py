"""State by parameter name is exact: saved and taken up again at every stage, and across stages and world sizes."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.engine_cases import Results, largest_difference, run_cases
from train.deepspeed_state import CHECKED_VERSIONS

Case = dict[str, Any]


def test_deepspeed_is_a_version_this_was_checked_on() -> None:
    """train/deepspeed_state.py touches internals: on a new release run all of this folder, then add it there."""
    assert importlib.metadata.version("deepspeed") in CHECKED_VERSIONS


def save_and_resume(folder: Path, cases: list[Case], *, world_size: int) -> tuple[Results, Results]:
    """Train 8 steps saving after 4; then, in new processes and from other first weights, 4 more."""
    first = [{**case, "steps": 8, "save": str(folder / case["name"]), "save_at": 4, "hash_at": [4]} for case in cases]
    second = [{**case, "steps": 4, "resume": str(folder / case["name"]), "hash_first": True} for case in cases]
    return (
        run_cases(first, folder / "first", world_size=world_size),
        run_cases(second, folder / "second", world_size=world_size),
    )


def check_exact(unbroken: Results, resumed: Results) -> None:
    for name, result in unbroken.items():
        assert resumed[name]["first_hashes"] == result["hashes_at"]["4"], f"{name}: what was loaded"
        assert resumed[name]["losses"] == result["losses"][4:], f"{name}: losses"
        assert resumed[name]["hashes"] == result["hashes"], f"{name}: weights and moments after 8 steps"
        assert resumed[name]["eval_loss"] == result["eval_loss"], f"{name}: evaluation"
        # Trained tensors of three kinds, two frozen tables and a buffer.
        assert len(result["hashes"]) > 100
        assert result["hashes"] != result["hashes_at"]["4"]


@pytest.mark.slow
def test_resume_is_exact_on_two_ranks(tmp_path: Path) -> None:
    cases: list[Case] = [
        {"name": "zero1-bf16", "zero_stage": 1, "precision": "bf16"},
        {"name": "zero2-fp32", "zero_stage": 2, "precision": "fp32"},
        {"name": "zero3-bf16", "zero_stage": 3, "precision": "bf16"},
    ]
    check_exact(*save_and_resume(tmp_path, cases, world_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_exact_at_every_stage_and_precision(tmp_path: Path, world_size: int) -> None:
    cases: list[Case] = [
        {
            "name": f"zero{stage}-{precision}-{accumulate}",
            "zero_stage": stage,
            "precision": precision,
            "grad_accum_steps": accumulate,
        }
        for stage in (0, 1, 2, 3)
        for precision, accumulate in (("fp32", 1), ("bf16", 1), ("bf16", 2), ("autocast", 1))
    ]
    check_exact(*save_and_resume(tmp_path, cases, world_size=world_size))


@pytest.mark.slow
def test_resume_is_exact_with_offloaded_optimizer(tmp_path: Path) -> None:
    cases: list[Case] = [
        {"name": f"zero{stage}", "zero_stage": stage, "offload_optimizer": "cpu", "precision": precision}
        for stage, precision in ((1, "bf16"), (2, "fp32"), (3, "bf16"))
    ]
    check_exact(*save_and_resume(tmp_path, cases, world_size=2))


@pytest.mark.slow
def test_another_world_size_and_stage_go_on_with_the_losses_of_the_unbroken_run(tmp_path: Path) -> None:
    oracle = run_cases([{"name": "all", "kind": "torch", "steps": 20}], tmp_path / "oracle", world_size=1)["all"]
    root = str(tmp_path / "checkpoints")
    first = {"name": "a", "zero_stage": 1, "steps": 6, "save": root, "save_at": 6}
    second = {"name": "b", "zero_stage": 3, "steps": 6, "resume": root, "save": root, "save_at": 12}
    third = {"name": "c", "zero_stage": 2, "steps": 8, "resume": root}
    losses = [
        *run_cases([first], tmp_path / "a", world_size=2)["a"]["losses"],
        *run_cases([second], tmp_path / "b", world_size=1)["b"]["losses"],
        *run_cases([third], tmp_path / "c", world_size=2)["c"]["losses"],
    ]
    assert largest_difference(losses, oracle["losses"]) <= 1e-6
    # The same files in bf16, and in plain torch.
    low = {"name": "low", "zero_stage": 3, "precision": "bf16", "steps": 8, "resume": root}
    plain = {"name": "plain", "kind": "torch", "steps": 8, "resume": root}
    results = run_cases([low, plain], tmp_path / "d", world_size=1)
    assert largest_difference(results["low"]["losses"], oracle["losses"][12:]) <= 5e-3
    assert largest_difference(results["plain"]["losses"], oracle["losses"][12:]) <= 1e-6


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    cases: list[Case] = [
        {
            "name": f"zero{stage}-{precision}-{accumulate}",
            "zero_stage": stage,
            "precision": precision,
            "grad_accum_steps": accumulate,
            "steps": 4,
            "poison": [2],
            "hash_at": [2, 3],
        }
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16", "autocast")
        for accumulate in (1, 2)
    ]
    for name, result in run_cases(cases, tmp_path, world_size=2).items():
        assert result["skipped_steps"] == 1, name
        assert math.isnan(result["losses"][2]), name
        assert result["norms"][2] == math.inf, name
        assert result["hashes_at"]["2"] == result["hashes_at"]["3"], f"{name}: weights, moments or step count moved"
        assert result["losses"][3] < result["losses"][0], name
        assert result["hashes"] != result["hashes_at"]["3"], f"{name}: training went on"


@pytest.mark.slow
def test_rolling_back_in_place_is_exact(tmp_path: Path) -> None:
    cases: list[Case] = [
        {
            "name": f"zero{stage}-{precision}",
            "zero_stage": stage,
            "precision": precision,
            "steps": 8,
            "save": str(tmp_path / f"{stage}{precision}"),
            "save_at": 4,
            "roll_back": str(tmp_path / f"{stage}{precision}"),
        }
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16", "autocast")
    ]
    for name, result in run_cases(cases, tmp_path / "out", world_size=2).items():
        assert result["rolled_back"] == result["losses"][4:6], name
