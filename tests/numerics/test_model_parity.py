"""The model against transformers' ViTMAEForPreTraining: same weights, same noise, same numbers,
every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from model.config import SIZES, ModelConfig
from model.exchange.hf_names import rename_from_hf
from model.exchange.weights import to_hf
from model.objectives.mae import MaskedAutoencoder

transformers = pytest.importorskip("transformers")

SMALL = ModelConfig(
    image_size=32,
    patch_size=8,
    embed_dim=48,
    depth=3,
    num_heads=4,
    decoder_embed_dim=32,
    decoder_depth=2,
    decoder_num_heads=2,
)

FILTERING = [HealthCheck.filter_too_much, HealthCheck.too_slow]


def twins(config: ModelConfig) -> tuple[MaskedAutoencoder, torch.nn.Module]:
    """Our model with random weights everywhere (biases and norms too), and theirs with the same."""
    torch.manual_seed(0)
    ours = MaskedAutoencoder(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
            else:
                assert name.endswith("pos_embed")
    state, settings_ = to_hf(ours.state_dict(), config, names="v5")
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**settings_, attn_implementation="eager")
    ).train()
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


def assert_same(config: ModelConfig, *, batch: int) -> None:
    ours, theirs = twins(config)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(
        batch, 3, config.image_height, config.image_width, generator=generator
    )
    noise = torch.rand(batch, config.num_patches, generator=generator)
    output = ours(images, noise)
    expected = theirs(pixel_values=images, noise=noise)
    torch.testing.assert_close(output.mask_BN, expected.mask, rtol=0, atol=0)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        output.prediction_BNP, expected.logits, rtol=1e-4, atol=1e-5
    )
    output.loss.backward()
    expected.loss.backward()
    gradients = rename_from_hf(
        {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    )
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert set(gradients) == set(trained), (
        "a parameter gets a gradient in one model only"
    )
    # A key's bias has no effect under softmax: its gradient is rounding noise, which the absolute
    # bound covers.
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in trained.items():
        torch.testing.assert_close(
            gradient,
            gradients[name],
            rtol=1e-4,
            atol=1e-6 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_small_model_matches_transformers(norm_pix_loss: bool) -> None:
    assert_same(SMALL.model_copy(update={"norm_pix_loss": norm_pix_loss}), batch=3)


@pytest.mark.slow
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_vit_b_matches_transformers(norm_pix_loss: bool) -> None:
    assert_same(
        SIZES["vit_b_16"].model_copy(update={"norm_pix_loss": norm_pix_loss}), batch=1
    )


@settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=FILTERING
)
@given(
    patch_size=st.sampled_from([2, 4, 7, 8]),
    side=st.integers(2, 6),
    heads=st.integers(1, 4),
    # Narrower norms magnify float32 rounding beyond the bounds, in both models.
    head_dim=st.sampled_from([16, 20]),
    depth=st.integers(1, 3),
    decoder_heads=st.integers(1, 3),
    decoder_depth=st.integers(1, 3),
    mlp_ratio=st.sampled_from([1.0, 2.0, 4.0]),
    mask_ratio=st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9]),
    norm_pix_loss=st.booleans(),
)
def test_any_square_model_matches_transformers(
    patch_size: int,
    side: int,
    heads: int,
    head_dim: int,
    depth: int,
    decoder_heads: int,
    decoder_depth: int,
    mlp_ratio: float,
    mask_ratio: float,
    norm_pix_loss: bool,
) -> None:
    kept = int(side * side * (1 - mask_ratio))
    assume(1 <= kept < side * side)
    config = ModelConfig(
        image_size=patch_size * side,
        patch_size=patch_size,
        embed_dim=heads * head_dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        decoder_embed_dim=decoder_heads * head_dim,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_heads,
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
    )
    assume(
        config.num_visible == kept
    )  # theirs truncates in binary floating point; ours counts exactly
    assert_same(config, batch=2)
