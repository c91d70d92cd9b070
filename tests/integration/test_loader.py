"""The loader on real shards: pure in (seed, epoch, position), whatever the ranks, decoder, storage
or interruption."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.loader import Loader, read_samples
from pipeline.loader.transfer import DeviceCopier, scale_fused
from pipeline.sampling.boxes import draw_boxes

CPU = torch.device("cpu")
VIEW = ViewConfig(height=32, width=32)
ORDER = OrderConfig(lanes=4, window=2)
GLOBAL = 16
DECODERS = ["dali", "turbo", "ffcv"]


def view_of(decoder):
    """FFCV's kernels have one filter, which DALI lacks."""
    return (
        VIEW.model_copy(update={"interpolation": "area"}) if decoder == "ffcv" else VIEW
    )


def make_loader(
    dataset, *, rank=0, world=1, micro=4, decoder="turbo", state=None, **settings
):
    loader = Loader(
        dataset,
        view_of(decoder),
        ORDER,
        LoaderConfig(decoder=decoder, num_threads=1, **settings),
        seed=3,
        rank=rank,
        world_size=world,
        global_batch_size=GLOBAL,
        micro_batch_size=micro,
        device=CPU,
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader


def records(batch):
    """What was seen, one tuple an image: sample, epoch, box, flip."""
    (boxes,) = batch.boxes
    columns = (
        batch.sample_ids_B,
        batch.epochs_B,
        boxes.tops_B,
        boxes.lefts_B,
        boxes.heights_B,
        boxes.widths_B,
    )
    return list(
        zip(*(column.tolist() for column in (*columns, boxes.flips_B)), strict=True)
    )


def take(loader, global_batches, *, world=1, micro=4):
    """Read whole global batches of one rank: a list of record lists."""
    stream, seen = iter(loader), []
    for _ in range(global_batches):
        seen.append(
            [
                record
                for _ in range(GLOBAL // world // micro)
                for record in records(next(stream))
            ]
        )
    return seen


@pytest.fixture
def dataset(make_dataset):
    return open_dataset(make_dataset())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("world", [2, 4])
def test_batches_are_the_same_at_every_world_size_and_with_every_decoder(
    dataset, world, decoder
):
    with make_loader(dataset) as loader:
        alone = take(loader, 6)
    union = [[] for _ in alone]
    for rank in range(world):
        with make_loader(
            dataset, rank=rank, world=world, micro=2, decoder=decoder
        ) as loader:
            for batch, mine in zip(
                union, take(loader, 6, world=world, micro=2), strict=True
            ):
                batch += mine
    assert [sorted(batch) for batch in union] == [sorted(batch) for batch in alone]


@pytest.mark.parametrize("stopped_after", [1, 3, 5])
def test_resume_goes_on_exactly_also_at_another_world_size(dataset, stopped_after):
    with make_loader(dataset) as loader:
        whole = take(loader, 8)
    with make_loader(dataset) as loader:
        before = take(loader, stopped_after)
        state = loader.state_dict()
    assert set(state) == {"seed", "epoch", "position", "fingerprint"}
    union = [[] for _ in range(8 - stopped_after)]
    for rank in range(2):
        with make_loader(dataset, rank=rank, world=2, state=state) as loader:
            for batch, mine in zip(
                union, take(loader, 8 - stopped_after, world=2), strict=True
            ):
                batch += mine
    assert before + [sorted(batch) for batch in union] == before + [
        sorted(batch) for batch in whole[stopped_after:]
    ]
    assert before == whole[:stopped_after]


def pixels_by_sample(loader, micro_batches):
    """Read micro-batches: the pixels of each (sample, epoch)."""
    stream, seen = iter(loader), {}
    for _ in range(micro_batches):
        batch = next(stream)
        names = zip(batch.sample_ids_B.tolist(), batch.epochs_B.tolist(), strict=True)
        seen |= {
            name: image.numpy().tobytes()
            for name, image in zip(names, batch.images_BCHW, strict=True)
        }
    return seen


@pytest.mark.parametrize("decoder", DECODERS)
def test_pixels_are_the_same_bit_for_bit_after_a_resume_and_at_another_world_size(
    make_dataset, decoder
):
    # With images that the fast path refuses, which must not depend on their neighbours in a batch
    # either.
    dataset = open_dataset(make_dataset(replace={5: b"junk" * 30, 33: b""}))
    with make_loader(dataset, decoder=decoder) as loader:
        whole = pixels_by_sample(loader, 32)
    with make_loader(dataset, decoder=decoder) as loader:
        seen = pixels_by_sample(loader, 12)
        state = loader.state_dict()
    for rank in range(2):
        with make_loader(
            dataset, rank=rank, world=2, micro=8, decoder=decoder, state=state
        ) as loader:
            seen |= pixels_by_sample(loader, 5)
    assert seen == whole


def test_a_batch_of_pixels_stays_valid_until_the_next_but_one(dataset):
    with make_loader(dataset) as loader:
        expected = [
            batch.images_BCHW.clone()
            for batch, _ in zip(loader, range(12), strict=False)
        ]
    for held in (2, 3):
        with Loader(
            dataset,
            VIEW,
            ORDER,
            LoaderConfig(decoder="turbo", num_threads=1),
            seed=3,
            global_batch_size=GLOBAL,
            micro_batch_size=4,
            device=CPU,
            dtype=torch.uint8,
        ) as loader:
            stream, batches, addresses = iter(loader), [], set()
            for number in range(12):
                batches = [*batches, next(stream).images_BCHW][-held:]
                addresses.add(batches[-1].data_ptr())
                first = number + 1 - len(batches)
                if held == 2:  # the newest and the one before it
                    for batch, whole in zip(batches, expected[first:], strict=False):
                        pixels_BHW3 = batch.permute(0, 2, 3, 1)
                        assert torch.equal(
                            DeviceCopier(device=CPU, dtype=torch.float32).normalise(
                                pixels_BHW3
                            ),
                            whole,
                        )
            assert len(addresses) < 12  # memory was used again


def test_state_moves_only_with_whole_global_batches(dataset):
    with make_loader(dataset) as loader:
        stream = iter(loader)
        positions = []
        for _ in range(9):
            next(stream)
            positions.append(loader.state_dict()["position"])
    assert positions == [0, 0, 0, 16, 16, 16, 16, 32, 32]


def test_images_and_labels_are_those_of_the_samples(dataset):
    with make_loader(dataset) as loader:
        batch = next(iter(loader))
    assert batch.images_BCHW.shape == (4, 3, 32, 32)
    assert batch.images_BCHW.dtype == torch.float32
    assert batch.labels_B.tolist() == [
        sample_id % 15 for sample_id in batch.sample_ids_B.tolist()
    ]
    replayed = read_samples(
        dataset,
        batch.sample_ids_B,
        VIEW,
        LoaderConfig(decoder="turbo"),
        seed=3,
        device=CPU,
    )
    assert torch.equal(replayed.images_BCHW, batch.images_BCHW)
    dali = read_samples(
        dataset,
        batch.sample_ids_B,
        VIEW,
        LoaderConfig(decoder="dali"),
        seed=3,
        device=CPU,
    )
    assert (dali.images_BCHW - batch.images_BCHW).abs().mean() < 0.02
    assert -2.2 < batch.images_BCHW.min() < batch.images_BCHW.max() < 2.7


def test_normalising_is_imagenets(dataset):
    pixels_BHW3 = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 4, 3)
    images_BCHW = DeviceCopier(device=CPU, dtype=torch.float32).normalise(pixels_BHW3)
    expected = (
        pixels_BHW3.double() / 255 - torch.tensor([0.485, 0.456, 0.406])
    ) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(images_BCHW.permute(0, 2, 3, 1).double(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_form_of_normalising_gives_the_same(dtype):
    pixels_BHW3 = torch.arange(4 * 8 * 8 * 3, dtype=torch.uint8).reshape(4, 8, 8, 3)
    copier = DeviceCopier(device=CPU, dtype=dtype)
    plain = copier.normalise(pixels_BHW3)
    fused = scale_fused(
        pixels_BHW3.permute(0, 3, 1, 2), copier._scale_C11, copier._shift_C11, dtype
    )
    assert fused.dtype == plain.dtype == dtype
    assert fused.stride() == plain.stride()
    assert torch.allclose(
        fused.double(), plain.double(), atol=1e-6, rtol=torch.finfo(dtype).eps
    )


def test_another_dataset_is_refused(dataset, make_dataset, tmp_path):
    other = open_dataset(make_dataset((13, 17, 11, 18), uri=str(tmp_path / "other")))
    with make_loader(dataset) as loader:
        state = loader.state_dict()
    with (
        pytest.raises(DataError, match="its samples changed"),
        make_loader(other, state=state),
    ):
        pass


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_bad_image_is_replaced_counted_and_reported(make_dataset, crops, decoder):
    folder = make_dataset(
        replace={5: b"\xff\xd8\xff\xe0 junk" * 30, 21: crops[21][:200], 40: b"x"}
    )
    dataset = open_dataset(folder)
    with make_loader(dataset, decoder=decoder) as loader:
        whole = take(loader, 4)
        report = loader.report.to_json()
    assert sum(len(batch) for batch in whole) == 4 * GLOBAL
    seen_bad = [
        record[0] for batch in whole for record in batch if record[0] in (5, 21, 40)
    ]
    # The loader works ahead of what was taken.
    assert report["num_bad"] >= len(seen_bad) >= 3
    assert {(entry["shard"], entry["key"]) for entry in report["first"]} == {
        ("train-000000.tar", "000005"),
        ("train-000001.tar", "000021"),
        ("train-000002.tar", "000040"),
    }
    batch = read_samples(
        dataset,
        np.array([5, 6]),
        view_of(decoder),
        LoaderConfig(decoder=decoder),
        device=CPU,
    )
    assert batch.labels_B.tolist() == [6, 6]
    assert (batch.images_BCHW[0].std() > 0.01).item()


def test_the_substitute_is_the_same_with_every_decoder(make_dataset):
    dataset = open_dataset(make_dataset(replace={5: b"junk" * 30, 6: b""}))
    pictures = [
        read_samples(
            dataset,
            np.array([5]),
            view_of(decoder),
            LoaderConfig(decoder=decoder),
            device=CPU,
        )
        for decoder in DECODERS
    ]
    assert [picture.labels_B.tolist() for picture in pictures] == [[7], [7], [7]]
    assert (pictures[0].images_BCHW - pictures[1].images_BCHW).abs().mean() < 0.02
    assert (
        pictures[2].images_BCHW - pictures[1].images_BCHW
    ).abs().mean() < 0.2  # another filter


def test_too_many_bad_images_stop_the_run(make_dataset):
    dataset = open_dataset(
        make_dataset(replace=dict.fromkeys(range(0, 60, 3), b"junk"))
    )
    with (
        make_loader(dataset, max_bad_share=0.0005) as loader,
        pytest.raises(
            DataError, match=r"bad samples among the last 10,000.*Reasons: not an image"
        ),
    ):
        take(loader, 4)


def test_hashes_are_checked_when_asked(make_dataset, crops):
    flipped = bytearray(crops[7])
    flipped[len(flipped) // 2] ^= 1
    folder = make_dataset()
    dataset = open_dataset(folder)
    rows = dataset.lookup(np.array([7]))
    path = Path(folder) / "train-000000.tar"
    data = bytearray(path.read_bytes())
    start = int(rows.offsets_B[0])
    data[start : start + len(flipped)] = flipped
    path.write_bytes(data)
    with make_loader(dataset, verify_hashes="on") as loader:
        take(loader, 4)
        first = loader.report.to_json()["first"][0]
    assert (first["key"], first["reason"]) == ("000007", "hash mismatch")


def test_a_bomb_is_refused_by_what_the_manifest_says(dataset):
    with make_loader(
        dataset, max_pixels=60 * 60, max_bad_share=1.0, max_bad_in_a_row=1000
    ) as loader:
        with pytest.raises(DataError, match="cannot be used"):
            take(loader, 4)
        assert loader.report.to_json()["reasons"].keys() <= {"too many pixels"}


def test_a_shard_that_was_cut_is_named(make_dataset):
    folder = make_dataset()
    dataset = open_dataset(folder)
    path = Path(folder) / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    with (
        make_loader(dataset) as loader,
        pytest.raises(DataError, match=r"train-000002.tar has \d+ bytes, the manifest"),
    ):
        take(loader, 4)


def test_closing_ends_the_threads(dataset):
    before = set(threading.enumerate())
    loader = make_loader(dataset)
    next(iter(loader))
    loader.close()
    loader.close()
    left = [
        thread
        for thread in threading.enumerate()
        if thread not in before and thread.name.startswith("loader")
    ]
    assert left == []


def test_stages_count_what_passed(dataset):
    with make_loader(dataset) as loader:
        take(loader, 3)
        stages = loader.stats.snapshot()
        assert loader.wait_s > 0
    assert stages["copy"]["items"] == 3 * GLOBAL
    assert stages["decode"]["items"] >= 3 * GLOBAL
    assert stages["read"]["bytes"] > 0
    assert stages["decode"]["busy_s"] > 0


def test_sizes_that_cannot_work_are_refused(dataset):
    with pytest.raises(
        ConfigError, match=r"not a multiple of train\.micro_batch_size 5"
    ):
        make_loader(dataset, micro=5)


def test_boxes_are_those_of_the_pure_function(dataset):
    with make_loader(dataset) as loader:
        batch = next(iter(loader))
    rows = dataset.lookup(batch.sample_ids_B)
    boxes = draw_boxes(
        VIEW,
        seed=3,
        epochs_B=batch.epochs_B,
        sample_ids_B=batch.sample_ids_B,
        widths_B=rows.widths_B,
        heights_B=rows.heights_B,
    )
    assert boxes.tops_B.tolist() == batch.boxes[0].tops_B.tolist()
    assert boxes.flips_B.tolist() == batch.boxes[0].flips_B.tolist()
