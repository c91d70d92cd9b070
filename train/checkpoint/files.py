"""What a checkpoint is on disk or in object storage: names, manifest, hashes, and reading it back.

    step-000123/weight-00000-of-00002.safetensors       whole fp32 tensors under their names in the
    model step-000123/exp_avg-00000-of-00002.safetensors      AdamW's moments, the same names
    step-000123/exp_avg_sq-00000-of-00002.safetensors step-000123/state.json
    step, position, settings, table of tensors step-000123/MANIFEST.json
    size and hash of all of these; written last: the commit

No pickle, and nothing that depends on the number of ranks or on how they shard: any safetensors
reader will do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import xxhash

from pipeline import storage
from pipeline.errors import DataError, MaelstromError
from pipeline.storage.local import TMP_MARK
from train.engine.named_state import NamedTensor
from train.errors import CheckpointError

FORMAT = 1
"""Version of the layout above; a reader refuses others."""
MANIFEST_FILE = "MANIFEST.json"
STATE_FILE = "state.json"
CHECKPOINTS_FOLDER = "checkpoints"
"""Where a run keeps its checkpoints unless told otherwise."""
_CHUNK_BYTES = 2**23
_STEP_NAME = re.compile(r"step-(\d{6,})")
_OWN_NAME = re.compile(
    r"(weight|exp_avg|exp_avg_sq)-\d{5}-of-\d{5}\.safetensors|state\.json|MANIFEST\.json"
)
_OWN_TMP_NAME = re.compile(rf"\.({_OWN_NAME.pattern}){re.escape(TMP_MARK)}[\w-]+")


class DamagedCheckpointError(CheckpointError):
    """A checkpoint with a file that is missing, short, or not what was written."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a manifest.

    Args:
        name: file name in the step's folder.
        size_bytes: its size.
        xxh3: hash of its bytes, 128 bits in hex; guards against damage, not against an attacker.
    """

    name: str
    size_bytes: int
    xxh3: str


def step_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Return the step of a folder name; None where it is not one of ours."""
    match = _STEP_NAME.fullmatch(name)
    return int(match.group(1)) if match and step_name(int(match.group(1))) == name else None


def part_name(kind: str, part: int, parts: int) -> str:
    """Return the file name of one kind of tensor of one part."""
    return f"{kind}-{part:05d}-of-{parts:05d}.safetensors"


def is_own_file(name: str) -> bool:
    """Tell whether a file of a step's folder was written by this program, finished or not."""
    return bool(_OWN_NAME.fullmatch(name) or _OWN_TMP_NAME.fullmatch(name))


def hash_bytes(data: bytes | memoryview) -> str:
    """Hash a file's content."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(uri: str) -> tuple[int, str]:
    """Read a file through and return its size and hash."""
    digest, size = xxhash.xxh3_128(), 0
    with storage.open_read(uri) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def write_file(folder: str, name: str, data: bytes | memoryview) -> FileEntry:
    """Write a file whole or not at all, and read a local one back: a disk may lie about what it
    took.

    The interpreter is free meanwhile, so that a training loop in another thread goes on.

    Raises:
        CheckpointError: what is there now is not what was written.
        InfrastructureError: the storage refused.
    """
    uri = storage.join(folder, name)
    entry = FileEntry(name, len(data), hash_bytes(data))
    # A local file is written from any memory; the clients of object stores want an object of bytes.
    storage.write_atomic(uri, cast("bytes", data) if storage.is_local(uri) else _as_bytes(data))
    # Object stores check what they receive themselves; its size is looked at before the commit.
    if storage.is_local(uri) and hash_file(uri) != (entry.size_bytes, entry.xxh3):
        raise CheckpointError(f"{uri}: reads back other than it was written. Check the disk.")
    return entry


def _as_bytes(data: bytes | memoryview) -> bytes:
    if isinstance(data, bytes):
        return data
    copied = bytearray(len(data))
    # torch copies without holding the interpreter's lock; bytes(data) would stop the training loop
    # for a second.
    torch.frombuffer(copied, dtype=torch.uint8).copy_(torch.from_numpy(np.asarray(data)))
    return cast("bytes", copied)


def render_manifest(step: int, files: Iterable[FileEntry]) -> bytes:
    """Render MANIFEST.json; it carries a hash of itself."""
    content = {"format": FORMAT, "step": step, "files": [asdict(entry) for entry in files]}
    return json.dumps({**content, "xxh3": _hash_json(content)}, indent=1).encode()


def _hash_json(content: Mapping[str, Any]) -> str:
    return hash_bytes(json.dumps(content, sort_keys=True).encode())


def read_manifest(folder: str) -> list[FileEntry]:
    """Read and check MANIFEST.json.

    Args:
        folder: URI of a step's folder.

    Raises:
        DamagedCheckpointError: it is missing or not what was written.
        CheckpointError: it is of another version of this program.
    """
    uri = storage.join(folder, MANIFEST_FILE)
    try:
        content = json.loads(storage.read_bytes(uri))
        claimed = content.pop("xxh3")
        entries = [FileEntry(**entry) for entry in content["files"]]
    except DataError:
        raise DamagedCheckpointError(
            f"{uri}: not there; the checkpoint was never finished."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{uri}: not a manifest ({type(error).__name__}: {error})."
        ) from None
    if content.get("format") != FORMAT and claimed == _hash_json(content):
        raise CheckpointError(
            f"{uri}: layout version {content.get('format')}, this program reads {FORMAT}. "
            "Use the release it was written with, or another checkpoint.dir for a new run."
        )
    if claimed != _hash_json(content) or not all(
        _OWN_NAME.fullmatch(entry.name) for entry in entries
    ):
        raise DamagedCheckpointError(f"{uri}: its own hash does not match.")
    return entries


def check_entry(folder: str, entry: FileEntry) -> str | None:
    """Read one file through and compare it with the manifest.

    Returns:
        What is wrong with it, or None.
    """
    uri = storage.join(folder, entry.name)
    try:
        size, digest = hash_file(uri)
    except MaelstromError as error:
        return f"{storage.redact(uri)}: {error}"
    if size != entry.size_bytes:
        return f"{storage.redact(uri)}: {size} bytes, {entry.size_bytes} were written"
    if digest != entry.xxh3:
        return f"{storage.redact(uri)}: hash {digest}, {entry.xxh3} was written"
    return None


def find_steps(root: str) -> dict[int, set[str]]:
    """List the files of every step's folder below a folder of checkpoints.

    Args:
        root: URI of the folder; one that is not there has no steps.

    Returns:
        File names by step, in ascending order of steps.
    """
    if not storage.exists(root):
        return {}
    found: dict[int, set[str]] = {}
    for file in storage.list_files(root, recursive=True):
        folder, _, name = file.name.partition("/")
        step = step_of(folder)
        if step is not None and name and "/" not in name:
            found.setdefault(step, set()).add(name)
    return dict(sorted(found.items()))


def render_table(table: Iterable[NamedTensor]) -> list[dict[str, Any]]:
    """Turn the table of tensors into JSON types."""
    return [asdict(tensor) for tensor in table]


def parse_table(rows: Iterable[Mapping[str, Any]]) -> list[NamedTensor]:
    """Read a table of tensors."""
    return [
        NamedTensor(row["name"], tuple(row["shape"]), row["trained"], row["part"]) for row in rows
    ]
