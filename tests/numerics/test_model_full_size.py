"""ViT-H/14 at its full size, through the files of an export and back: 657 million parameters, no
scaled-down stand-in.

Needs about 10 GB of memory; one model at a time is held where that is possible.
"""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch
import xxhash
from safetensors import safe_open

from model.config import SIZES, ModelConfig
from model.exchange.weights import load_published
from model.objectives.mae import MaskedAutoencoder
from train.config import RunConfig
from train.evaluation.saved_model import SavedModel
from train.export import export

transformers = pytest.importorskip("transformers")

NEEDED_BYTES = 11 * 10**9


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Give a hash of each tensor: a copy to compare with would take as much as the model."""
    state = model.state_dict()
    return {
        name: xxhash.xxh3_128_hexdigest(value.numpy()) for name, value in state.items()
    }


@pytest.mark.slow
def test_vit_h_in_transformers_computes_our_loss_and_comes_back_unchanged(
    tmp_path: Path,
) -> None:
    if psutil.virtual_memory().available < NEEDED_BYTES:
        pytest.skip("needs 11 GB of free memory")
    config = ModelConfig(**{**SIZES["vit_h_14"].model_dump(), "norm_pix_loss": True})
    torch.manual_seed(0)
    model = MaskedAutoencoder(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 657_074_508
    images, noise = torch.randn(1, 3, 224, 224), torch.rand(1, config.num_patches)
    with torch.no_grad():
        ours = model(images, noise)
    run = RunConfig.model_validate(
        {"recipe": "mae_vit_h_14", "model": config.model_dump()}
    )
    files = export(SavedModel(model, run, 0, "memory"), tmp_path, to="hf")
    expected_digests = digests(model)
    del model
    gc.collect()

    with safe_open(files[0], framework="pt") as exported:
        assert len(exported.keys()) == 654
    theirs, report = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[kind], kind
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 657_074_508
    with torch.no_grad():
        expected = theirs.eval()(pixel_values=images, noise=noise)
    torch.testing.assert_close(ours.mask_BN, expected.mask, rtol=0, atol=0)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ours.prediction_BNP, expected.logits, rtol=1e-4, atol=1e-4
    )
    del theirs
    gc.collect()

    with torch.device("meta"):
        revived = MaskedAutoencoder(config)
    revived = revived.to_empty(device="cpu")
    with safe_open(files[0], framework="pt") as exported:
        names = list(exported.keys())
        load_published(revived, {name: exported.get_tensor(name) for name in names})
    assert len(expected_digests) == 494
    assert digests(revived) == expected_digests
