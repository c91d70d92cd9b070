"""Read a checkpoint back."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from pipeline import storage
from pipeline.console import Progress
from pipeline.errors import DataError
from train.checkpoint.files import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    SHOW_AFTER_S,
    STATE_FILE,
    DamagedCheckpointError,
    FileEntry,
    OnRead,
    committed_steps,
    hash_bytes,
    parse_table,
    part_name,
    read_manifest,
    step_name,
)
from train.engine.named_state import KINDS, WEIGHT, NamedTensor
from train.errors import CheckpointError

_PIECE_BYTES = 2**26
"""Bytes of one read of a weights file: progress can be seen, and a retry repeats little."""


class CheckpointState:
    """One verified checkpoint. Tensors are read when asked for, memory-mapped.

    Args:
        uri: the step's folder.
        folder: local folder the files are read from; the same, or a staged copy of a remote one.
        document: content of state.json.
    """

    def __init__(
        self,
        *,
        uri: str,
        folder: Path,
        document: Mapping[str, Any],
    ) -> None:
        self.uri = uri
        self.step: int = document["step"]
        self.client: dict[str, Any] = document["client"]
        self.engine: dict[str, Any] = document["engine"]
        self.config: dict[str, Any] = document["config"]
        self.parts: int = document["parts"]
        self.table: list[NamedTensor] = parse_table(document["tensors"])
        self._parts = {tensor.name: tensor.part for tensor in self.table}
        self._files: dict[tuple[str, int], Any] = {}
        for kind in KINDS:
            # A part may hold frozen tensors only, and then has no file of moments.
            parts = {tensor.part for tensor in self.table if kind in tensor.kinds}
            for part in sorted(parts):
                name = part_name(kind, part, self.parts)
                path = folder / name
                self._files[kind, part] = safe_open(
                    path,
                    framework="pt",
                    device="cpu",
                )

    def tensor(self, name: str, kind: str) -> Tensor:
        """Read one whole fp32 tensor.

        Args:
            name: dotted name in the model.
            kind: weight, exp_avg or exp_avg_sq.
        """
        part = self._parts[name]
        file = self._files[kind, part]
        value: Tensor = file.get_tensor(name)
        return value


def resolve_step(uri: str) -> list[str]:
    """Find the committed steps a URI stands for: a step itself, a folder of checkpoints, or a run.

    Returns:
        URIs of step folders, newest first.

    Raises:
        CheckpointError: there is none.
    """
    # A step that was named is taken or refused, and no other one in its place.
    manifest = storage.join(uri, MANIFEST_FILE)
    if storage.exists(manifest):
        return [uri]
    in_run = storage.join(uri, CHECKPOINTS_FOLDER)
    for root in (uri, in_run):
        steps = committed_steps(root)
        if not steps:
            continue
        # The newest first: it is the one that is wanted unless it is damaged.
        names = [step_name(step) for step in reversed(steps)]
        return [storage.join(root, name) for name in names]
    shown = storage.redact(uri)
    raise CheckpointError(
        f"{shown}: no finished checkpoint here. Give the folder of a run, its checkpoints, or one "
        "step."
    )


def load_weights(uri: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the weights of a checkpoint into host memory; no other process and no optimizer state is
    needed.

    Args:
        uri: a step's folder, a folder of checkpoints or a run's folder; of several steps the newest
            undamaged one.

    Returns:
        fp32 tensors by name, and state.json: step, settings (`config`), what the loop saved
        (`client`), `tensors`.

    Raises:
        CheckpointError: no finished checkpoint is there, or all are damaged.
    """
    # An older step is better than none: the newest one may have been damaged since.
    problems = []
    for folder in resolve_step(uri):
        try:
            return _load_weights(folder)
        except DamagedCheckpointError as error:
            problems.append(str(error))
    raise DamagedCheckpointError("\n".join(problems))


def _load_weights(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # Hashes are checked while reading: what is loaded here may be published.
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    entries = [entry for entry in read_manifest(folder) if _is_wanted(entry)]
    total_bytes = sum(entry.size_bytes for entry in entries)
    label = f"reading {storage.name_of(folder)}"
    with Progress(
        label, total=total_bytes, unit="bytes", after_s=SHOW_AFTER_S
    ) as progress:
        for entry in entries:
            data = _read_entry(folder, entry, on_read=progress.advance)
            if entry.name == STATE_FILE:
                state = json.loads(data)
            else:
                tensors |= safetensors.torch.load(data)

    # A manifest can be whole and name no file of weights: it was written by another program.
    rows = state.get("tensors", [])
    names = [row["name"] for row in rows]
    missing = [name for name in names if name not in tensors]
    if missing or not state:
        shown = storage.redact(folder)
        some_missing = ", ".join(missing[:5])
        raise DamagedCheckpointError(f"{shown}: no weights of {some_missing}.")
    # In the order of the model, not of the files.
    ordered = {name: tensors[name] for name in names}
    return ordered, state


def _is_wanted(entry: FileEntry) -> bool:
    """Leave out the optimizer's moments: two thirds of a checkpoint."""
    if entry.name == STATE_FILE:
        return True
    return entry.name.startswith(f"{WEIGHT}-")


def _read_entry(
    folder: str,
    entry: FileEntry,
    *,
    on_read: OnRead,
) -> bytes:
    uri = storage.join(folder, entry.name)
    shown = storage.redact(uri)
    # BytesIO hands its memory over at the end; joined pieces would take it twice.
    content = io.BytesIO()
    try:
        size_bytes = storage.size_of(uri)
        if size_bytes != entry.size_bytes:
            raise DamagedCheckpointError(
                f"{shown}: {size_bytes} bytes, {entry.size_bytes} were written."
            )
        for start in range(0, size_bytes, _PIECE_BYTES):
            length = min(_PIECE_BYTES, size_bytes - start)
            piece = storage.read_view(uri, start, length)
            content.write(piece)
            on_read(length)
    except DataError as error:
        raise DamagedCheckpointError(str(error)) from error
    data = content.getvalue()
    if hash_bytes(data) != entry.xxh3:
        raise DamagedCheckpointError(
            f"{shown}: hash differs from the manifest's; the file is damaged."
        )
    return data
