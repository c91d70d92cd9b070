"""metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline import storage

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LOSS_PICTURE = "loss.png"
RECONSTRUCTION_PICTURE = "reconstruction.png"


# ----------------------------------------------------------------------------------------- the file
def truncate_after(path: Path, step: int) -> int:
    """Cut a metrics file after a step, so that a resumed run writes no step twice.

    Args:
        path: metrics.jsonl, which need not exist.
        step: last step to keep.

    Returns:
        How many lines went; half-written last lines count.
    """
    if not path.exists():
        return 0
    kept = []
    dropped = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        line_step = _step_of(line)
        # A line that cannot be read is one that a killed run was writing.
        if line_step is not None and line_step <= step:
            kept.append(f"{line}\n")
        else:
            dropped += 1
    if dropped:
        # Whole or not at all: these lines are the only record of the run.
        storage.write_atomic(str(path), "".join(kept).encode())
    return dropped


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):
        return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, oldest first; a half-written last line is left
    out."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # Another process may be writing the last line right now.
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
