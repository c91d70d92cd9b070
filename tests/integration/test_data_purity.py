"""One dataset on local disk and in object storage, read by one, two and four ranks, interrupted:
one sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.loader import Loader

pytestmark = pytest.mark.remote

GLOBAL = 16
BATCHES = 12
"""Global batches that are compared: three epochs of 60 samples and the beginning of the fourth."""


@pytest.fixture
def datasets(make_dataset, s3_bucket):
    return {
        "local": open_dataset(make_dataset()),
        "s3": open_dataset(make_dataset(uri=f"{s3_bucket}/crops")),
    }


def read(dataset, *, world, cache_dir, state=None, batches, decoder="turbo"):
    """Read whole global batches with every rank; return what was seen by position, and the state
    after them."""
    seen, states = {}, []
    for rank in range(world):
        loader = Loader(
            dataset,
            ViewConfig(height=32, width=32),
            OrderConfig(lanes=4, window=2),
            LoaderConfig(decoder=decoder, num_threads=1, cache_dir=str(cache_dir)),
            seed=7,
            rank=rank,
            world_size=world,
            global_batch_size=GLOBAL,
            micro_batch_size=2,
            device=torch.device("cpu"),
        )
        if state is not None:
            loader.load_state_dict(state)
        with loader:
            stream = iter(loader)
            for _ in range(batches):
                parts = [next(stream) for _ in range(GLOBAL // world // 2)]
                begin = parts[0].epoch * dataset.info.num_samples + parts[0].position
                records = [record for part in parts for record in records_of(part)]
                first = (rank - begin) % world
                for k, record in enumerate(records):
                    place = begin + first + k * world
                    assert place not in seen
                    seen[place] = record
            states.append(loader.state_dict())
    assert all(each == states[0] for each in states)
    return seen, states[0]


def records_of(batch):
    (boxes,) = batch.boxes
    columns = (
        batch.sample_ids_B,
        boxes.tops_B,
        boxes.lefts_B,
        boxes.heights_B,
        boxes.widths_B,
        boxes.flips_B,
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_every_way_of_reading_gives_one_sequence_position_by_position(
    datasets, tmp_path
):
    whole, _ = read(datasets["local"], world=1, cache_dir=tmp_path, batches=BATCHES)
    assert sorted(whole) == list(range(GLOBAL * BATCHES))
    for epoch in range(3):
        assert sorted(whole[60 * epoch + p][0] for p in range(60)) == list(range(60))
    random = np.random.default_rng(0)
    for world in (1, 2, 4):
        for where, dataset in datasets.items():
            # Read in four pieces: stopped at three random places, and gone on with from the state
            # alone.
            stops = sorted(
                random.choice(np.arange(1, BATCHES), 3, replace=False).tolist()
            )
            pieces, state = {}, None
            for batches in np.diff([0, *stops, BATCHES]).tolist():
                cache_dir = tmp_path / f"{where}-{world}"
                piece, state = read(
                    dataset,
                    world=world,
                    cache_dir=cache_dir,
                    state=state,
                    batches=batches,
                )
                pieces |= piece
            assert pieces == whole, f"{where}, {world} ranks, stopped after {stops}"


def test_a_run_goes_on_exactly_elsewhere_and_with_another_decoder(datasets, tmp_path):
    """Local on two ranks with one decoder, then from object storage on four with the other."""
    whole, _ = read(datasets["local"], world=1, cache_dir=tmp_path, batches=BATCHES)
    first, state = read(
        datasets["local"], world=2, cache_dir=tmp_path, batches=5, decoder="dali"
    )
    rest, _ = read(
        datasets["s3"], world=4, cache_dir=tmp_path, state=state, batches=BATCHES - 5
    )
    assert first | rest == whole
