"""Weights for other libraries: `python -m train.export CHECKPOINT --to mae|timm|hf|detectron2
[--out DIR]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from model.exchange.weights import WeightsError, to_detectron2, to_hf, to_mae, to_timm
from model.objectives.mae import is_decoder_name
from pipeline.errors import ConfigError, InfrastructureError, MaelstromError
from train.evaluation.saved_model import SavedModel, load_model
from train.process.outcome import describe

Target = Literal["mae", "timm", "hf", "detectron2"]
Part = Literal["encoder", "full"]
FileType = Literal["safetensors", "pth"]
DEFAULT_PARTS: Mapping[Target, Part] = {
    "mae": "full",
    "timm": "encoder",
    "hf": "full",
    "detectron2": "encoder",
}
"""What each library can take: timm and Detectron2 have no place for a decoder."""


@dataclass(frozen=True)
class Arguments:
    """Write a checkpoint's weights under the names of another library."""

    checkpoint: tyro.conf.Positional[str]
    """A step's folder, a folder of checkpoints, or a run's folder; local or a URI."""
    to: Target
    """mae: the published MAE names. timm: VisionTransformer(num_classes=0). hf: transformers'
    ViTMAE, with config.json. detectron2: ViTDet's backbone, to be loaded with matching
    heuristics."""
    out: str = ""
    """Folder to write into. Empty: `export-<to>`."""
    part: Part | None = None
    """encoder, or full (with the decoder). None: full for mae and hf, encoder for timm and
    detectron2."""
    file_type: FileType = "safetensors"
    """pth: what torch.load of the original projects expects (`{"model": ...}`); tensors only, no
    pickled objects."""
    patch_size: int | None = None
    """detectron2 only: patch size to resample to, in pixels; ViT-H/14 needs 16 there."""


def export(
    saved: SavedModel,
    out: Path,
    *,
    to: Target,
    part: Part | None = None,
    file_type: FileType = "safetensors",
    patch_size: int | None = None,
) -> list[Path]:
    """Write a model's weights for another library.

    Args:
        saved: the model.
        out: local folder; made.
        to: the library.
        part: encoder or full; by default what the library takes.
        file_type: kind of file.
        patch_size: Detectron2 only, in pixels.

    Returns:
        The files, weights first.

    Raises:
        ConfigError: the library cannot take what was asked for.
        InfrastructureError: the folder cannot be written.
    """
    part = part or DEFAULT_PARTS[to]
    _check(to, part, file_type=file_type, patch_size=patch_size)
    state, config = saved.model.state_dict(), saved.config.model
    settings: dict[str, Any] | None = None
    try:
        if to == "hf":
            weights, settings = to_hf(state, config)
            if part == "encoder":
                weights = {
                    name: value for name, value in weights.items() if name.startswith("vit.")
                }
                settings["architectures"] = ["ViTMAEModel"]
        elif to == "mae":
            weights = to_mae(state, config, part=part)["model"]
        elif to == "timm":
            weights = to_timm(state, config)
        else:
            weights = to_detectron2(state, config, patch_size=patch_size)["model"]
    except WeightsError as error:
        raise ConfigError(f"{saved.uri}: {error}") from error
    facts = {
        "format": "pt",
        "source": f"maelstrom {saved.config.recipe}",
        "step": str(saved.step),
        "part": part,
    }
    files = [
        _write_weights(
            out, weights, stem="model" if to == "hf" else to, file_type=file_type, facts=facts
        )
    ]
    if settings is not None:
        files.append(out / "config.json")
        files[-1].write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return files


def _check(to: Target, part: Part, *, file_type: FileType, patch_size: int | None) -> None:
    problems = []
    if part == "full" and DEFAULT_PARTS[to] == "encoder":
        problems.append(
            f"--to {to} takes the encoder only: leave --part out, or use --to mae or --to hf"
        )
    if file_type == "pth" and to in ("hf", "timm"):
        problems.append(
            f"--to {to} is written as safetensors, which it loads: leave --file-type out"
        )
    if patch_size is not None and to != "detectron2":
        problems.append(f"--patch-size {patch_size} is for --to detectron2, not {to}")
    if problems:
        raise ConfigError("; ".join(problems))


def _write_weights(
    out: Path,
    weights: Mapping[str, Tensor],
    *,
    stem: str,
    file_type: FileType,
    facts: Mapping[str, str],
) -> Path:
    assert not (facts["part"] == "encoder" and any(is_decoder_name(name) for name in weights))
    # Contiguous copies: views of one tensor (query, key, value) may not share a file's memory.
    tensors = {
        name: value.detach().float().cpu().clone().contiguous() for name, value in weights.items()
    }
    path = out / f"{stem}.{file_type}"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file_type == "safetensors":
            save_file(tensors, temporary, metadata=dict(facts))
        else:
            torch.save({"model": tensors}, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InfrastructureError(
            f"{path}: cannot be written: {error}; free some space or use --out"
        ) from error
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = tyro.cli(Arguments, prog="python -m train.export", args=argv)
    try:
        files = export(
            load_model(arguments.checkpoint),
            Path(arguments.out or f"export-{arguments.to}"),
            to=arguments.to,
            part=arguments.part,
            file_type=arguments.file_type,
            patch_size=arguments.patch_size,
        )
    except MaelstromError as error:
        sys.stderr.write(describe(error))
        return error.exit_code
    for file in files:
        sys.stdout.write(f"{file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
