"""The step's benchmark: rows of real steps, a row for what cannot run, and the comparison with a
peer."""

from __future__ import annotations

import json

import pytest

from model.config import SIZES, ModelConfig
from train.bench.step_peer import compare
from train.step_bench import main

TINY = ModelConfig(
    image_size=16,
    patch_size=4,
    embed_dim=32,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)


@pytest.mark.slow
def test_each_combination_is_a_row_and_so_is_what_cannot_run(capsys):
    words = [
        "--model",
        "demo",
        "--images",
        "2",
        "--steps",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    assert (
        main(
            [
                *words,
                "--precision",
                "bf16",
                "fp16",
                "--checkpointing",
                "full",
                "--optimizer",
                "loops",
            ]
        )
        == 0
    )
    done, refused = json.loads(capsys.readouterr().out)["rows"]
    assert done["precision"] == "bf16"
    assert "problem" not in done
    assert (
        min(done[name] for name in ("step_s", "optimizer_s", "tflops", "memory_gib"))
        > 0
    )
    assert done["step_min_s"] <= done["step_s"] <= done["step_max_s"]
    assert refused["precision"] == "fp16"
    assert refused["problem"]
    assert "step_s" not in refused


def test_what_cannot_be_measured_is_said(capsys):
    assert main(["--model", "vit_x"]) == 2
    assert "--model vit_x: choose from vit_" in capsys.readouterr().err
    assert main(["--steps", "0"]) == 2


def test_a_peer_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("train.bench.step_peer.SIZES", {**SIZES, "tiny": TINY})
    row = compare(
        "tiny", images=2, precision="fp32", compiled=False, repeats=2, threads=0
    )
    assert row["loss_difference"] < 1e-5
    assert row["ratio"].low <= row["ratio"].median <= row["ratio"].high
    assert row["compiled"] is False
