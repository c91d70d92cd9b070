"""The model under torch.compile: one graph, the same numbers."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.objectives.mae import MaskedAutoencoder

CONFIG = ModelConfig(
    image_size=16,
    patch_size=4,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    norm_pix_loss=True,
)


def test_compiled_model_is_one_graph_with_the_same_numbers() -> None:
    """Without code generation; the engines' losses with it are in test_engine_losses.py."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = MaskedAutoencoder(CONFIG)
    model.set_activation_checkpointing(encoder="selective", decoder="full")
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    plain = model(images, noise)
    plain.loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(images, noise)
    output.loss.backward()
    assert torch.equal(output.mask_BN, plain.mask_BN)
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        output.prediction_BNP, plain.prediction_BNP, rtol=1e-4, atol=1e-5
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(
            model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6
        )
