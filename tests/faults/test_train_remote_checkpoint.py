"""Checkpoints in object storage: committed by a conditional put, fetched once, verified, and
leaving nothing local."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pipeline import storage
from train.checkpoint.files import MANIFEST_FILE, find_steps, render_manifest
from train.checkpoint.state import load_weights
from train.checkpoint.store import CheckpointStore, CheckpointWriteError
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import build_engine
from train.engine.named_state import KINDS
from train.process.world import World

pytestmark = [pytest.mark.remote, pytest.mark.slow]

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


@pytest.fixture
def engine() -> Engine:
    engine = build_engine(CONFIG, model=Small(), resume=None, world=World())
    engine.forward_backward(torch.ones(2, 3), torch.ones(2, 4))
    engine.step(0.1)
    return engine


def test_saved_pruned_damaged_and_read_back(
    s3_bucket: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = f"{s3_bucket}/run/checkpoints"
    store = CheckpointStore(uri, keep_last=2)
    assert store.latest(World()) is None
    for step in (1, 2, 3):
        store.save(step, engine, {"position": step}, world=World())
    assert list(find_steps(uri)) == [2, 3]
    name = f"{uri}/step-000003/exp_avg-00000-of-00001.safetensors"
    storage.write_atomic(name, storage.read_bytes(name)[:-1] + b"x")
    state = CheckpointStore(uri, keep_last=2).latest(World())
    assert state is not None
    assert (state.step, state.client) == (2, {"position": 2})
    assert (
        list(tmp_path.iterdir()) == []
    )  # what was fetched is already unlinked, and can still be read:
    exported = engine.export_state().tensors["layer.weight"]
    assert all(
        torch.equal(state.tensor("layer.weight", kind), exported[kind])
        for kind in KINDS
    )
    weights, document = load_weights(f"{s3_bucket}/run")
    assert torch.equal(weights["layer.weight"], exported["weight"])
    assert document["step"] == 3  # its weights are sound, only a moment is damaged


def test_a_step_that_another_run_commits_meanwhile_is_not_overwritten(
    s3_bucket: str, engine: Engine
) -> None:
    uri = f"{s3_bucket}/shared"
    theirs = render_manifest(1, [])

    def intrude(phase: str) -> None:
        if phase == "checked":
            storage.write_atomic(f"{uri}/step-000001/{MANIFEST_FILE}", theirs)

    with pytest.raises(CheckpointWriteError, match="another program has committed"):
        CheckpointStore(uri, keep_last=2, on_phase=intrude).save(
            1, engine, {}, world=World()
        )
    assert storage.read_bytes(f"{uri}/step-000001/{MANIFEST_FILE}") == theirs
