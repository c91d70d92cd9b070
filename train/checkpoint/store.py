"""Saving and finding checkpoints over all ranks.

A save is two halves: copying to host memory, which training waits for, and writing, which touches
neither the model nor the accelerator. The manifest is the commit; there is no pointer to a latest
step that could lie.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline import storage
from pipeline.errors import InfrastructureError, MaelstromError
from train.checkpoint.files import (
    FORMAT,
    MANIFEST_FILE,
    STATE_FILE,
    DamagedCheckpointError,
    FileEntry,
    check_entry,
    find_steps,
    is_own_file,
    part_name,
    read_manifest,
    render_manifest,
    render_table,
    step_name,
    write_file,
)
from train.checkpoint.host_buffers import HostBuffers
from train.checkpoint.state import CheckpointState
from train.config import RunConfig
from train.engine.named_state import ExportedState, NamedTensor, Place
from train.errors import CheckpointError
from train.process.world import World

log = logging.getLogger(__name__)
PHASES = ("captured", "written", "checked", "committed", "pruned")
"""Moments of a save that an observer is told about, in order; `checked` comes on rank 0 only."""


class CheckpointWriteError(InfrastructureError):
    """A save that failed and left no trace; earlier checkpoints are untouched and training may go
    on."""


class StateExporter(Protocol):
    """What a save needs of an engine."""

    config: RunConfig
    table: list[NamedTensor]
    device: torch.device

    def export_state(self, place: Place) -> ExportedState:
        """Copy this rank's share of the state to host memory; all ranks call it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A state in host memory, on its way to a checkpoint.

    Args:
        step: optimizer steps done.
        files: this rank's share, by kind, as the files will be.
        document: content of state.json.
    """

    step: int
    files: Mapping[str, memoryview]
    document: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        uri: folder of checkpoints, local or in object storage.
        keep_last: newest steps that are kept.
        keep_every: steps that are a multiple of this are kept for good; 0 keeps none for that
            reason.
        on_phase: told the name of each of `PHASES` as it is passed; tests end the process there.
    """

    def __init__(
        self,
        uri: str,
        *,
        keep_last: int,
        keep_every: int = 0,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        self.uri = uri
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._on_phase = on_phase or (lambda phase: None)
        self._current: int | None = None
        self._buffers: HostBuffers | None = None

    def save(
        self, step: int, engine: StateExporter, client: Mapping[str, Any], *, world: World
    ) -> str:
        """Save the state after `step` optimizer steps. All ranks call it together.

        Saving again what was just saved or loaded does nothing.

        Args:
            step: optimizer steps done.
            engine: whose state.
            client: what the loop needs to go on, JSON types; rank 0's is written.
            world: the processes of the run.

        Returns:
            URI of the step's folder.

        Raises:
            CheckpointWriteError: on every rank alike, where any could not write; nothing earlier
                was touched.
        """
        if not self.has(step):
            self.write(self.capture(step, engine, client, world=world), world=world)
        return self.uri_of(step)

    def has(self, step: int) -> bool:
        """Tell whether this step is what was saved or loaded last."""
        return self._current == step

    def uri_of(self, step: int) -> str:
        """Give the URI of a step's folder."""
        return storage.join(self.uri, step_name(step))

    def capture(
        self, step: int, engine: StateExporter, client: Mapping[str, Any], *, world: World
    ) -> Captured:
        """Copy the state to host memory: the half of a save that training waits for. All ranks call
        it together.

        The copy is overwritten by the next one: what was captured before must be written by then.

        Args:
            step: optimizer steps done.
            engine: whose state.
            client: what the loop needs to go on, JSON types.
            world: the processes of the run.
        """
        if self._buffers is None:
            self._buffers = HostBuffers(engine.table, part=world.rank, device=engine.device)
        exported = engine.export_state(self._buffers.place)
        self._on_phase("captured")
        document = {
            "format": FORMAT,
            "step": step,
            "client": dict(client),
            "engine": exported.scalars,
            "config": engine.config.model_dump(mode="json"),
            "parts": world.world_size,
            "tensors": render_table(exported.table),
            "versions": {"torch": torch.__version__},
        }
        return Captured(step, self._buffers.files(), document)

    def write(self, captured: Captured, *, world: World) -> None:
        """Write, commit, and remove what is no longer to be kept: the half of a save that a thread
        may do.

        Touches neither the model nor the accelerator. All ranks call it together.

        Args:
            captured: what `capture` returned.
            world: the processes of the run; in a thread, one from `World.for_a_thread`.

        Raises:
            CheckpointWriteError: on every rank alike, where any could not write; nothing earlier
                was touched.
        """
        self._write(captured, world=world)
        self._current = captured.step
        if world.is_main:
            self._prune(captured.step)
        self._on_phase("pruned")

    def latest(self, world: World, *, before: int | None = None) -> CheckpointState | None:
        """Find the newest checkpoint that every rank can read and whose every byte is as written.

        Damaged ones are passed over with a warning that names the file. The ranks share the
        reading.

        Args:
            world: the processes of the run; all call it together.
            before: only look at steps below this one.

        Returns:
            The state, or None where nothing was ever committed.

        Raises:
            CheckpointError: there are checkpoints and none of them is sound; starting afresh would
                hide that.
        """
        candidates: list[int] = []
        with _agreed(
            world,
            f"{storage.redact(self.uri)}: cannot list checkpoints",
            raises=InfrastructureError,
        ):
            if world.is_main:
                found = find_steps(self.uri)
                candidates = [step for step, names in found.items() if MANIFEST_FILE in names]
        candidates = [
            step for step in world.broadcast(candidates) if before is None or step < before
        ]
        damage: list[str] = []
        for step in reversed(candidates):
            state, problems = self._open(step, world=world)
            if state is not None:
                self._current = step
                return state
            damage += problems
            if world.is_main:
                log.warning(
                    "checkpoint of step %d is damaged and passed over: %s",
                    step,
                    "; ".join(problems),
                )
        if candidates:
            raise CheckpointError(
                f"{storage.redact(self.uri)}: none of {len(candidates)} checkpoints is sound: "
                f"{'; '.join(damage[:3])}. "
                "Restore one from a copy, or give another checkpoint.dir to start afresh."
            )
        return None

    # -------------------------------------------------------------------------------------- writing

    def _write(self, captured: Captured, *, world: World) -> None:
        step, folder = captured.step, self.uri_of(captured.step)
        failure = f"{storage.redact(folder)}: the checkpoint was not saved"
        with _agreed(world, failure, raises=CheckpointWriteError):
            if world.is_main:
                self._clear(step, find_steps(self.uri).get(step, set()))
        entries: list[FileEntry] = []
        try:
            with _agreed(world, failure, raises=CheckpointWriteError):
                for kind, content in captured.files.items():
                    entries.append(
                        write_file(folder, part_name(kind, world.rank, world.world_size), content)
                    )
                if world.is_main:
                    entries.append(
                        write_file(
                            folder, STATE_FILE, json.dumps(captured.document, indent=1).encode()
                        )
                    )
            self._on_phase("written")
            everything = [entry for part in world.gather(entries) for entry in part]
            with _agreed(world, failure, raises=CheckpointWriteError):
                if world.is_main:
                    self._commit(step, everything)
        except CheckpointWriteError:
            for entry in entries:
                with contextlib.suppress(MaelstromError):
                    storage.delete(storage.join(folder, entry.name))
            raise
        self._on_phase("committed")

    def _commit(self, step: int, entries: list[FileEntry]) -> None:
        folder = storage.join(self.uri, step_name(step))
        sizes = {file.name: file.size_bytes for file in storage.list_files(folder)}
        for entry in entries:
            if sizes.get(entry.name) != entry.size_bytes:
                raise CheckpointError(
                    f"{entry.name} has {sizes.get(entry.name, 'no')} bytes, {entry.size_bytes} "
                    "were written. "
                    "All ranks must see one folder: use shared or object storage for "
                    "checkpoint.dir."
                )
        self._on_phase("checked")
        if not storage.put_if_absent(
            storage.join(folder, MANIFEST_FILE), render_manifest(step, entries)
        ):
            raise CheckpointError(
                "another program has committed this step. Two runs share this checkpoint.dir."
            )

    def _clear(self, step: int, names: set[str]) -> None:
        """Remove this program's files of a step, the commit first: a half-removed checkpoint must
        not look whole."""
        folder = storage.join(self.uri, step_name(step))
        for name in sorted(filter(is_own_file, names), key=lambda name: name != MANIFEST_FILE):
            storage.delete(storage.join(folder, name))
        if storage.is_local(folder):
            with contextlib.suppress(OSError):  # somebody else's file keeps the folder
                storage.local_path(folder).rmdir()

    def _prune(self, newest: int) -> None:
        """Remove checkpoints that are not to be kept, after `newest` was verified and committed."""
        try:
            steps = {step: names for step, names in find_steps(self.uri).items() if step <= newest}
            committed = [step for step, names in steps.items() if MANIFEST_FILE in names]
            kept = set(committed[-self.keep_last :])
            if self.keep_every:
                kept |= {step for step in committed if step % self.keep_every == 0}
            for step, names in steps.items():
                if step not in kept:
                    self._clear(step, names)
        except MaelstromError as error:
            log.warning("old checkpoints could not be removed, they stay: %s", error)

    # -------------------------------------------------------------------------------------- reading

    def _open(self, step: int, *, world: World) -> tuple[CheckpointState | None, list[str]]:
        """Verify one checkpoint together and open it; return what is wrong with it otherwise."""
        uri = storage.join(self.uri, step_name(step))
        staged = None if storage.is_local(uri) else _make_stage(world)
        problems: list[str] = []
        entries: list[FileEntry] = []
        try:
            entries = read_manifest(uri)
            problems = _verify_share(uri, entries, staged=staged, world=world)
        except DamagedCheckpointError as error:
            problems = [str(error)]
        except MaelstromError as error:
            # Not damage: storage that fails, or a newer layout. All ranks end alike, not one alone.
            problems = [_FATAL + str(error)]
        everywhere = list(
            dict.fromkeys(problem for part in world.gather(problems) for problem in part)
        )
        fatal = [
            problem.removeprefix(_FATAL) for problem in everywhere if problem.startswith(_FATAL)
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
                # Every rank has mapped its files by now; unlinked ones live until they are
                # unmapped.
                world.barrier()
                shutil.rmtree(staged, ignore_errors=True)


_FATAL = "fatal: "


def _verify_share(
    uri: str, entries: list[FileEntry], *, staged: Path | None, world: World
) -> list[str]:
    """Check this rank's share of the files, and that all of them can be seen from here.

    A remote checkpoint is fetched once a node while it is checked; a local one is read where it is.
    """
    first, stride = (
        (world.rank, world.world_size)
        if staged is None
        else (world.local_rank, world.local_world_size)
    )
    problems = []
    for number, entry in enumerate(entries):
        if number % stride == first:
            if staged is not None:
                _fetch(storage.join(uri, entry.name), staged / entry.name)
            problem = check_entry(str(staged or uri), entry)
            if problem:
                problems.append(problem)
        elif staged is None and not storage.exists(storage.join(uri, entry.name)):
            problems.append(f"{storage.join(uri, entry.name)}: not seen by rank {world.rank}")
    return problems


def _fetch(uri: str, path: Path) -> None:
    with storage.open_read(uri) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 2**23)


def _make_stage(world: World) -> Path:
    """Make one temporary folder a node and tell all its ranks."""
    host = socket.gethostname()
    own = tempfile.mkdtemp(prefix="maelstrom-checkpoint-") if world.local_rank == 0 else None
    folders = {name: folder for name, folder in world.gather((host, own)) if folder is not None}
    return Path(folders[host])


@contextlib.contextmanager
def _agreed(world: World, what: str, *, raises: type[MaelstromError]) -> Iterator[None]:
    """Run a block on every rank; where it fails on any, raise the same error on all."""
    problem = None
    try:
        yield
    except (MaelstromError, OSError) as error:
        problem = f"rank {world.rank}: {error}"
    problems = [text for text in world.gather(problem) if text]
    if problems:
        raise raises(f"{what}. {'; '.join(dict.fromkeys(problems))}")
