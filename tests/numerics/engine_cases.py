"""Starts the engine worker on some ranks and collects what each case measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.launch import run

WORKER = Path(__file__).with_name("engine_worker.py")

Results = dict[str, dict[str, Any]]


def run_cases(
    cases: Sequence[dict[str, Any]], folder: Path, *, world_size: int
) -> Results:
    """Run cases one after the other in one launch; give rank 0's results by name, after checking
    they are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "cases.json"
    listed.write_text(json.dumps(list(cases)))
    done = run([str(WORKER), str(listed), str(folder)], ranks=world_size)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    ranks = [
        json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)
    ]
    for rank in ranks[1:]:
        for name, result in rank.items():
            assert repr(result["losses"]) == repr(ranks[0][name]["losses"]), name
    first: Results = ranks[0]
    return first


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Give the largest relative difference of two lists of losses."""
    assert len(losses) == len(reference) > 0
    return max(
        abs(loss - expected) / abs(expected)
        for loss, expected in zip(losses, reference, strict=True)
    )
