"""Decoders against Pillow's bicubic filter on 500 cuts of real photographs at the size that models
train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bench.photos import make_sources
from pipeline.config import LoaderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.decoders.base import decode_single
from pipeline.decoders.choose import build_decoder
from pipeline.reading.reader import ShardReader
from pipeline.sampling.boxes import draw_boxes

pytestmark = pytest.mark.slow
COUNT, BATCH = 500, 50


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Encoded images, their boxes, and what Pillow makes of them."""
    folder: Path = tmp_path_factory.mktemp("photographs")
    make_sources(folder, num_images=COUNT, variants=("originals",))
    dataset = open_dataset(str(folder / "originals"))
    rows = dataset.lookup(np.arange(COUNT))
    images, _ = ShardReader(dataset).read(rows)
    view, ids = ViewConfig(), np.arange(COUNT)
    boxes = draw_boxes(
        view,
        seed=0,
        epochs_B=0 * ids,
        sample_ids_B=ids,
        widths_B=rows.widths_B,
        heights_B=rows.heights_B,
    )
    pillows = [
        decode_single(image, boxes.take(slice(i, i + 1)), view)
        for i, image in enumerate(images)
    ]
    return images, boxes, np.stack(pillows)


@pytest.mark.parametrize(
    ("decoder_name", "interpolation", "mean_limit", "tail_limit"),
    [
        ("dali", "bicubic", 0.75, 8),
        ("turbo", "bicubic", 0.75, 8),
        ("turbo", "area", 4.0, 255),
        ("ffcv", "area", 4.0, 255),
    ],
)
def test_the_same_box_gives_the_same_picture(
    photographs, decoder_name, interpolation, mean_limit, tail_limit
):
    images, boxes, pillows = photographs
    decoder = build_decoder(
        LoaderConfig(decoder=decoder_name, num_threads=2),
        view=ViewConfig(interpolation=interpolation),
        max_batch_size=BATCH,
        local_world_size=1,
        device=torch.device("cpu"),
    )
    differences = []
    for first in range(0, COUNT, BATCH):
        part = slice(first, first + BATCH)
        decoded = decoder.decode(images[part], boxes.take(part))
        assert not decoded.bad
        differences.append(
            np.abs(decoded.pixels_BHW3.numpy().astype(np.int16) - pillows[part]).astype(
                np.uint8
            )
        )
    decoder.close()
    difference = np.concatenate(differences)
    print(
        f"{decoder_name} {interpolation}: mean {difference.mean():.3f}, 99.9% "
        f"{np.percentile(difference, 99.9)}"
    )
    assert difference.mean() <= mean_limit
    assert np.percentile(difference, 99.9) <= tail_limit
