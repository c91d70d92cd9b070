"""Starts the run worker on some ranks, with a tiny model, and reads what it left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from train.checkpoint.store import CheckpointStore
from train.process.world import World
from train.report.metrics_file import read_metrics

WORKER = Path(__file__).with_name("train_run_worker.py")
LIMIT_S = 240

TINY = {
    "model.image-size": "32",
    "model.embed-dim": "32",
    "model.depth": "2",
    "model.num-heads": "2",
    "model.decoder-embed-dim": "32",
    "model.decoder-depth": "1",
    "model.decoder-num-heads": "2",
    "train.global-batch-size": "12",
    "train.micro-batch-size": "6",
    "optim.warmup-steps": "4",
    "order.lanes": "4",
    "loader.decoder": "turbo",
    "engine.precision": "fp32",
    "engine.activation-checkpointing": "none",
    "checkpoint.keep-last": "50",
    "log.every-steps": "1",
    "log.num-pictures": "0",
    "log.tensorboard": "off",
}


def command_of(
    folder: Path,
    plan: dict[str, Any],
    *,
    data: str,
    ranks: int = 2,
    settings: dict[str, str],
    launcher: Literal["torchrun", "deepspeed"] = "torchrun",
) -> list[str]:
    """Give the command that runs the worker; the run's folder is `folder / "run"`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {**TINY, "data.train": data, "run.dir": str(folder / "run"), **settings}
    words = ["demo", *(word for name, value in given.items() for word in (f"--{name}", value))]
    listed = folder / "plan.json"
    listed.write_text(json.dumps({**plan, "words": words}))
    worker = [str(WORKER), str(listed)]
    if launcher == "deepspeed":
        program = str(Path(sys.executable).with_name("deepspeed"))
        return [
            program,
            f"--num_accelerators={ranks}",
            f"--master_port={find_free_port()}",
            *worker,
        ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), *worker]


def environment() -> dict[str, str]:
    """Give the environment of a run without what a launcher left in this process's."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}


def start(
    folder: Path,
    plan: dict[str, Any],
    *,
    data: str,
    ranks: int = 2,
    settings: dict[str, str],
    launcher: Literal["torchrun", "deepspeed"] = "torchrun",
) -> subprocess.CompletedProcess[str]:
    """Run the worker to its end, whatever that is."""
    command = command_of(folder, plan, data=data, ranks=ranks, settings=settings, launcher=launcher)
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def find_free_port() -> int:
    """Give a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def final_state(run_dir: Path, *, step: int) -> dict[str, torch.Tensor]:
    """Read all weights, moments and Adam's step count of a run's newest checkpoint, which is that
    of `step`."""
    state = CheckpointStore(str(run_dir / "checkpoints"), keep_last=9).latest(World())
    assert state is not None
    assert state.step == step
    return {
        f"{row.name}/{kind}": state.tensor(row.name, kind)
        for row in state.table
        for kind in row.kinds
    } | {"adam_step": torch.tensor(state.engine["adam_step"])}


def losses(run_dir: Path) -> dict[int, float]:
    """Read the losses by step; none may be there twice."""
    lines = read_metrics(run_dir)
    assert len({line["step"] for line in lines}) == len(lines), "a step was written twice"
    return {line["step"]: line["loss"] for line in lines}
