"""Estimates of a rank's memory: known numbers, what sharding and recomputing take away, and the
recommendation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from model.config import SIZES
from model.flops import activation_bytes, parameter_counts
from train.config import RunConfig
from train.engine.deepspeed_config import BUCKET_NUMEL
from train.settings.fit import (
    BUCKETS_NUMEL,
    CONTEXT_BYTES,
    GIB,
    MemoryEstimate,
    describe_fit,
    device_bytes_of,
    estimate_memory,
    list_choices,
    recommend,
)


def make_config(
    size: str = "vit_b_16", *, micro_batch_size: int = 64, **engine: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": SIZES[size].model_dump(),
            "train": {
                "steps": 10,
                "global_batch_size": 4096,
                "micro_batch_size": micro_batch_size,
            },
            "engine": engine,
        }
    )


def estimate(
    config: RunConfig, *, world_size: int = 1, stage: Any = 1, mode: Any = "none"
) -> MemoryEstimate:
    return estimate_memory(
        config, world_size=world_size, zero_stage=stage, encoder=mode, decoder=mode
    )


@pytest.mark.parametrize(
    ("size", "gb"), [("vit_b_16", 1.56), ("vit_l_16", 4.60), ("vit_h_14", 9.18)]
)
def test_state_in_bf16_is_fourteen_bytes_a_parameter(size: str, gb: float):
    memory = estimate(make_config(size))
    assert (memory.weights + memory.optimizer) / 1e9 == pytest.approx(gb, rel=0.005)
    assert (
        memory.weights + memory.optimizer
        == 14 * parameter_counts(SIZES[size]).trainable
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_stage_shards_what_it_says(stage: int):
    config = make_config("vit_h_14", micro_batch_size=32)
    one, eight = estimate(config, stage=0), estimate(config, world_size=8, stage=stage)
    trained = parameter_counts(SIZES["vit_h_14"]).trainable
    assert eight.optimizer == pytest.approx(
        12 * trained / (8 if stage >= 1 else 1), rel=1e-6
    )
    if stage:  # gradients and their fp32 sums
        assert eight.gradients == pytest.approx(
            6 * trained / (8 if stage >= 2 else 1), rel=1e-6
        )
    # DeepSpeed's default leaves the weights of a model of this size gathered.
    assert eight.weights == pytest.approx(
        2 * trained * (1 + (1 / 8 if stage == 3 else 0)), rel=1e-6
    )
    assert eight.activations == one.activations


def test_fp32_copies_of_gradients_are_whole_only_where_micro_batches_are_summed():
    trained = parameter_counts(SIZES["vit_b_16"]).trainable
    assert estimate(make_config(), world_size=2).gradients == 6 * trained
    assert (
        estimate(make_config(micro_batch_size=2048), world_size=2).gradients
        == 4 * trained
    )
    assert (
        estimate(make_config(precision="fp32"), world_size=2).gradients == 4 * trained
    )


def test_fp32_keeps_no_masters_at_stage_0():
    trained = parameter_counts(SIZES["vit_b_16"]).trainable
    config = make_config(precision="fp32")
    assert (estimate(config, stage=0).weights, estimate(config, stage=0).optimizer) == (
        4 * trained,
        8 * trained,
    )
    assert estimate(config, stage=1).optimizer == 12 * trained


def test_offloading_takes_the_optimizer_off_the_device():
    config = make_config(offload_optimizer="cpu")
    assert estimate(config, stage=1).optimizer == 0
    assert estimate(config, stage=0).optimizer > 0


def test_activations_are_those_of_one_micro_batch_and_recomputing_keeps_one_block():
    config = make_config(micro_batch_size=32)
    model, images = SIZES["vit_b_16"], 4 * 3 * 224 * 224
    assert estimate(config).activations == 32 * (activation_bytes(model) + images)
    full = estimate(config, mode="full").activations
    kept = activation_bytes(model, encoder="full", decoder="full")
    block = (
        activation_bytes(model) - activation_bytes(model, decoder="full")
    ) // model.decoder_depth
    assert full == 32 * (kept + block + images)
    assert (
        full
        < estimate(config, mode="selective").activations
        < estimate(config).activations
    )


def test_workspace_counts_the_buckets_that_are_configured():
    assert BUCKETS_NUMEL == 2 * BUCKET_NUMEL
    assert estimate(make_config(), stage=0).workspace == CONTEXT_BYTES
    assert (
        estimate(make_config(), stage=1).workspace == CONTEXT_BYTES + 2 * BUCKETS_NUMEL
    )


def test_the_fastest_that_fits_is_recommended():
    choices = list_choices(make_config("vit_h_14", micro_batch_size=64), world_size=8)
    assert len(choices) == 12
    best = recommend(choices, device_bytes=80 * GIB)
    assert best is not None
    assert (best.zero_stage, best.checkpointing) == (1, "none")
    previous = best.cost
    for size_gib in range(
        79, 0, -1
    ):  # with less memory it only gets slower, and ends with nothing
        best = recommend(choices, device_bytes=size_gib * GIB)
        if best is None:
            assert all(
                choice.memory.total > 0.92 * size_gib * GIB for choice in choices
            )
            break
        assert best.memory.total <= 0.92 * size_gib * GIB
        assert best.cost >= previous
        previous = best.cost
    else:
        pytest.fail("a ViT-H fitted 1 GiB")


def test_fp16_has_no_stage_0():
    assert {
        choice.zero_stage
        for choice in list_choices(make_config(precision="fp16"), world_size=2)
    } == {1, 2, 3}


def test_the_text_names_every_stage_and_the_settings_to_use():
    config = make_config("vit_l_16")
    text = "\n".join(describe_fit(config, world_size=8, device_bytes=80 * GIB))
    for part in (
        "ZeRO 0",
        "ZeRO 3",
        "selective",
        "fastest that fits 80 GiB",
        "--engine.zero-stage 1",
        "micro batch 64",
    ):
        assert part in text
    assert (
        "nothing fits 2 GiB"
        in describe_fit(config, world_size=8, device_bytes=2 * GIB)[-1]
    )
    assert (
        "--engine.device-memory-gib"
        in describe_fit(config, world_size=8, device_bytes=None)[-1]
    )


def test_the_device_is_asked_unless_it_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert device_bytes_of(make_config()) == 40960 * 2**20
    assert device_bytes_of(make_config(device_memory_gib=24)) == 24 * GIB
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert device_bytes_of(make_config()) is None
