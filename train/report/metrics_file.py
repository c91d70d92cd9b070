"""metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keep = int(json.loads(line)["step"]) <= step
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            keep = False
        if keep:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
    return dropped


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, oldest first; a half-written last line is left
    out."""
    path = run_dir / METRICS_FILE
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
