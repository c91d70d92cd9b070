"""Exported weights in transformers itself: nothing missing, nothing left over, the same numbers,
and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import SIZES, ModelConfig
from model.exchange.weights import load_published, to_hf
from model.objectives.mae import MaskedAutoencoder

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("names", ["legacy", "v5"])
def test_transformers_loads_exports_and_we_load_what_it_saves(
    tmp_path: Path, names: str
) -> None:
    config = ModelConfig(**{**SIZES["demo"].model_dump(), "norm_pix_loss": True})
    torch.manual_seed(0)
    model = MaskedAutoencoder(config)
    state, settings = to_hf(model.state_dict(), config, names=names)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(settings))

    theirs, report = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[kind], kind
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 64)
    ours, expected = model(images, noise), theirs(pixel_values=images, noise=noise)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ours.prediction_BNP, expected.logits, rtol=1e-4, atol=1e-5
    )

    theirs.save_pretrained(tmp_path / "again")
    revived = MaskedAutoencoder(config)
    load_published(revived, load_file(tmp_path / "again" / "model.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(revived.state_dict()[name], value), name
