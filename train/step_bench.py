"""How fast is a training step without data? `python -m train.step_bench [--model vit_b_16] [--peer
transformers]`.

Every combination of the values given is measured on random pixels, each in a process of its own:
peaks of memory are its own, and one that runs out of memory ends alone. `--peer` compares with
another implementation in turn.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.step_bench")

import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from model.config import SIZES, ActivationCheckpointing
from pipeline.console import run_command, say_json
from train.bench.step_peer import Comparison, compare, render_comparisons
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import build_engine
from train.objectives.base import Objective, random_batch
from train.objectives.choose import choose_objective
from train.process.world import init_world
from train.report.utilisation import model_tflops, peak_tflops

Precision = Literal["fp32", "autocast", "bf16", "fp16"]
Optimizer = Literal["fused", "foreach", "loops"]
Switch = Literal["off", "on"]
WARM_UP_STEPS = 3
"""Steps that are not counted: compiling, allocating, making optimizer state."""
T = TypeVar("T")


@dataclass(frozen=True)
class Arguments:
    """What is measured; every combination of the lists."""

    model: tuple[str, ...] = ("vit_b_16",)
    """Model sizes: demo, vit_b_16, vit_l_16, vit_h_14."""
    images: tuple[int, ...] = (16,)
    """Images of a step."""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32, autocast, bf16 or fp16 (GPU only)."""
    compile: tuple[Switch, ...] = ("off",)
    """torch.compile."""
    checkpointing: tuple[ActivationCheckpointing, ...] = ("none",)
    """Activation checkpointing of encoder and decoder: none, selective, full."""
    optimizer: tuple[Optimizer, ...] = ("fused",)
    """AdamW's kernels: one fused for all tensors, torch's lists of tensors, or a loop over them."""
    steps: int = 5
    """Steps that count."""
    peer: Literal["none", "transformers"] = "none"
    """transformers: compare with its ViTMAEForPreTraining in place of measuring the engine; fp32
    and autocast."""
    threads: int = 0
    """Threads of the CPU; 0 leaves torch's choice."""
    json: bool = False
    """Write the result to stdout as JSON in place of a table."""


@dataclass(frozen=True, slots=True)
class Case:
    """One combination; see `Arguments`."""

    model: str
    images: int
    precision: Precision
    compile: Switch
    checkpointing: ActivationCheckpointing
    optimizer: Optimizer


@dataclass(frozen=True, slots=True)
class Measurement:
    """One case.

    Args:
        case: what was measured.
        device: its name.
        step_s, step_min_s, step_max_s: median seconds of a step, and their range.
        optimizer_s: median seconds of the optimizer's part.
        tflops: 10^12 model operations a second; recomputed activations do not count.
        mfu: of the device's dense 16-bit peak; None where that is not known.
        memory_gib: peak; of the device's allocator, on the CPU of the process.
        problem: why there are no figures; None where there are.
    """

    case: Case
    device: str = ""
    step_s: float = 0.0
    step_min_s: float = 0.0
    step_max_s: float = 0.0
    optimizer_s: float = 0.0
    tflops: float = 0.0
    mfu: float | None = None
    memory_gib: float = 0.0
    problem: str | None = None


def measure(case: Case, *, steps: int, threads: int = 0) -> Measurement:
    """Train on random pixels and time the steps. Takes this process's peak of memory: start a fresh
    one for each case.

    Args:
        case: what.
        steps: steps that count.
        threads: of the CPU; 0 leaves torch's choice.
    """
    if threads:
        torch.set_num_threads(threads)
    config = _config(case)
    world = init_world(config)
    try:
        torch.manual_seed(0)
        objective = choose_objective(config)
        engine = build_engine(config, model=objective.build(), resume=None, world=world)
        _choose_kernels(engine, case.optimizer)
        times = _time_steps(engine, objective, images=case.images, steps=steps)
        device = engine.device
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        step_s = statistics.median(total for total, _ in times)
        tflops = model_tflops(objective.train_flops(), images_per_s=case.images / step_s)
        peak = peak_tflops(name) if device.type == "cuda" else None
        return Measurement(
            case,
            device=name,
            step_s=step_s,
            step_min_s=min(total for total, _ in times),
            step_max_s=max(total for total, _ in times),
            optimizer_s=statistics.median(update for _, update in times),
            tflops=tflops,
            mfu=tflops / peak if peak else None,
            memory_gib=_peak_gib(device),
        )
    finally:
        world.end()


def _config(case: Case) -> RunConfig:
    # Plain torch where it can; low-precision weights with fp32 masters are DeepSpeed's.
    kind = "torch" if case.precision in ("fp32", "autocast") else "deepspeed"
    model = SIZES[case.model]
    return RunConfig.model_validate(
        {
            "model": model.model_dump(),
            "view": {"height": model.image_height, "width": model.image_width},
            "train": {
                "steps": 1,
                "global_batch_size": case.images,
                "micro_batch_size": case.images,
            },
            "engine": {
                "kind": kind,
                "precision": case.precision,
                "compile": case.compile,
                "activation_checkpointing": case.checkpointing,
                "decoder_activation_checkpointing": case.checkpointing,
            },
        }
    )


def _choose_kernels(engine: Engine, optimizer: Optimizer) -> None:
    """Set the kernels before the first step makes the optimizer's state."""
    for group in engine.param_groups:
        group["fused"], group["foreach"] = optimizer == "fused", optimizer == "foreach"


def _time_steps(
    engine: Engine, objective: Objective, *, images: int, steps: int
) -> list[tuple[float, float]]:
    """Give seconds of each step and of its optimizer's part."""
    inputs = objective.inputs(random_batch(objective, images=images, device=engine.device))

    def wait() -> float:
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return time.perf_counter()

    times = []
    for _ in range(WARM_UP_STEPS + steps):
        begun = wait()
        engine.forward_backward(*inputs)
        between = wait()
        engine.step(1e-4)
        ended = wait()
        times.append((ended - begun, ended - between))
    return times[WARM_UP_STEPS:]


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


def in_own_process(function: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Call a function in a fresh process and give what it returns.

    Args:
        function: of a module's top level.
        arguments, settings: what pickles.

    Raises:
        Exception: what the function raised; BrokenProcessPool where the process was killed.
    """
    with ProcessPoolExecutor(
        max_workers=1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(function, *arguments, **settings).result()


def measure_safely(case: Case, *, steps: int, threads: int) -> Measurement:
    """Measure in a fresh process; a case that fails, for want of memory or otherwise, says so in
    its row."""
    try:
        return in_own_process(measure, case, steps=steps, threads=threads)
    except Exception as error:  # noqa: BLE001 - the other cases go on
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Measurement(
            case, problem="out of memory" if "out of memory" in str(error) else lines[0][:120]
        )


def list_cases(arguments: Arguments) -> list[Case]:
    """Combine the values of the arguments."""
    return [
        Case(*values)
        for values in itertools.product(
            arguments.model,
            arguments.images,
            arguments.precision,
            arguments.compile,
            arguments.checkpointing,
            arguments.optimizer,
        )
    ]


def render(measurements: Sequence[Measurement]) -> str:
    """Lay measurements out as a Markdown table."""
    lines = [
        "| model | images | precision | compile | checkpointing | AdamW | step (range) | AdamW "
        "alone | images/s "
        "| TFLOP/s | MFU | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in measurements:
        what = " | ".join(map(str, asdict(one.case).values()))
        if one.problem:
            lines.append(f"| {what} | {one.problem} | | | | | |")
            continue
        mfu = "" if one.mfu is None else f"{100 * one.mfu:.1f}%"
        lines.append(
            f"| {what} | {1e3 * one.step_s:,.0f} ms "
            f"({1e3 * one.step_min_s:,.0f}-{1e3 * one.step_max_s:,.0f}) "
            f"| {1e3 * one.optimizer_s:,.1f} ms | {one.case.images / one.step_s:,.1f} | "
            f"{one.tflops:,.2f} | {mfu} "
            f"| {one.memory_gib:.2f} GiB |"
        )
    devices = sorted({one.device for one in measurements if one.device})
    return "\n".join([*lines, "", f"Device: {'; '.join(devices) or 'none'}."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        _run,
        Arguments,
        argv,
        module="train.step_bench",
        interrupted="step_bench: stopped; nothing is left behind.",
    )


def _run(arguments: Arguments) -> int:
    if arguments.peer == "none":
        rows = [
            measure_safely(case, steps=arguments.steps, threads=arguments.threads)
            for case in list_cases(arguments)
        ]
        result, text = {"measurements": [asdict(one) for one in rows]}, render(rows)
    else:
        pairs = _compare(arguments)
        result, text = {"comparisons": [asdict(one) for one in pairs]}, render_comparisons(pairs)
    if arguments.json:
        say_json(result)
    else:
        sys.stdout.write(f"{text}\n")
    return 0


def _compare(arguments: Arguments) -> list[Comparison]:
    return [
        in_own_process(
            compare,
            name,
            images=images,
            precision="autocast" if precision == "autocast" else "fp32",
            compiled=switch == "on",
            repeats=arguments.steps,
            threads=arguments.threads,
        )
        for name, images, precision, switch in itertools.product(
            arguments.model, arguments.images, arguments.precision, arguments.compile
        )
    ]
