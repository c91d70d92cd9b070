"""How long training waits for a checkpoint: `python -m train.checkpoint_bench [--model vit_b_16]
[--uri s3://...]`.

One process saves a real model's whole state (weights and both moments, 12 bytes a parameter) while
it trains on random pixels, with `checkpoint.mode` sync and async in turn, beside a copy of the same
bytes from memory to memory.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.checkpoint_bench")

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

from model.config import SIZES, ModelConfig
from pipeline import storage
from pipeline.console import run_command, say_json
from train.checkpoint.files import find_steps
from train.checkpoint.saver import Saver
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import build_engine
from train.objectives.base import Objective, random_batch
from train.objectives.choose import choose_objective
from train.process.world import World

Mode = Literal["sync", "async"]


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    model: tuple[str, ...] = ("demo", "vit_b_16")
    """Model sizes: names such as demo, vit_b_16, vit_h_14."""
    uri: tuple[str, ...] = ()
    """Folders that checkpoints are written to, and removed from; a temporary folder if none is
    given."""
    saves: int = 5
    """Saves of each kind; the first is not counted, because it takes the memory that later ones use
    again."""
    images: int = 2
    """Images of a training step."""
    json: bool = False
    """Write the result to stdout as JSON in place of a table."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Saves of one model to one place in one mode; medians, with the smallest and largest stall.

    Args:
        model, place, mode: what was saved, where to, how.
        state_mb: size of the state, in 10^6 bytes.
        stall_s: seconds that training waited for a save.
        stall_min_s, stall_max_s: its range.
        write_s: seconds from the copy's end to the commit.
        copy_s: seconds for a copy of the same bytes from memory to memory, measured before each
            save.
        stall_over_copy: median over the saves of the wait through the copy just before.
        step_s, step_while_writing_s: seconds of a training step without and during a write; None
            where no step fell into one.
    """

    model: str
    place: str
    mode: Mode
    state_mb: float
    stall_s: float
    stall_min_s: float
    stall_max_s: float
    write_s: float
    copy_s: float
    stall_over_copy: float
    step_s: float
    step_while_writing_s: float | None


def measure(name: str, uri: str, mode: Mode, *, saves: int, images: int) -> Measurement:
    """Train and save in turn.

    Args:
        name: model size.
        uri: folder of checkpoints; those made here are removed.
        mode: sync or async.
        saves: saves that count.
        images: images of a step.
    """
    config, world = _config(SIZES[name], images=images), World(device=_device())
    torch.manual_seed(0)
    objective = choose_objective(config)
    engine = build_engine(config, model=objective.build(), resume=None, world=world)
    step = _stepper(engine, objective, images=images)
    step()
    saver = Saver(CheckpointStore(uri, keep_last=1), world=world, mode=mode)
    copy = _copier(engine)
    stalls, writes, copies, quiet, busy = [], [], [], [], []
    for number in range(1, saves + 2):
        # A step before either, so that both find the caches as training leaves them.
        step()
        copies.append(_seconds(copy))
        quiet.append(_seconds(step))
        begun = time.perf_counter()
        saver.start(number, engine, {})
        stalls.append(time.perf_counter() - begun)
        while not saver.is_ready():
            seconds = _seconds(step)
            if not saver.is_ready():
                busy.append(seconds)
        saved = saver.finish()
        assert saved is not None
        writes.append(saved.write_s)
    _remove(uri)
    return Measurement(
        model=name,
        place=uri.partition("://")[0] if "://" in uri else "local disk",
        mode=mode,
        state_mb=_state_bytes(engine) / 1e6,
        stall_s=statistics.median(stalls[1:]),
        stall_min_s=min(stalls[1:]),
        stall_max_s=max(stalls[1:]),
        write_s=statistics.median(writes[1:]),
        copy_s=statistics.median(copies[1:]),
        stall_over_copy=statistics.median(
            stall / alone for stall, alone in zip(stalls[1:], copies[1:], strict=True)
        ),
        step_s=statistics.median(quiet[1:]),
        step_while_writing_s=statistics.median(busy) if busy else None,
    )


def _config(model: ModelConfig, *, images: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": model.model_dump(),
            "view": {"height": model.image_height, "width": model.image_width},
            "train": {"steps": 1, "global_batch_size": images, "micro_batch_size": images},
            "engine": {"kind": "torch", "precision": "fp32"},
        }
    )


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _state_bytes(engine: Engine) -> int:
    return sum(4 * len(tensor.kinds) * math.prod(tensor.shape) for tensor in engine.table)


def _stepper(engine: Engine, objective: Objective, *, images: int) -> Callable[[], None]:
    inputs = objective.inputs(random_batch(objective, images=images, device=engine.device))

    def step() -> None:
        engine.forward_backward(*inputs)
        engine.step(1e-4)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _seconds(action: Callable[[], None]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _copier(engine: Engine) -> Callable[[], None]:
    """Give the copy that no save can do without: as many bytes, in one piece, into memory that is
    there already."""
    values = _state_bytes(engine) // 4
    source = torch.ones(values, device=engine.device)
    target = torch.ones(values, pin_memory=engine.device.type == "cuda")

    def copy() -> None:
        target.copy_(source)

    return copy


def _remove(uri: str) -> None:
    for step, names in find_steps(uri).items():
        for name in names:
            storage.delete(storage.join(uri, f"step-{step:06d}", name))


def render(measurements: Sequence[Measurement]) -> str:
    """Lay measurements out as a Markdown table."""
    lines = [
        "| model | state | to | mode | training waits (range) | copy alone | waits / copy | "
        "writing | step "
        "| step while writing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in measurements:
        busy = (
            "" if one.step_while_writing_s is None else f"{1e3 * one.step_while_writing_s:,.0f} ms"
        )
        lines.append(
            f"| {one.model} | {one.state_mb:,.0f} MB | {one.place} | {one.mode} | "
            f"**{1e3 * one.stall_s:,.0f} ms** "
            f"({1e3 * one.stall_min_s:,.0f}-{1e3 * one.stall_max_s:,.0f}) | "
            f"{1e3 * one.copy_s:,.0f} ms "
            f"| {one.stall_over_copy:.2f} "
            f"| {1e3 * one.write_s:,.0f} ms | {1e3 * one.step_s:,.0f} ms | {busy} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        _run,
        Arguments,
        argv,
        module="train.checkpoint_bench",
        interrupted=(
            "checkpoint_bench: stopped. Its checkpoints may be left where they were written."
        ),
    )


def _run(arguments: Arguments) -> int:
    with tempfile.TemporaryDirectory(prefix="maelstrom-bench-", dir=os.curdir) as folder:
        results = [
            measure(
                name,
                storage.join(uri, f"checkpoint-bench-{name}"),
                mode,
                saves=arguments.saves,
                images=arguments.images,
            )
            for name in arguments.model
            for uri in arguments.uri or (folder,)
            for mode in get_args(Mode)
        ]
    if arguments.json:
        say_json({"measurements": [asdict(one) for one in results]})
    else:
        sys.stdout.write(f"{render(results)}\n")
    return 0
