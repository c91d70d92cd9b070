"""Saving beside training: what was captured is what is written, one save at a time, failures come
out at the end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.limits import HANG_S
from train.checkpoint.files import find_steps
from train.checkpoint.saver import Saver
from train.checkpoint.state import load_weights
from train.checkpoint.state_buffers import StateBuffers, safetensors_header
from train.checkpoint.store import CheckpointStore, CheckpointWriteError
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import build_engine
from train.engine.named_state import list_tensors
from train.process.world import World

WORLD = World()
CONFIG = RunConfig.model_validate(
    {
        "train": {"steps": 9, "global_batch_size": 2, "micro_batch_size": 2},
        "engine": {"kind": "torch", "precision": "fp32"},
    }
)


class Output(NamedTuple):
    loss: Tensor


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> Output:
        return Output((self.layer(images_BCHW) - noise_BN).square().mean())


def make_engine() -> Engine:
    torch.manual_seed(0)
    return build_engine(CONFIG, model=Small(), resume=None, world=WORLD)


def train(engine: Engine) -> Tensor:
    engine.forward_backward(torch.ones(2, 3), torch.ones(2, 4))
    engine.step(0.1)
    return engine.module.state_dict()["layer.weight"].clone()


def make_saver(
    folder: Path,
    *,
    mode: Literal["async", "sync"] = "async",
    on_phase: Callable[[str], None] | None = None,
) -> Saver:
    return Saver(
        CheckpointStore(str(folder), keep_last=9, on_phase=on_phase),
        world=WORLD,
        mode=mode,
    )


class Gate:
    """Holds a writer at a phase until it is let through."""

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, phase: str) -> None:
        if phase == self._phase:
            self.reached.set()
            assert self.opened.wait(HANG_S)


def test_training_goes_on_while_what_was_captured_is_written(tmp_path: Path):
    gate = Gate("written")
    saver, engine = make_saver(tmp_path, on_phase=gate), make_engine()
    captured = train(engine)
    saver.start(1, engine, {"position": 1})
    assert gate.reached.wait(HANG_S)
    assert saver.pending == 1
    assert not saver.is_ready()
    later = train(engine)  # the weights change under the writer's hands
    assert not torch.equal(later, captured)
    assert "MANIFEST.json" not in find_steps(str(tmp_path))[1]
    gate.opened.set()
    saved = saver.finish()
    assert saved is not None
    assert (saved.step, saved.uri, saver.pending) == (
        1,
        str(tmp_path / "step-000001"),
        None,
    )
    weights, document = load_weights(saved.uri)
    assert torch.equal(weights["layer.weight"], captured)
    assert document["client"] == {"position": 1}


def test_is_ready_once_the_thread_has_ended(tmp_path: Path):
    saver, engine = make_saver(tmp_path), make_engine()
    assert not saver.is_ready()
    assert saver.finish() is None
    saver.start(1, engine, {})
    assert saver._thread is not None
    saver._thread.join()
    assert saver.is_ready()
    assert saver.finish() is not None
    assert not saver.is_ready()


def test_one_save_at_a_time(tmp_path: Path):
    saver, engine = make_saver(tmp_path), make_engine()
    saver.start(1, engine, {})
    with pytest.raises(RuntimeError, match="step 1 is still being saved"):
        saver.start(2, engine, {})
    saver.finish()
    saver.start(2, engine, {})
    saver.finish()
    assert list(find_steps(str(tmp_path))) == [1, 2]


def test_what_was_just_saved_is_not_saved_again(tmp_path: Path):
    saver, engine = make_saver(tmp_path), make_engine()
    saver.start(1, engine, {})
    saver.finish()
    saver.start(1, engine, {})
    assert saver.pending is None


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_failure_comes_out_at_the_end_and_the_next_save_goes_through(
    tmp_path: Path, mode: Literal["async", "sync"]
):
    (tmp_path / "step-000001").write_text("a file where the folder should be")
    saver, engine = make_saver(tmp_path, mode=mode), make_engine()
    saver.start(1, engine, {})
    with pytest.raises(CheckpointWriteError, match="was not saved"):
        saver.finish()
    assert saver.pending is None
    saver.start(2, engine, {})
    assert saver.finish() is not None
    assert list(find_steps(str(tmp_path))) == [2]


def test_a_defect_in_the_thread_is_not_lost(tmp_path: Path):
    def break_down(phase: str) -> None:
        if phase == "checked":
            raise ZeroDivisionError

    saver = make_saver(tmp_path, on_phase=break_down)
    saver.start(1, make_engine(), {})
    with pytest.raises(ZeroDivisionError):
        saver.finish()


def test_sync_mode_has_committed_when_start_returns(tmp_path: Path):
    saver = make_saver(tmp_path, mode="sync")
    saver.start(1, make_engine(), {})
    assert load_weights(str(tmp_path))[1]["step"] == 1
    assert saver.is_ready()
    saved = saver.finish()
    assert saved is not None
    assert saved.stall_s >= saved.write_s > 0


def test_waiting_beats_the_watchdog(tmp_path: Path):
    gate, beats = Gate("written"), []
    saver = make_saver(tmp_path, on_phase=gate)

    def beat() -> None:
        beats.append(1)
        gate.opened.set()

    saver.on_wait = beat
    saver.start(1, make_engine(), {})
    saver.finish()
    assert beats


# ---------------------------------------------------------------------------------------- the bytes


def test_buffers_hold_the_file_as_safetensors_reads_it():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    table = list_tensors(model, parts=2)
    buffers = [
        StateBuffers(table, part=part, device=torch.device("cpu")) for part in range(2)
    ]
    values = {}
    for tensor in table:
        for kind in tensor.kinds:
            value = torch.randn(tensor.shape, dtype=torch.bfloat16)
            copied = buffers[tensor.part].place(tensor.name, kind, value)
            value_before = values[tensor.name, kind] = value.float()
            value.zero_()
            assert torch.equal(copied, value_before)
    read = {
        (name, kind): value
        for part in buffers
        for kind, content in part.files().items()
        for name, value in safetensors.torch.load(bytes(content)).items()
    }
    assert set(read) == set(values)
    assert all(torch.equal(read[key], value) for key, value in values.items())
    assert sum(part.size_bytes for part in buffers) == sum(
        len(content) for part in buffers for content in part.files().values()
    )


def test_a_header_is_aligned_and_carries_what_it_was_given():
    for length in range(1, 10):
        header = safetensors_header(
            [("n" * length, (2, 3)), ("scalar", ())], {"kind": "weight"}
        )
        assert len(header) % 8 == 0
        content = json.loads(header[8:])
        assert int.from_bytes(header[:8], "little") == len(header) - 8
        assert content["__metadata__"] == {"kind": "weight"}
        assert content["scalar"] == {
            "dtype": "F32",
            "shape": [],
            "data_offsets": [24, 28],
        }


def test_a_part_without_tensors_has_no_files():
    table = list_tensors(nn.Linear(2, 2, bias=False), parts=3)
    assert StateBuffers(table, part=2, device=torch.device("cpu")).files() == {}
