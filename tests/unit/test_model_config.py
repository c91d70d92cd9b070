"""Settings of the model: what they derive, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from model.config import SIZES, ModelConfig, count_visible


def test_defaults_are_vit_b_16() -> None:
    assert ModelConfig() == SIZES["vit_b_16"]
    assert ModelConfig().grid == (14, 14)
    assert (
        ModelConfig().num_patches,
        ModelConfig().num_visible,
        ModelConfig().num_masked,
    ) == (
        196,
        49,
        147,
    )
    assert ModelConfig().patch_dim == 768


@pytest.mark.parametrize(
    ("name", "patches", "visible", "patch_dim"),
    [("vit_l_16", 196, 49, 768), ("vit_h_14", 256, 64, 588)],
)
def test_published_sizes(name: str, patches: int, visible: int, patch_dim: int) -> None:
    size = SIZES[name]
    assert (size.num_patches, size.num_visible, size.patch_dim) == (
        patches,
        visible,
        patch_dim,
    )


@pytest.mark.parametrize("value", [(224, 448), [224, 448], "224x448", "224 x 448"])
def test_image_size_takes_height_and_width(value: object) -> None:
    config = ModelConfig(image_size=value)
    assert (config.image_height, config.image_width) == (224, 448)
    assert config.grid == (14, 28)


@pytest.mark.parametrize("value", [64, "64", (64, 64), "64x64"])
def test_square_image_sizes_are_equal_however_written(value: object) -> None:
    assert ModelConfig(image_size=value, patch_size=8) == ModelConfig(
        image_size=64, patch_size=8
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_size": 225},
            "image_size 225 is not a multiple of patch_size 16: use 224 or 240",
        ),
        (
            {"image_size": (224, 230)},
            "image_size 230 is not a multiple of patch_size 16: use 224 or 240",
        ),
        ({"image_size": 5}, "image_size 5 is not a multiple of patch_size 16: use 16"),
        ({"image_size": 0}, "image_size 0 is not a number of pixels"),
        (
            {"num_heads": 7},
            "embed_dim 768 does not divide into num_heads 7: use 1, 2, 3, 4, 6, 8, 12, 16, 24 "
            "heads",
        ),
        (
            {"decoder_num_heads": 3},
            "decoder_embed_dim 512 does not divide into decoder_num_heads 3",
        ),
        (
            {"embed_dim": 30, "num_heads": 3},
            "embed_dim 30 is not a multiple of 4.*use 28 or 32",
        ),
        (
            {"decoder_embed_dim": 6, "decoder_num_heads": 2},
            "decoder_embed_dim 6 is not a multiple of 4",
        ),
        ({"mlp_ratio": 0.3}, "mlp_ratio 0.3 times embed_dim 768 is not a whole number"),
        ({"mask_ratio": 0.999}, "mask_ratio 0.999 keeps 0 of 196 patches"),
        ({"mask_ratio": 1e-9}, "mask_ratio 1e-09 keeps 196 of 196 patches"),
        ({"image_size": 16}, "keeps 0 of 1 patches"),
        ({"mask_ratio": 1.0}, "less than 1"),
        ({"drop_path": 0.1}, "Extra inputs"),
    ],
)
def test_impossible_settings_say_what_would_do(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**settings)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(
        ValidationError,
        match=r"image_size 225(.|\n)*num_heads 7(.|\n)*decoder_num_heads 3",
    ):
        ModelConfig(image_size=225, num_heads=7, decoder_num_heads=3)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().mask_ratio = 0.5


def test_named_sizes_take_changes_and_check_them() -> None:
    assert ModelConfig.of_size("vit_l_16", image_size=448).num_patches == 784
    with pytest.raises(ValidationError, match="225"):
        ModelConfig.of_size("vit_l_16", image_size=225)
    with pytest.raises(
        ValueError, match="model size 'vit_g' is unknown: use one of vit_ti_16"
    ):
        ModelConfig.of_size("vit_g")


@pytest.mark.parametrize("patches", [196, 256])
def test_visible_patches_agree_with_truncation_where_weights_were_published(
    patches: int,
) -> None:
    for percent in range(0, 101, 5):
        assert count_visible(patches, percent / 100) == int(
            patches * (1 - percent / 100)
        ), percent


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [
        (100, 0.8, 20),
        (100, 0.9, 10),
        (400, 0.8, 80),
        (400, 0.9, 40),
        (1025, 0.8, 205),
        (12, 5 / 6, 2),
        (9, 1 / 3, 6),
    ],
)
def test_visible_patches_are_counted_exactly(
    patches: int, ratio: float, visible: int
) -> None:
    assert count_visible(patches, ratio) == visible


def test_any_count_of_hidden_patches_can_be_asked_for() -> None:
    for patches in (2, 7, 64, 196, 256, 1024):
        for hidden in range(patches + 1):
            assert count_visible(patches, hidden / patches) == patches - hidden


def test_settings_and_costs_import_no_torch() -> None:
    script = "import sys, model.config, model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
