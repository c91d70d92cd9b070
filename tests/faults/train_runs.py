"""Starts the run worker on some ranks, with a tiny model, and reads what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from tests.launch import environment, find_free_port, run
from tests.limits import HANG_S
from train.checkpoint.store import CheckpointStore
from train.process.world import World
from train.report.metrics_file import read_metrics

WORKER = Path(__file__).with_name("train_run_worker.py")

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


def words_of(
    folder: Path, plan: dict[str, Any], *, data: str, settings: dict[str, str]
) -> list[str]:
    """Write the plan; give the worker and its words. The run's folder is `folder / "run"`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {**TINY, "data.train": data, "run.dir": str(folder / "run"), **settings}
    words = [
        "demo",
        *(word for name, value in given.items() for word in (f"--{name}", value)),
    ]
    listed = folder / "plan.json"
    listed.write_text(json.dumps({**plan, "words": words}))
    return [str(WORKER), str(listed)]


def start(
    folder: Path,
    plan: dict[str, Any],
    *,
    data: str,
    ranks: int = 2,
    settings: dict[str, str],
    launcher: Literal["none", "deepspeed"] = "none",
) -> subprocess.CompletedProcess[str]:
    """Run the worker to its end, whatever that is."""
    worker = words_of(folder, plan, data=data, settings=settings)
    if launcher == "none":
        return run(worker, ranks=ranks)
    program = str(Path(sys.executable).with_name("deepspeed"))
    options = [f"--num_accelerators={ranks}", f"--master_port={find_free_port()}"]
    return subprocess.run(
        [program, *options, *worker],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


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
    assert len({line["step"] for line in lines}) == len(lines), (
        "a step was written twice"
    )
    return {line["step"]: line["loss"] for line in lines}
