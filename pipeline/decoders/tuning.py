"""The tuning file: which decoder and settings were fastest on a machine, as `pipeline.bench --tune`
wrote them."""

from __future__ import annotations

import os
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError

from pipeline import storage
from pipeline.config import Settings
from pipeline.errors import ConfigError


class Tuning(Settings):
    """The `[loader]` table of a tuning file; every name and unit is that of the loader's
    settings."""

    decoder: Literal["dali", "turbo", "ffcv"]
    num_threads: int = Field(ge=1)
    dali_depth: int = Field(default=0, ge=0, le=16)
    hw_decoder_load: float = Field(default=0.0, ge=0, le=1)


def is_installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it; `a.b` is not installed
    either if `a` is missing."""
    # `find_spec` imports the parents of a dotted name.
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def candidates(*, device: torch.device, interpolation: str) -> list[Tuning]:
    """List what is worth trying on a machine: every decoder that is installed and has the filter.

    Args:
        device: device on which batches are wanted.
        interpolation: the view's filter.
    """
    cores = len(os.sched_getaffinity(0))
    # Fewer threads than cores may be faster: the model's launches need cores too. A set, because
    # on a small machine some of the three are equal.
    quarter = max(1, cores // 4)
    half = max(1, cores // 2)
    threads = sorted({quarter, half, cores})
    ways = []
    for count in threads:
        ways.append(Tuning(decoder="turbo", num_threads=count))
    if interpolation == "area" and is_installed("ffcv"):
        ways += [Tuning(decoder="ffcv", num_threads=count) for count in threads]
    if interpolation == "area" or not is_installed("nvidia.dali"):
        return ways
    if device.type != "cuda":
        for count in threads:
            ways.append(Tuning(decoder="dali", num_threads=count))
        return ways
    # Depth and share depend on each other: the JPEG engine and the CUDA kernels work at once, and
    # how well they are fed depends on the batches in hand. So all pairs are tried.
    for count in threads:
        for depth in (2, 3):
            for load in (0.5, 0.65, 0.8, 1.0):
                way = Tuning(
                    decoder="dali",
                    num_threads=count,
                    dali_depth=depth,
                    hw_decoder_load=load,
                )
                ways.append(way)
    return ways


def describe(tuning: Tuning) -> str:
    """Say what a tuning sets, in a line."""
    chosen = tuning.model_dump(exclude_defaults=True)
    settings = []
    for name, value in chosen.items():
        settings.append(f"{name} {value}")
    return ", ".join(settings)


def describe_machine(device: torch.device) -> str:
    """Name what a tuning is good for: the device's model and the cores this process may use."""
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores"


def write_tuning(
    path: Path, tuning: Tuning, *, device: torch.device, comment: str
) -> None:
    """Write a tuning file.

    Args:
        path: file to write.
        tuning: what was best.
        device: what it was measured on.
        comment: how it was measured, lines of text.
    """
    # By hand: the standard library reads TOML and does not write it.
    lines = []
    for line in comment.splitlines():
        lines.append(f"# {line}".rstrip())
    machine = describe_machine(device)
    lines += [f'machine = "{machine}"', "", "[loader]"]
    settings = tuning.model_dump(exclude_defaults=True)
    for name, value in settings.items():
        text = value
        if isinstance(value, str):
            text = f'"{value}"'
        lines.append(f"{name} = {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read_tuning(path: str, *, device: torch.device) -> Tuning:
    """Read a tuning file.

    Raises:
        ConfigError: it cannot be read, or was written on another kind of machine.
    """
    try:
        text = Path(storage.expand_home(path)).read_text()
        content = tomllib.loads(text)
        tuning = Tuning(**content.get("loader", {}))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise ConfigError(
            f"loader.tuning_file {path}: cannot be used ({error}). Write it with python -m "
            "pipeline.bench URI --tune"
        ) from error
    here = describe_machine(device)
    there = content.get("machine")
    # Threads and decoders that were fastest elsewhere may be the slowest here.
    if there != here:
        raise ConfigError(
            f"loader.tuning_file {path}: was written for {there!r}, but this machine is {here!r}. "
            "Run python -m pipeline.bench URI --tune on this machine, or leave the setting empty"
        )
    return tuning
