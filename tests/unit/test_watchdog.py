"""A rank without progress leaves its stacks and ends; one with progress is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.limits import HANG_S
from train.process.watchdog import Watchdog

CODE = """
import sys, threading
sys.path.insert(0, {root!r})
from pathlib import Path
from train.process.watchdog import Watchdog
def where_it_hangs():
    threading.Event().wait()
with Watchdog(timeout_s=0.2, folder=Path({folder!r}), rank=3):
    where_it_hangs()
"""


def test_hanging_rank_writes_its_stacks_and_ends_as_infrastructure(
    tmp_path: Path,
) -> None:
    root = str(Path(__file__).resolve().parents[2])
    code = CODE.format(root=root, folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 76
    assert "rank 3: no step for" in done.stderr
    assert "where_it_hangs" in (tmp_path / "stacks-rank-00003.txt").read_text()


def test_progress_keeps_it_quiet(tmp_path: Path) -> None:
    with Watchdog(timeout_s=60.0, folder=tmp_path, rank=0) as watchdog:
        watchdog.beat()
    assert list(tmp_path.iterdir()) == []


HANGING_REPORT = """
import sys, threading
sys.path.insert(0, {root!r})
from pathlib import Path
from train.process import watchdog
watchdog.REPORT_LIMIT_S = 0.2
def report(error):
    threading.Event().wait()
with watchdog.Watchdog(timeout_s=0.2, folder=Path({folder!r}), rank=3, conclude=report):
    threading.Event().wait()
"""


def test_a_report_that_hangs_does_not_keep_the_rank_from_ending(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    code = HANGING_REPORT.format(root=root, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], timeout=HANG_S, check=False)
    assert done.returncode == 76
