"""Skipped steps, spikes of the loss, and replicas that differ: what is found, and what is done."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from train.config import RunConfig
from train.engine.build import build_engine
from train.loop.guard import HISTORY_NEEDED, SkipGuard, SpikeGuard
from train.loop.replicas import checksums, find_differing
from train.process.world import World

# ------------------------------------------------------------------------------------ skipped steps


def test_the_run_goes_back_after_so_many_in_a_row_and_stops_after_so_many_times():
    guard = SkipGuard(skipped_in_a_row=3, roll_backs=2)
    assert [guard.judge("skipped") for _ in range(3)] == [
        "skipped",
        "skipped",
        "roll-back",
    ]
    guard.rolled_back(8)
    assert (guard.in_a_row, guard.roll_backs, guard.target) == (0, 1, 8)
    assert [guard.judge("skipped") for _ in range(3)] == [
        "skipped",
        "skipped",
        "roll-back",
    ]
    guard.rolled_back(4)
    assert [guard.judge("skipped") for _ in range(3)] == ["skipped", "skipped", "stop"]


def test_a_step_that_is_taken_ends_the_row():
    guard = SkipGuard(skipped_in_a_row=2, roll_backs=1)
    for _ in range(5):
        assert guard.judge("skipped") == "skipped"
        assert guard.in_a_row == 1
        assert guard.judge("taken") == "fine"


class Output(NamedTuple):
    loss: Tensor


class Overflowing(nn.Module):
    """A squared error that overflows in fp32 where its gradient, the mean of the errors, does
    not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> Output:
        return Output((self.weight - images_BCHW).square().mean() * noise_BN.mean())


@pytest.mark.parametrize(
    ("error", "skipped"), [(1.0, 0), (1e18, 0), (3e19, 1), (math.nan, 1)]
)
def test_a_loss_that_is_not_finite_is_a_skipped_step_even_if_its_gradient_is(
    error: float, skipped: int
):
    config = RunConfig.model_validate(
        {
            "train": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2},
            "engine": {"kind": "torch", "precision": "fp32"},
        }
    )
    engine = build_engine(config, model=Overflowing(), resume=None, world=World())
    images, noise = torch.tensor([[error], [-error]]), torch.tensor([0.5])
    loss = engine.forward_backward(images, noise)
    engine.step(0.1)
    assert bool(torch.isfinite(loss)) == (skipped == 0)
    assert engine.skipped_steps == skipped
    if error == 3e19:  # the gradient alone would not have told
        weight = torch.ones(1, requires_grad=True)
        ((weight - images).square().mean() * noise.mean()).backward()
        assert weight.grad is not None
        assert torch.isfinite(weight.grad).all()


# ------------------------------------------------------------------------------------------- spikes


def test_a_spike_is_told_once_and_does_not_become_the_usual():
    guard = SpikeGuard(factor=2.0)
    assert not any(guard.begins(1.0 + 0.1 * (number % 2)) for number in range(10))
    assert [guard.begins(loss) for loss in (1.9, 2.5, 9.0, 2.5, 1.0, 2.5)] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert guard.usual_loss < 1.2


def test_the_first_lines_and_those_that_are_not_finite_are_no_spikes():
    guard = SpikeGuard(factor=2.0)
    assert not any(
        guard.begins(10.0 ** (number % 3)) for number in range(HISTORY_NEEDED)
    )
    assert not guard.begins(math.nan)
    assert not guard.begins(math.inf)
    off = SpikeGuard(factor=0.0)
    assert not any(off.begins(loss) for loss in [1.0] * 10 + [1e9])


# ----------------------------------------------------------------------------------------- replicas


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    model.register_buffer("table", torch.arange(4, dtype=torch.bfloat16))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_flipped_bit_changes_its_tensors_sum_and_no_other(dtype: torch.dtype):
    names, before = checksums(make_model().to(dtype))
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "table"]
    for bit in range(16):
        model = make_model().to(dtype)
        bits = model[0].weight.data.view(torch.int16)  # type: ignore[union-attr]
        bits[1, 2] ^= (
            torch.tensor(1, dtype=torch.int32).bitwise_left_shift(bit).to(torch.int16)
        )
        _, after = checksums(model)
        assert (after != before).tolist() == [True, False, False, False, False], bit


def test_values_that_changed_places_are_found():
    model = make_model()
    _, before = checksums(model)
    with torch.no_grad():
        model[0].weight[:] = model[0].weight.flip(0)  # type: ignore[union-attr]
    assert (checksums(model)[1] != before).tolist() == [
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("sums", "tensors", "ranks"),
    [
        ([[1, 2], [1, 2]], [], []),
        ([[1, 2], [1, 3]], [1], []),
        ([[1, 2], [1, 3], [1, 2]], [1], [1]),
        ([[1, 2], [9, 2], [1, 3], [1, 2], [1, 2]], [0, 1], [1, 2]),
        ([[1, 2], [1, 2], [1, 3], [1, 3]], [1], []),
    ],
)
def test_the_rank_outside_the_majority_is_named(
    sums: list[list[int]], tensors: list[int], ranks: list[int]
):
    assert find_differing(sums) == (tensors, ranks)
