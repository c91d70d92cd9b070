"""Runs commands whose results go to places of every kind, each in a process of its own.

Usage: train_places_worker.py CASES.json, a list of cases with

    "module": the command, e.g. `train.export`
    "words": its command line
    "disk": a mounted file system of its own, which holds the result; optional
    "room": bytes that are left on it for this case; optional
    "read_only": whether it is mounted again so that it cannot be written to; optional

Writes one JSON object a line for each case: its exit code, what it said on stderr, and the files
that are in the folder "look" afterwards. Imports torch once: the cases are forked.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 - once, not in each case
import torch

import train.evaluation.pictures
import train.export
import train.reconstruct  # noqa: F401

FILLER = "filler"


def leave_room(disk: Path, room: int) -> None:
    """Fill a file system until so many bytes are free."""
    disk.joinpath(FILLER).unlink(missing_ok=True)
    found = os.statvfs(disk)
    size = found.f_bavail * found.f_frsize - room
    disk.joinpath(FILLER).write_bytes(b"0" * size)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    if "room" in case:
        leave_room(Path(case["disk"]), case["room"])
    if case.get("read_only"):
        subprocess.run(["mount", "-o", "remount,ro", case["disk"]], check=True)
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            # As an unhandled exception ends a program: with a traceback and code 1.
            try:
                code = importlib.import_module(case["module"]).main(case["words"])
            except BaseException:  # noqa: BLE001 - whatever it is
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(pid, 0)[1]
        said.seek(0)
        text = said.read()
    left = [str(path) for path in Path(case["look"]).rglob("*") if path.name != FILLER]
    return {
        "code": os.waitstatus_to_exitcode(status),
        "said": text,
        "left": sorted(left),
    }


def main() -> None:
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run_case(case)), flush=True)


if __name__ == "__main__":
    main()
