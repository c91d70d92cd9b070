"""Every engine computes what plain torch computes: same losses, norms and evaluation, whatever is
sharded.

All cases of one world size run in one launch: starting one takes longer than a case.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.numerics.engine_cases import Results, largest_difference, run_cases

pytestmark = pytest.mark.slow

STEPS = 12
"""Two of warm-up, then the largest rates; a wrong scale or a lost gradient shows after the first
update."""
LIMITS = {"fp32": 1e-6, "bf16": 5e-3, "autocast": 5e-3}
"""Largest relative difference of any of the losses from plain torch in fp32."""
STAGES = (0, 1, 2, 3)

Grid = list[dict[str, Any]]


def make_grid(pairs: tuple[tuple[str, int], ...]) -> Grid:
    """All stages with each pair of precision and micro-batches a step."""
    return [
        {
            "name": f"zero{stage}-{precision}-accumulate{accumulate}",
            "zero_stage": stage,
            "precision": precision,
            "grad_accum_steps": accumulate,
            "steps": STEPS,
        }
        for stage in STAGES
        for precision, accumulate in pairs
    ]


TWO_RANKS = make_grid(
    (("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2), ("autocast", 2))
)
ONE_RANK = make_grid((("fp32", 2), ("bf16", 2), ("autocast", 1)))
SAME_NUMBERS: Grid = [
    {"name": f"{name}-zero{stage}", "zero_stage": stage, "steps": STEPS, **settings}
    for name, stage, settings in (
        ("recomputed", 1, {"activation_checkpointing": "full"}),
        ("partly-recomputed", 2, {"activation_checkpointing": "selective"}),
        ("recomputed", 3, {"activation_checkpointing": "full"}),
        ("offloaded", 1, {"offload_optimizer": "cpu"}),
        ("offloaded", 2, {"offload_optimizer": "cpu"}),
        ("offloaded", 3, {"offload_optimizer": "cpu"}),
    )
]
COMPILED: Grid = [
    {"name": "compiled", "kind": "torch", "compile": "on", "steps": STEPS},
    {
        "name": "compiled-zero2",
        "zero_stage": 2,
        "compile": "on",
        "activation_checkpointing": "full",
        "steps": STEPS,
    },
]
CLIP = {"steps": STEPS, "optim": {"grad_clip": 0.5}}
CLIPPED: Grid = [
    {"name": f"clipped-zero{stage}", "zero_stage": stage, **CLIP} for stage in STAGES
]
ORACLES: Grid = [
    {"name": "oracle", "kind": "torch", "steps": STEPS},
    {"name": "clipped-oracle", "kind": "torch", **CLIP},
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_cases(
        [*ORACLES, *ONE_RANK, *COMPILED], tmp_path_factory.mktemp("alone"), world_size=1
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_cases(
        [*TWO_RANKS, *SAME_NUMBERS, *CLIPPED],
        tmp_path_factory.mktemp("together"),
        world_size=2,
    )


def check(grid: Grid, results: Results, oracle: dict[str, Any]) -> None:
    for case in grid:
        result, limit = results[case["name"]], LIMITS[case.get("precision", "fp32")]
        assert largest_difference(result["losses"], oracle["losses"]) <= limit, case[
            "name"
        ]
        assert result["norms"][0] == pytest.approx(
            oracle["norms"][0], rel=max(limit, 1e-5)
        ), case["name"]
        assert result["eval_loss"] == pytest.approx(oracle["eval_loss"], rel=limit), (
            case["name"]
        )
        assert result["skipped_steps"] == 0


def test_two_ranks_at_every_stage_are_plain_torch(
    alone: Results, together: Results
) -> None:
    assert alone["oracle"]["losses"][-1] < 0.97 * alone["oracle"]["losses"][0], (
        "nothing is learnt: nothing is compared"
    )
    check(TWO_RANKS, together, alone["oracle"])


def test_one_rank_at_every_stage_is_plain_torch(alone: Results) -> None:
    check(ONE_RANK, alone, alone["oracle"])


def test_recomputing_activations_and_offloading_change_nothing(
    alone: Results, together: Results
) -> None:
    check(SAME_NUMBERS, together, alone["oracle"])


def test_compiling_changes_nothing(alone: Results) -> None:
    check(COMPILED, alone, alone["oracle"])


def test_clipping_is_torchs(alone: Results, together: Results) -> None:
    oracle = alone["clipped-oracle"]
    assert oracle["losses"] != alone["oracle"]["losses"], (
        "the norm never reached the limit"
    )
    for case in CLIPPED:
        result = together[case["name"]]
        # DeepSpeed divides by norm / limit, torch by (norm + 1e-6) / limit.
        assert largest_difference(result["losses"], oracle["losses"]) <= 5e-6, case[
            "name"
        ]
        assert result["norms"][0] == pytest.approx(oracle["norms"][0], rel=1e-5)
