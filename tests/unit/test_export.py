"""Weights for other libraries, pictures and the nearest-neighbour figure, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from model.config import ModelConfig
from model.objectives.mae import MaskedAutoencoder
from pipeline.errors import ConfigError
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.engine.build import build_engine
from train.evaluation.neighbours import knn_accuracy
from train.evaluation.saved_model import SavedModel
from train.export import export
from train.export import main as export_command
from train.objectives.mae import complete, raw_losses, to_display
from train.process.world import World
from train.reconstruct import main as reconstruct_command
from train.report.drawing import draw_loss, draw_reconstruction, spread_ids

SMALL = ModelConfig(
    image_size=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)


@pytest.fixture(scope="module")
def saved() -> SavedModel:
    torch.manual_seed(0)
    return SavedModel(
        MaskedAutoencoder(SMALL).eval(), RunConfig(model=SMALL), step=12, uri="run"
    )


def test_transformers_loads_the_hf_export_and_computes_the_same(
    saved: SavedModel, tmp_path: Path
):
    from transformers import ViTMAEForPreTraining

    export(saved, tmp_path, to="hf")
    theirs, info = ViTMAEForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        loss = theirs.eval()(pixel_values=images, noise=noise).loss
        torch.testing.assert_close(
            loss, saved.model(images, noise).loss, rtol=1e-5, atol=1e-6
        )


def test_transformers_loads_the_encoder_alone(saved: SavedModel, tmp_path: Path):
    from transformers import ViTMAEModel

    export(saved, tmp_path, to="hf", part="encoder")
    _, info = ViTMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("part", ["full", "encoder"])
def test_mae_names_are_the_state_dicts(saved: SavedModel, tmp_path: Path, part):
    (path,) = export(saved, tmp_path, to="mae", part=part)
    state = (
        saved.model.state_dict() if part == "full" else saved.model.encoder_state_dict()
    )
    tensors = load_file(path)
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], value) for name, value in state.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["step"] == "12"


def test_timm_gets_the_encoder_without_the_mask_token(
    saved: SavedModel, tmp_path: Path
):
    (path,) = export(saved, tmp_path, to="timm")
    assert path.name == "timm.safetensors"
    assert set(load_file(path)) == set(saved.model.encoder_state_dict())


def test_a_pth_is_loadable_without_unpickling_objects(
    saved: SavedModel, tmp_path: Path
):
    (path,) = export(saved, tmp_path, to="detectron2", file_type="pth")
    assert "patch_embed.proj.weight" in torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"to": "timm", "part": "full"}, "encoder only"),
        ({"to": "hf", "file_type": "pth"}, "safetensors"),
        ({"to": "timm", "patch_size": 16}, "detectron2"),
    ],
)
def test_what_a_library_cannot_take_is_refused_before_writing(
    saved: SavedModel, tmp_path: Path, options, part
):
    with pytest.raises(ConfigError, match=part):
        export(saved, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_hf_settings_say_what_the_model_is(saved: SavedModel, tmp_path: Path):
    files = export(saved, tmp_path, to="hf")
    settings = json.loads(files[1].read_text())
    assert (
        settings["hidden_size"],
        settings["patch_size"],
        settings["layer_norm_eps"],
    ) == (
        32,
        8,
        1e-6,
    )


# ----------------------------------------------------------------------------------------- pictures


def test_raw_losses_average_to_the_models_own_loss_on_plain_pixels(saved: SavedModel):
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    with torch.no_grad():
        output = saved.model(images, noise)
    losses_B = raw_losses(saved.model, images, output)
    assert losses_B.shape == (4,)
    torch.testing.assert_close(losses_B.mean(), output.loss)


def test_a_perfect_normalised_prediction_has_no_raw_loss():
    from model.objectives.mae import MAEOutput, reconstruction_target
    from model.patches import patchify

    model = MaskedAutoencoder(SMALL.model_copy(update={"norm_pix_loss": True}))
    images = torch.randn(2, 3, 32, 32)
    target = reconstruction_target(patchify(images, 8), norm_pix_loss=True)
    output = MAEOutput(torch.zeros(()), target, torch.ones(2, 16))
    torch.testing.assert_close(
        raw_losses(model, images, output), torch.zeros(2), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("count", [1, 3, 8])
def test_pictures_are_drawn_for_any_number_of_images(
    saved: SavedModel, tmp_path: Path, count: int
):
    completion = complete(
        saved.model, torch.randn(count, 3, 32, 32), torch.rand(count, 16)
    )
    visible = completion.masked_BCHW == completion.original_BCHW
    assert visible.float().mean() > 0.2
    draw_reconstruction(tmp_path / "r.png", completion, title="test")
    draw_loss(
        tmp_path / "l.png",
        [{"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 2, "loss": None, "lr": 0.1}],
    )
    for name in ("r.png", "l.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.png", "r.png"]


def test_a_loss_picture_of_no_lines_is_still_a_picture(tmp_path: Path):
    draw_loss(tmp_path / "l.png", [])
    assert (tmp_path / "l.png").exists()


def test_display_undoes_the_normalisation():
    from pipeline.config import IMAGENET_MEAN, IMAGENET_STD

    pixels = torch.rand(2, 3, 4, 4)
    normalised = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
        IMAGENET_STD
    ).view(3, 1, 1)
    torch.testing.assert_close(to_display(normalised), pixels)


def test_spread_ids_stay_inside_and_do_not_repeat():
    for num_samples, count in ((1, 8), (8, 8), (100, 8), (191, 7)):
        ids = spread_ids(num_samples, count)
        assert len(set(ids.tolist())) == len(ids) == min(num_samples, count)
        assert ids.min() >= 0
        assert ids.max() < num_samples


# --------------------------------------------------------------------------------------- neighbours


def unit(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_neighbours_vote_by_similarity_and_not_by_count():
    known = unit((1, 0), (0.5, 1), (0.5, 1.1))
    labels = torch.tensor([0, 1, 1])
    query = unit((1, 0.05))
    assert knn_accuracy(query, torch.tensor([0]), known, labels) == 1.0
    # With a temperature so high that all votes weigh the same, the two far ones would win.
    assert knn_accuracy(unit((0.5, 1.05)), torch.tensor([1]), known, labels) == 1.0


def test_only_the_nearest_vote():
    known = unit((1, 0), *[(0.9, 0.5)] * 30)
    labels = torch.tensor([0] + [1] * 30)
    assert (
        knn_accuracy(unit((1, 0)), torch.tensor([0]), known, labels, neighbours=1)
        == 1.0
    )
    assert (
        knn_accuracy(unit((1, 0)), torch.tensor([0]), known, labels, neighbours=31)
        == 0.0
    )


# ------------------------------------------------------------------------------------- the commands


@pytest.fixture
def run_dir(saved: SavedModel, tmp_path: Path) -> Path:
    """A run's folder with one checkpoint."""
    engine = {"kind": "torch", "precision": "fp32"}
    train = {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2}
    view = {"height": 32, "width": 32}
    changed = {"engine": engine, "train": train, "view": view}
    settings = {**saved.config.model_dump(), **changed}
    config = RunConfig.model_validate(settings)
    built = build_engine(config, model=saved.model, resume=None, world=World())
    store = CheckpointStore(str(tmp_path / "run" / "checkpoints"), keep_last=1)
    store.save(1, built, {}, world=World())
    return tmp_path / "run"


def test_export_gives_one_json_object(run_dir: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert (
        export_command([str(run_dir), "--to", "hf", "--out", str(out), "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["to"], result["part"], result["step"]) == ("hf", "full", 1)
    assert result["files"] == [str(out / "model.safetensors"), str(out / "config.json")]
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_mistake_is_told_before_the_checkpoint_is_read(
    tmp_path: Path, capsys
) -> None:
    words = [str(tmp_path / "nowhere"), "--to", "timm", "--part", "full"]
    assert export_command(words) == ConfigError.exit_code
    assert "takes the encoder only" in capsys.readouterr().err


def test_reconstruct_gives_one_json_object(
    run_dir: Path, tmp_path: Path, capsys
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(picture)
    out = tmp_path / "drawn.png"
    words = [str(run_dir), "--images", str(picture), "--out", str(out), "--json"]
    assert reconstruct_command(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["out"], result["step"], result["num_pictures"]) == (str(out), 1, 1)
    assert result["loss"] > 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_reconstruct_without_pictures_says_what_to_give(run_dir: Path, capsys) -> None:
    assert reconstruct_command([str(run_dir)]) == ConfigError.exit_code
    assert "give a folder of pictures with --images" in capsys.readouterr().err
