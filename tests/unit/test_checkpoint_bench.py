"""The checkpoint benchmark measures real saves and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import SIZES, ModelConfig
from train.checkpoint_bench import main, measure

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
    row = measure("tiny", str(tmp_path), mode, saves=2, images=2)
    assert row["stall_s"].low <= row["stall_s"].median <= row["stall_s"].high
    assert min(row[name].low for name in ("stall_s", "write_s", "copy_s", "step_s")) > 0
    assert row["state_mb"] > 0.1
    assert row["store"] == "local disk"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_cannot_be_measured_is_said(capsys):
    assert main(["--model", "vit_x"]) == 2
    assert "--model vit_x: choose from vit_" in capsys.readouterr().err
    assert main(["--saves", "0"]) == 2
