"""Weights in and out: names, strictness, resampling. What transformers makes of them is in
tests/numerics."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.exchange.weights import (
    WeightsError,
    expected_shapes,
    fit_weights,
    from_published,
    load_published,
    to_detectron2,
    to_hf,
    to_mae,
    to_timm,
)
from model.objectives.mae import MaskedAutoencoder, is_decoder_name
from model.pos_embed import interpolate_table

CONFIG = ModelConfig(
    image_size=32,
    patch_size=8,
    embed_dim=16,
    depth=2,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        name: torch.randn_like(value)
        for name, value in MaskedAutoencoder(CONFIG).state_dict().items()
    }


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_expected_shapes_are_the_models(state: dict[str, torch.Tensor]) -> None:
    assert expected_shapes(CONFIG) == {
        name: tuple(value.shape) for name, value in state.items()
    }
    assert set(expected_shapes(CONFIG, "encoder")) == set(
        MaskedAutoencoder(CONFIG).encoder_state_dict()
    )


@pytest.mark.parametrize("names", ["v5", "legacy"])
def test_transformers_names_go_there_and_back(
    state: dict[str, torch.Tensor], names: str
) -> None:
    theirs, settings = to_hf(state, CONFIG, names=names)
    assert len(theirs) == len(state) + 4 * (CONFIG.depth + CONFIG.decoder_depth)
    assert all(name.startswith(("vit.", "decoder.")) for name in theirs)
    assert settings["layer_norm_eps"] == 1e-6
    assert settings["intermediate_size"] == 64
    storages = [value.untyped_storage().data_ptr() for value in theirs.values()]
    assert len(set(storages)) == len(storages), (
        "tensors share memory, which safetensors refuses"
    )
    assert_equal(from_published(theirs), state)
    alone = {
        name.removeprefix("vit."): value
        for name, value in theirs.items()
        if name.startswith("vit.")
    }
    assert_equal(from_published(alone), to_timm(state, CONFIG))


def test_encoder_exports_leave_the_decoder_out(state: dict[str, torch.Tensor]) -> None:
    encoder = to_timm(state, CONFIG)
    assert set(encoder) == {
        name for name in state if not name.startswith(("decoder_", "mask_token"))
    }
    assert_equal(to_mae(state, CONFIG, part="encoder")["model"], encoder)
    assert_equal(to_detectron2(state, CONFIG)["model"], encoder)
    assert_equal(to_mae(state, CONFIG)["model"], state)


@pytest.mark.parametrize("export", [to_mae, to_timm, to_hf, to_detectron2])
def test_exports_refuse_weights_of_another_model(
    state: dict[str, torch.Tensor], export: object
) -> None:
    del state["norm.weight"]
    state["head.weight"] = torch.zeros(10, 16)
    state["cls_token"] = torch.zeros(1, 1, 24)
    with pytest.raises(WeightsError) as caught:
        export(state, CONFIG)
    message = str(caught.value)
    assert "1 missing, 1 unexpected, 1 of another shape" in message
    for row in (
        ["missing", "norm.weight", "(16,)", "-"],
        ["unexpected", "head.weight", "-", "(10, 16)"],
        ["shape", "cls_token", "(1, 1, 16)", "(1, 1, 24)"],
    ):
        assert any(
            [cell.strip() for cell in line.split("  ") if cell.strip()] == row
            for line in message.splitlines()
        )


def test_long_tables_are_cut(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(WeightsError, match="and 28 more"):
        fit_weights(
            {name: value for name, value in state.items() if "norm.weight" in name},
            CONFIG,
        )


def test_detectron2_can_have_larger_patches(state: dict[str, torch.Tensor]) -> None:
    larger = to_detectron2(state, CONFIG, patch_size=16)["model"]
    assert larger["patch_embed.proj.weight"].shape == (16, 3, 16, 16)
    assert torch.equal(
        larger["pos_embed"], interpolate_table(state["pos_embed"], (4, 4), (2, 2))
    )
    with pytest.raises(
        ValueError, match="image_size 32 is not a multiple of patch_size 5"
    ):
        to_detectron2(state, CONFIG, patch_size=5)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_published_checkpoints_load(
    state: dict[str, torch.Tensor], wrapper: str | None, prefix: str
) -> None:
    saved: dict[str, object] = {prefix + name: value for name, value in state.items()}
    saved = {wrapper: saved, "epoch": 800} if wrapper else saved
    model = MaskedAutoencoder(CONFIG)
    load_published(model, saved)
    assert_equal(model.state_dict(), state)


def test_an_encoder_alone_loads_where_it_is_asked_for(
    state: dict[str, torch.Tensor],
) -> None:
    classifier = {
        **to_timm(state, CONFIG),
        "head.weight": torch.zeros(10, 16),
        "head.bias": torch.zeros(10),
    }
    model = MaskedAutoencoder(CONFIG)
    decoder = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if is_decoder_name(name)
    }
    load_published(model, classifier, part="encoder")
    assert_equal(model.state_dict(), {**to_timm(state, CONFIG), **decoder})
    with pytest.raises(WeightsError, match=f"{len(decoder)} missing, 0 unexpected"):
        load_published(model, classifier)


def test_position_tables_follow_the_image_size(state: dict[str, torch.Tensor]) -> None:
    larger = ModelConfig(**{**CONFIG.model_dump(), "image_size": (48, 64)})
    model = MaskedAutoencoder(larger)
    load_published(model, state)
    expected = interpolate_table(state["pos_embed"], (4, 4), (6, 8))
    assert torch.equal(model.pos_embed, expected)
    assert model.decoder_pos_embed.shape == (1, 49, 8)
    back = fit_weights(model.state_dict(), CONFIG, old_grid=(6, 8))
    assert back["pos_embed"].shape == state["pos_embed"].shape
    with pytest.raises(
        WeightsError, match=r"shape +pos_embed +\(1, 17, 16\) +\(1, 48, 16\)"
    ):
        fit_weights({**state, "pos_embed": torch.zeros(1, 48, 16)}, CONFIG)


def test_equal_numbers_of_patches_on_another_grid_need_the_old_grid(
    state: dict[str, torch.Tensor],
) -> None:
    wide = ModelConfig(**{**CONFIG.model_dump(), "image_size": (16, 64)})
    fitted = fit_weights(state, wide, old_grid=(4, 4))
    assert torch.equal(
        fitted["pos_embed"], interpolate_table(state["pos_embed"], (4, 4), (2, 8))
    )


def of_size(*size: int) -> ModelConfig:
    return ModelConfig(**{**CONFIG.model_dump(), "image_size": size})


@pytest.mark.parametrize("kind", ["fixed", "half", "learned"])
@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        ((32, 32), (16, 64)),
        ((16, 64), (32, 32)),
        ((16, 64), (64, 16)),
        ((64, 16), (8, 128)),
    ],
)
def test_a_table_of_as_many_patches_in_another_shape_is_refused(
    saved: tuple[int, int], wanted: tuple[int, int], kind: str
) -> None:
    state = dict(MaskedAutoencoder(of_size(*saved)).state_dict())
    if kind == "half":
        state = {name: value.bfloat16().float() for name, value in state.items()}
    if kind == "learned":
        # Says nothing of its grid, so that a square is all that may be guessed.
        state |= {
            name: torch.randn_like(state[name]) for name in state if "pos_embed" in name
        }
    target = MaskedAutoencoder(of_size(*wanted))
    if kind == "learned" and wanted == (32, 32):
        load_published(target, state)
        return
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"as many in another shape. Give old_grid=\(\d"
    ):
        load_published(target, state)
    assert_equal(dict(target.state_dict()), before)
    load_published(target, state, old_grid=of_size(*saved).grid)


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (64, 16), (8, 128)])
def test_a_models_own_export_loads_again(size: tuple[int, int]) -> None:
    config = of_size(*size)
    saved = MaskedAutoencoder(config)
    loaded = MaskedAutoencoder(config)
    load_published(loaded, to_mae(saved.state_dict(), config))
    assert_equal(dict(loaded.state_dict()), dict(saved.state_dict()))


def test_a_fixed_table_is_resampled_from_the_grid_it_was_made_for() -> None:
    # 2 x 8 patches are as many as 4 x 4: a square would be the wrong guess.
    state = MaskedAutoencoder(of_size(16, 64)).state_dict()
    fitted = fit_weights(state, of_size(32, 128))
    assert torch.equal(
        fitted["pos_embed"], interpolate_table(state["pos_embed"], (2, 8), (4, 16))
    )


def test_weights_are_untouched_by_a_failed_load(state: dict[str, torch.Tensor]) -> None:
    model = MaskedAutoencoder(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state["blocks.1.mlp.fc2.bias"] = torch.zeros(3)
    with pytest.raises(
        WeightsError, match=r"blocks\.1\.mlp\.fc2\.bias +\(16,\) +\(3,\)"
    ):
        load_published(model, state)
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("saved", [{}, {"args": 3}, {"model": {"cls_token": "text"}}])
def test_what_is_not_weights_is_refused(saved: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match="expected a dictionary of tensors"):
        from_published(saved)


def test_a_query_without_its_key_is_refused(state: dict[str, torch.Tensor]) -> None:
    theirs, _ = to_hf(state, CONFIG)
    del theirs["vit.encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(WeightsError, match=r"missing +blocks\.1\.attn\.qkv\.bias"):
        fit_weights(from_published(theirs), CONFIG)
