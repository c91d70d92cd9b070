"""What a checkpoint is on disk or in object storage: names, manifest, hashes, and reading it back.

    step-000123/weight-00000-of-00002.safetensors       whole fp32 tensors, named as in the model
    step-000123/exp_avg-00000-of-00002.safetensors      AdamW's moments, the same names
    step-000123/exp_avg_sq-00000-of-00002.safetensors
    step-000123/state.json       step, position, settings, table of tensors
    step-000123/MANIFEST.json    size and hash of all of these; written last: the commit

No pickle, and nothing that depends on the number of ranks or on how they shard: any safetensors
reader will do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
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
CHUNK_BYTES = 2**23
"""Bytes that are read and hashed together: large enough for object storage, small enough for a
progress bar."""
SHOW_AFTER_S = 2.0
"""Reading that is done sooner shows no progress."""
_STEP_NAME = re.compile(r"step-(\d{6,})")
_OWN_NAME = re.compile(
    r"(weight|exp_avg|exp_avg_sq)-\d{5}-of-\d{5}\.safetensors|state\.json|MANIFEST\.json"
)
_OWN_TMP_NAME = re.compile(rf"\.({_OWN_NAME.pattern}){re.escape(TMP_MARK)}[\w-]+")


OnRead = Callable[[int], None]
"""Told the bytes that were read since it was last told."""


def no_report(num_bytes: int) -> None:
    """Take no notice."""


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
    """Return the step of a folder name; None if the name is not one of ours."""
    match = _STEP_NAME.fullmatch(name)
    if not match:
        return None
    step = int(match.group(1))
    # `step-0000123` is a number too, but no step is written under it.
    return step if step_name(step) == name else None


def part_name(kind: str, part: int, parts: int) -> str:
    """Return the file name of one kind of tensor of one part."""
    return f"{kind}-{part:05d}-of-{parts:05d}.safetensors"


def is_own_file(name: str) -> bool:
    """Tell whether a file of a step's folder was written by this program, finished or not."""
    return bool(_OWN_NAME.fullmatch(name) or _OWN_TMP_NAME.fullmatch(name))


def hash_bytes(data: bytes | memoryview) -> str:
    """Hash a file's content."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(uri: str, *, on_read: OnRead = no_report) -> tuple[int, str]:
    """Read a file through.

    Args:
        uri: the file.
        on_read: told the bytes read since it was last told.

    Returns:
        Its size in bytes and its hash.
    """
    # In pieces: a rank's share may be larger than the memory that is left beside the model.
    digest = xxhash.xxh3_128()
    size_bytes = 0
    with storage.open_read(uri) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
            on_read(len(chunk))
    return size_bytes, digest.hexdigest()


def write_file(
    folder: str,
    name: str,
    data: bytes | memoryview,
) -> FileEntry:
    """Write a file whole or not at all, and read a local one back: a disk may lie about what it
    took.

    The interpreter is free meanwhile, so that a training loop in another thread goes on.

    Raises:
        CheckpointError: the file read back differs from what was written.
        InfrastructureError: the storage refused.
    """
    uri = storage.join(folder, name)
    entry = FileEntry(name, len(data), hash_bytes(data))
    if not storage.is_local(uri):
        # Object stores check what they receive themselves; its size is looked at before the commit.
        storage.write_atomic(uri, _as_bytes(data))
        return entry
    # A local file is written from any memory; the clients of object stores want an object of bytes.
    storage.write_atomic(uri, cast("bytes", data))
    if hash_file(uri) != (entry.size_bytes, entry.xxh3):
        raise CheckpointError(
            f"{uri}: the file read back differs from what was written. Check the disk."
        )
    return entry


def _as_bytes(data: bytes | memoryview) -> bytes:
    if isinstance(data, bytes):
        return data
    copied = bytearray(len(data))
    # torch copies without holding the interpreter's lock; bytes(data) would stop the training loop
    # for a second.
    torch.frombuffer(copied, dtype=torch.uint8).copy_(
        torch.from_numpy(np.asarray(data))
    )
    return cast("bytes", copied)


def render_manifest(step: int, files: Iterable[FileEntry]) -> bytes:
    """Render MANIFEST.json; it carries a hash of itself."""
    content = {
        "format": FORMAT,
        "step": step,
        "files": [asdict(entry) for entry in files],
    }
    signed = {**content, "xxh3": hash_json(content)}
    return json.dumps(signed, indent=1).encode()


def hash_json(content: Mapping[str, Any]) -> str:
    """Hash JSON types, whatever the order of their keys."""
    # Python's default separators are part of the format: readers make the same text.
    text = json.dumps(content, sort_keys=True)
    return hash_bytes(text.encode())


def read_manifest(folder: str) -> list[FileEntry]:
    """Read and check MANIFEST.json.

    Args:
        folder: URI of a step's folder.

    Raises:
        DamagedCheckpointError: it is missing or not what was written.
        CheckpointError: it is of another version of this program.
    """
    uri = storage.join(folder, MANIFEST_FILE)
    shown = storage.redact(uri)
    try:
        content = json.loads(storage.read_bytes(uri))
        claimed = content.pop("xxh3")
        entries = [FileEntry(**entry) for entry in content["files"]]
    except DataError:
        raise DamagedCheckpointError(
            f"{shown}: not there; the checkpoint was never finished."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{shown}: not a manifest ({type(error).__name__}: {error})."
        ) from None

    # The hash first: a version number that was damaged must not send anybody to another release.
    is_sound = claimed == hash_json(content)
    if is_sound and content.get("format") != FORMAT:
        raise CheckpointError(
            f"{shown}: layout version {content.get('format')}, this program reads {FORMAT}. "
            "Use the release it was written with, or another checkpoint.dir for a new run."
        )
    # A name with a slash would lead out of the folder.
    if not is_sound or not all(_OWN_NAME.fullmatch(entry.name) for entry in entries):
        raise DamagedCheckpointError(f"{shown}: its own hash does not match.")
    return entries


def check_entry(
    folder: str,
    entry: FileEntry,
    *,
    on_read: OnRead = no_report,
) -> str | None:
    """Read one file through and compare it with the manifest.

    Args:
        folder: where it is: the step's folder, or a copy of it.
        entry: what the manifest says.
        on_read: told the bytes read since it was last told.

    Returns:
        What is wrong with it, or None.
    """
    uri = storage.join(folder, entry.name)
    shown = storage.redact(uri)
    try:
        size_bytes, digest = hash_file(uri, on_read=on_read)
    except MaelstromError as error:
        return f"{shown}: {error}"
    # Told apart from another hash: a short file points to a full disk, not to a bad one.
    if size_bytes != entry.size_bytes:
        return f"{shown}: {size_bytes} bytes, {entry.size_bytes} were written"
    if digest != entry.xxh3:
        return f"{shown}: hash {digest}, {entry.xxh3} was written"
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
    # One listing for all steps: in object storage each listing is a request.
    found: dict[int, set[str]] = {}
    for file in storage.list_files(root, recursive=True):
        folder, _, name = file.name.partition("/")
        step = step_of(folder)
        if step is not None and name and "/" not in name:
            found.setdefault(step, set()).add(name)
    return dict(sorted(found.items()))


def committed_steps(root: str) -> list[int]:
    """List the finished steps below a folder of checkpoints, in ascending order."""
    return [step for step, names in find_steps(root).items() if MANIFEST_FILE in names]


def render_table(table: Iterable[NamedTensor]) -> list[dict[str, Any]]:
    """Turn the table of tensors into JSON types."""
    return [asdict(tensor) for tensor in table]


def parse_table(rows: Iterable[Mapping[str, Any]]) -> list[NamedTensor]:
    """Read a table of tensors."""
    tensors = []
    for row in rows:
        # JSON has lists only; a tensor's shape is compared as a tuple.
        shape = tuple(row["shape"])
        tensors.append(
            NamedTensor(
                row["name"],
                shape,
                row["trained"],
                row["part"],
            )
        )
    return tensors
