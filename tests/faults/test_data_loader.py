"""What the loader does when a thread fails, when the data changed, when too much is bad."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.formats.webdataset_index import index_shard
from pipeline.formats.webdataset_writer import WebDatasetWriter
from pipeline.loader import Loader


def make_loader(dataset, **settings):
    return Loader(
        dataset,
        ViewConfig(height=32, width=32),
        OrderConfig(lanes=4, window=2),
        LoaderConfig(decoder="turbo", num_threads=1, **settings),
        seed=0,
        global_batch_size=16,
        micro_batch_size=4,
        device=torch.device("cpu"),
    )


class Poisoned:
    """A decoder that a sample breaks in a way that nobody foresaw."""

    def __init__(self, decoder, poison: bytes) -> None:
        self._decoder, self._poison = decoder, poison

        self.depth, self.device = decoder.depth, decoder.device

    def submit(self, images_B, boxes, out_BHW3=None):
        if any(image.tobytes() == self._poison for image in images_B):
            raise RuntimeError("codec state corrupted")
        return self._decoder.submit(images_B, boxes, out_BHW3)

    def close(self):
        self._decoder.close()


def test_a_thread_that_dies_names_the_samples_in_flight(make_dataset, crops):
    dataset = open_dataset(make_dataset())
    with make_loader(dataset) as loader:
        loader._decoders = [Poisoned(loader._decoders[0], crops[21])]
        stream = iter(loader)
        with pytest.raises(
            DataError,
            match=r"decode thread failed \(RuntimeError: codec state corrupted\)",
        ) as caught:
            list(islice(stream, 15))
    message = str(caught.value)
    named = json.loads(message[message.index("[") : message.index("]") + 1])
    assert 21 in named
    assert len(named) == 4
    assert "train-000001.tar" in message


def test_a_reading_thread_that_dies_names_them_too(make_dataset, monkeypatch):
    dataset = open_dataset(make_dataset())

    def broken(*_, **__):
        raise TypeError("not a row")

    with make_loader(dataset) as loader:
        monkeypatch.setattr(loader._reader, "read", broken)
        with pytest.raises(
            DataError,
            match=r"read thread failed \(TypeError: not a row\) on samples \[\d+, ",
        ):
            next(iter(loader))


@pytest.fixture
def changed(make_dataset, tmp_path):
    """Give a dataset, and one whose second and fourth shards hold other samples."""
    before = open_dataset(make_dataset(uri=str(tmp_path / "before")))
    after = open_dataset(
        make_dataset(uri=str(tmp_path / "after"), shard_sizes=(13, 16, 12, 19))
    )
    return before, after


def test_a_changed_dataset_is_refused_naming_the_shards(changed):
    before, after = changed
    with make_loader(before) as loader:
        state = loader.state_dict()
    with make_loader(after) as loader:
        with pytest.raises(
            DataError,
            match=r"in 2 of 4 shards: train-000001\.tar, train-000002\.tar\. Restore",
        ):
            loader.load_state_dict(state, trained_on=before.info)
        with pytest.raises(DataError, match=r"its samples changed\. Restore"):
            loader.load_state_dict(state)
        with pytest.raises(
            DataError, match=r"its samples changed\. Restore"
        ):  # not the description of that run
            loader.load_state_dict(state, trained_on=after.info)


def test_a_changed_dataset_may_be_accepted_at_the_next_epoch(changed):
    before, after = changed
    with make_loader(before) as loader:
        stream = iter(loader)
        for _ in range(8):
            next(stream)
        state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (0, 32)
    with make_loader(after) as loader:
        loader.load_state_dict(state, on_change="next-epoch")
        batch = next(iter(loader))
        assert (batch.epoch, batch.position) == (1, 0)
        assert loader.state_dict()["fingerprint"] == after.info.fingerprint


def test_one_flipped_bit_in_one_image_makes_another_dataset(
    make_dataset, crops, tmp_path
):
    """A shard that was made again with other pixels has another fingerprint, though every count is
    the same."""
    before = open_dataset(make_dataset())
    other = bytearray(crops[30])
    other[-10] ^= 1
    folder = Path(make_dataset(uri=str(tmp_path / "other")))
    from pipeline.dataset.writer import write_dataset
    from pipeline.images.header import probe

    shards = []
    for s in range(4):
        first = int(before.shard_starts[s])
        with WebDatasetWriter(str(folder / before.shard_name(s))) as writer:
            for i in range(first, first + int(before.shard_sizes[s])):
                image = bytes(other) if i == 30 else crops[i]
                writer.add(f"{i:06d}", image, probe(image), label=i % 15)
            shards.append(writer.close())
    write_dataset(str(folder), shards=shards, name="crops", container="webdataset")
    after = open_dataset(str(folder))
    with make_loader(before) as loader:
        state = loader.state_dict()
    with (
        make_loader(after) as loader,
        pytest.raises(DataError, match=r"in 1 of 4 shards: train-000002\.tar"),
    ):
        loader.load_state_dict(state, trained_on=before.info)


def test_bad_samples_in_a_row_end_the_run_with_reasons_and_shards(make_dataset):
    junk = dict.fromkeys(
        (n for n in range(60) if n % 10), b"\xff\xd8junk" * 20
    )  # there is a substitute for each
    dataset = open_dataset(make_dataset(replace=junk))
    with make_loader(dataset, max_bad_in_a_row=5, max_bad_share=1.0) as loader:
        stream = iter(loader)
        with pytest.raises(
            DataError,
            match=r"5 bad samples in a row \(limit 5\).*Reasons: .*Shards: train-",
        ) as caught:
            list(islice(stream, 200))
    assert "pipeline.verify --full" in str(caught.value)


def test_a_shard_with_nothing_good_is_named(make_dataset):
    dataset = open_dataset(
        make_dataset(replace=dict.fromkeys(range(13, 30), b"\xff\xd8junk" * 20))
    )
    with make_loader(dataset, max_bad_share=1.0, max_bad_in_a_row=1000) as loader:
        stream = iter(loader)
        with pytest.raises(
            DataError,
            match=r"of train-000001\.tar cannot be used, nor can the 16 after it",
        ):
            list(islice(stream, 200))


@pytest.mark.parametrize("part", ["data", "padding"])
def test_a_tar_cut_inside_a_member_is_told_with_the_counts(make_dataset, part):
    dataset = open_dataset(make_dataset())
    rows = dataset.lookup(np.array([15]))  # the third sample of the second shard
    begin, size = int(rows.offsets_B[0]), int(rows.sizes_B[0])
    cut = begin + 100 if part == "data" else begin + size + 1
    path = Path(dataset.uri) / dataset.shard_name(1)
    path.write_bytes(path.read_bytes()[:cut])
    wanted, came = (size, 100) if part == "data" else (-size % 512, 1)
    with pytest.raises(
        DataError,
        match=rf"train-000001\.tar: the file ends inside the {part} of '000015\.jpg': "
        rf"expected {wanted} bytes, "
        rf"got {came} at byte .*after \d+ whole members",
    ):
        index_shard(str(path))


def test_a_batch_keeps_its_size_and_its_place_whatever_is_bad(make_dataset):
    dataset = open_dataset(
        make_dataset(
            replace={n: b"" if n % 2 else b"no image" for n in range(0, 60, 7)}
        )
    )
    whole = open_dataset(dataset.uri)
    seen = []
    for each in (dataset, whole):
        with make_loader(each, max_bad_share=1.0) as loader:
            stream = iter(loader)
            batches = [next(stream) for _ in range(15)]
        seen.append(torch.cat([batch.images_BCHW for batch in batches]))
        assert [len(batch.sample_ids_B) for batch in batches] == [4] * 15
        assert sorted(
            np.concatenate([batch.sample_ids_B for batch in batches]).tolist()
        ) == list(range(60))
    assert torch.equal(*seen)  # the substitutes are the same in every run
