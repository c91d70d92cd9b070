"""The model against a plain float64 transcription of the paper, image by image, for any image
shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.objectives.mae import MaskedAutoencoder

State = dict[str, Tensor]


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * state[f"{name}.weight"] + state[
        f"{name}.bias"
    ]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    width = x.shape[-1]
    head = width // heads
    qkv = linear(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
    mixed = []
    for h in range(heads):
        query, key, value = (
            qkv[:, i * width + h * head : i * width + (h + 1) * head] for i in range(3)
        )
        mixed.append(torch.softmax(query @ key.T / math.sqrt(head), dim=-1) @ value)
    x = x + linear(torch.cat(mixed, dim=-1), state, f"{name}.attn.proj")
    hidden = linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, state, f"{name}.mlp.fc2")


def position(row: int, column: int, width: int) -> Tensor:
    quarter = width // 4
    omega = [10000 ** (-k / quarter) for k in range(quarter)]
    values = [
        f(place * w)
        for place in (column, row)
        for f in (math.sin, math.cos)
        for w in omega
    ]
    return torch.tensor(values, dtype=torch.float32).double()


def positions(config: ModelConfig, width: int) -> Tensor:
    rows, columns = config.grid
    return torch.stack(
        [
            position(row, column, width)
            for row in range(rows)
            for column in range(columns)
        ]
    )


def predict_one(
    state: State, config: ModelConfig, image: Tensor, kept: list[int]
) -> Tensor:
    """Prediction of all patches of one image."""
    pixels = torch.nn.functional.conv2d(
        image[None],
        state["patch_embed.proj.weight"],
        state["patch_embed.proj.bias"],
        stride=config.patch_size,
    )
    tokens = pixels[0].flatten(1).T + positions(config, config.embed_dim)
    x = torch.cat([state["cls_token"][0], tokens[kept]])
    for i in range(config.depth):
        x = block(x, state, f"blocks.{i}", config.num_heads)
    x = linear(layer_norm(x, state, "norm"), state, "decoder_embed")
    places = {patch: 1 + i for i, patch in enumerate(kept)}
    line = [
        x[places[n]] if n in places else state["mask_token"][0, 0]
        for n in range(config.num_patches)
    ]
    x = torch.cat(
        [x[:1], torch.stack(line) + positions(config, config.decoder_embed_dim)]
    )
    for i in range(config.decoder_depth):
        x = block(x, state, f"decoder_blocks.{i}", config.decoder_num_heads)
    return linear(layer_norm(x, state, "decoder_norm"), state, "decoder_pred")[1:]


def target_one(config: ModelConfig, image: Tensor) -> Tensor:
    size = config.patch_size
    patches = []
    for row in range(config.grid[0]):
        for column in range(config.grid[1]):
            patch = image[
                :, row * size : (row + 1) * size, column * size : (column + 1) * size
            ]
            values = torch.stack(
                [
                    patch[c, y, x]
                    for y in range(size)
                    for x in range(size)
                    for c in range(3)
                ]
            )
            if config.norm_pix_loss:
                variance = ((values - values.mean()) ** 2).sum() / (len(values) - 1)
                values = (values - values.mean()) / torch.sqrt(variance + 1e-6)
            patches.append(values)
    return torch.stack(patches)


def oracle(
    state: State, config: ModelConfig, images: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, prediction and mask of a batch."""
    predictions, masks, errors = [], [], []
    for image, line in zip(images, noise, strict=True):
        kept = sorted(
            range(config.num_patches), key=lambda n, line=line: (float(line[n]), n)
        )[: config.num_visible]
        hidden = [n for n in range(config.num_patches) if n not in kept]
        prediction = predict_one(state, config, image, kept)
        errors += [
            ((prediction[n] - target_one(config, image)[n]) ** 2).mean() for n in hidden
        ]
        predictions.append(prediction)
        masks.append([0.0 if n in kept else 1.0 for n in range(config.num_patches)])
    return torch.stack(errors).mean(), torch.stack(predictions), torch.tensor(masks)


def assert_matches_oracle(config: ModelConfig, noise: Tensor) -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(config)
    images = torch.randn(noise.shape[0], 3, config.image_height, config.image_width)
    output = model(images, noise)
    output.loss.backward()
    state = {
        name: value.detach().double().requires_grad_(not name.endswith("pos_embed"))
        for name, value in model.state_dict().items()
    }
    loss, prediction, mask = oracle(state, config, images.double(), noise)
    loss.backward()
    assert torch.equal(output.mask_BN, mask)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        output.prediction_BNP.double(), prediction, rtol=1e-4, atol=1e-5
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = state[name].grad
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                parameter.grad.double(),
                expected,
                rtol=1e-4,
                atol=max(1e-5 * scale, 1e-8),
                msg=lambda text, name=name: f"{name}: {text}",
            )
        else:
            assert parameter.grad is None


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    patch_size=st.sampled_from([2, 3, 4]),
    rows=st.integers(1, 4),
    columns=st.integers(2, 5),
    heads=st.integers(1, 3),
    mask_share=st.floats(0.0, 1.0),
    norm_pix_loss=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_rectangle_matches_the_paper(
    patch_size: int,
    rows: int,
    columns: int,
    heads: int,
    mask_share: float,
    norm_pix_loss: bool,
    seed: int,
) -> None:
    patches = rows * columns
    hidden = 1 + round(
        mask_share * (patches - 2)
    )  # from one patch hidden to one patch kept
    config = ModelConfig(
        image_size=(rows * patch_size, columns * patch_size),
        patch_size=patch_size,
        embed_dim=8 * heads,
        depth=2,
        num_heads=heads,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        mask_ratio=hidden / patches,
        norm_pix_loss=norm_pix_loss,
    )
    assert config.num_masked == hidden
    noise = torch.rand(2, patches, generator=torch.Generator().manual_seed(seed))
    assert_matches_oracle(config, noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_ties_in_the_noise_go_to_the_lower_patch_number(dtype: torch.dtype) -> None:
    config = ModelConfig(
        image_size=(8, 16),
        patch_size=4,
        embed_dim=8,
        depth=1,
        num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    assert_matches_oracle(
        config, torch.tensor([[3, 1, 1, 1, 1, 1, 1, 0], [5] * 8]).to(dtype)
    )
