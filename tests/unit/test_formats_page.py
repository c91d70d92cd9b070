"""docs/formats.md is true: the reader that stands on the page reads what the program writes.

The page's Python blocks are run as they stand, with none of the program's code, and must agree with
the program about real files and about thousands of random choices.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.config import count_visible
from model.masking import mask_patches
from pipeline.config import OrderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.formats.webdataset_writer import WebDatasetWriter
from pipeline.images.header import probe
from pipeline.images.refused import Reason
from pipeline.sampling.boxes import draw_boxes
from pipeline.sampling.order import Cursor, EpochOrder, Order
from pipeline.sampling.philox import (
    MAX_STREAM,
    Purpose,
    permutation,
    random_words,
    unit_float32,
)
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.engine.build import build_engine
from train.process.world import World
from train.report.meter import Window
from train.report.utilisation import utilisation

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs/formats.md"
SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Give the names that the page's blocks define."""
    names: dict[str, Any] = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL
    ):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_a_dataset_is_read(
    page: dict[str, Any], make_dataset: Callable[..., str], crops: list[bytes]
) -> None:
    folder = make_dataset((5, 1, 7))
    info, tables = page["read_dataset"](folder)
    hashes = [page["content_hash"](table) for table in tables]
    assert hashes == info["shards"]["content_hash"]
    assert page["fingerprint"](hashes) == info["fingerprint"]
    assert info["fingerprint"] == open_dataset(folder).info.fingerprint
    sample_id = 0
    for shard, size in enumerate(info["shards"]["num_samples"]):
        for row in range(size):
            stored = page["read_image"](folder, info, tables, shard, row)
            assert stored == crops[sample_id % len(crops)]
            sample_id += 1


def test_an_index_for_dali_is_as_the_page_says(
    tmp_path: Path, crops: list[bytes]
) -> None:
    with WebDatasetWriter(str(tmp_path / "train-000000.tar")) as writer:
        for number, image in enumerate(crops[:3]):
            writer.add(
                f"k{number}", image, probe(image), label=number, metadata={"class": "a"}
            )
        written = writer.close()
    first, *lines = written.dali_index.decode().splitlines()
    assert first == "v1.2 3"
    archive = (tmp_path / "train-000000.tar").read_bytes()
    for number, line in enumerate(lines):
        words = line.split()
        members = {
            words[i]: (archive[int(words[i + 1]) :][: int(words[i + 2])], words[i + 3])
            for i in range(0, len(words), 4)
        }
        assert members["jpg"] == (crops[number], f"k{number}.jpg")
        assert members["cls"] == (str(number).encode(), f"k{number}.cls")
        assert json.loads(members["json"][0]) == {"class": "a"}


@given(
    seed=SEEDS,
    purpose=st.sampled_from(list(Purpose)),
    epoch=EPOCHS,
    stream=st.integers(0, MAX_STREAM - 1),
    num_blocks=st.integers(1, 5),
)
def test_words_are_drawn(
    page: dict[str, Any], seed: int, purpose: Purpose, **named: int
) -> None:
    ours = random_words(
        seed=seed,
        purpose=purpose,
        epochs_n=named["epoch"],
        streams_n=named["stream"],
        num_blocks=named["num_blocks"],
    )
    drawn = page["draw"](seed, int(purpose), **named)
    assert drawn == ours[0].tolist()


@given(count=st.integers(0, 70), seed=SEEDS, epoch=EPOCHS, stream=st.integers(0, 2**40))
def test_numbers_are_permuted(
    page: dict[str, Any], count: int, seed: int, **named: int
) -> None:
    ours = permutation(count, seed=seed, purpose=Purpose.WINDOW, **named)
    assert (
        page["permutation"](count, seed, int(Purpose.WINDOW), **named) == ours.tolist()
    )


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    lanes=st.integers(1, 9),
    window=st.integers(0, 4),
    seed=SEEDS,
    epoch=st.integers(0, 5),
)
def test_the_order_is_followed(
    page: dict[str, Any],
    sizes: list[int],
    lanes: int,
    window: int,
    seed: int,
    epoch: int,
) -> None:
    config = OrderConfig(lanes=lanes, window=window)
    ours = EpochOrder(np.array(sizes), config=config, seed=seed, epoch=epoch)
    positions = np.arange(sum(sizes))
    read = [
        page["sample_at"](position, sizes, lanes, window, seed, epoch)
        for position in positions.tolist()
    ]
    assert read == ours.sample_ids(positions).tolist()


def test_ranks_take_positions_by_their_number(page: dict[str, Any]) -> None:
    sizes, batch, ranks = [7, 9, 5], 6, 3
    for rank in range(ranks):
        order = Order(
            np.array(sizes),
            config=OrderConfig(lanes=4, window=2),
            seed=3,
            global_batch_size=batch,
            rank=rank,
            world_size=ranks,
        )
        cursor = Cursor()
        for number in range(8):
            batch_of_rank = order.rank_batch(cursor)
            stream = [
                n
                for n in range(number * batch, (number + 1) * batch)
                if n % ranks == rank
            ]
            expected = [
                page["sample_at"](n % sum(sizes), sizes, 4, 2, 3, n // sum(sizes))
                for n in stream
            ]
            assert batch_of_rank.sample_ids_B.tolist() == expected
            cursor = batch_of_rank.end


@settings(max_examples=60)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    areas=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=SEEDS,
    epoch=EPOCHS,
    sample_id=st.integers(0, MAX_STREAM - 1),
)
def test_boxes_and_flips_are_drawn(
    page: dict[str, Any],
    width: int,
    height: int,
    areas: tuple[float, float],
    seed: int,
    epoch: int,
    sample_id: int,
) -> None:
    view = ViewConfig(min_area=min(areas), max_area=max(areas))
    ours = draw_boxes(
        view,
        seed=seed,
        epochs_B=np.array([epoch]),
        sample_ids_B=np.array([sample_id]),
        widths_B=[width],
        heights_B=[height],
    )
    found = page["crop_box"](width, height, view.model_dump(), seed, epoch, sample_id)
    box = (ours.tops_B, ours.lefts_B, ours.heights_B, ours.widths_B)
    assert found == tuple(int(values[0]) for values in box)
    flipped = page["is_flipped"](view.model_dump(), seed, epoch, sample_id)
    assert flipped == bool(ours.flips_B[0])


@pytest.mark.parametrize("ratio", [0.75, 0.6, 0.9])
def test_masks_are_drawn(page: dict[str, Any], ratio: float) -> None:
    num_patches, seed, epoch, sample_id = 196, 11, 2, 2**33 + 7
    num_visible = count_visible(num_patches, ratio)
    words = random_words(
        seed=seed,
        purpose=Purpose.MASK,
        epochs_n=epoch,
        streams_n=sample_id,
        num_blocks=num_patches // 4,
    )
    ours = mask_patches(torch.from_numpy(unit_float32(words)), num_visible)
    found = page["visible_patches"](num_patches, num_visible, seed, epoch, sample_id)
    assert found == ours.ids_keep_BV[0].tolist()


def test_every_key_of_metrics_is_explained() -> None:
    reporting = REPOSITORY / "train/loop/reporting.py"
    (log_line,) = (
        node
        for node in ast.walk(ast.parse(reporting.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "log_line"
    )
    written = {
        key.value
        for node in ast.walk(log_line)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    written |= Window(steps=1, images=1, elapsed_s=1.0, wait_s=0.0).rates().keys()
    written |= utilisation(1, images_per_s=1.0, world_size=1, peak=1.0).keys()
    assert len(written) > 15
    table = PAGE.read_text().split("### `metrics.jsonl`")[1].split("\n#")[0]
    names = " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    assert set(re.findall(r"`([^`]+)`", names)) == written


def test_every_reason_is_listed() -> None:
    table = PAGE.read_text().split("### Reasons")[1].split("\n#")[0]
    listed = re.findall(
        r"`([^`]+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    )
    assert sorted(listed) == sorted(Reason)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("scale", torch.full((2,), 0.5))


def test_a_checkpoint_is_read(page: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "engine": {"kind": "torch", "precision": "fp32"},
        }
    )
    torch.manual_seed(0)
    engine = build_engine(config, model=Small(), resume=None, world=World())
    store = CheckpointStore(str(tmp_path), keep_last=1)
    folder = Path(store.save(7, engine, {"images_seen": 7}, world=World()))
    state, tensors = page["read_checkpoint"](folder)
    assert (state["step"], state["client"]["images_seen"]) == (7, 7)
    exported = engine.export_state().tensors
    expected = {
        (kind, name): tensor.numpy()
        for name, kinds in exported.items()
        for kind, tensor in kinds.items()
    }
    assert tensors.keys() == expected.keys()
    for entry, values in expected.items():
        np.testing.assert_array_equal(tensors[entry], values)

    weights = folder / "weight-00000-of-00001.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(AssertionError):
        page["read_checkpoint"](folder)
