"""The checkpoint benchmark measures real saves and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import SIZES, ModelConfig
from train.checkpoint_bench import measure, render

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


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_measurement_is_of_real_saves_and_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode
):
    monkeypatch.setattr("train.checkpoint_bench.SIZES", {**SIZES, "tiny": TINY})
    one = measure("tiny", str(tmp_path), mode, saves=2, images=2)
    assert one.stall_min_s <= one.stall_s <= one.stall_max_s
    assert min(one.stall_s, one.write_s, one.copy_s, one.step_s) > 0
    assert one.state_mb > 0.1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert f"| tiny | {one.state_mb:,.0f} MB | local disk | {mode} |" in render([one])
