"""What engines, decoders and this machine cannot do: the one list of rules, read before the start,
by `--dry-run` and by the engine itself."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import ConfigError
from train.config import EngineSection, RunConfig
from train.settings.devices import Device


def engine_problems(
    engine: EngineSection, *, world_size: int, device: Device | None = None
) -> list[str]:
    """List the settings of an engine that cannot work together, or not on a device.

    Args:
        engine: the settings.
        world_size: ranks of this launch.
        device: what the ranks compute on; None if it is not known yet.

    Returns:
        Messages that name the setting, its value and the remedy; empty if all is well.
    """
    problems = []
    if engine.kind == "torch":
        problems += _torch_problems(engine, world_size=world_size)
    elif engine.precision == "fp16" and engine.zero_stage == 0:
        problems.append(
            "engine.precision fp16 does not scale its loss at engine.zero_stage 0: "
            "use engine.zero_stage 1"
        )
    # Offloading moves what a stage has taken apart: at stage 0 there are no parts to move.
    if engine.offload_optimizer == "cpu" and engine.zero_stage == 0:
        problems.append(
            "engine.offload_optimizer cpu needs engine.zero_stage 1, 2 or 3, not 0"
        )
    # Only stage 3 has the weights in parts.
    if engine.offload_parameters == "cpu" and engine.zero_stage != 3:
        problems.append(
            f"engine.offload_parameters cpu needs engine.zero_stage 3, not {engine.zero_stage}"
        )
    # The engine asks again with the device that it got, which several GPUs of two kinds decide.
    if device is not None:
        problems += device_problems(engine, device)
    return problems


def _torch_problems(engine: EngineSection, *, world_size: int) -> list[str]:
    problems = []
    if world_size > 1:
        problems.append(
            f"engine.kind torch runs one process, not {world_size}: use engine.kind deepspeed"
        )
    # 16-bit weights need fp32 copies, which DeepSpeed keeps and the plain engine does not.
    if engine.precision in ("bf16", "fp16"):
        problems.append(
            "engine.kind torch runs fp32 and autocast, not engine.precision "
            f"{engine.precision}: use engine.kind deepspeed"
        )
    return problems


def device_problems(engine: EngineSection, device: Device) -> list[str]:
    """List the settings that a device cannot do.

    Args:
        engine: the settings.
        device: what the ranks compute on.
    """
    # DeepSpeed refuses it too, but only once the ranks are up.
    if engine.precision == "fp16" and device.kind == "cpu":
        return [
            "engine.precision fp16 needs a GPU, this process has none: use bf16, autocast or fp32"
        ]
    # Not `not device.has_bf16`: None is not known, and then the engine finds out.
    if engine.precision in ("bf16", "autocast") and device.has_bf16 is False:
        return [
            f"engine.precision {engine.precision} computes in bf16, which this GPU cannot (compute "
            "capability 8.0 can, e.g. A100): use fp16 or fp32"
        ]
    return []


def decoder_problems(config: RunConfig) -> list[str]:
    """List the filters that the decoder which was asked for does not have.

    Args:
        config: settings of the run. `auto` always finds a decoder.
    """
    decoder = config.loader.decoder
    interpolation = config.view.interpolation
    # The same words as the decoders', which say it only when ranks and GPUs are up.
    if decoder == "dali" and interpolation == "area":
        return [
            "view.interpolation area: DALI has bicubic and bilinear; choose one of them, or "
            "loader.decoder turbo"
        ]
    if decoder == "ffcv" and interpolation != "area":
        return [
            f"view.interpolation {interpolation}: FFCV has only area; choose it, or loader.decoder "
            "turbo or dali"
        ]
    return []


def machine_problems(config: RunConfig) -> list[str]:
    """List what a run needs and this machine does not have: mistakes of a run, notes of a dry run.

    Args:
        config: settings of the run.
    """
    decoder = config.loader.decoder
    # Asked for by name only: `auto` takes what is installed.
    packages = (
        ("loader.decoder", "dali", decoder == "dali", "nvidia.dali", "dali"),
        ("loader.decoder", "ffcv", decoder == "ffcv", "ffcv", "ffcv"),
        ("log.wandb", "on", config.log.wandb == "on", "wandb", "tracking"),
        ("log.mlflow", "on", config.log.mlflow == "on", "mlflow", "tracking"),
    )
    problems = [
        f"{name} {value} needs the package {package}, which is not installed: run make setup with "
        f"{extra} among its EXTRAS, or choose another value"
        for name, value, is_asked, package, extra in packages
        if is_asked and not _is_installed(package)
    ]
    return problems + _tuning_problems(config.loader.tuning_file)


def _is_installed(package: str) -> bool:
    # `find_spec` imports the parents of a dotted name, which may be missing too.
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _tuning_problems(path: str) -> list[str]:
    """Say so if a tuning file cannot be read; whether it is this machine's only torch can tell."""
    if not path:
        return []
    try:
        tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [
            f"loader.tuning_file {path}: cannot be used ({error}). Write it with python -m "
            "pipeline.bench URI --tune"
        ]
    return []


def batch_problems(
    config: RunConfig, *, world_size: int, source: str = ""
) -> list[str]:
    """Say so if the ranks cannot share the global batch out evenly.

    Args:
        config: settings of the run.
        world_size: ranks of this launch.
        source: what says how many ranks there are, e.g. `WORLD_SIZE in the environment`: it may be
            left over from another start.
    """
    try:
        config.train.grad_accum_steps(world_size=world_size)
    except ValueError as error:
        because = f" ({world_size} ranks: {source})" if source else ""
        return [f"{error}{because}"]
    return []


def refuse_engine_settings(
    config: RunConfig,
    *,
    world_size: int,
    device: Device,
) -> None:
    """Refuse what an engine cannot do: the guard of an engine that is built without a command line.

    Args:
        config: settings of the run.
        world_size: ranks.
        device: what this rank computes on.

    Raises:
        ConfigError: all that does not fit, at once.
    """
    problems = engine_problems(config.engine, world_size=world_size, device=device)
    problems += batch_problems(config, world_size=world_size)
    if problems:
        lines = [f"  {problem}" for problem in problems]
        raise ConfigError("\n".join(["settings that cannot work together:", *lines]))
