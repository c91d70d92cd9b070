"""Any settings: a clear refusal before the start, or real steps."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings

from pipeline.errors import ConfigError, DataError
from tests.random_settings import list_settings, some_settings
from train.loop.loop import train
from train.process.outcome import Outcome
from train.settings.command_line import parse_run
from train.settings.lengths import known_num_samples, refuse_lengths

pytestmark = pytest.mark.slow

TINY = {
    "model.image-size": "32",
    "model.patch-size": "8",
    "model.embed-dim": "16",
    "model.depth": "1",
    "model.num-heads": "2",
    "model.decoder-embed-dim": "16",
    "model.decoder-depth": "1",
    "model.decoder-num-heads": "2",
    "train.global-batch-size": "8",
    "train.micro-batch-size": "4",
    "train.steps": "9",
    "optim.warmup-steps": "1",
    "order.lanes": "4",
    "loader.decoder": "turbo",
    "engine.kind": "torch",
    "engine.precision": "fp32",
    "engine.activation-checkpointing": "none",
    "checkpoint.every-steps": "2",
    "log.tensorboard": "off",
}
NOT_STARTED = frozenset({"engine.kind", "engine.compile"})
"""Engines that take seconds to import, and a compiler that takes a minute, have tests of their
own."""
STEPS = 3
EXAMPLES = 60
REFUSED_WITHIN_S = 2.0


class EnoughSteps(Exception):  # noqa: N818 - the good end
    """Three steps were taken."""


class ThreeSteps(Outcome):
    """Ends the run in the middle of the loop."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "step" and value >= STEPS:
            raise EnoughSteps


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def words_of(folder: Path, drawn: dict[str, str], data: str) -> list[str]:
    paths = {"data.train": data, "data.val": data, "run.dir": str(folder / "run")}
    given = {
        **TINY,
        **paths,
        **{name.replace("_", "-"): word for name, word in drawn.items()},
    }
    return ["demo", *(f"--{name}={word}" for name, word in given.items())]


def test_settings_at_random_are_refused_or_train(
    folder: Path, make_dataset: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    counts = {"refused": 0, "trained": 0}

    @settings(max_examples=EXAMPLES)
    @given(drawn=some_settings(without=NOT_STARTED))
    def refused_or_trains(drawn: dict[str, str]) -> None:
        begun_s = time.process_time()
        shutil.rmtree(folder / "run", ignore_errors=True)
        refusal = ""
        try:
            config = parse_run(words_of(folder, drawn, data))
            refuse_lengths(config, num_samples=known_num_samples(config) or 0)
        except ConfigError as error:
            refusal = str(error)
        if refusal:
            counts["refused"] += 1
            assert any(name.rpartition(".")[2] in refusal for name in drawn), refusal
            assert time.process_time() - begun_s < REFUSED_WITHIN_S
            return

        outcome = ThreeSteps(folder / "run")
        try:
            train(config, outcome)
        except (EnoughSteps, DataError) as end:
            # Limits of images so low that none passes are told with the data's exit code.
            limits = drawn.keys() & {"loader.max_pixels", "loader.max_bytes"}
            is_over = isinstance(end, EnoughSteps) or limits
        else:
            # A shorter run.
            is_over = 1 <= outcome.step < STEPS
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        assert is_over
        counts["trained"] += 1

    refused_or_trains()
    # Neither half of the promise may be empty.
    assert min(counts.values()) >= 5, counts


def test_every_setting_can_be_drawn() -> None:
    assert len(list_settings()) > 70
