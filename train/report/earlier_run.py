"""What earlier runs have left in a run's folder: kept under other names, never overwritten; and the
settings of every start."""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.report.metrics_file import (
    LOSS_PICTURE,
    METRICS_FILE,
    RECONSTRUCTION_PICTURE,
    SUMMARY_FILE,
    read_metrics,
)

HISTORY_FILE = "history.jsonl"
SETTINGS_FILE = "config.toml"
TENSORBOARD_FOLDER = "tensorboard"
_RECORDS = (
    METRICS_FILE,
    SETTINGS_FILE,
    "ds_config.json",
    SUMMARY_FILE,
    LOSS_PICTURE,
    RECONSTRUCTION_PICTURE,
    TENSORBOARD_FOLDER,
    "trackers.json",
    "data_report.json",
)
"""Files of one run; history.jsonl is of the folder and only grows."""
_RECORD_OF_RANK = re.compile(
    r"data_report-rank-\d+\.json|nonfinite-step-\d+-at-\d+-\d+-rank-\d+\.json|stacks-rank-\d+\.txt"
)


def keep_earlier_run(
    run_dir: Path, *, run_id: str, step: int, settings: str, checkpoint_dir: str
) -> list[str]:
    """Rename what another run has left in a folder: metrics.jsonl becomes metrics-1.jsonl, and so
    on with one number for all.

    Args:
        run_dir: local folder of the run.
        run_id: name of the run that begins or goes on here.
        step: step it goes on from; 0 if it begins.
        settings: its config.toml.
        checkpoint_dir: its `checkpoint.dir` as set.

    Returns:
        The new names; empty if nothing was there, or what is there is of this run.
    """
    if not _holds_another_run(run_dir, run_id, step, settings, checkpoint_dir):
        return []
    # Sorted, so that the message lists them alike every time.
    found = sorted(path for path in run_dir.iterdir() if _is_record(path.name))
    number = 1
    while any(_numbered(path, number).exists() for path in found):
        number += 1
    # Renamed and not copied: events and pictures may be large.
    for path in found:
        path.rename(_numbered(path, number))
    return [_numbered(path, number).name for path in found]


def add_to_history(run_dir: Path, start: Mapping[str, Any]) -> None:
    """Add one start of the program to history.jsonl.

    Args:
        run_dir: local folder of the run.
        start: what is known of it, JSON types; `run` is the run's name.
    """
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"started": started, **start})
    path = run_dir / HISTORY_FILE
    # A start that was killed here may have left half a line without an end.
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    gap = "\n" if text and not text.endswith("\n") else ""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{gap}{line}\n")


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Read the starts in a run's folder, oldest first; half-written lines are left out."""
    path = run_dir / HISTORY_FILE
    if not path.exists():
        return []
    starts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # Unlike metrics, lines behind a broken one count: a later start has added them.
        try:
            starts.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return starts


def _holds_another_run(
    run_dir: Path, run_id: str, step: int, settings: str, checkpoint_dir: str
) -> bool:
    # The latest start tells whose files these are; a run that begins has a name of its own.
    history = read_history(run_dir)
    if history and history[-1].get("run") == run_id:
        # A copy of an older checkpoint in another folder is a branch of the run: the lines behind
        # it are those of the other branch.
        moved = history[-1].get("checkpoint_dir") != checkpoint_dir
        return moved and _last_step(run_dir) > step
    if not history and step > 0:
        # Version 0.1.0 kept no history: the folder is of this run if its checkpoints are.
        return _checkpoint_dir_of(run_dir, default=checkpoint_dir) != checkpoint_dir
    if _has_content(run_dir):
        return True
    # A start that took no step has left settings only; the same ones again are no loss.
    path = run_dir / SETTINGS_FILE
    return path.exists() and path.read_text(encoding="utf-8") != settings


def _is_record(name: str) -> bool:
    return name in _RECORDS or _RECORD_OF_RANK.fullmatch(name) is not None


def _last_step(run_dir: Path) -> int:
    return max((int(line.get("step", 0)) for line in read_metrics(run_dir)), default=0)


def _has_content(run_dir: Path) -> bool:
    if (run_dir / SUMMARY_FILE).exists():
        return True
    metrics = run_dir / METRICS_FILE
    if metrics.exists() and metrics.stat().st_size > 0:
        return True
    return any(run_dir.glob("nonfinite-step-*.json"))


def _checkpoint_dir_of(run_dir: Path, *, default: str) -> str:
    """Read `checkpoint.dir` in config.toml; the default without one."""
    try:
        settings = tomllib.loads((run_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
        return str(settings["checkpoint"]["dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return default


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")
