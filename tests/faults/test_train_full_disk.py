"""A run's folder that is full, read-only or in the way: told with a remedy, never by a bare number;
and no reason to end a run whose checkpoints have room."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.train_runs import TINY
from tests.launch import REPOSITORY, environment, run
from tests.limits import HANG_S

pytestmark = pytest.mark.slow

CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        ["unshare", "--mount", "true"], capture_output=True, check=False
    ).returncode
    == 0
)


def words_of(run_dir: Path, data: str, **more: str) -> list[str]:
    settings = {
        **TINY,
        "data.train": data,
        "run.dir": str(run_dir),
        "optim.warmup-steps": "1",
    }
    settings |= {"train.steps": "6", **more}
    return [
        "demo",
        *(word for name, value in settings.items() for word in (f"--{name}", value)),
    ]


def run_on_small_disk(
    disk: Path, words: list[str], *, before: str
) -> subprocess.CompletedProcess[str]:
    """Run with 256 KiB of disk at `disk`, and something done to it first."""
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=256k tmpfs "$1"'
    script = f'{mount} && cd "$1" && {before}; cd /; shift; exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh", str(disk)]
    return subprocess.run(
        [*prefix, sys.executable, "-m", "train.pretrain", *words],
        env=environment() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def check_refused(stderr: str, returncode: int, path: Path, why: str) -> None:
    assert returncode == 76, stderr
    assert stderr.count("error: ") == 1
    assert "Traceback" not in stderr
    for text in (str(path), why, "--run.dir"):
        assert text in stderr


def test_a_file_where_the_folder_should_be(
    make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        (tmp_path / "file").write_text("in the way")
        done = run(["-m", "train.pretrain", *words_of(run_dir, make_dataset())])
        check_refused(
            done.stderr, done.returncode, tmp_path / "file", "is a file, and a folder"
        )


@pytest.mark.skipif(not CAN_MOUNT, reason="needs to mount a file system")
@pytest.mark.parametrize(
    ("before", "why"),
    [
        ("head -c 1M /dev/zero > full", "the disk is full"),
        ("mount -o remount,ro .", "the file system is read-only"),
    ],
)
def test_a_folder_that_cannot_be_written_to(
    make_dataset: Callable[..., str], tmp_path: Path, before: str, why: str
) -> None:
    disk = tmp_path / "disk"
    done = run_on_small_disk(
        disk, words_of(disk / "run", make_dataset()), before=before
    )
    check_refused(done.stderr, done.returncode, disk / "run", why)


@pytest.mark.skipif(not CAN_MOUNT, reason="needs to mount a file system")
def test_a_disk_that_fills_up_does_not_end_a_run_whose_checkpoints_have_room(
    make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    disk, elsewhere = tmp_path / "disk", tmp_path / "checkpoints"
    # Room for the start, and none for the lines of 600 steps.
    more = {
        "checkpoint.dir": str(elsewhere),
        "train.steps": "600",
        "checkpoint.keep-last": "1",
    }
    words = words_of(disk / "run", make_dataset(), **more)
    done = run_on_small_disk(disk, words, before="head -c 150K /dev/zero > most")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout.count("metrics.jsonl: cannot be written") == 1
    assert (elsewhere / "step-000600" / "MANIFEST.json").exists()
