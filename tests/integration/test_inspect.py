"""The contact sheet and the figures of a real dataset."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from PIL import Image

from pipeline.dataset import open_dataset
from pipeline.inspect import contact_sheet, summary, survey


def test_figures_are_the_datasets(make_dataset, crops):
    dataset = open_dataset(make_dataset())
    figures = summary(dataset, survey(dataset))
    assert (figures["num_samples"], figures["num_shards"], figures["num_classes"]) == (
        60,
        4,
        15,
    )
    assert figures["formats"] == {"jpeg": 60}
    assert figures["image_bytes"][0] == min(len(crop) for crop in crops)
    assert figures["image_bytes"][4] == max(len(crop) for crop in crops)


def test_pictures_are_spread_over_the_dataset_and_a_bad_one_is_said(make_dataset):
    dataset = open_dataset(make_dataset(replace={59: b"junk"}))
    sheet = contact_sheet(dataset, count=7)
    assert len(sheet) == 7
    assert sheet[0][0] == "000000\n0"
    assert "bad" in sheet[-1][0]
    assert not sheet[-1][1].any()
    assert all(np.ptp(picture) > 0 for _, picture in sheet[:-1])


def test_the_command_writes_the_sheet(make_dataset, tmp_path):
    out = tmp_path / "sheet.png"
    command = [
        sys.executable,
        "-m",
        "pipeline.inspect",
        make_dataset(),
        "--out",
        str(out),
        "--count",
        "9",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_samples"] == 60
    with Image.open(out) as picture:
        assert picture.width > 500
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_folder_that_is_no_dataset_ends_with_the_data_code(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pipeline.inspect",
        str(tmp_path),
        "--out",
        str(tmp_path / "sheet.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert str(tmp_path) in done.stderr
