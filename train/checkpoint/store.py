"""Saving and finding checkpoints over all ranks.

A save is two halves: copying to host memory, which training waits for, and writing, which touches
neither the model nor the accelerator. The manifest is the commit; there is no pointer to a latest
step that could lie.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipeline import storage
from pipeline.errors import InfrastructureError, MaelstromError
from train.checkpoint.agreement import agreed
from train.checkpoint.files import (
    FORMAT,
    MANIFEST_FILE,
    STATE_FILE,
    FileEntry,
    committed_steps,
    find_steps,
    is_own_file,
    part_name,
    render_manifest,
    render_table,
    step_name,
    write_file,
)
from train.checkpoint.owner import CheckpointOwner
from train.checkpoint.state import CheckpointState
from train.checkpoint.state_buffers import StateBuffers
from train.checkpoint.verified import open_verified
from train.config import RunConfig
from train.engine.named_state import ExportedState, HostCopy, NamedTensor
from train.errors import CheckpointError
from train.process.world import World

log = logging.getLogger(__name__)
PHASES = ("captured", "written", "checked", "committed", "pruned")
"""Moments of a save that an observer is told about, in order; `checked` comes on rank 0 only."""


class CheckpointWriteError(InfrastructureError):
    """A save that failed and left no trace; earlier checkpoints are untouched and training may go
    on."""


class CheckpointLostError(CheckpointError):
    """Another job has taken the folder of checkpoints over; this one must write no more."""


class StateExporter(Protocol):
    """What a save needs of an engine."""

    config: RunConfig
    table: list[NamedTensor]
    device: torch.device

    def export_state(self, copy: HostCopy) -> ExportedState:
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
        owner: who this job is to others that write here; without one nobody is looked for.
        on_phase: told the name of each of `PHASES` as it is passed; tests end the process there.
    """

    def __init__(
        self,
        uri: str,
        *,
        keep_last: int,
        keep_every: int = 0,
        owner: CheckpointOwner | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        self.uri = uri
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._owner = owner
        self._on_phase = on_phase or (lambda phase: None)
        self._current: int | None = None
        self._buffers: StateBuffers | None = None

    def save(
        self,
        step: int,
        engine: StateExporter,
        client: Mapping[str, Any],
        *,
        world: World,
    ) -> str:
        """Save the state after `step` optimizer steps. All ranks call it together.

        A step that was just saved or loaded is not saved again.

        Args:
            step: optimizer steps done.
            engine: whose state.
            client: what the loop needs to go on, JSON types; rank 0's is written.
            world: the processes of the run.

        Returns:
            URI of the step's folder.

        Raises:
            CheckpointWriteError: on every rank alike, if any could not write; earlier ones were not
                touched.
        """
        if not self.has(step):
            self.write(
                self.capture(
                    step,
                    engine,
                    client,
                    world=world,
                ),
                world=world,
            )
        return self.uri_of(step)

    def has(self, step: int) -> bool:
        """Tell whether this step is what was saved or loaded last."""
        return self._current == step

    def uri_of(self, step: int) -> str:
        """Give the URI of a step's folder."""
        return storage.join(self.uri, step_name(step))

    def capture(
        self,
        step: int,
        engine: StateExporter,
        client: Mapping[str, Any],
        *,
        world: World,
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
            # Once, at the first save: pinned memory takes longer to get than to fill.
            self._buffers = StateBuffers(
                engine.table,
                part=world.rank,
                device=engine.device,
            )
        # All ranks: at ZeRO 1 to 3 whole tensors are gathered from them.
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
            CheckpointWriteError: on every rank alike, if any could not write; earlier ones were not
                touched.
            CheckpointLostError: on every rank alike, another job has taken the folder over.
        """
        self._write(captured, world=world)
        # Only now: a failed save must be tried again when the loop asks for the same step.
        self._current = captured.step
        if world.is_main and self._is_still_ours():
            self._prune(captured.step)
        self._on_phase("pruned")

    def latest(
        self,
        world: World,
        *,
        before: int | None = None,
    ) -> CheckpointState | None:
        """Find the newest checkpoint that every rank can read and whose every byte is as written.

        Damaged ones are skipped with a warning that names the file. The ranks share the
        reading.

        Args:
            world: the processes of the run; all call it together.
            before: only look at steps below this one.

        Returns:
            The state, or None if no step was ever committed.

        Raises:
            CheckpointError: there are checkpoints and none of them is sound; starting afresh would
                hide that.
        """
        # Names only, no content: a folder without MANIFEST.json costs no reading.
        candidates = self._committed_together(world)
        if before is not None:
            candidates = [step for step in candidates if step < before]
        damage: list[str] = []
        for step in reversed(candidates):
            state, problems = open_verified(self.uri_of(step), world=world)
            if state is not None:
                # A run that ends at once must not save again what it has just read.
                self._current = step
                return state
            damage += problems
            if world.is_main:
                text = "; ".join(problems)
                log.warning(
                    "checkpoint of step %d is damaged and skipped: %s", step, text
                )
        if candidates:
            raise CheckpointError(
                f"{storage.redact(self.uri)}: none of {len(candidates)} checkpoints is sound: "
                f"{'; '.join(damage[:3])}. "
                "Restore one from a copy, or give another checkpoint.dir to start afresh."
            )
        return None

    def _committed_together(self, world: World) -> list[int]:
        """Let rank 0 list the finished steps: ranks that listed alone might see different ones."""
        steps: list[int] = []
        failure = f"{storage.redact(self.uri)}: cannot list checkpoints"
        with agreed(world, failure, raises=InfrastructureError):
            if world.is_main:
                steps = committed_steps(self.uri)
        return world.broadcast(steps)

    # -------------------------------------------------------------------------------------- writing

    def _write(self, captured: Captured, *, world: World) -> None:
        folder = self.uri_of(captured.step)
        failure = f"{storage.redact(folder)}: the checkpoint was not saved"
        self._check_owner(failure, world=world)
        # What an earlier start has left of this step, before anybody writes into the folder.
        with agreed(world, failure, raises=CheckpointWriteError):
            if world.is_main:
                names = find_steps(self.uri).get(captured.step, set())
                self._clear(captured.step, names)

        entries: list[FileEntry] = []
        try:
            with agreed(world, failure, raises=CheckpointWriteError):
                # Appended one by one: after a failure these are removed again.
                for name, content in self._share(captured, world=world):
                    entries.append(write_file(folder, name, content))
            self._on_phase("written")

            everything = [entry for part in world.gather(entries) for entry in part]
            # Writing may have taken long enough for another job to take the folder over.
            self._check_owner(failure, world=world)
            with agreed(world, failure, raises=CheckpointWriteError):
                if world.is_main:
                    self._commit(captured.step, everything)
        except CheckpointWriteError:
            # Under the same names another job may have written meanwhile.
            is_ours = world.broadcast(world.is_main and self._is_still_ours())
            for entry in entries if is_ours else []:
                with contextlib.suppress(MaelstromError):
                    storage.delete(storage.join(folder, entry.name))
            raise
        self._on_phase("committed")

    def _check_owner(self, failure: str, *, world: World) -> None:
        """End this job's writing if another one has taken the folder over. All ranks enter."""
        problem = None
        with agreed(world, failure, raises=CheckpointWriteError):
            if world.is_main and self._owner is not None:
                problem = self._owner.problem()
        # Not through `agreed`: this is no failed save that a later one may make good.
        problem = world.broadcast(problem)
        if problem is not None:
            raise CheckpointLostError(problem)

    def _is_still_ours(self) -> bool:
        """Tell whether steps may be removed; not if that cannot be known."""
        try:
            # Asked anew: between the commit and here another job may have come.
            return self._owner is None or self._owner.problem() is None
        except MaelstromError as error:
            log.warning("old checkpoints were not removed, they stay: %s", error)
            return False

    def _share(
        self, captured: Captured, *, world: World
    ) -> Iterator[tuple[str, bytes | memoryview]]:
        """Give names and contents of the files that this rank writes."""
        for kind, content in captured.files.items():
            yield part_name(kind, world.rank, world.world_size), content
        if world.is_main:
            text = json.dumps(captured.document, indent=1)
            # One copy of it, from rank 0: what it holds is equal on all ranks.
            yield STATE_FILE, text.encode()

    def _commit(self, step: int, entries: list[FileEntry]) -> None:
        folder = self.uri_of(step)
        sizes = {file.name: file.size_bytes for file in storage.list_files(folder)}
        # Rank 0 looks at everybody's files: a folder on a node's own disk shows here.
        for entry in entries:
            if sizes.get(entry.name) != entry.size_bytes:
                raise CheckpointError(
                    f"{entry.name} has {sizes.get(entry.name, 'no')} bytes, {entry.size_bytes} "
                    "were written. "
                    "All ranks must see one folder: use shared or object storage for "
                    "checkpoint.dir."
                )
        self._on_phase("checked")
        manifest = storage.join(folder, MANIFEST_FILE)
        if not storage.put_if_absent(manifest, render_manifest(step, entries)):
            raise CheckpointError(
                "another program has committed this step. Two runs share this checkpoint.dir."
            )

    def _clear(self, step: int, names: set[str]) -> None:
        """Remove this program's files of a step, the commit first: a half-removed checkpoint must
        not look whole."""
        folder = self.uri_of(step)
        own = [name for name in names if is_own_file(name)]
        for name in sorted(own, key=lambda name: name != MANIFEST_FILE):
            storage.delete(storage.join(folder, name))
        if storage.is_local(folder):
            # Fails if somebody else's file is in it, and then the folder stays.
            with contextlib.suppress(OSError):
                storage.local_path(folder).rmdir()

    def _prune(self, newest: int) -> None:
        """Remove checkpoints that are not to be kept, after `newest` was verified and committed."""
        try:
            # Newer steps are of a run that went back; it will write them again.
            steps = {
                step: names
                for step, names in find_steps(self.uri).items()
                if step <= newest
            }
            committed = [
                step for step, names in steps.items() if MANIFEST_FILE in names
            ]
            # Unfinished saves are in `steps` and not in `kept`: they are removed with the old ones.
            kept = set(committed[-self.keep_last :])
            if self.keep_every:
                kept |= {step for step in committed if step % self.keep_every == 0}
            for step, names in steps.items():
                if step not in kept:
                    self._clear(step, names)
        except MaelstromError as error:
            log.warning("old checkpoints could not be removed, they stay: %s", error)
