"""The same dataset as tars and as betons: one order, one set of boxes, the same pixels, one state
to resume from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import Manifest, open_dataset
from pipeline.dataset.writer import write_dataset
from pipeline.formats.beton_writer import BetonWriter
from pipeline.formats.table import FORMATS
from pipeline.images.header import probe
from pipeline.loader import Loader, read_samples

CPU = torch.device("cpu")
VIEW = ViewConfig(height=32, width=32)
GLOBAL = 16


@pytest.fixture
def pair(make_dataset: Callable[..., str], tmp_path: Path) -> tuple[Manifest, Manifest]:
    """Give the same 60 samples as tars and as betons."""
    tars = make_dataset()
    convert(tars, str(tmp_path / "betons"), ConvertSettings(format="ffcv"), workers=1)
    return open_dataset(tars), open_dataset(str(tmp_path / "betons"))


def make_loader(dataset, *, rank=0, world=1, decoder="turbo", state=None, **settings):
    loader = Loader(
        dataset,
        VIEW.model_copy(update={"interpolation": "area"})
        if decoder == "ffcv"
        else VIEW,
        OrderConfig(lanes=4, window=2),
        LoaderConfig(decoder=decoder, num_threads=1, **settings),
        seed=7,
        rank=rank,
        world_size=world,
        global_batch_size=GLOBAL,
        micro_batch_size=4,
        device=CPU,
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader


def take(loader, batches, *, world=1):
    """Read global batches of one rank: records of (sample, epoch, box, flip), in order, and the
    pixels."""
    stream, seen, pixels = iter(loader), [], []
    for _ in range(batches * GLOBAL // world // 4):
        batch = next(stream)
        (boxes,) = batch.boxes
        columns = (
            batch.sample_ids_B,
            batch.epochs_B,
            boxes.tops_B,
            boxes.lefts_B,
            boxes.heights_B,
            boxes.widths_B,
        )
        seen += list(
            zip(*(column.tolist() for column in (*columns, boxes.flips_B)), strict=True)
        )
        pixels.append(batch.images_BCHW)
    return seen, torch.cat(pixels)


@pytest.mark.parametrize("decoder", ["turbo", "dali", "ffcv"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_tars_and_betons_give_the_same_batches(pair, world, decoder):
    for rank in range(world):
        taken = []
        for dataset in pair:
            with make_loader(
                dataset, rank=rank, world=world, decoder=decoder
            ) as loader:
                taken.append(take(loader, 5, world=world))
        (tar_records, tar_pixels), (beton_records, beton_pixels) = taken
        assert tar_records == beton_records
        assert torch.equal(tar_pixels, beton_pixels)


def test_a_run_on_tars_goes_on_with_betons_at_another_world_size(pair):
    tars, betons = pair
    with make_loader(tars) as loader:
        whole, _ = take(loader, 6)
    with make_loader(tars) as loader:
        take(loader, 2)
        state = loader.state_dict()
    rest = []
    for rank in range(2):
        with make_loader(betons, rank=rank, world=2, state=state) as loader:
            rest += take(loader, 4, world=2)[0]
    assert sorted(rest) == sorted(whole[2 * GLOBAL :])


def test_hashes_of_betons_are_checked(pair):
    _, betons = pair
    with make_loader(betons, verify_hashes="on") as loader:
        records, _ = take(loader, 1)
    assert len(records) == GLOBAL
    assert loader.report.num_bad == 0


def test_a_damaged_image_in_a_beton_is_replaced_and_named(crops, tmp_path):
    with BetonWriter(str(tmp_path / "d" / "train-000000.beton")) as writer:
        for number, image in enumerate(crops[:16]):
            stored = image if number != 5 else image[: len(image) // 2]
            writer.add(f"{number:06d}", stored, probe(image), label=number)
        shard = writer.close()
    write_dataset(str(tmp_path / "d"), shards=[shard], name="d", container="ffcv")
    dataset = open_dataset(str(tmp_path / "d"))
    batch = read_samples(
        dataset, np.array([5]), VIEW, LoaderConfig(decoder="turbo"), device=CPU
    )
    assert batch.labels_B.tolist() == [6]
    with make_loader(dataset, max_bad_share=1.0) as loader:
        take(loader, 1)
    named = {
        (entry["shard"], entry["key"]) for entry in loader.report.to_json()["first"]
    }
    assert named == {("train-000000.beton", "000005")}


@pytest.mark.parametrize("decoder", ["turbo", "dali", "ffcv"])
@pytest.mark.parametrize("write_mode", ["raw", "smart"])
def test_raw_pixels_are_cut_like_lossless_files(
    make_dataset, crops, tmp_path, decoder, write_mode
):
    settings = ConvertSettings(
        format="ffcv", write_mode=write_mode, smart_threshold_bytes=90 * 90 * 3
    )
    convert(make_dataset(), str(tmp_path / "raw"), settings, workers=1)
    raw = open_dataset(str(tmp_path / "raw"))
    formats = {
        FORMATS[code]
        for s in range(raw.info.num_shards)
        for code in raw.shard_table(s).formats
    }
    assert formats == ({"raw"} if write_mode == "raw" else {"raw", "jpeg"})
    convert(str(tmp_path / "raw"), str(tmp_path / "png"), ConvertSettings(), workers=1)
    png = open_dataset(str(tmp_path / "png"))
    taken = []
    for dataset in (raw, png):
        with make_loader(dataset, decoder=decoder) as loader:
            taken.append(take(loader, 5))
        assert loader.report.num_bad == 0
    (raw_records, raw_pixels), (png_records, png_pixels) = taken
    assert raw_records == png_records
    # PNG goes through Pillow in some decoders; its area filter weighs the pixels at the edges of
    # areas another way.
    assert (raw_pixels - png_pixels).abs().mean() < (
        0.05 if decoder == "ffcv" else 0.01
    )
