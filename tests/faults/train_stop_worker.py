"""Steps without work until asked to stop, agreeing with the other ranks at every step.

Usage: train_stop_worker.py FOLDER [--local_rank=N]: leaves FOLDER/ready-<rank> and, once stopped,
FOLDER/stopped-<rank> with the step and the reason; exits with 75.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train.config import RunConfig
from train.errors import Preempted
from train.process.preemption import Preemption
from train.process.world import init_world


def main() -> None:
    folder = Path(
        next(argument for argument in sys.argv[1:] if not argument.startswith("--"))
    )
    world = init_world(RunConfig())
    with Preemption(world) as preemption:
        step = 0
        ready = folder / f".ready-{world.rank}"
        ready.write_text(str(os.getpid()))
        # The test reads the number as soon as the file is there: it must appear whole.
        ready.rename(folder / f"ready-{world.rank}")
        while not preemption.requested():
            step += 1
            world.barrier()
        stopped = folder / f".stopped-{world.rank}"
        stopped.write_text(json.dumps({"step": step, "reason": preemption.reason}))
        stopped.rename(folder / f"stopped-{world.rank}")
        preemption.disarm()
        world.end()
        sys.exit(Preempted.exit_code)


if __name__ == "__main__":
    main()
