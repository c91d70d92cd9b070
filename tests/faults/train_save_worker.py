"""Saves checkpoints of a small model, and may be killed at a named moment of a save.

Usage: train_save_worker.py FOLDER PHASE STEPS MODE: trains to each step, saves, and dies of SIGKILL
when the save of the last one passes PHASE (`never` to live). In MODE async the next step is trained
while the save goes on. Resumes by itself. Ranks come from the launcher, if there is one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from train.checkpoint.saver import Saver
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.engine.build import build_engine
from train.engine.plain import TorchEngine
from train.process.world import init_world

CONFIG = RunConfig.model_validate(
    {
        "train": {"steps": 9, "global_batch_size": 2, "micro_batch_size": 2},
        "engine": {"kind": "torch", "precision": "fp32"},
    }
)


class Output(NamedTuple):
    loss: Tensor


class Wide(nn.Module):
    """Large enough (12 MB of state) that a kill at any moment falls into a write."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(512, 512) for _ in range(4)])

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> Output:
        for layer in self.layers:
            images_BCHW = layer(images_BCHW)
        return Output((images_BCHW - noise_BN).square().mean())


def report(saver: Saver) -> None:
    saved = saver.finish()
    if saved is not None:
        print(f"saved {saved.step}", flush=True)


def main() -> None:
    folder, phase, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
    mode: Literal["async", "sync"] = "async" if sys.argv[4] == "async" else "sync"
    torch.set_num_threads(1)
    world = init_world(CONFIG)

    def die(passed: str) -> None:
        if passed == phase and saving[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    saving = [0]
    store = CheckpointStore(folder, keep_last=2, on_phase=die)
    saver = Saver(store, world=world, mode=mode)
    state = store.latest(world)
    torch.manual_seed(0)
    engine = build_engine(CONFIG, model=Wide(), resume=state, world=world)
    assert isinstance(engine, TorchEngine)
    print(f"from {state.step if state else 0}", flush=True)
    for step in range(state.step if state else 0, last):
        generator = torch.Generator().manual_seed(step)
        engine.forward_backward(
            torch.randn(2, 512, generator=generator),
            torch.randn(2, 512, generator=generator),
        )
        engine.step(0.01)
        report(saver)
        saving[0] = step + 1
        saver.start(step + 1, engine, {"position": step + 1})
        if mode == "sync":
            report(saver)
    report(saver)
    world.end()


if __name__ == "__main__":
    main()
