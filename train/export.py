"""Weights for other libraries: `python -m train.export CHECKPOINT --to mae|timm|hf|detectron2
[--out DIR]`."""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.export")

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from pipeline import storage
from pipeline.console import run_command, say_json, say_result, starting
from pipeline.errors import ConfigError, InfrastructureError
from pipeline.options import LocalText, Location, Pixels
from pipeline.storage.local import commit_file, tmp_path
from train.process.folder import cannot_write, prepare_out, writing

if TYPE_CHECKING:
    from torch import Tensor

    from model.config import ModelConfig
    from train.evaluation.saved_model import SavedModel

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

    checkpoint: tyro.conf.Positional[Location]
    """A step's folder, a folder of checkpoints, or a run's folder; local or a URI."""
    to: Target
    """mae: the published MAE names. timm: VisionTransformer(num_classes=0). hf: transformers'
    ViTMAE, with config.json. detectron2: ViTDet's backbone, to be loaded with matching
    heuristics."""
    out: LocalText = ""
    """Folder to write into. Empty: `export-<to>`."""
    part: Part | None = None
    """encoder, or full (with the decoder). None: full for mae and hf, encoder for timm and
    detectron2."""
    file_type: FileType = "safetensors"
    """pth: what torch.load of the original projects expects (`{"model": ...}`); tensors only, no
    pickled objects."""
    patch_size: Pixels | None = None
    """detectron2 only: patch size to resample to, in pixels; ViT-H/14 needs 16 there."""
    json: bool = False
    """Write the result to stdout as JSON: to, part, step, files."""


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
    weights, settings = _convert(
        saved,
        to=to,
        part=part,
        patch_size=patch_size,
    )
    facts = {
        "format": "pt",
        "source": f"maelstrom {saved.config.recipe}",
        "step": str(saved.step),
        "part": part,
    }
    # transformers finds a model by its file's name.
    stem = "model" if to == "hf" else to
    files = [
        _write_weights(
            out,
            weights,
            stem=stem,
            file_type=file_type,
            facts=facts,
        )
    ]
    if settings is not None:
        path = out / "config.json"
        text = json.dumps(settings, indent=2) + "\n"
        with writing(path, option="--out"):
            storage.write_atomic(str(path), text.encode())
        files.append(path)
    return files


def _convert(
    saved: SavedModel, *, to: Target, part: Part, patch_size: int | None
) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """Give the weights under the other library's names, and its settings if it has a file for
    them."""
    from model.exchange.weights import (
        WeightsError,
        to_detectron2,
        to_hf,
        to_mae,
        to_timm,
    )

    state = saved.model.state_dict()
    config = saved.config.model
    try:
        if to == "mae":
            return to_mae(state, config, part=part)["model"], None
        if to == "timm":
            return to_timm(state, config), None
        if to == "detectron2":
            _check_patch_size(patch_size, config)
            return to_detectron2(state, config, patch_size=patch_size)["model"], None
        return to_hf(state, config, part=part)
    except WeightsError as error:
        raise ConfigError(f"--to {to}: {saved.uri}: {error}") from error


def _check_patch_size(patch_size: int | None, config: ModelConfig) -> None:
    """Refuse a patch that does not divide the images of the model."""
    sides = (config.image_height, config.image_width)
    if patch_size is None or not any(side % patch_size for side in sides):
        return
    smaller = min(sides)
    fitting = [
        str(size)
        for size in range(4, smaller + 1)
        if not any(side % size for side in sides)
    ]
    raise ConfigError(
        f"--patch-size {patch_size} does not divide the model's images of {sides[0]} x {sides[1]} "
        f"pixels: use {', '.join(fitting)}"
    )


def _check(
    to: Target,
    part: Part,
    *,
    file_type: FileType,
    patch_size: int | None,
) -> None:
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
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from model.objectives.mae import is_decoder_name

    assert not (
        facts["part"] == "encoder" and any(is_decoder_name(name) for name in weights)
    )
    # Contiguous copies: views of one tensor (query, key, value) may not share a file's memory.
    tensors = {
        name: value.detach().float().cpu().clone().contiguous()
        for name, value in weights.items()
    }
    path = out / f"{stem}.{file_type}"
    # Not storage.write_atomic: these libraries write to a path, and a large model's bytes would be
    # in memory a second time.
    temporary = tmp_path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file_type == "safetensors":
            save_file(tensors, temporary, metadata=dict(facts))
        else:
            # Not by its path: torch would then say "file write failed", and not why.
            with temporary.open("wb") as file:
                torch.save({"model": tensors}, file)
        commit_file(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        # Both libraries put the file system's error into an exception of their own.
        raise InfrastructureError(cannot_write(path, error, setting="--out")) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path


def _run(arguments: Arguments) -> int:
    # Here and not at the top: torch takes seconds, and --help must not wait for it.
    with starting("train.export"):
        from train.evaluation.saved_model import load_model

    # Before the checkpoint is read: a mistake must not cost minutes of it.
    part = arguments.part or DEFAULT_PARTS[arguments.to]
    _check(
        arguments.to,
        part,
        file_type=arguments.file_type,
        patch_size=arguments.patch_size,
    )
    out = Path(arguments.out or f"export-{arguments.to}")
    prepare_out(out, option="--out")
    saved = load_model(arguments.checkpoint)
    files = export(
        saved,
        out,
        to=arguments.to,
        part=part,
        file_type=arguments.file_type,
        patch_size=arguments.patch_size,
    )
    names = [str(file) for file in files]
    if arguments.json:
        say_json(
            {
                "to": arguments.to,
                "part": part,
                "step": saved.step,
                "files": names,
            }
        )
    else:
        say_result("".join(f"{name}\n" for name in names))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        _run,
        Arguments,
        argv,
        module="train.export",
        interrupted="export: stopped. No file is half-written; the same command starts again.",
    )
