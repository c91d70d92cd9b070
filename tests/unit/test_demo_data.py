"""The demo's pictures: halves that do not overlap, splits that do not move."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError, DataError
from train.demo.pictures import (
    MARKER,
    PHOTOS,
    CropPlan,
    boxes,
    cut_photos,
    photo_path,
    split_folder,
)


@pytest.mark.parametrize(
    ("width", "height"), [(640, 427), (427, 640), (512, 512), (400, 300)]
)
def test_training_and_held_out_crops_share_no_pixel(width: int, height: int):
    plan = CropPlan()
    seen = {half: np.zeros((height, width), dtype=int) for half in ("train", "val")}
    for half, pixels in seen.items():
        found = list(boxes(width, height, plan=plan, half=half))
        assert found
        for left, top, right, bottom in found:
            assert (right - left, bottom - top) == (plan.size, plan.size)
            assert right <= width
            assert bottom <= height
            pixels[top:bottom, left:right] += 1
    assert not np.any((seen["train"] > 0) & (seen["val"] > 0))
    assert seen["val"].max() == 1, "held-out crops overlap each other"


def test_the_photographs_are_cut_into_class_folders(tmp_path: Path):
    plan = CropPlan(size=128, train_stride=128)
    pictures = cut_photos(tmp_path, plan)
    labels = {Path(name).stem for name in PHOTOS}
    assert len(labels) == pictures.num_classes == 15
    for folder, count in (
        (pictures.train, pictures.num_train),
        (pictures.val, pictures.num_val),
    ):
        assert {path.name for path in folder.iterdir()} == labels
        files = sorted(folder.rglob("*.jpg"))
        assert len(files) == count
        with Image.open(files[0]) as crop:
            assert (crop.size, crop.mode, crop.format) == ((128, 128), "RGB", "JPEG")


def test_finished_pictures_are_left_alone_and_another_plan_is_not(tmp_path: Path):
    plan = CropPlan(size=128, train_stride=128)
    first = cut_photos(tmp_path, plan)
    victim = next(first.train.rglob("*.jpg"))
    victim.write_bytes(b"changed")
    assert cut_photos(tmp_path, plan) == first
    assert victim.read_bytes() == b"changed"
    (tmp_path / MARKER).unlink()  # as if the first run had been killed
    assert cut_photos(tmp_path, plan) == first
    assert victim.read_bytes() != b"changed"


def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match="--src"):
        photo_path("no_such_package/data/x.png")


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


def test_a_split_by_name_does_not_move_when_pictures_are_added(tmp_path: Path):
    fill(tmp_path / "src", [f"class{i % 3}/{i}.png" for i in range(60)])
    before = split_folder(tmp_path / "src", tmp_path / "out")
    assert before.num_classes == 3
    assert before.num_train + before.num_val == 60
    held_out = names_in(before.val)
    fill(tmp_path / "src", [f"class{i % 3}/{i}.png" for i in range(60, 120)])
    after = split_folder(tmp_path / "src", tmp_path / "out")
    assert held_out <= names_in(after.val)
    assert names_in(after.train).isdisjoint(names_in(after.val))
    assert after.num_train + after.num_val == 120


def test_a_picture_that_went_leaves_no_link(tmp_path: Path):
    fill(tmp_path / "src", [f"{i}.png" for i in range(20)])
    split_folder(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "3.png").unlink()
    after = split_folder(tmp_path / "src", tmp_path / "out")
    assert "3.png" not in names_in(after.train) | names_in(after.val)
    assert after.num_classes == 0


def test_two_pictures_give_one_on_each_side(tmp_path: Path):
    fill(tmp_path / "src", ["a.png", "b.png"])
    pictures = split_folder(tmp_path / "src", tmp_path / "out")
    assert (pictures.num_train, pictures.num_val) == (1, 1)


def test_too_few_pictures_and_no_folder_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such folder"):
        split_folder(tmp_path / "none", tmp_path / "out")
    fill(tmp_path / "src", ["a.png"])
    (tmp_path / "src" / "notes.txt").write_text("not a picture")
    with pytest.raises(DataError, match="found 1 pictures"):
        split_folder(tmp_path / "src", tmp_path / "out")
    shutil.rmtree(tmp_path / "src")
