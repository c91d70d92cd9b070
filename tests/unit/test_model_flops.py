"""Closed-form costs against torch's own counters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import SIZES, ActivationCheckpointing, ModelConfig
from model.flops import (
    activation_bytes,
    forward_flops,
    parameter_counts,
    recompute_flops,
    train_flops,
)
from model.objectives.mae import MaskedAutoencoder

WIDE = ModelConfig(
    image_size=(32, 48),
    patch_size=8,
    embed_dim=48,
    depth=3,
    num_heads=4,
    mlp_ratio=3,
    decoder_embed_dim=32,
    decoder_depth=5,
    decoder_num_heads=2,
    mask_ratio=0.6,
)


def count(
    config: ModelConfig,
    *,
    encoder: ActivationCheckpointing = "none",
    decoder: ActivationCheckpointing = "none",
) -> tuple[int, int]:
    """Operations that torch sees per image, forward and backward, on the meta device."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = MaskedAutoencoder(config)
        model.set_activation_checkpointing(encoder=encoder, decoder=decoder)
        images = torch.empty(2, 3, config.image_height, config.image_width)
        noise = torch.empty(2, config.num_patches)
        with FlopCounterMode(display=False) as forward:
            loss = model(images, noise).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


@pytest.mark.parametrize(
    "config", [WIDE, SIZES["demo"], SIZES["vit_b_16"]], ids=["wide", "demo", "vit_b_16"]
)
def test_forward_flops_are_exactly_what_torch_counts(config: ModelConfig) -> None:
    forward, backward = count(config)
    assert forward_flops(config).total == forward
    # Each product has two gradients, but nothing needs the one of the pixels.
    assert backward == 2 * forward - forward_flops(config).patch_embed


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("none", "selective"), ("selective", "none"), ("full", "full")],
)
def test_recomputed_flops_are_exactly_what_torch_counts(
    encoder: ActivationCheckpointing, decoder: ActivationCheckpointing
) -> None:
    plain, repeated = count(WIDE)[1], count(WIDE, encoder=encoder, decoder=decoder)[1]
    assert recompute_flops(WIDE, encoder=encoder, decoder=decoder) == repeated - plain
    assert (
        train_flops(WIDE, encoder=encoder, decoder=decoder)
        == 3 * forward_flops(WIDE).total + repeated - plain
    )


@pytest.mark.parametrize(
    ("name", "gflop_per_image", "decoder_share"),
    [("vit_b_16", 58.5, 0.54), ("vit_l_16", 124.2, 0.26), ("vit_h_14", 291.0, 0.15)],
)
def test_training_costs_agree_with_other_estimates(
    name: str, gflop_per_image: float, decoder_share: float
) -> None:
    # Those project hidden patches too; ours costs up to 1% less.
    assert 0.99 * gflop_per_image < train_flops(SIZES[name]) / 1e9 < gflop_per_image
    assert forward_flops(SIZES[name]).decoder_share == pytest.approx(
        decoder_share, abs=0.02
    )


@pytest.mark.parametrize("config", [WIDE, SIZES["demo"], SIZES["vit_s_16"]])
def test_parameter_counts_are_those_of_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder(config)
    counts = parameter_counts(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.trainable == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert counts.encoder + counts.encoder_pos_embed == sum(
        v.numel() for v in model.encoder_state_dict().values()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("none", "none"), ("selective", "full"), ("full", "selective"), ("full", "full")],
)
def test_activation_memory_is_what_autograd_saves(
    dtype: torch.dtype,
    encoder: ActivationCheckpointing,
    decoder: ActivationCheckpointing,
) -> None:
    config, batch = SIZES["demo"], 4
    model = MaskedAutoencoder(config).to(dtype)
    model.set_activation_checkpointing(encoder=encoder, decoder=decoder)
    weights = {
        parameter.untyped_storage().data_ptr() for parameter in model.parameters()
    }
    held: list[torch.Tensor] = []  # keeps addresses from being used twice
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, noise = torch.randn(batch, 3, 64, 64), torch.rand(batch, config.num_patches)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images, noise).loss
    estimate = activation_bytes(
        config, encoder=encoder, decoder=decoder, value_bytes=dtype.itemsize
    )
    assert sum(sizes.values()) / batch == pytest.approx(estimate, rel=0.03)
    del loss
