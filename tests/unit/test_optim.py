"""Learning rate against its closed form, and which parameters are decayed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.objectives.mae import MaskedAutoencoder
from train.config import RunConfig
from train.engine.optim import (
    build_optimizer,
    build_param_groups,
    lr_at,
    set_lr,
)
from train.settings.lengths import peak_lr

PAPER = RunConfig.model_validate(
    {
        "train": {"epochs": 800, "global_batch_size": 4096},
        "optim": {"base_lr": 1.5e-4, "warmup_epochs": 40},
    }
)
STEPS_PER_EPOCH = 312
TOTAL = 800 * STEPS_PER_EPOCH


def paper_lr(step: int) -> float:
    return lr_at(step, config=PAPER, steps_per_epoch=STEPS_PER_EPOCH, total_steps=TOTAL)


def test_published_recipe_has_its_published_rates() -> None:
    assert peak_lr(PAPER) == pytest.approx(2.4e-3)
    assert paper_lr(0) == 0.0
    assert paper_lr(20 * STEPS_PER_EPOCH) == pytest.approx(1.2e-3)
    assert paper_lr(40 * STEPS_PER_EPOCH) == pytest.approx(2.4e-3)
    assert paper_lr(420 * STEPS_PER_EPOCH) == pytest.approx(1.2e-3)
    assert 0 < paper_lr(TOTAL - 1) < 1e-9
    assert paper_lr(TOTAL) == paper_lr(TOTAL + 5) == 0.0


@given(step=st.integers(0, TOTAL - 1))
def test_rate_is_the_closed_form_in_epochs(step: int) -> None:
    epoch = step // STEPS_PER_EPOCH + (step % STEPS_PER_EPOCH) / STEPS_PER_EPOCH
    if epoch < 40:
        expected = 2.4e-3 * epoch / 40
    else:
        expected = 2.4e-3 * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 760))
    assert paper_lr(step) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(
    total=st.integers(1, 300),
    warmup=st.integers(0, 400),
    min_lr=st.floats(0, 1e-3),
    batch=st.sampled_from([8, 256, 4096]),
)
def test_rate_stays_inside_its_bounds_for_any_lengths(
    total: int, warmup: int, min_lr: float, batch: int
) -> None:
    config = RunConfig.model_validate(
        {
            "train": {"steps": total, "global_batch_size": batch},
            "optim": {
                "base_lr": 0.01,
                "min_lr": min_lr,
                "warmup_steps": warmup,
                "warmup_epochs": None,
            },
        }
    )
    rates = [
        lr_at(step, config=config, steps_per_epoch=7, total_steps=total)
        for step in range(total + 2)
    ]
    top = max(0.01 * batch / 256, min_lr)
    assert all(0 <= rate <= top * (1 + 1e-12) for rate in rates)
    if warmup < total:
        assert rates[warmup] == pytest.approx(0.01 * batch / 256)
        assert rates[-1] == min_lr
        assert rates[:warmup] == sorted(rates[:warmup])


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        paper_lr(-1)


def test_groups_decay_matrices_and_tokens_and_leave_out_frozen_tables() -> None:
    model = MaskedAutoencoder(
        ModelConfig(
            image_size=16,
            patch_size=4,
            embed_dim=16,
            depth=1,
            num_heads=2,
            decoder_num_heads=16,
        )
    )
    plain, decayed = build_param_groups(model, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain_names = {names[id(parameter)] for parameter in plain["params"]}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert {
        "cls_token",
        "mask_token",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
    } <= decayed_names
    assert {
        "norm.weight",
        "norm.bias",
        "blocks.0.attn.qkv.bias",
        "decoder_pred.bias",
    } <= plain_names
    frozen = {"pos_embed", "decoder_pos_embed"}
    assert (
        plain_names | decayed_names
        == {name for name, _ in model.named_parameters()} - frozen
    )


def test_optimizer_starts_at_rate_zero_and_takes_the_rate_of_each_step() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, PAPER.optim, device=torch.device("cpu"))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    set_lr(optimizer.param_groups, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_model_without_vectors_has_one_group() -> None:
    groups = build_param_groups(torch.nn.Linear(3, 2, bias=False), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1]


def cooldown_lr(step: float, *, total: int, share: float, warmup: int = 10) -> float:
    optim = {
        "base_lr": 1.0,
        "min_lr": 0.001,
        "warmup_steps": warmup,
        "warmup_epochs": None,
        "schedule": "constant_cooldown",
        "cooldown_share": share,
    }
    config = RunConfig.model_validate(
        {"train": {"steps": total, "global_batch_size": 256}, "optim": optim}
    )
    return lr_at(step, config=config, steps_per_epoch=7, total_steps=total)


def test_constant_rate_and_then_a_straight_line() -> None:
    rates = [cooldown_lr(step, total=100, share=0.2) for step in range(102)]
    assert rates[:11] == [pytest.approx(step / 10) for step in range(11)]
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx((1 + 0.001) / 2)
    assert rates[100] == rates[101] == 0.001
    steps = [before - after for before, after in pairwise(rates[80:101])]
    assert steps == [pytest.approx(0.999 / 20)] * 20


@given(total=st.integers(20, 300), more=st.integers(0, 300), share=st.floats(0.01, 1))
def test_a_longer_run_has_the_same_rates_until_its_cooldown(
    total: int, more: int, share: float
) -> None:
    for step in range(int(total * (1 - share)) + 1):
        before = cooldown_lr(step, total=total, share=share)
        assert cooldown_lr(step, total=total + more, share=share) == before


@given(total=st.integers(1, 60), share=st.floats(0.01, 1), warmup=st.integers(0, 80))
def test_a_cooldown_never_rises_and_waits_for_the_warmup(
    total: int, share: float, warmup: int
) -> None:
    rates = [
        cooldown_lr(step, total=total, share=share, warmup=warmup)
        for step in range(total + 1)
    ]
    assert all(0 <= rate <= 1 for rate in rates)
    rest = rates[warmup:]
    assert rest == sorted(rest, reverse=True)
    if warmup < total:
        assert rates[warmup] == 1.0
