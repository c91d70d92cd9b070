"""Settings an engine refuses, the DeepSpeed configuration it renders, and what importing it
costs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from train.config import RunConfig
from train.engine.build import build_engine
from train.engine.deepspeed_config import render_deepspeed_config
from train.engine.deepspeed_state import is_above_floor, keep_going_at_lowest_scale
from train.engine.named_state import list_tensors
from train.process.world import World
from train.settings.devices import Device
from train.settings.engine_rules import engine_problems, refuse_engine_settings


def make_config(
    *, micro_batch_size: int = 4, grad_clip: float = 0.0, **engine: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "train": {
                "steps": 5,
                "global_batch_size": 16,
                "micro_batch_size": micro_batch_size,
            },
            "optim": {"grad_clip": grad_clip},
            "engine": engine,
        }
    )


@pytest.mark.parametrize(
    ("engine", "world_size", "message"),
    [
        ({"precision": "fp16"}, 1, "engine.precision fp16 needs a GPU"),
        ({"kind": "torch", "precision": "fp32"}, 2, "runs one process, not 2"),
        ({"kind": "torch", "precision": "bf16"}, 1, "fp32 and autocast"),
        (
            {"zero_stage": 0, "offload_optimizer": "cpu"},
            1,
            "needs engine.zero_stage 1, 2 or 3",
        ),
        (
            {"zero_stage": 2, "offload_parameters": "cpu"},
            1,
            "needs engine.zero_stage 3, not 2",
        ),
        ({}, 3, "is not a multiple of train.micro_batch_size"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    engine: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_engine_settings(
            make_config(**engine),
            world_size=world_size,
            device=Device("cpu", has_bf16=True),
        )


def test_all_problems_come_at_once() -> None:
    config = make_config(precision="fp16", zero_stage=0, offload_optimizer="cpu")
    with pytest.raises(ConfigError) as caught:
        refuse_engine_settings(
            config, world_size=1, device=Device("cpu", has_bf16=True)
        )
    assert len(str(caught.value).splitlines()) == 4


def test_fp16_at_stage_0_is_refused_on_a_gpu_too() -> None:
    engine = make_config(precision="fp16", zero_stage=0).engine
    [problem] = engine_problems(
        engine, world_size=1, device=Device("cuda", has_bf16=True)
    )
    assert "does not scale its loss" in problem


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_bf16_is_refused_where_it_would_be_emulated(precision: str) -> None:
    engine = make_config(precision=precision).engine
    [problem] = engine_problems(
        engine, world_size=1, device=Device("cuda", has_bf16=False)
    )
    assert "use fp16 or fp32" in problem
    for unknown in (None, Device("cuda"), Device("cuda", has_bf16=True)):
        assert engine_problems(engine, world_size=1, device=unknown) == []


def test_an_engine_that_is_built_asks_the_same_list() -> None:
    with pytest.raises(ConfigError, match=r"engine.precision fp16 needs a GPU"):
        build_engine(
            make_config(precision="fp16"),
            model=nn.Linear(2, 2),
            resume=None,
            world=World(),
        )


def test_rendered_configuration_of_the_default_run() -> None:
    rendered = render_deepspeed_config(make_config(grad_clip=1.5), world_size=2)
    assert rendered["train_batch_size"] == 16
    assert rendered["train_micro_batch_size_per_gpu"] == 4
    assert rendered["gradient_accumulation_steps"] == 2
    assert rendered["gradient_clipping"] == 1.5
    assert rendered["zero_optimization"]["stage"] == 1
    assert rendered["bf16"] == {"enabled": True}
    assert rendered["fp16"]["enabled"] is False
    assert rendered["data_types"] == {"grad_accum_dtype": "fp32"}
    json.dumps(rendered)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "autocast"])
def test_exactly_one_precision_is_switched_on(precision: str) -> None:
    rendered = render_deepspeed_config(make_config(precision=precision), world_size=4)
    on = [
        name
        for name in ("bf16", "fp16", "torch_autocast")
        if rendered.get(name, {}).get("enabled")
    ]
    assert (
        on
        == {
            "bf16": ["bf16"],
            "fp16": ["fp16"],
            "fp32": [],
            "autocast": ["torch_autocast"],
        }[precision]
    )
    assert "data_types" not in rendered  # no accumulation over micro-batches


def test_stage_3_keeps_torchs_own_linear_layer_and_offload_is_passed_on() -> None:
    config = make_config(
        zero_stage=3, offload_parameters="cpu", offload_optimizer="cpu"
    )
    zero = render_deepspeed_config(config, world_size=1)["zero_optimization"]
    assert zero["memory_efficient_linear"] is False
    assert (
        zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    )


@pytest.mark.slow
def test_importing_the_engine_does_not_import_deepspeed() -> None:
    code = "import sys, train.engine; print('deepspeed' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_deepspeeds_loss_scaler_is_at_fault_only_at_its_floor_and_never_ends_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real scaler, outside an engine: DeepSpeed refuses fp16 on the CPU."""
    from types import SimpleNamespace

    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1))
    scaler = loss_scaler.DynamicLossScaler(
        init_scale=8,
        scale_window=1000,
        min_scale=1,
        delayed_shift=1,
        consecutive_hysteresis=False,
        dtype=torch.bfloat16,
    )
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    keep_going_at_lowest_scale(engine)
    searching = []
    for _ in range(5):
        scaler.update_scale(True)
        searching.append(is_above_floor(engine))
    assert searching == [True, True, False, False, False]
    assert not is_above_floor(SimpleNamespace(optimizer=SimpleNamespace()))


def test_tensors_are_shared_out_evenly_and_alike_on_every_rank() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    table = list_tensors(model, parts=3)
    assert table == list_tensors(model, parts=3)
    sizes = [
        sum(torch.Size(tensor.shape).numel() for tensor in table if tensor.part == part)
        for part in range(3)
    ]
    assert sizes == [144, 144, 144]


def test_a_step_before_all_micro_batches_is_a_mistake() -> None:
    engine = build_engine(
        make_config(kind="torch", precision="fp32"),
        model=nn.Linear(2, 2),
        resume=None,
        world=World(),
    )
    with pytest.raises(
        RuntimeError, match="after 0 micro-batches, expected grad_accum_steps 4"
    ):
        engine.step(0.1)
