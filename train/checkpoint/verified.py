"""Opening a checkpoint over all ranks: every byte is checked first, by one rank each."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path

from pipeline import storage
from pipeline.console import Progress
from pipeline.errors import MaelstromError
from train.checkpoint.files import (
    CHUNK_BYTES,
    SHOW_AFTER_S,
    STATE_FILE,
    DamagedCheckpointError,
    FileEntry,
    OnRead,
    check_entry,
    no_report,
    read_manifest,
)
from train.checkpoint.state import CheckpointState
from train.errors import CheckpointError
from train.process.world import World

_FATAL = "fatal: "
"""Marks, among the problems that ranks exchange, one that is no damage."""


def open_verified(
    uri: str, *, world: World
) -> tuple[CheckpointState | None, list[str]]:
    """Check one checkpoint together and open it. All ranks call it.

    Args:
        uri: the step's folder.
        world: the processes of the run.

    Returns:
        The state and no problems, or None and what is damaged.

    Raises:
        CheckpointError: on every rank alike: the storage failed, or the layout is newer than this
            program. Another step would not help.
    """
    staged = None if storage.is_local(uri) else _make_stage(world)
    problems: list[str] = []
    try:
        entries = read_manifest(uri)
        problems = _check_share(uri, entries, staged=staged, world=world)
    except DamagedCheckpointError as error:
        problems = [str(error)]
    except MaelstromError as error:
        # Not damage: storage that fails, or a newer layout. All ranks end alike, not one alone.
        problems = [_FATAL + str(error)]
    everywhere = _gather_unique(problems, world=world)
    fatal = [
        text.removeprefix(_FATAL) for text in everywhere if text.startswith(_FATAL)
    ]

    folder = staged or storage.local_path(uri)
    try:
        if fatal:
            raise CheckpointError("; ".join(fatal))
        if everywhere:
            return None, everywhere
        document = json.loads((folder / STATE_FILE).read_bytes())
        return CheckpointState(uri=uri, folder=folder, document=document), []
    finally:
        if staged is not None:
            # Every rank has mapped its files by now; unlinked ones live until they are unmapped.
            world.barrier()
            shutil.rmtree(staged, ignore_errors=True)


def _gather_unique(problems: list[str], *, world: World) -> list[str]:
    """Give every rank the problems of all, each once."""
    everywhere: dict[str, None] = {}
    for part in world.gather(problems):
        everywhere |= dict.fromkeys(part)
    return list(everywhere)


def _check_share(
    uri: str, entries: list[FileEntry], *, staged: Path | None, world: World
) -> list[str]:
    """Check this rank's share of the files, and that all of them can be seen from here.

    A remote checkpoint is fetched once a node while it is checked; a local one is read where it is.
    """
    first, stride = world.rank, world.world_size
    if staged is not None:
        first, stride = world.local_rank, world.local_world_size
    share = entries[first::stride]
    problems = []
    with ExitStack() as stack:
        on_read: OnRead = no_report
        # One rank's share stands for all: they are about equally large.
        if world.is_main:
            on_read = stack.enter_context(_progress(uri, share)).advance
        for entry in share:
            if staged is not None:
                _fetch(
                    storage.join(uri, entry.name),
                    staged / entry.name,
                    on_read=on_read,
                )
                # Fetching is what takes long; the copy is checked at the speed of the disk.
                problem = check_entry(str(staged), entry)
            else:
                problem = check_entry(uri, entry, on_read=on_read)
            if problem:
                problems.append(problem)
    if staged is None:
        problems += _unseen(uri, entries, but=share, rank=world.rank)
    return problems


def _unseen(
    uri: str,
    entries: list[FileEntry],
    *,
    but: list[FileEntry],
    rank: int,
) -> list[str]:
    """Find files of other ranks' shares that this one cannot see: its node has another disk."""
    problems = []
    for entry in entries:
        file = storage.join(uri, entry.name)
        if entry not in but and not storage.exists(file):
            problems.append(f"{storage.redact(file)}: not seen by rank {rank}")
    return problems


def _progress(uri: str, share: list[FileEntry]) -> Progress:
    total_bytes = sum(entry.size_bytes for entry in share)
    label = f"checking {storage.name_of(uri)}"
    return Progress(label, total=total_bytes, unit="bytes", after_s=SHOW_AFTER_S)


def _fetch(uri: str, path: Path, *, on_read: OnRead) -> None:
    with storage.open_read(uri) as source, path.open("wb") as target:
        while chunk := source.read(CHUNK_BYTES):
            target.write(chunk)
            on_read(len(chunk))


def _make_stage(world: World) -> Path:
    """Make one temporary folder a node and tell all its ranks."""
    host = socket.gethostname()
    own = (
        tempfile.mkdtemp(prefix="maelstrom-checkpoint-")
        if world.local_rank == 0
        else None
    )
    folders = {
        name: folder for name, folder in world.gather((host, own)) if folder is not None
    }
    return Path(folders[host])
