"""Checkpoints of one process: whole or not there, verified, kept and removed as promised.

The engine is the real torch one over a model of four tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from train.checkpoint.files import (
    MANIFEST_FILE,
    STATE_FILE,
    DamagedCheckpointError,
    find_steps,
    read_manifest,
    step_of,
)
from train.checkpoint.state import CheckpointState, load_weights
from train.checkpoint.store import CheckpointStore, CheckpointWriteError
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import build_engine
from train.errors import CheckpointError
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
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.table = nn.Parameter(torch.arange(float(width)), requires_grad=False)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> Output:
        return Output((self.layer(images_BCHW) - noise_BN).square().mean())


def make_engine(
    resume: CheckpointState | None = None, *, width: int = 4, seed: int = 0
) -> Engine:
    torch.manual_seed(seed)
    return build_engine(CONFIG, model=Small(width), resume=resume, world=WORLD)


def train(engine: Engine, *steps: int) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, generator=generator)
        losses.append(
            float(
                engine.forward_backward(images, torch.randn(2, 4, generator=generator))
            )
        )
        engine.step(0.1)
    return losses


def make_store(
    folder: Path, *, keep_last: int = 9, keep_every: int = 0
) -> CheckpointStore:
    return CheckpointStore(str(folder), keep_last=keep_last, keep_every=keep_every)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 2 and 4."""
    engine = make_engine()
    for step in (2, 4):
        train(engine, step - 2, step - 1)
        make_store(tmp_path).save(step, engine, {"position": step * 2}, world=WORLD)
    return tmp_path


def test_resumed_run_is_the_unbroken_one(saved: Path) -> None:
    unbroken = make_engine()
    losses = train(unbroken, *range(8))
    state = make_store(saved).latest(WORLD)
    assert state is not None
    assert (state.step, state.client, state.config["train"]["steps"]) == (
        4,
        {"position": 8},
        9,
    )
    resumed = make_engine(state, seed=5)
    assert train(resumed, *range(4, 8)) == losses[4:]
    theirs, ours = unbroken.export_state(), resumed.export_state()
    assert ours.scalars == theirs.scalars == {"adam_step": 8, "loss_scaler": {}}
    for name, kinds in theirs.tensors.items():
        for kind, value in kinds.items():
            assert torch.equal(value, ours.tensors[name][kind]), (name, kind)


def test_export_is_a_copy_that_training_does_not_change() -> None:
    engine = make_engine()
    train(engine, 0)
    exported = engine.export_state()
    before = exported.tensors["layer.weight"]["weight"].clone()
    train(engine, 1)
    assert torch.equal(exported.tensors["layer.weight"]["weight"], before)


def test_roll_back_restores_in_place(saved: Path) -> None:
    engine = make_engine()
    losses = train(engine, *range(6))
    state = make_store(saved).latest(WORLD, before=4)
    assert state is not None
    assert state.step == 2
    engine.restore(state)
    assert train(engine, 2, 3) == losses[2:4]


def test_files_are_plain_safetensors_under_the_models_names(saved: Path) -> None:
    folder = saved / "step-000004"
    assert sorted(path.name for path in folder.iterdir()) == [
        "MANIFEST.json",
        "exp_avg-00000-of-00001.safetensors",
        "exp_avg_sq-00000-of-00001.safetensors",
        "state.json",
        "weight-00000-of-00001.safetensors",
    ]
    names = {"layer.weight", "layer.bias", "table", "scale"}
    assert set(load_file(folder / "weight-00000-of-00001.safetensors")) == names
    assert set(load_file(folder / "exp_avg-00000-of-00001.safetensors")) == {
        "layer.weight",
        "layer.bias",
    }


def test_nothing_saved_is_none_and_no_error(tmp_path: Path) -> None:
    assert make_store(tmp_path / "absent").latest(WORLD) is None
    assert make_store(tmp_path).latest(WORLD) is None


@pytest.mark.parametrize(
    "name",
    [
        "weight-00000-of-00001.safetensors",
        "exp_avg_sq-00000-of-00001.safetensors",
        STATE_FILE,
        MANIFEST_FILE,
    ],
)
def test_a_flipped_bit_anywhere_is_found_and_the_step_before_taken(
    saved: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved / "step-000004" / name
    content = bytearray(path.read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        caplog.clear()
        state = make_store(saved).latest(WORLD)
        assert state is not None
        assert state.step == 2
        assert name in caplog.text


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_short_or_missing_file_is_found(saved: Path, damage: str) -> None:
    path = saved / "step-000004" / "exp_avg-00000-of-00001.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    state = make_store(saved).latest(WORLD)
    assert state is not None
    assert state.step == 2


def test_all_damaged_is_an_error_and_not_a_fresh_start(saved: Path) -> None:
    for folder in saved.iterdir():
        (folder / STATE_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is sound"):
        make_store(saved).latest(WORLD)


def test_a_newer_layout_is_named_not_skipped(saved: Path) -> None:
    from train.checkpoint.files import hash_json

    path = saved / "step-000004" / MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["xxh3"]
    content["format"] = 99
    path.write_text(json.dumps({**content, "xxh3": hash_json(content)}))
    with pytest.raises(CheckpointError, match="layout version 99"):
        make_store(saved).latest(WORLD)


def test_another_model_is_refused_with_a_table(saved: Path) -> None:
    state = make_store(saved).latest(WORLD)
    with pytest.raises(CheckpointError) as caught:
        make_engine(state, width=5)
    message = str(caught.value)
    assert "layer.weight  4x3" in message.replace("   ", "  ")
    assert "5x3" in message
    assert "4 frozen" in message
    assert "3 of 4 tensors differ" in message


def test_more_and_fewer_names_are_shown_as_missing(saved: Path) -> None:
    state = make_store(saved).latest(WORLD)
    assert state is not None

    class Other(Small):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)
            del self.table

    with pytest.raises(CheckpointError) as caught:
        build_engine(CONFIG, model=Other(), resume=state, world=WORLD)
    lines = {
        line.split()[0]: line.split()[1:]
        for line in str(caught.value).splitlines()[1:-1]
    }
    assert lines["extra.weight"] == ["missing", "2x2"]
    assert lines["table"] == ["4", "frozen", "missing"]


# ------------------------------------------------------------------------------------------ keeping


def test_only_what_is_to_be_kept_stays(tmp_path: Path) -> None:
    engine = make_engine()
    store = make_store(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        train(engine, step - 1)
        store.save(step, engine, {}, world=WORLD)
    assert list(find_steps(str(tmp_path))) == [4, 6, 7]


def test_files_of_others_are_never_removed(saved: Path) -> None:
    (saved / "step-000002" / "notes.txt").write_text("mine")
    (saved / "step-final").mkdir()
    (saved / "step-final" / "weight-00000-of-00001.safetensors").write_text("mine")
    (saved / "readme.md").write_text("mine")
    engine = make_engine()
    make_store(saved, keep_last=1).save(6, engine, {}, world=WORLD)
    assert [path.name for path in (saved / "step-000002").iterdir()] == ["notes.txt"]
    assert not (saved / "step-000004").exists()
    assert (
        saved / "step-final" / "weight-00000-of-00001.safetensors"
    ).read_text() == "mine"
    assert (saved / "readme.md").exists()


def test_left_overs_of_a_killed_save_are_cleared(saved: Path) -> None:
    left = saved / "step-000003"
    left.mkdir()
    (left / "weight-00000-of-00001.safetensors").write_text("half")
    (left / ".state.json.tmp-123-abc").write_text("half")
    engine = make_engine()
    make_store(saved).save(6, engine, {}, world=WORLD)
    assert list(find_steps(str(saved))) == [2, 4, 6]
    assert not left.exists()


def test_newer_steps_are_left_alone_after_a_roll_back(saved: Path) -> None:
    engine = make_engine()
    make_store(saved, keep_last=1).save(3, engine, {}, world=WORLD)
    assert list(find_steps(str(saved))) == [3, 4]


def test_saving_what_was_just_saved_or_loaded_writes_nothing(saved: Path) -> None:
    store = make_store(saved)
    state = store.latest(WORLD)
    before = (saved / "step-000004" / MANIFEST_FILE).stat().st_mtime_ns
    uri = store.save(4, make_engine(state), {}, world=WORLD)
    assert uri.endswith("step-000004")
    assert (saved / "step-000004" / MANIFEST_FILE).stat().st_mtime_ns == before


def test_a_step_trained_again_replaces_the_old_one(saved: Path) -> None:
    store = make_store(saved)
    state = store.latest(WORLD, before=4)
    engine = make_engine(state)
    train(engine, 7, 8)
    store.save(4, engine, {"position": 99}, world=WORLD)
    again = make_store(saved).latest(WORLD)
    assert again is not None
    assert (again.step, again.client) == (4, {"position": 99})


# ------------------------------------------------------------------------------------------ failing


def failing_save(folder: Path) -> None:
    engine = make_engine()
    with pytest.raises(CheckpointWriteError, match="was not saved"):
        make_store(folder).save(6, engine, {}, world=WORLD)


@contextmanager
def small_disk() -> Iterator[None]:
    """Let this process write files of 600 bytes at most: the kernel refuses more, as a full disk
    does.

    The limit is the whole process's: a log that pytest writes to meanwhile would be cut too.
    """
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_no_trace_and_the_last_good_one(saved: Path) -> None:
    engine = make_engine()
    with pytest.raises(CheckpointWriteError, match="was not saved"), small_disk():
        make_store(saved).save(6, engine, {}, world=WORLD)
    assert list(find_steps(str(saved))) == [2, 4]
    state = make_store(saved).latest(WORLD)
    assert state is not None
    assert state.step == 4


def test_a_save_after_a_failed_one_goes_through(saved: Path) -> None:
    (saved / "step-000006").write_text("a file where the folder should be")
    failing_save(saved)
    (saved / "step-000006").unlink()
    make_store(saved).save(6, make_engine(), {}, world=WORLD)
    assert list(find_steps(str(saved))) == [2, 4, 6]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_a_failed_save(saved: Path) -> None:
    saved.chmod(0o500)
    try:
        failing_save(saved)
    finally:
        saved.chmod(0o700)


# ---------------------------------------------------------------------------------- loading weights


def test_weights_load_from_a_step_a_folder_and_a_run(
    saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").symlink_to(saved)
    for uri in (saved / "step-000004", saved, run):
        weights, state = load_weights(str(uri))
        assert list(weights) == ["layer.weight", "layer.bias", "table", "scale"] or set(
            weights
        ) == {
            "layer.weight",
            "layer.bias",
            "table",
            "scale",
        }
        assert state["step"] == 4
        assert state["config"]["engine"]["kind"] == "torch"
    assert load_weights(str(saved / "step-000002"))[1]["step"] == 2


def test_loading_weights_passes_over_a_damaged_step(saved: Path) -> None:
    path = saved / "step-000004" / "weight-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"xxxx")
    assert load_weights(str(saved))[1]["step"] == 2
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(str(saved / "step-000004"))


def test_loading_weights_from_nothing_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-000123", 123),
        ("step-1234567", 1234567),
        ("step-0001234567", None),
        ("step-12", None),
        ("xstep-000001", None),
        ("step-000001x", None),
    ],
)
def test_step_names(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_reading_a_large_checkpoint_shows_how_far_it_is(
    saved: Path, monkeypatch, capsys
) -> None:
    """With no patience at all, every reading is a long one."""
    for module in ("state", "verified"):
        monkeypatch.setattr(f"train.checkpoint.{module}.SHOW_AFTER_S", 0.0)
    load_weights(str(saved))
    text = capsys.readouterr().err
    assert text.startswith("reading step-")
    assert "MB/s" in text
    store = CheckpointStore(str(saved), keep_last=2)
    assert store.latest(World()) is not None
    assert capsys.readouterr().err.startswith("checking step-")


def test_a_manifest_that_was_shortened_is_damaged(saved: Path) -> None:
    """Every file that it still names is sound; only its own hash tells."""
    path = saved / "step-000004" / MANIFEST_FILE
    content = json.loads(path.read_text())
    content["files"].pop(0)
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpointError, match="its own hash does not match"):
        read_manifest(str(path.parent))
    # The step before it is taken in its place.
    assert load_weights(str(saved))[1]["step"] == 2
