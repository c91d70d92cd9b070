"""The masked autoencoder as a whole: names, counts, what it may look at, types, memory modes,
pictures."""

from __future__ import annotations

import pytest
import torch

from model.config import SIZES, ActivationCheckpointing, ModelConfig
from model.flops import parameter_counts
from model.objectives.baselines import paint_mean, paint_nearby
from model.objectives.mae import (
    MaskedAutoencoder,
    masked_loss,
    reconstruct,
    reconstruction_target,
)
from model.patches import patchify, unpatchify

TINY = ModelConfig(
    image_size=(16, 24),
    patch_size=4,
    embed_dim=32,
    depth=3,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=3,
    decoder_num_heads=2,
)


def tiny(**settings: object) -> tuple[MaskedAutoencoder, torch.Tensor, torch.Tensor]:
    config = ModelConfig(**{**TINY.model_dump(), **settings})
    torch.manual_seed(0)
    model = MaskedAutoencoder(config)
    images = torch.randn(3, 3, config.image_height, config.image_width)
    return model, images, torch.rand(3, config.num_patches)


def on_meta(name: str) -> MaskedAutoencoder:
    with torch.device("meta"):
        return MaskedAutoencoder(SIZES[name])


@pytest.mark.parametrize(
    ("name", "keys", "encoder_keys", "total", "trainable", "encoder"),
    [
        ("vit_b_16", 254, 150, 111_907_840, 111_655_680, 85_798_656),
        ("vit_l_16", 398, 294, 329_541_888, 329_239_296, 303_301_632),
        ("vit_h_14", 494, 390, 657_074_508, 656_613_964, 630_764_800),
    ],
)
def test_published_models_have_the_published_counts(
    name: str, keys: int, encoder_keys: int, total: int, trainable: int, encoder: int
) -> None:
    model = on_meta(name)
    state, encoder_state = model.state_dict(), model.encoder_state_dict()
    assert (len(state), len(encoder_state)) == (keys, encoder_keys)
    assert all(value.is_meta for value in state.values())
    assert sum(value.numel() for value in state.values()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert sum(value.numel() for value in encoder_state.values()) == encoder
    counts = parameter_counts(SIZES[name])
    assert (
        counts.total,
        counts.trainable,
        counts.encoder + counts.encoder_pos_embed,
    ) == (
        total,
        trainable,
        encoder,
    )


def test_state_dict_has_the_published_names_shapes_and_order() -> None:
    shapes = {
        name: tuple(value.shape)
        for name, value in on_meta("vit_h_14").state_dict().items()
    }

    def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
        sizes = {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }
        return {
            f"{name}.{layer}.{leaf}": shape if leaf == "weight" else shape[:1]
            for layer, shape in sizes.items()
            for leaf in ("weight", "bias")
        }

    expected: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 1280),
        "pos_embed": (1, 257, 1280),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 257, 512),
        "patch_embed.proj.weight": (1280, 3, 14, 14),
        "patch_embed.proj.bias": (1280,),
    }
    for i in range(32):
        expected |= block(f"blocks.{i}", 1280)
    expected |= {"norm.weight": (1280,), "norm.bias": (1280,)}
    expected |= {"decoder_embed.weight": (512, 1280), "decoder_embed.bias": (512,)}
    for i in range(8):
        expected |= block(f"decoder_blocks.{i}", 512)
    expected |= {"decoder_norm.weight": (512,), "decoder_norm.bias": (512,)}
    expected |= {"decoder_pred.weight": (588, 512), "decoder_pred.bias": (588,)}
    assert list(shapes.items()) == list(expected.items())


def test_position_tables_are_saved_but_not_trained() -> None:
    frozen = {
        name
        for name, parameter in on_meta("demo").named_parameters()
        if not parameter.requires_grad
    }
    assert frozen == {"pos_embed", "decoder_pos_embed"}


def test_hidden_pixels_reach_only_the_loss() -> None:
    model, images, noise = tiny()
    output = model(images, noise)
    removed = unpatchify(
        output.mask_BN.unsqueeze(-1).expand(-1, -1, 48), 4, (4, 6)
    ).bool()
    other = torch.where(removed, torch.randn_like(images), images)
    changed = model(other, noise)
    assert torch.equal(changed.prediction_BNP, output.prediction_BNP)
    assert not torch.equal(changed.loss, output.loss)


def test_visible_pixels_are_not_scored() -> None:
    prediction = torch.zeros(1, 4, 6)
    target = torch.tensor([0.0, 1.0, 2.0, 100.0]).view(1, 4, 1).expand(1, 4, 6)
    assert masked_loss(prediction, target, torch.tensor([[0.0, 1.0, 1.0, 0.0]])) == 2.5


def test_normalised_targets_have_mean_zero_and_unbiased_variance_one() -> None:
    patches = patchify(torch.randn(2, 3, 8, 8), 4) * 3 + 5
    target = reconstruction_target(patches, norm_pix_loss=True)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        target.var(-1, correction=1), torch.ones(2, 4), rtol=1e-5, atol=0
    )
    flat = reconstruction_target(torch.full((1, 1, 48), 0.3), norm_pix_loss=True)
    assert torch.isfinite(flat).all()
    assert flat.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("none", "full"), ("full", "none"), ("selective", "selective"), ("full", "full")],
)
def test_activation_checkpointing_changes_memory_and_nothing_else(
    encoder: ActivationCheckpointing, decoder: ActivationCheckpointing
) -> None:
    model, images, noise = tiny()
    calls = [0]
    for block in [*model.blocks, *model.decoder_blocks]:
        block.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    model(images, noise).loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss = model(images, noise).loss.item()
    model.zero_grad()
    model.set_activation_checkpointing(encoder=encoder, decoder=decoder)
    calls[0] = 0
    output = model(images, noise)
    assert calls[0] == 6
    attention = [0]
    for block in [*model.blocks, *model.decoder_blocks]:
        block.attn.register_forward_hook(
            lambda *_: attention.__setitem__(0, attention[0] + 1)
        )
    output.loss.backward()
    recomputed = {"none": 0, "selective": 2, "full": 3}
    assert attention[0] == recomputed[encoder] + recomputed[decoder]
    assert output.loss.item() == loss
    for name, gradient in plain.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_bf16_weights_keep_a_float32_loss_near_the_exact_one(
    norm_pix_loss: bool,
) -> None:
    model, images, noise = tiny(norm_pix_loss=norm_pix_loss)
    exact = model(images, noise)
    model = model.to(torch.bfloat16)
    for batch in (images, images.to(torch.bfloat16)):
        output = model(batch, noise)
        assert output.loss.dtype == torch.float32
        assert output.prediction_BNP.dtype == torch.bfloat16
        assert torch.equal(output.mask_BN, exact.mask_BN)
        torch.testing.assert_close(output.loss, exact.loss, rtol=2e-2, atol=0)
        output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_of_bf16_tensors_is_computed_in_float32(norm_pix_loss: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    patches = (torch.randn(2, 9, 48, generator=generator) + 3).to(torch.bfloat16)
    prediction = torch.randn(2, 9, 48, generator=generator).to(torch.bfloat16)
    mask = (torch.rand(2, 9, generator=generator) > 0.5).float()
    target = patches.double()
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True) + 1e-6
        ).sqrt()
    expected = (
        ((prediction.double() - target) ** 2).mean(-1) * mask
    ).sum() / mask.sum()
    loss = masked_loss(
        prediction, reconstruction_target(patches, norm_pix_loss=norm_pix_loss), mask
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_autocast_keeps_a_float32_loss() -> None:
    model, images, noise = tiny()
    exact = model(images, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, noise)
    assert output.loss.dtype == torch.float32
    assert output.prediction_BNP.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, exact.loss, rtol=2e-2, atol=0)
    output.loss.backward()
    assert model.cls_token.grad.dtype == torch.float32


def test_images_of_another_shape_are_refused() -> None:
    model, images, noise = tiny()
    with pytest.raises(
        ValueError, match=r"\(3, 3, 24, 16\) do not fit a model for \(B, 3, 16, 24\)"
    ):
        model(images.transpose(2, 3), noise)
    with pytest.raises(ValueError, match="do not fit"):
        model.features(images[:, :1])


def test_features_are_the_mean_of_normalised_patch_tokens() -> None:
    model, images, _ = tiny()
    tokens = model.encode(model.patches(images))
    assert tokens.shape == (3, 25, 32)
    features = model.features(images)
    torch.testing.assert_close(features, tokens[:, 1:].mean(1))
    single = model.features(images[1:2])
    torch.testing.assert_close(features[1:2], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_makes_perfect_pictures(norm_pix_loss: bool) -> None:
    _, images, noise = tiny()
    mask = (noise > 0.5).float()
    prediction = reconstruction_target(patchify(images, 4), norm_pix_loss=norm_pix_loss)
    pictures = reconstruct(
        images, prediction, mask, patch_size=4, norm_pix_loss=norm_pix_loss
    )
    torch.testing.assert_close(pictures.predicted_BCHW, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pictures.pasted_BCHW, images, rtol=1e-4, atol=1e-5)
    removed = unpatchify(mask.unsqueeze(-1).expand(-1, -1, 48), 4, (4, 6)).bool()
    assert not pictures.masked_BCHW[removed].any()
    assert torch.equal(pictures.masked_BCHW[~removed], images[~removed])


def test_pasted_pictures_keep_visible_pixels_and_take_hidden_ones_from_the_prediction() -> (
    None
):
    model, images, noise = tiny()
    output = model(images, noise)
    pictures = model.reconstruct(images, output)
    removed = unpatchify(
        output.mask_BN.unsqueeze(-1).expand(-1, -1, 48), 4, (4, 6)
    ).bool()
    assert torch.equal(pictures.pasted_BCHW[~removed], images[~removed])
    assert torch.equal(pictures.pasted_BCHW[removed], pictures.predicted_BCHW[removed])
    assert not pictures.pasted_BCHW.requires_grad


def test_mean_paint_is_the_visible_mean() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[0, :, :2, :2] = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)  # visible
    image[0, :, :2, 2:] = torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1)  # visible
    image[0, :, 2:] = 100.0  # hidden
    painted = paint_mean(image, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), patch_size=2)
    assert painted.shape == (1, 4, 12)
    assert unpatchify(painted, 2, (2, 2))[0, :, 3, 3].tolist() == [2.0, 2.0, 2.0]
    target = reconstruction_target(patchify(image, 2), norm_pix_loss=False)
    assert masked_loss(painted, target, torch.tensor([[0.0, 0.0, 1.0, 1.0]])) == 98.0**2


def test_nearby_paint_weighs_by_inverse_squared_distance() -> None:
    image = torch.zeros(1, 3, 2, 8)
    image[..., 0:2] = 4.0  # patch 0, visible
    image[..., 2:6] = 50.0  # patches 1 and 2, hidden
    image[..., 6:8] = -1.0  # patch 3, visible
    painted = paint_nearby(image, torch.tensor([[0.0, 1.0, 1.0, 0.0]]), patch_size=2)
    expected = [4.0, (4 - 1 / 4) / (1 + 1 / 4), (4 / 4 - 1) / (1 / 4 + 1), -1.0]
    torch.testing.assert_close(
        painted, torch.tensor(expected).view(1, 4, 1).expand(1, 4, 12)
    )


def test_paints_never_look_below_the_mask() -> None:
    _, images, noise = tiny()
    mask = (noise > 0.4).float()
    removed = unpatchify(mask.unsqueeze(-1).expand(-1, -1, 48), 4, (4, 6)).bool()
    other = torch.where(removed, torch.randn_like(images), images)
    for paint in (paint_mean, paint_nearby):
        before, after = (paint(batch, mask, patch_size=4) for batch in (images, other))
        torch.testing.assert_close(before[mask.bool()], after[mask.bool()])
