"""Starts the run worker on some ranks, with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def start(
    folder: Path, plan: dict[str, Any], *, data: str, ranks: int = 2, settings: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run the worker to its end, whatever that is; the run's folder is `folder / "run"`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {**TINY, "data.train": data, "run.dir": str(folder / "run"), **settings}
    words = ["demo", *(word for name, value in given.items() for word in (f"--{name}", value))]
    listed = folder / "plan.json"
    listed.write_text(json.dumps({**plan, "words": words}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(WORKER), str(listed)]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
