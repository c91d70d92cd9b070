"""The step's benchmark: rows of real steps, a row for what cannot run, and the comparison with a
peer."""

from __future__ import annotations

import json

import pytest

from model.config import SIZES, ModelConfig
from train.bench.step_peer import compare, render_comparisons
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
    words = ["--model", "demo", "--images", "2", "--steps", "1", "--threads", "1", "--json"]
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
    done, refused = json.loads(capsys.readouterr().out)["measurements"]
    assert done["case"]["precision"] == "bf16"
    assert done["problem"] is None
    assert min(done[name] for name in ("step_s", "optimizer_s", "tflops", "memory_gib")) > 0
    assert refused["case"]["precision"] == "fp16"
    assert refused["problem"]
    assert refused["step_s"] == 0


def test_a_peer_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("train.bench.step_peer.SIZES", {**SIZES, "tiny": TINY})
    found = compare("tiny", images=2, precision="fp32", compiled=False, repeats=2, threads=0)
    assert found.loss_difference < 1e-5
    assert found.ratio_range[0] <= found.ratio <= found.ratio_range[1]
    assert "| tiny | 2 | fp32 | off |" in render_comparisons([found])
