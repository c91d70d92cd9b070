"""How fast is a training step without data? `python -m train.step_bench [--model vit_b_16] [--peer
transformers]`.

Every combination of the values given is measured on random pixels, each in a process of its own:
peaks of memory are its own, and one that runs out of memory ends alone. `--peer` compares with
another implementation in turns.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.step_bench")

import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch

from model.config import SIZES, ActivationCheckpointing
from pipeline.bench.command import BenchArguments, Outcome, report, run_bench
from pipeline.bench.probes import peak_rss_bytes
from pipeline.bench.rows import Row
from pipeline.bench.turns import Spread
from pipeline.console import Progress
from pipeline.errors import ConfigError
from pipeline.options import BatchSize, Parallel, Rounds
from train.bench.random_run import RandomRun, device_name, random_config
from train.bench.step_peer import compare
from train.config import RunConfig
from train.process.world import init_world
from train.report.utilisation import model_tflops, peak_tflops

Precision = Literal["fp32", "autocast", "bf16", "fp16"]
Optimizer = Literal["fused", "foreach", "loops"]
Switch = Literal["off", "on"]
WARM_UP_STEPS = 3
"""Steps that are not counted: compiling, allocating, making optimizer state."""
T = TypeVar("T")


@dataclass(frozen=True)
class Arguments(BenchArguments):
    """Measure every combination of the lists."""

    model: tuple[str, ...] = ("vit_b_16",)
    """Model sizes: demo, vit_b_16, vit_l_16, vit_h_14."""
    images: tuple[BatchSize, ...] = (16,)
    """Images per step."""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32, autocast, bf16 or fp16 (GPU only)."""
    compile: tuple[Switch, ...] = ("off",)
    """torch.compile."""
    checkpointing: tuple[ActivationCheckpointing, ...] = ("none",)
    """Activation checkpointing of encoder and decoder: none, selective, full."""
    optimizer: tuple[Optimizer, ...] = ("fused",)
    """AdamW's kernels: one fused for all tensors, torch's lists of tensors, or a loop over them."""
    steps: Rounds = 5
    """Steps that count."""
    peer: Literal["none", "transformers"] = "none"
    """transformers: compare with its ViTMAEForPreTraining instead of measuring the engine; fp32
    and autocast."""
    threads: Parallel = 0
    """Threads of the CPU; 0 leaves torch's choice."""


@dataclass(frozen=True, slots=True)
class Case:
    """One combination; see `Arguments`."""

    model: str
    images: int
    precision: Precision
    compile: Switch
    checkpointing: ActivationCheckpointing
    optimizer: Optimizer


# ------------------------------------------------------------------ in the case's process


def measure(case: Case, *, steps: int, threads: int = 0) -> Row:
    """Train on random pixels and time the steps. Takes this process's peak of memory: start a fresh
    one for each case.

    Args:
        case: what to measure.
        steps: steps that count.
        threads: of the CPU; 0 leaves torch's choice.

    Returns:
        step_s and optimizer_s, the optimizer's part of it; tflops: 10^12 model operations a second,
        without activations that are computed again; mfu: of the device's dense 16-bit peak, None if
        that is not known; memory_gib: peak of the device's allocator, on the CPU of the process.
    """
    if threads:
        torch.set_num_threads(threads)
    config = _config(case)
    world = init_world(config)
    try:
        run = RandomRun(config, world)
        _choose_kernels(run, case.optimizer)
        steps_s, updates_s = _time_steps(run, steps=steps)
        device = run.engine.device
        name = device_name(device)
        step = Spread.of(steps_s)
        images_per_s = case.images / step.median
        flops = run.objective.train_flops()
        tflops = model_tflops(flops, images_per_s=images_per_s)
        # A CPU's name says little about its peak: that depends on clocks and instructions.
        mfu = None
        if device.type == "cuda" and (peak := peak_tflops(name)):
            mfu = tflops / peak
        memory_bytes = _peak_bytes(device)
        return {
            **asdict(case),
            "device": name,
            "step_s": step,
            "optimizer_s": Spread.of(updates_s),
            "images_per_s": images_per_s,
            "tflops": tflops,
            "mfu": mfu,
            "memory_gib": memory_bytes / 2**30,
        }
    # Also after an error: a process group that is left open may keep the process from ending.
    finally:
        world.end()


def _config(case: Case) -> RunConfig:
    # Plain torch if it can; low-precision weights with fp32 masters are DeepSpeed's.
    kind = "deepspeed"
    if case.precision in ("fp32", "autocast"):
        kind = "torch"
    engine: dict[str, object] = {
        "kind": kind,
        "precision": case.precision,
        "compile": case.compile,
        "activation_checkpointing": case.checkpointing,
        "decoder_activation_checkpointing": case.checkpointing,
    }
    model = SIZES[case.model]
    return random_config(model, images=case.images, engine=engine)


def _choose_kernels(run: RandomRun, optimizer: Optimizer) -> None:
    # Before the first step, which makes the optimizer's state for the kernels it finds.
    for group in run.engine.param_groups:
        group["fused"] = optimizer == "fused"
        group["foreach"] = optimizer == "foreach"


def _time_steps(run: RandomRun, *, steps: int) -> tuple[list[float], list[float]]:
    """Give seconds of each step, and of its optimizer's part."""
    steps_s = []
    updates_s = []
    for _ in range(WARM_UP_STEPS + steps):
        run.wait()
        start_s = time.perf_counter()
        run.forward_backward()
        # This wait costs a little of what a run overlaps; without it the parts cannot be told.
        run.wait()
        between_s = time.perf_counter()
        run.update()
        run.wait()
        end_s = time.perf_counter()
        steps_s.append(end_s - start_s)
        updates_s.append(end_s - between_s)
    counted_steps_s = steps_s[WARM_UP_STEPS:]
    counted_updates_s = updates_s[WARM_UP_STEPS:]
    return counted_steps_s, counted_updates_s


def _peak_bytes(device: torch.device) -> int:
    # Allocated, not reserved: how much the allocator keeps in hand depends on what came before.
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss_bytes()


# ---------------------------------------------------------------- in the command's process


def in_own_process(function: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Call a function in a fresh process and give what it returns.

    Args:
        function: of a module's top level.
        arguments, settings: what pickles.

    Raises:
        Exception: what the function raised; BrokenProcessPool if the process was killed.
    """
    # Not forked: CUDA does not survive a fork, whose peak of memory begins with its parent's too.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        future = pool.submit(function, *arguments, **settings)
        return future.result()


def measure_safely(case: Case, *, steps: int, threads: int) -> Row:
    """Measure in a fresh process; a case that fails, for lack of memory or otherwise, says so in
    its row."""
    try:
        return in_own_process(measure, case, steps=steps, threads=threads)
    except Exception as error:  # noqa: BLE001 - the other cases go on
        text = str(error)
        lines = text.strip().splitlines() or [type(error).__name__]
        # A cell of a table: CUDA's message alone has ten lines.
        problem = lines[0][:120]
        if "out of memory" in text:
            problem = "out of memory"
        return {**asdict(case), "problem": problem}


def list_cases(arguments: Arguments) -> list[Case]:
    """Combine the values of the arguments."""
    combinations = itertools.product(
        arguments.model,
        arguments.images,
        arguments.precision,
        arguments.compile,
        arguments.checkpointing,
        arguments.optimizer,
    )
    return [Case(*values) for values in combinations]


def _run(arguments: Arguments) -> Outcome:
    unknown = sorted(set(arguments.model) - set(SIZES))
    if unknown:
        known = ", ".join(SIZES)
        raise ConfigError(f"step_bench: --model {unknown[0]}: choose from {known}")
    fewest = min(arguments.steps, *arguments.images)
    if fewest < 1:
        raise ConfigError("step_bench: --steps and --images are at least 1")
    if arguments.peer != "none":
        pairs = _compare(arguments)
        return report(pairs)
    cases = list_cases(arguments)
    rows = []
    with Progress("step_bench", total=len(cases), unit="cases") as progress:
        for case in cases:
            row = measure_safely(case, steps=arguments.steps, threads=arguments.threads)
            rows.append(row)
            progress.advance(1)
    return report(rows)


def _compare(arguments: Arguments) -> list[Row]:
    combinations = itertools.product(
        arguments.model, arguments.images, arguments.precision, arguments.compile
    )
    cases = list(combinations)
    comparisons: list[Row] = []
    with Progress("step_bench", total=len(cases), unit="cases") as progress:
        for name, images, precision, switch in cases:
            # Low-precision weights are DeepSpeed's, which the peer does not run under.
            compared = "fp32"
            if precision == "autocast":
                compared = precision
            comparison = in_own_process(
                compare,
                name,
                images=images,
                precision=compared,
                compiled=switch == "on",
                repeats=arguments.steps,
                threads=arguments.threads,
            )
            comparisons.append(comparison)
            progress.advance(1)
    return comparisons


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_bench(Arguments, _run, module="train.step_bench", args=argv)
