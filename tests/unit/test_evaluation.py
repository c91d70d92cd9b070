"""What `train.evaluate` and `train.export` cannot do is said by name; what they can, is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.objectives.mae import MaskedAutoencoder
from pipeline import storage
from pipeline.config import LoaderConfig
from pipeline.dataset import open_dataset
from pipeline.errors import ConfigError, DataError, InfrastructureError
from train.config import RunConfig
from train.evaluation.saved_model import SavedModel
from train.evaluation.scores import evaluate, report
from train.export import export
from train.process.folder import named_run_dir, prepare_file, prepare_out

SHAPE = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
}
SHAPE |= {"decoder_depth": 1, "decoder_num_heads": 2}


def make_saved(
    image_size: int | tuple[int, int] = 32, *, tuning_file: str = ""
) -> SavedModel:
    torch.manual_seed(0)
    model = ModelConfig(image_size=image_size, **SHAPE)
    config = RunConfig(model=model, loader=LoaderConfig(tuning_file=tuning_file))
    config = config.model_copy(
        update={
            "view": config.view.model_copy(
                update={"height": model.image_height, "width": model.image_width}
            )
        }
    )
    return SavedModel(MaskedAutoencoder(model).eval(), config, step=1, uri="run")


def name_classes(uri: str, names: list[str] | None) -> None:
    """Write class names into a dataset's description."""
    info = dataclasses.replace(open_dataset(uri).info, classes=names)
    storage.write_atomic(storage.join(uri, "dataset.json"), info.to_json())


@pytest.mark.parametrize(
    ("val_classes", "train_classes", "why"),
    [
        (
            [f"c{n}" for n in range(15)],
            [f"d{n}" for n in range(15)],
            "only in the former: d0",
        ),
        (
            [f"c{n}" for n in range(15)],
            [f"c{n}" for n in range(14, -1, -1)],
            "another order",
        ),
        ([f"c{n}" for n in range(15)], None, "(0 and 15"),
        (None, None, "has no labels"),
    ],
)
def test_the_losses_stay_when_neighbours_cannot_be_told(
    make_dataset: Callable[..., str],
    tmp_path: Path,
    val_classes: list[str] | None,
    train_classes: list[str] | None,
    why: str,
) -> None:
    val = make_dataset((9,), uri=str(tmp_path / "val"))
    train = make_dataset((9,), uri=str(tmp_path / "train"))
    name_classes(val, val_classes)
    name_classes(train, train_classes)
    result = evaluate(make_saved(), val=val, train=train)
    assert result["num_images"] == 9
    assert result["model_loss"] > 0
    assert "knn" not in result
    assert why in result["not_measured"]["knn"]
    assert why in report(result)


def test_shards_that_were_moved_are_named_with_the_option_that_gives_others(
    make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    val = make_dataset((9,), uri=str(tmp_path / "val"))
    name_classes(val, [f"c{n}" for n in range(15)])
    result = evaluate(make_saved(), val=val, train="shards/train")
    assert "--train URI" in result["not_measured"]["knn"]
    assert "relative to the folder" in result["not_measured"]["knn"]
    with pytest.raises(DataError, match=r"data\.val shards/val: .*relative.*--val URI"):
        evaluate(make_saved(), val="shards/val")


def test_a_tuning_file_of_another_machine_is_not_needed(
    make_dataset: Callable[..., str],
) -> None:
    saved = make_saved(tuning_file="/nowhere/tuned.toml")
    assert evaluate(saved, val=make_dataset((5,)))["num_images"] == 5


@pytest.mark.parametrize("size", [(32, 64), (16, 64), (64, 16)])
def test_images_that_are_not_square_go_only_where_they_can_be_run(
    size: tuple[int, int], tmp_path: Path
) -> None:
    saved = make_saved(size)
    for number, options in enumerate(({"to": "hf"}, {"to": "detectron2"})):
        out = tmp_path / str(number)
        with pytest.raises(
            ConfigError, match=f"{size[0]} x {size[1]} pixels.*square ones"
        ):
            export(saved, out, **options)
        assert not out.exists()
    export(saved, tmp_path / "timm", to="timm")
    export(saved, tmp_path / "hf", to="hf", part="encoder")
    from transformers import ViTMAEModel

    theirs = ViTMAEModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert theirs(torch.randn(1, 3, *size)).last_hidden_state.isfinite().all()


# ------------------------------------------------------------------------------------------ places


def test_places_for_results_are_tried_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (file, file / "below", tmp_path / "link" / "below"):
        with pytest.raises(
            ConfigError, match="is a file, and a folder is needed there"
        ):
            prepare_out(path, option="--out")
    with pytest.raises(ConfigError, match="is a folder, and a file is to be written"):
        prepare_file(tmp_path, option="--out")
    with pytest.raises(InfrastructureError, match="--out"):
        prepare_out(Path("/proc/nowhere/out"), option="--out")
    prepare_file(tmp_path / "new" / "x.png", option="--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "new"]
    assert list((tmp_path / "new").iterdir()) == []
    assert file.read_text() == "kept"


def test_the_folder_of_a_run_with_a_mistake_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toml = tmp_path / "run.toml"
    toml.write_bytes(b'\xef\xbb\xbf[run]\ndir = "from-file"\n')
    for words, launched, expected in (
        (["demo", "--run.dir", "a"], False, "a"),
        (["demo", "--run.dir=a", "--run.dir", "b"], False, "b"),
        (["demo", "--config", str(toml)], False, "from-file"),
        (["demo", "--run.dir", "a", "--config", str(toml)], False, "a"),
        (["demo", "--config", "nowhere.toml"], False, None),
        (["demo"], True, "runs/demo"),
        (["demmo"], True, None),
        (["demo", "--run.dir"], True, "runs/demo"),
    ):
        found = named_run_dir(words, is_launched=launched)
        assert found == (None if expected is None else Path(expected)), words
