"""One rank of a real run, in which things go wrong on purpose.

Usage: train_run_worker.py [--local_rank=N] PLAN.json, with the settings of `train.pretrain` under
    "words" and any of

    "scale": [{"rank": R or null, "first": A, "last": B, "factor": F}]
        images of micro-batches A to B are multiplied
    "flip": {"rank": R, "after": N}
        one bit of one weight flips after micro-batch N
    "kill": {"rank": R, "step": S} or {"rank": R, "phase": P, "save": N}
        SIGKILL after step S, or in the N-th save
    "hang": {"rank": R, "step": S} or {"rank": R, "phase": P, "save": N}
        SIGSTOP after step S, or in the N-th save

Micro-batches and saves are counted from 0 and from 1 within this start of the program.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import train.loop.opening
import train.pretrain
from train.checkpoint.store import CheckpointStore
from train.engine.base import Engine
from train.process.outcome import Outcome
from train.process.place import rank_of
from train.settings.command_line import parse_run

RANK = rank_of(os.environ)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def at_step(step: int, act: Callable[[], None]) -> None:
    """Do something once a step is done."""

    class Watched(Outcome):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "step" and value == step:
                act()

    train.pretrain.Outcome = Watched  # type: ignore[misc]


def is_mine(fault: dict[str, Any]) -> bool:
    return fault["rank"] in (None, RANK)


def spoil(engine: Engine, plan: dict[str, Any]) -> Engine:
    """Let the engine meet what the plan says."""
    count = 0
    forward_backward = engine.forward_backward

    def spoiled(images_BCHW: torch.Tensor, noise_BN: torch.Tensor) -> torch.Tensor:
        nonlocal count
        for fault in plan.get("scale", []):
            if is_mine(fault) and fault["first"] <= count <= fault["last"]:
                images_BCHW = images_BCHW * fault["factor"]
        loss = forward_backward(images_BCHW, noise_BN)
        flip = plan.get("flip")
        if flip and is_mine(flip) and count == flip["after"]:
            weight = engine.module.get_parameter("blocks.0.mlp.fc1.weight")
            weight.data.view(torch.int32)[1, 2] ^= 1
        count += 1
        return loss

    engine.forward_backward = spoiled  # type: ignore[method-assign]
    return engine


def install(plan: dict[str, Any]) -> None:
    build_engine = train.loop.opening.build_engine
    train.loop.opening.build_engine = lambda *args, **words: spoil(
        build_engine(*args, **words), plan
    )
    for fault, act in (("hang", stop), ("kill", die)):
        where = plan.get(fault)
        if where is None or not is_mine(where):
            continue
        if "step" in where:
            at_step(where["step"], act)
        else:
            in_save(where["save"], where["phase"], act)


def in_save(number: int, wanted: str, act: Callable[[], None]) -> None:
    """Do something in a phase of a save."""
    saves = 0

    def on_phase(phase: str) -> None:
        nonlocal saves
        saves += phase == "captured"
        if phase == wanted and saves == number:
            act()

    train.loop.opening.CheckpointStore = partial(CheckpointStore, on_phase=on_phase)  # type: ignore[assignment, misc]


def main() -> int:
    plan = json.loads(Path(sys.argv[-1]).read_text())
    install(plan)
    return train.pretrain.run(parse_run(plan["words"]))


if __name__ == "__main__":
    sys.exit(main())
