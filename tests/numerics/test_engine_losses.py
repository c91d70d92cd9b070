"""Every engine computes what plain torch computes: same losses, norms and evaluation, whatever is sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.engine_cases import largest_difference, run_cases

pytestmark = pytest.mark.slow

STEPS = 20
LIMITS = {"fp32": 1e-6, "bf16": 5e-3, "autocast": 5e-3}
"""Largest relative difference of any of the losses from plain torch in fp32."""

Grid = list[dict[str, Any]]


def make_grid(*, stages: tuple[int, ...], precisions: tuple[str, ...], accumulations: tuple[int, ...]) -> Grid:
    return [
        {
            "name": f"zero{stage}-{precision}-accumulate{accumulate}",
            "zero_stage": stage,
            "precision": precision,
            "grad_accum_steps": accumulate,
            "steps": STEPS,
        }
        for stage in stages
        for precision in precisions
        for accumulate in accumulations
    ]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = [{"name": "oracle", "kind": "torch", "steps": STEPS}]
    result: dict[str, Any] = run_cases(cases, tmp_path_factory.mktemp("oracle"), world_size=1)["oracle"]
    return result


@pytest.fixture
def check(oracle: dict[str, Any], tmp_path: Path) -> Callable[..., None]:
    def run(grid: Grid, *, world_size: int) -> None:
        results = run_cases(grid, tmp_path, world_size=world_size)
        for case in grid:
            result, limit = results[case["name"]], LIMITS[case["precision"]]
            assert largest_difference(result["losses"], oracle["losses"]) <= limit, case["name"]
            assert result["norms"][0] == pytest.approx(oracle["norms"][0], rel=max(limit, 1e-5)), case["name"]
            assert result["eval_loss"] == pytest.approx(oracle["eval_loss"], rel=limit), case["name"]
            assert result["skipped_steps"] == 0

    return run


def test_fp32_stages_on_two_ranks_are_plain_torch(check: Callable[..., None]) -> None:
    check(make_grid(stages=(0, 1, 2, 3), precisions=("fp32",), accumulations=(2,)), world_size=2)


def test_low_precision_on_two_ranks_is_close_to_plain_torch(check: Callable[..., None]) -> None:
    check(make_grid(stages=(0, 1, 2, 3), precisions=("bf16", "autocast"), accumulations=(1, 2)), world_size=2)


def test_fp32_without_accumulation_on_two_ranks_is_plain_torch(check: Callable[..., None]) -> None:
    check(make_grid(stages=(0, 1, 2, 3), precisions=("fp32",), accumulations=(1,)), world_size=2)


def test_one_rank_is_plain_torch(check: Callable[..., None]) -> None:
    check(make_grid(stages=(0, 1, 2, 3), precisions=("fp32", "bf16", "autocast"), accumulations=(1, 2)), world_size=1)


def test_recomputing_activations_offloading_and_clipping_change_nothing(oracle: dict[str, Any], tmp_path: Path) -> None:
    variants: list[tuple[str, dict[str, Any]]] = [
        ("recomputed", {"activation_checkpointing": "full"}),
        ("offloaded", {"offload_optimizer": "cpu"}),
    ]
    grid = [
        {"name": f"{name}-zero{stage}", "zero_stage": stage, "steps": STEPS, **settings}
        for name, settings in variants
        for stage in (1, 2, 3)
    ]
    clipped = [
        {"name": f"clipped-zero{stage}", "zero_stage": stage, "steps": STEPS, "optim": {"grad_clip": 0.5}}
        for stage in (0, 1, 2, 3)
    ]
    reference = {"name": "clipped-torch", "kind": "torch", "steps": STEPS, "optim": {"grad_clip": 0.5}}
    results = run_cases([*grid, *clipped], tmp_path / "two", world_size=2)
    clipped_oracle = run_cases([reference], tmp_path / "one", world_size=1)["clipped-torch"]
    for case in grid:
        assert largest_difference(results[case["name"]]["losses"], oracle["losses"]) <= 1e-6, case["name"]
    for case in clipped:
        result = results[case["name"]]
        # DeepSpeed divides by norm / limit, torch by (norm + 1e-6) / limit.
        assert largest_difference(result["losses"], clipped_oracle["losses"]) <= 5e-6, case["name"]
        assert result["norms"][0] == pytest.approx(clipped_oracle["norms"][0], rel=1e-5)
