"""Patches, masks, position tables and initial weights: their defining properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import SIZES, ModelConfig
from model.exchange.resample import resample_kernel
from model.masking import gather_rows, mask_patches, unshuffle
from model.objectives.mae import MaskedAutoencoder
from model.patches import patchify, unpatchify
from model.pos_embed import interpolate_table, sincos_table
from model.vit import PatchEmbed


@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    size=st.integers(1, 5),
)
def test_unpatchify_undoes_patchify(
    batch: int, rows: int, columns: int, size: int
) -> None:
    images = torch.arange(batch * 3 * rows * columns * size**2, dtype=torch.float32)
    images = images.view(batch, 3, rows * size, columns * size)
    patches = patchify(images, size)
    assert patches.shape == (batch, rows * columns, size * size * 3)
    assert torch.equal(unpatchify(patches, size, (rows, columns)), images)


def test_patches_run_row_by_row_with_the_channel_fastest() -> None:
    image = torch.arange(3 * 4 * 6).view(1, 3, 4, 6)
    patches = patchify(image, 2)
    # The second patch of the second row of patches: pixel rows 2 and 3, columns 2 and 3.
    expected = [
        int(image[0, c, y, x]) for y in (2, 3) for x in (2, 3) for c in (0, 1, 2)
    ]
    assert patches[0, 1 * 3 + 1].tolist() == expected


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="30 x 32 pixels do not divide into patches of 16 x 16"
    ):
        patchify(torch.zeros(1, 3, 30, 32), 16)
    with pytest.raises(ValueError, match="do not make 2 x 3 patches"):
        unpatchify(torch.zeros(1, 4, 12), 2, (2, 3))
    with pytest.raises(ValueError, match="4 patches of 13 values"):
        unpatchify(torch.zeros(1, 4, 13), 2, (2, 2))


@given(patches=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_masks_are_permutations_that_keep_the_smallest_noise(
    patches: int, share: float, seed: int
) -> None:
    visible = round(share * patches)
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(seed))
    mask = mask_patches(noise, visible)
    everyone = torch.arange(patches).expand(3, -1)
    assert torch.equal(mask.ids_shuffle_BN.sort(dim=1).values, everyone)
    assert torch.equal(mask.ids_shuffle_BN.gather(1, mask.ids_restore_BN), everyone)
    assert torch.equal(mask.ids_restore_BN.gather(1, mask.ids_shuffle_BN), everyone)
    assert torch.equal(mask.ids_keep_BV, mask.ids_shuffle_BN[:, :visible])
    assert mask.mask_BN.sum(1).tolist() == [patches - visible] * 3
    assert mask.mask_BN.gather(1, mask.ids_keep_BV).sum() == 0
    if 0 < visible < patches:
        kept = noise.masked_fill(mask.mask_BN.bool(), -1).amax(1)
        removed = noise.masked_fill(~mask.mask_BN.bool(), 2).amin(1)
        assert (kept <= removed).all()


def test_equal_noise_is_settled_by_patch_number() -> None:
    mask = mask_patches(torch.zeros(2, 300), 75)
    assert torch.equal(mask.ids_shuffle_BN, torch.arange(300).expand(2, -1))


def test_masks_do_not_depend_on_the_batch() -> None:
    noise = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    whole = mask_patches(noise, 5)
    for i in range(5):
        for alone, together in zip(
            mask_patches(noise[i : i + 1], 5), whole, strict=True
        ):
            assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("visible", [-1, 11])
def test_impossible_counts_are_refused(visible: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {visible} of 10"):
        mask_patches(torch.rand(1, 10), visible)


def test_unshuffle_is_the_inverse_and_so_is_its_gradient() -> None:
    mask = mask_patches(torch.rand(2, 7, generator=torch.Generator().manual_seed(0)), 3)
    rows = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(unshuffle(gather_rows(rows, mask.ids_shuffle_BN), mask), rows)
    assert torch.autograd.gradcheck(lambda x: unshuffle(x, mask), (rows,))


@pytest.mark.parametrize(("grid", "width"), [((14, 14), 1280), ((3, 5), 16)])
def test_position_table_is_columns_then_rows_sine_then_cosine(
    grid: tuple[int, int], width: int
) -> None:
    table = sincos_table(grid, width)
    quarter = width // 4
    omega = 1 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    expected = np.zeros((1 + grid[0] * grid[1], width))
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [
                np.sin(column * omega),
                np.cos(column * omega),
                np.sin(row * omega),
                np.cos(row * omega),
            ]
            expected[1 + row * grid[1] + column] = np.concatenate(angles)
    assert table.shape == (1, *expected.shape)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(
        table[0].numpy(), expected.astype(np.float32), rtol=0, atol=6e-8
    )


def test_position_table_needs_a_width_of_four_blocks() -> None:
    with pytest.raises(ValueError, match="embed_dim 30"):
        sincos_table((2, 2), 30)


def test_position_table_interpolates_the_grid_and_not_the_class_token() -> None:
    table = torch.randn(1, 1 + 6, 8, generator=torch.Generator().manual_seed(0))
    larger = interpolate_table(table, (2, 3), (4, 6))
    assert larger.shape == (1, 25, 8)
    assert torch.equal(larger[:, 0], table[:, 0])
    picture = table[0, 1:].view(2, 3, 8).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(picture, size=(4, 6), mode="bicubic")[
        0
    ].permute(1, 2, 0)
    torch.testing.assert_close(larger[0, 1:].view(4, 6, 8), expected)
    assert interpolate_table(table, (2, 3), (2, 3)) is table
    with pytest.raises(ValueError, match="does not belong to a grid of 3 x 3"):
        interpolate_table(table, (3, 3), (4, 4))


def test_patch_embedding_equals_a_convolution() -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(4, 12)
    torch.nn.init.normal_(embed.proj.weight)
    torch.nn.init.normal_(embed.proj.bias)
    images = torch.randn(2, 3, 8, 12)
    tokens = embed(patchify(images, 4))
    expected = torch.nn.functional.conv2d(
        images, embed.proj.weight, embed.proj.bias, stride=4
    )
    torch.testing.assert_close(
        tokens, expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5
    )


def test_enlarged_kernels_give_enlarged_patches_the_same_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, 14, 14, generator=generator, dtype=torch.float64)
    patch = torch.randn(1, 3, 14, 14, generator=generator, dtype=torch.float64)
    larger = torch.nn.functional.interpolate(
        patch, size=(16, 16), mode="bilinear", align_corners=False
    )
    tokens = (kernel * patch).sum((1, 2, 3))
    torch.testing.assert_close(
        (resample_kernel(kernel, 16) * larger).sum((1, 2, 3)),
        tokens,
        rtol=1e-9,
        atol=1e-9,
    )
    torch.testing.assert_close(resample_kernel(kernel, 14), kernel)


def test_initial_weights_have_the_published_ranges() -> None:
    config = ModelConfig(depth=1, decoder_depth=1)
    torch.manual_seed(0)
    state = MaskedAutoencoder(config).state_dict()
    width = config.embed_dim
    for name, fan in {
        "patch_embed.proj.weight": config.patch_dim + width,
        "blocks.0.attn.qkv.weight": 4 * width,  # one matrix of width x 3 width
        "blocks.0.attn.proj.weight": 2 * width,
        "blocks.0.mlp.fc1.weight": 5 * width,
        "decoder_embed.weight": width + 512,
        "decoder_pred.weight": 512 + config.patch_dim,
    }.items():
        bound = math.sqrt(6 / fan)
        assert 0.999 * bound < state[name].abs().max() <= bound, name
        assert abs(float(state[name].std()) / (bound / math.sqrt(3)) - 1) < 0.01, name
    bias = state["patch_embed.proj.bias"]
    assert 0.95 / math.sqrt(768) < bias.abs().max() <= 1 / math.sqrt(768)
    for name, value in state.items():
        if name.endswith(".bias") and name != "patch_embed.proj.bias":
            assert not value.any(), name
        if "norm" in name and name.endswith(".weight"):
            assert (value == 1).all(), name
    for name in ("cls_token", "mask_token"):
        assert 0.018 < state[name].std() < 0.022, name
    assert torch.equal(state["pos_embed"], sincos_table((14, 14), 768))
    assert torch.equal(state["decoder_pos_embed"], sincos_table((14, 14), 512))


def test_initial_weights_follow_the_generator() -> None:
    config = SIZES["demo"]
    model = MaskedAutoencoder(config)
    model.init_weights(torch.Generator().manual_seed(3))
    with torch.device("meta"):
        empty = MaskedAutoencoder(config)
    revived = empty.to_empty(device="cpu")
    for parameter in revived.parameters():
        parameter.data.fill_(float("nan"))
    revived.init_weights(torch.Generator().manual_seed(3))
    for (name, mine), theirs in zip(
        model.state_dict().items(), revived.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    revived.init_weights(torch.Generator().manual_seed(4))
    assert not torch.equal(model.cls_token, revived.cls_token)
