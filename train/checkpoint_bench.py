"""How long training waits for a checkpoint: `python -m train.checkpoint_bench [--model vit_b_16]
[--uri s3://...]`.

One process saves a real model's whole state (weights and both moments, 12 bytes per parameter)
while it trains on random pixels, with `checkpoint.mode` sync and async, next to a copy of the same
bytes from memory to memory.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.checkpoint_bench")

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from model.config import SIZES
from pipeline import storage
from pipeline.bench.command import BenchArguments, Outcome, report, run_bench
from pipeline.bench.rows import Row
from pipeline.bench.turns import Spread, Turns, divide_pairs, time_call
from pipeline.console import say
from pipeline.errors import ConfigError
from pipeline.options import BatchSize, Location, Rounds
from train.bench.random_run import RandomRun, random_config
from train.checkpoint.files import find_steps
from train.checkpoint.saver import Saver
from train.checkpoint.store import CheckpointStore
from train.engine.base import Engine
from train.process.world import World

Mode = Literal["sync", "async"]
_SAVE = "save"
_COPY = "copy"
_STEP = "step"


@dataclass(frozen=True)
class Arguments(BenchArguments):
    """Measure saves of every model to every folder."""

    model: tuple[str, ...] = ("demo", "vit_b_16")
    """Model sizes: names such as demo, vit_b_16, vit_h_14."""
    uri: tuple[Location, ...] = ()
    """Folders that checkpoints are written to, and removed from; a temporary folder if none is
    given."""
    saves: Rounds = 5
    """Saves of each kind, after one that is not counted: it takes the memory that later ones use
    again."""
    images: BatchSize = 2
    """Images of a training step."""


def measure(name: str, uri: str, mode: Mode, *, saves: int, images: int) -> Row:
    """Train and save in turns.

    Args:
        name: model size.
        uri: folder of checkpoints; those made here are removed.
        mode: sync or async.
        saves: saves that count.
        images: images per step.

    Returns:
        stall_s: how long training waited for a save; write_s: from the copy's end to the commit;
        copy_s: a copy of the same bytes from memory to memory, measured before each save;
        stall_over_copy: one divided by the other, save by save; step_s and step_while_writing_s: a
        training step without and during a write, None if no step fell into one.
    """
    world = World(device=_device())
    engine: dict[str, object] = {"kind": "torch", "precision": "fp32"}
    model = SIZES[name]
    config = random_config(model, images=images, engine=engine)
    run = RandomRun(config, world)
    # AdamW makes its moments in the first step: before it there is less to save.
    run.step()
    store = CheckpointStore(uri, keep_last=1)
    saver = Saver(store, world=world, mode=mode)
    copy = _copier(run.engine)
    label = f"checkpoint_bench: {name}, {mode}"
    turns = Turns(label, rounds=saves, warm_up_rounds=1)
    # In the order of training, not in changing turns: a save is preceded by steps, and so is the
    # copy, so that both find the caches as training leaves them.
    for number in turns.rounds():
        run.step()
        turns.record(_COPY, time_call(copy))
        turns.record(_STEP, time_call(run.step))
        start_s = time.perf_counter()
        saver.start(number + 1, run.engine, {})
        stall_s = time.perf_counter() - start_s
        turns.record(_SAVE, {"stall_s": stall_s})
        # Training goes on, as in a run; a sync save is ready at once.
        while not saver.is_ready():
            figures = time_call(run.step)
            # The write may have ended during the step, which then is of neither kind.
            if not saver.is_ready():
                turns.record(_STEP, {"while_writing_s": figures["wall_s"]})
        saved = saver.finish()
        assert saved is not None
        turns.record(_SAVE, {"write_s": saved.write_s})
    _remove(uri)
    stalls_s = turns.values(_SAVE, "stall_s")
    copies_s = turns.values(_COPY, "wall_s")
    busy_s = turns.values(_STEP, "while_writing_s")
    step_while_writing = None
    if busy_s:
        step_while_writing = Spread.of(busy_s)
    # The scheme alone: a bucket's name does not belong in a published table.
    store_name = "local disk"
    if "://" in uri:
        store_name, _, _ = uri.partition("://")
    return {
        "model": name,
        "state_mb": _state_bytes(run.engine) / 1e6,
        "store": store_name,
        "mode": mode,
        "stall_s": Spread.of(stalls_s),
        "copy_s": Spread.of(copies_s),
        "stall_over_copy": divide_pairs(stalls_s, copies_s),
        "write_s": turns.spread(_SAVE, "write_s"),
        "step_s": turns.spread(_STEP, "wall_s"),
        "step_while_writing_s": step_while_writing,
    }


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("cpu")


def _state_bytes(engine: Engine) -> int:
    # fp32, whatever precision the engine computes in: checkpoints hold nothing else.
    count = 0
    for tensor in engine.table:
        num_values = math.prod(tensor.shape)
        count += len(tensor.kinds) * num_values
    return 4 * count


def _copier(engine: Engine) -> Callable[[], None]:
    """Give the copy that no save can do without: as many bytes, in one piece, into memory that is
    there already."""
    count = _state_bytes(engine) // 4
    # Ones, not `empty`: pages that were never written are given by the kernel during the copy.
    source = torch.ones(count, device=engine.device)
    is_pinned = engine.device.type == "cuda"
    target = torch.ones(count, pin_memory=is_pinned)

    def copy() -> None:
        target.copy_(source)

    return copy


def _remove(uri: str) -> None:
    # File by file, and only what a checkpoint holds: the folder may be one of the user's.
    for step, names in find_steps(uri).items():
        folder = storage.join(uri, f"step-{step:06d}")
        for name in names:
            storage.delete(storage.join(folder, name))


def _run(arguments: Arguments) -> Outcome:
    unknown = sorted(set(arguments.model) - set(SIZES))
    if unknown:
        known = ", ".join(SIZES)
        raise ConfigError(
            f"checkpoint_bench: --model {unknown[0]}: choose from {known}"
        )
    if min(arguments.saves, arguments.images) < 1:
        raise ConfigError("checkpoint_bench: --saves and --images are at least 1")
    rows = []
    # In the working folder, because /tmp is often memory, which is faster than any disk.
    with tempfile.TemporaryDirectory(
        prefix="maelstrom-bench-", dir=os.curdir
    ) as folder:
        for name in arguments.model:
            for uri in arguments.uri or (folder,):
                target = storage.join(uri, f"checkpoint-bench-{name}")
                for mode in get_args(Mode):
                    say(f"checkpoint_bench: {name}, {mode}, to {target}")
                    row = measure(
                        name,
                        target,
                        mode,
                        saves=arguments.saves,
                        images=arguments.images,
                    )
                    rows.append(row)
    return report(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_bench(
        Arguments,
        _run,
        module="train.checkpoint_bench",
        args=argv,
        stopped="Checkpoints of the benchmark may be left where they were written.",
    )
