"""What a resumed run may change: every setting is in one of three classes.

The table is complete: a test fails for a setting without a class, and docs/configuration.md shows
it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.settings.layers import dashed, did_you_mean, flatten, setting_types

Rule = Literal["defines", "may change", "free"]

RULES: Mapping[str, Rule] = {
    # Names of places, and how often something is said, change no number of a run.
    "run.dir": "free",
    "run.name": "free",
    # Which shards these are is told by the fingerprint, not by where they lie.
    "data.train": "may change",
    "data.val": "may change",
    "data.on_change": "free",
    "model.image_size": "defines",
    "model.patch_size": "defines",
    "model.embed_dim": "defines",
    "model.depth": "defines",
    "model.num_heads": "defines",
    "model.mlp_ratio": "defines",
    "model.decoder_embed_dim": "defines",
    "model.decoder_depth": "defines",
    "model.decoder_num_heads": "defines",
    "model.mask_ratio": "defines",
    "model.norm_pix_loss": "defines",
    "view.crop": "defines",
    "view.height": "defines",
    "view.width": "defines",
    "view.min_area": "defines",
    "view.max_area": "defines",
    "view.min_aspect": "defines",
    "view.max_aspect": "defines",
    "view.flip_probability": "defines",
    "view.interpolation": "defines",
    "order.lanes": "defines",
    "order.window": "defines",
    "order.remainder": "defines",
    # Decoders round pixels differently; samples, boxes and flips stay the same.
    "loader.decoder": "may change",
    "loader.tuning_file": "may change",
    "loader.num_threads": "free",
    "loader.prefetch_batches": "free",
    "loader.dali_depth": "free",
    "loader.hw_decoder_load": "may change",
    "loader.verify_hashes": "free",
    "loader.cache_dir": "free",
    "loader.cache_size_gib": "free",
    # Larger or fewer images are replaced: the run sees other pixels from here on.
    "loader.max_pixels": "may change",
    "loader.max_bytes": "may change",
    "loader.max_bad_share": "free",
    "loader.max_bad_in_a_row": "free",
    "optim.base_lr": "defines",
    "optim.min_lr": "defines",
    "optim.schedule": "defines",
    # The cooldown's length is chosen late, when a run's end is known.
    "optim.cooldown_share": "may change",
    "optim.warmup_epochs": "defines",
    "optim.warmup_steps": "defines",
    "optim.beta1": "defines",
    "optim.beta2": "defines",
    "optim.eps": "defines",
    "optim.weight_decay": "defines",
    "optim.grad_clip": "defines",
    "train.steps": "may change",
    "train.epochs": "may change",
    "train.global_batch_size": "may change",
    "train.micro_batch_size": "may change",
    "train.seed": "defines",
    "engine.kind": "may change",
    "engine.zero_stage": "may change",
    "engine.precision": "may change",
    "engine.activation_checkpointing": "may change",
    "engine.decoder_activation_checkpointing": "may change",
    "engine.compile": "may change",
    "engine.offload_optimizer": "may change",
    "engine.offload_parameters": "may change",
    "engine.device_memory_gib": "free",
    "engine.device_tflops": "free",
    "engine.timeout_s": "free",
    "checkpoint.dir": "free",
    "checkpoint.every_steps": "free",
    "checkpoint.keep_last": "free",
    "checkpoint.keep_every": "free",
    "checkpoint.mode": "free",
    # Decides which steps the weights go back over.
    "guard.skipped_in_a_row": "may change",
    "guard.roll_backs": "free",
    "guard.spike_factor": "free",
    "guard.checksum_every_steps": "free",
    "log.every_steps": "free",
    "log.pictures_every_steps": "free",
    "log.num_pictures": "free",
    "log.tensorboard": "free",
    "log.wandb": "free",
    "log.wandb_project": "free",
    "log.mlflow": "free",
    "log.mlflow_uri": "free",
    "log.mlflow_experiment": "free",
    "resume.accept": "free",
}
"""The class of every setting.

`defines`: the run would not be the same; a resume refuses another value, unless it is accepted by
name. `may change`: the same run in another way, or a longer one; a resume says so. `free`: a resume
does not mention it."""

NEVER_ACCEPTED = frozenset(
    name
    for name in RULES
    if name.startswith("model.")
    and name not in ("model.mask_ratio", "model.norm_pix_loss")
)
"""Settings that decide what the saved weights mean: other values need other weights."""
ORDER_SETTINGS = frozenset(
    {"train.seed", *(name for name in RULES if name.startswith("order."))},
)
"""Settings that decide the order of the samples. Accepted ones apply from the next epoch on: within
one, some samples would come twice and others not at all."""


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that differs between the checkpoint and this start.

    Args:
        name: dotted name.
        before: value in the checkpoint.
        now: value of this start.
    """

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.before)} -> {_shown(self.now)}"


def find_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compare the settings of a checkpoint with those of this start.

    Args:
        saved: settings by section, as JSON types. Settings that the program did not have then are
            taken as equal: a new setting's default leaves runs as they were.
        now: the same of this start.

    Returns:
        What differs, free settings included, in the order of the table.
    """
    before = flatten(saved)
    after = flatten(now)
    changes = []
    for name in RULES:
        if name not in before or name not in after:
            continue
        if _comparable(before[name]) != _comparable(after[name]):
            changes.append(Change(name, before[name], after[name]))
    return changes


def of_rule(changes: Iterable[Change], rule: Rule) -> list[Change]:
    """Give the changes of settings of one class."""
    return [change for change in changes if RULES[change.name] == rule]


def split_names(text: str) -> list[str]:
    """Read the names of `resume.accept`, with dashes or underscores."""
    names = [
        word.strip().removeprefix("--").replace("-", "_") for word in text.split(",")
    ]
    return [name for name in names if name]


def accept_problems(text: str) -> list[str]:
    """Check the names of `resume.accept`.

    Args:
        text: names of settings with commas between them.

    Returns:
        A message for each name that cannot be accepted.
    """
    known = setting_types()
    problems = []
    for name in split_names(text):
        if name not in known:
            problems.append(
                f"resume.accept: unknown setting {name}{did_you_mean(name, [*known])}"
            )
        elif name in NEVER_ACCEPTED:
            problems.append(
                f"resume.accept: {name} decides what the saved weights mean and cannot be "
                "accepted: give another checkpoint.dir for a new run"
            )
    return problems


def describe_refused(refused: Iterable[Change], *, where: str) -> str:
    """Say which settings define the run and differ, and what to do.

    Args:
        refused: what differs.
        where: the checkpoint.
    """
    lines = []
    names = []
    for change in refused:
        before = _shown(change.before)
        now = _shown(change.now)
        lines.append(f"  - {change.name} is {now}, the run was started with {before}")
        names.append(dashed(change.name))
    return "\n".join(
        [
            f"{where} is of a run with other settings:",
            *lines,
            "Keep the run's settings, or give another checkpoint.dir for a new run. To go on with "
            f"the new values: --resume.accept {','.join(names)}",
        ]
    )


def _comparable(value: Any) -> Any:
    # One number for a square and two equal ones are the same size.
    if isinstance(value, list | tuple):
        parts = list(value)
        return parts[0] if len(parts) == 2 and parts[0] == parts[1] else parts
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return str(value) or "empty"
