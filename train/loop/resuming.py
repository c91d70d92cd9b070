"""Is this start of the same run as the checkpoint, and what has changed since?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.loader import Loader
from pipeline.storage import redact
from train.checkpoint.files import hash_json
from train.checkpoint.state import CheckpointState
from train.config import RunConfig
from train.engine.named_state import check_same_model, list_tensors
from train.engine.optim import lr_at
from train.errors import CheckpointError
from train.loop.progress import PROGRESS_KEY, Pace, Progress
from train.objectives.base import Objective
from train.report.data_record import kept_description
from train.settings.layers import EITHER_OR
from train.settings.lengths import peak_lr
from train.settings.resume_rules import (
    NEVER_ACCEPTED,
    ORDER_SETTINGS,
    RULES,
    Change,
    describe_refused,
    find_changes,
    of_rule,
    split_names,
)

RUN_KEY = "run"
CHANGES_KEY = "changes"
"""Where a checkpoint keeps the run's name for itself, and what was changed at its resumes."""
_RATE_JUMP = 0.01
"""Share of the peak rate from which on a change of the rate is told."""


@dataclass(frozen=True)
class Resume:
    """What goes on from a checkpoint.

    Args:
        run_id: name that all starts of one run share, and no other run has.
        changes: settings that differ from the checkpoint's and are taken; free ones too.
        accepted: names of those that define the run.
        earlier: changes of resumes before this one, as the checkpoint has them.
    """

    run_id: str
    changes: list[Change] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    earlier: list[dict[str, Any]] = field(default_factory=list)

    def to_client(self, *, step: int) -> dict[str, Any]:
        """Give what a checkpoint keeps.

        Args:
            step: the step that this start went on from.
        """
        # Free settings change no number of the run: history.jsonl alone has them.
        kept = [change for change in self.changes if RULES[change.name] != "free"]
        changes = list(self.earlier)
        for change in kept:
            row = {"step": step, "setting": change.name, "before": change.before}
            changes.append({**row, "now": change.now})
        return {RUN_KEY: self.run_id, CHANGES_KEY: changes}


def check_same_run(
    config: RunConfig, objective: Objective, state: CheckpointState
) -> Resume:
    """Refuse settings that are not those of the run, and list what else has changed.

    Args:
        config: settings of this start.
        objective: what is learned.
        state: the checkpoint.

    Raises:
        CheckpointError: the model is another.
        ConfigError: settings that define the run differ and are not accepted by name.
    """
    settings = config.model_dump(mode="json")
    changes = find_changes(state.config, settings)
    # First: whoever changed the model meets the view's size among the other settings too.
    _refuse_other_model(objective, state, changes)

    accepted = _accepted_names(config)
    defining = of_rule(changes, "defines")
    refused = [change for change in defining if change.name not in accepted]
    if refused:
        raise ConfigError(describe_refused(refused, where=redact(state.uri)))
    # All of `changes` may be taken from here on.
    return Resume(
        run_id=state.client.get(RUN_KEY) or _name_older_run(state),
        changes=changes,
        accepted=[change.name for change in defining],
        earlier=list(state.client.get(CHANGES_KEY, [])),
    )


def restore_cursor(loader: Loader, state: CheckpointState, config: RunConfig) -> None:
    """Bring the loader to the checkpoint's next sample.

    Raises:
        DataError: the dataset is another.
    """
    cursor = state.client["loader"]
    changes = find_changes(state.config, config.model_dump(mode="json"))
    changed_names = {change.name for change in changes}
    if not ORDER_SETTINGS.isdisjoint(changed_names):
        # Within an epoch another order would bring some samples twice and others not at all.
        epoch = cursor["epoch"] + bool(cursor["position"])
        cursor = {**cursor, "seed": config.train.seed, "epoch": epoch, "position": 0}
    trained_on = kept_description(config.checkpoint_dir, cursor["fingerprint"])
    loader.load_state_dict(
        cursor, trained_on=trained_on, on_change=config.data.on_change
    )


def progress_of(state: CheckpointState | None, pace: Pace) -> Progress:
    """Say how far a checkpoint's run is, going on at a pace; without one it is at its start."""
    if state is None:
        return Progress.start(pace)
    batch_size = int(state.config["train"]["global_batch_size"])
    return Progress.from_client(
        state.client, step=state.step, batch_size=batch_size, pace=pace
    )


def describe_resume(
    config: RunConfig,
    state: CheckpointState,
    resume: Resume,
    progress: Progress,
    *,
    ranks: int,
) -> list[str]:
    """Say what differs from the start that saved a checkpoint, in one line for each kind.

    Args:
        config: settings of this start.
        state: the checkpoint.
        resume: what `check_same_run` found.
        progress: of this start.
        ranks: processes of this start.
    """
    lines = []
    told = []
    for change in of_rule(resume.changes, "may change"):
        told.append(str(change))
    if state.parts != ranks:
        told.append(f"ranks {state.parts} -> {ranks}")
    # One line for each kind of change, so that each can be looked for in a log.
    if told:
        lines.append(f"changed since the checkpoint: {', '.join(told)}")
    if resume.accepted:
        taken = []
        for change in resume.changes:
            if change.name in resume.accepted:
                taken.append(str(change))
        names = ", ".join(taken)
        line = f"accepted by resume.accept and written to history.jsonl: {names}"
        if not ORDER_SETTINGS.isdisjoint(resume.accepted):
            line += "; the new order begins with the next epoch"
        lines.append(line)
    # base_lr is given per 256 images: a reader may expect the rate to follow the batch.
    changed_names = {change.name for change in resume.changes}
    if "train.global_batch_size" in changed_names:
        batch = progress.first_pace.global_batch_size
        peak = peak_lr(config, global_batch_size=batch)
        lines.append(
            f"the peak learning rate stays {peak:.3g}, that of the {batch} images per step which "
            "the run was started with"
        )
    return [*lines, *_rate_lines(config, state, progress)]


def _rate_lines(
    config: RunConfig, state: CheckpointState, progress: Progress
) -> list[str]:
    """Say so if the learning rate jumps here, because the run is longer or shorter than it was."""
    try:
        before = RunConfig.model_validate(state.config)
    except ValidationError:
        # An older version's settings, which this one cannot read: the rate cannot be compared.
        return []
    # The rate that this very step would have had, had the settings stayed as they were.
    then = progress_of(state, _pace_of(state, progress))
    expected = rate_at(state.step, config=before, progress=then)
    now = rate_at(state.step, config=config, progress=progress)
    peak = peak_lr(config, global_batch_size=progress.first_pace.global_batch_size)
    if abs(now - expected) <= _RATE_JUMP * peak:
        return []
    last_step = max(0, state.step - 1)
    last = rate_at(last_step, config=before, progress=then)
    line = f"note: the learning rate goes from {last:.3g} to {now:.3g}"
    old_length = then.total_steps(before)
    new_length = progress.total_steps(config)
    if old_length == new_length:
        return [f"{line}, because the schedule's settings changed"]

    # The way without a jump differs: a cosine has none, a constant rate has one until it falls.
    remedy = (
        "Choose optim.schedule constant_cooldown for a run that is to be made longer"
    )
    if config.optim.schedule == "constant_cooldown":
        remedy = (
            "A checkpoint from before the cooldown goes on without a jump: copy its step into "
            "another checkpoint.dir"
        )
    return [
        f"{line}, because the schedule is laid out over {new_length} steps and was over "
        f"{old_length}. {remedy}"
    ]


def rate_at(step: int, *, config: RunConfig, progress: Progress) -> float:
    """Compute the learning rate of one step of a run.

    Args:
        step: optimizer steps done before it.
        config: settings of the run.
        progress: its paces.
    """
    return lr_at(
        progress.schedule_at(step, config),
        config=config,
        steps_per_epoch=progress.first_pace.steps_per_epoch,
        total_steps=progress.schedule_length(config),
        global_batch_size=progress.first_pace.global_batch_size,
    )


def _pace_of(state: CheckpointState, progress: Progress) -> Pace:
    """Give the pace that a checkpoint was saved at."""
    kept: Mapping[str, Any] | None = state.client.get(PROGRESS_KEY)
    if kept is None:
        return progress.first_pace
    return Pace(**kept["pace"])


def _accepted_names(config: RunConfig) -> set[str]:
    """Give the names that are accepted; of two that exclude each other one stands for both."""
    names = set(split_names(config.resume.accept))
    for pair in EITHER_OR:
        if not names.isdisjoint(pair):
            names.update(pair)
    return names


def _refuse_other_model(
    objective: Objective, state: CheckpointState, changes: list[Change]
) -> None:
    shape = []
    for change in changes:
        if change.name in NEVER_ACCEPTED:
            shape.append(str(change))
    if not shape:
        return
    # Tensors of other shapes are told by a table of them.
    where = redact(state.uri)
    table = list_tensors(objective.build(), parts=1)
    check_same_model(state.table, table, where=where)
    # The shapes are equal and the meaning is not: position tables, heads, patches.
    raise CheckpointError(
        f"{where}: the checkpoint is of another model: {', '.join(shape)}. The weights "
        "have the same shapes, but were trained for the old values. Use the model settings it was "
        "made with, or another checkpoint.dir for a new run."
    )


def _name_older_run(state: CheckpointState) -> str:
    """Name a run of version 0.1.0, which had no name: the same for each of its checkpoints."""
    known = {
        "model": state.config["model"],
        "seed": state.config["train"]["seed"],
        "fingerprint": state.client["loader"]["fingerprint"],
    }
    # Not drawn: a start that is killed before its first save must find the same name again.
    return hash_json(known)[:12]
