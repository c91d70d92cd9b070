"""What this machine's GPUs are, asked without torch and without taking one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MIB = 2**20
BF16_CAPABILITY = 8
"""First major compute capability that computes in bf16 (Ampere: A100, A10, RTX 30). Source: CUDA
C++ programming guide, arithmetic instructions."""
_LIMIT_S = 20.0
"""nvidia-smi takes seconds on a machine whose driver is not kept loaded."""
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""What a GPU's driver makes: NVIDIA's, NVIDIA's under WSL, AMD's."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a rank would compute on.

    Args:
        kind: cpu or cuda.
        has_bf16: whether it computes in bf16; None if that is not known.
    """

    kind: Literal["cpu", "cuda"]
    has_bf16: bool | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver reports it.

    Args:
        memory_bytes: all of it.
        capability: major compute capability; None if the driver does not say.
    """

    memory_bytes: int
    capability: int | None


def list_gpus() -> list[Gpu]:
    """Ask nvidia-smi; empty if there is no such program, or it sees no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [
        program,
        "--query-gpu=memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    gpus = []
    for line in done.stdout.splitlines():
        memory, _, capability = line.partition(",")
        if not memory.strip().isdigit():  # "[N/A]", of an integrated GPU
            continue
        major = capability.strip().partition(".")[0]
        known = int(major) if major.isdigit() else None
        gpus.append(Gpu(int(memory) * MIB, known))
    return gpus


def find_device(env: Mapping[str, str]) -> Device | None:
    """Tell what ranks of this machine would compute on; None if only torch can tell.

    Args:
        env: the environment; CUDA_VISIBLE_DEVICES may hide the GPUs.
    """
    if env.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return Device("cpu", has_bf16=True)
    if not any(Path(file).exists() for file in _DEVICE_FILES):
        return Device("cpu", has_bf16=True)
    gpus = list_gpus()
    if not gpus:  # a driver without its program, or another maker's GPU
        return None
    answers = {
        gpu.capability is not None and gpu.capability >= BF16_CAPABILITY for gpu in gpus
    }
    # Which of several kinds a rank gets is not known here.
    has_bf16 = answers.pop() if len(answers) == 1 else None
    if any(gpu.capability is None for gpu in gpus):
        has_bf16 = None
    return Device("cuda", has_bf16)
