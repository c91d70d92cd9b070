"""The converter as a real process: killed, out of space, given nonsense. Exit codes and
messages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.storage.local import TMP_MARK
from tests.limits import HANG_S, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "pipeline.convert", *map(str, args)]


def behind(words: list[str]) -> list[str]:
    """Let a program run behind this one, which must see how far it has come before it ends."""
    return ["nice", "-n", "19", *words]


def run(
    *args: object, prefix: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(prefix or []), *command(*args)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(
    make_class_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_class_folder(
        num_classes=4,
        per_class=20,
        size_px=48,
        root=tmp_path_factory.mktemp("convert") / "src",
    )


OPTIONS = ("--samples-per-shard", 4, "--resize", 32)


@pytest.fixture(scope="module")
def undisturbed(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    target = tmp_path_factory.mktemp("undisturbed") / "dst"
    done = run(source, target, *OPTIONS, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return hashes(target)


def assert_message(
    done: subprocess.CompletedProcess[str], code: int, *parts: str
) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


@pytest.mark.slow
def test_two_workers_make_the_same_bytes(
    source: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    done = run(source, tmp_path / "dst", *OPTIONS, "--workers", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "dst") == undisturbed
    found = json.loads(done.stdout)
    assert (found["num_samples"], found["num_shards"], found["num_rejected"]) == (
        80,
        20,
        0,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "after"), [(1, 1), (2, 3), (2, 12)])
def test_a_killed_converter_goes_on(
    source: Path, tmp_path: Path, undisturbed: dict[str, str], workers: int, after: int
) -> None:
    target = tmp_path / "dst"
    args = (source, target, *OPTIONS, "--workers", workers)
    process = subprocess.Popen(
        behind(command(*args)),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children: list[psutil.Process] = []
    try:
        wait_until(
            lambda: len(list(target.glob("_parts/train-*.parquet"))) >= after,
            what=f"{after} shards",
            still_possible=lambda: process.poll() is None,
            poll_s=0.001,
        )
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=HANG_S)
    for child in alive:
        child.kill()
    assert not alive, "workers outlived the converter"
    assert not (target / "dataset.json").exists()
    kept = {
        path.name: path.stat().st_mtime_ns
        for path in (target / "_parts").glob("train-*.parquet")
    }
    tars = {
        name: (target / name.replace(".parquet", ".tar")).stat().st_mtime_ns
        for name in kept
    }
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert "continuing the conversion" in done.stderr
    assert hashes(target) == undisturbed
    for name, time_ns in tars.items():
        assert (
            target / name.replace(".parquet", ".tar")
        ).stat().st_mtime_ns == time_ns, f"{name} was made again"


@pytest.mark.slow
def test_a_killed_worker_is_said_and_the_rest_is_kept(
    source: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    target = tmp_path / "dst"
    args = (source, target, *OPTIONS, "--workers", 2)
    process = subprocess.Popen(
        behind(command(*args)), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(
            lambda: list(target.glob("_parts/train-*.parquet")),
            what="the first shard",
            still_possible=lambda: process.poll() is None,
            poll_s=0.001,
        )
        # Workers are forked off a process of their own, which imports for all of them.
        workers = [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if p.ppid() != process.pid
        ]
        workers[0].kill()
        _, errors = process.communicate(timeout=HANG_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 76, errors
    assert "a worker process was killed" in errors
    assert "Traceback" not in errors
    assert run(*args).returncode == 0
    assert hashes(target) == undisturbed


def peak_bytes(source: Path, target: Path, *options: str) -> int:
    """Return the most memory that a conversion's parent had."""
    # Not ru_maxrss: a child starts with its parent's, which is larger than all that is measured
    # here.
    peak = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    run = "from pipeline.convert.__main__ import main; code = main()"
    script = f"{run}; {peak}; raise SystemExit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(target), *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
def test_a_file_more_costs_little_memory(source: Path, tmp_path: Path) -> None:
    image = next(source.rglob("*.jpg"))
    peaks = {}
    for count in (1_000, 61_000):
        root = tmp_path / str(count)
        for number in range(count):
            folder = root / f"n{number // 1000:08d}"
            if number % 1000 == 0:
                folder.mkdir(parents=True)
                (folder / "first.jpg").write_bytes(
                    image.read_bytes()
                )  # a file has 65,000 names at most
            os.link(
                folder / "first.jpg", folder / f"n{number // 1000:08d}_{number}.JPEG"
            )
        peaks[count] = peak_bytes(root, tmp_path / "dst", "--dry-run")
    # A million files then take less than 700 MB, all told.
    assert (peaks[61_000] - peaks[1_000]) / 60_000 < 500


@pytest.mark.slow
def test_what_the_user_gets_wrong_is_said_in_one_line(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a.txt").write_text("x")
    target = tmp_path / "dst"
    assert_message(
        run(tmp_path / "none", target), 3, "not found", str(tmp_path / "none")
    )
    assert_message(run(tmp_path / "empty", target), 3, "no image", "seen: no files")
    assert_message(run(tmp_path / "text", target), 3, "1 .txt")
    assert_message(run(source, tmp_path / "taken"), 2, "not empty", "a.txt")
    assert_message(run("pipe:ls", target), 2, "pipe:")
    assert_message(run(source, target, "--shard-size", "big"), 2, "--shard-size 'big'")
    assert_message(
        run(source, target, "--quality", 0, "--limit", 0), 2, "--quality", "--limit"
    )
    assert_message(run(source, target, "--format", "zip"), 2)
    assert not target.exists()


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = run(
        source, tmp_path / "dst", "--samples-per-shard", 30, "--dry-run", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["num_images"],
        found["num_shards"],
        found["num_classes"],
        found["finished"],
    ) == (
        80,
        3,
        4,
        False,
    )
    size = sum(path.stat().st_size for path in source.rglob("*.jpg"))
    assert size < found["estimated_bytes"] < 3 * size + 80 * 4096
    assert found["estimated_s"] >= 0
    assert (found["tried"], found["refused"]) == (48, 0)
    assert not (tmp_path / "dst").exists()


def in_small_file_system(folder: Path, options: str) -> list[str]:
    """Return a prefix that runs a command in a mount namespace of its own, with a small tmpfs on a
    folder."""
    mount = f'mount -t tmpfs -o {options} tmpfs "{folder}"'
    script = f'{mount} && "$@"; code=$?; find "{folder}" -type f >&2; exit $code'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*prefix, "true"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own")
    return prefix


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_said_and_nothing_half_done_stays(
    source: Path, tmp_path: Path, workers: int
) -> None:
    prefix = in_small_file_system(tmp_path, "size=96k")
    done = run(
        source,
        tmp_path / "dst",
        "--samples-per-shard",
        4,
        "--workers",
        workers,
        prefix=prefix,
    )
    assert_message(done, 76, "No space left", str(tmp_path / "dst"), "Free some space")
    assert "_plan.json" in done.stderr  # the prefix lists what is left
    assert TMP_MARK not in done.stderr


def test_a_read_only_target_is_said(source: Path, tmp_path: Path) -> None:
    prefix = in_small_file_system(tmp_path, "ro")
    assert_message(
        run(source, tmp_path / "dst", prefix=prefix),
        76,
        "read-only",
        str(tmp_path / "dst"),
    )


@pytest.mark.slow
def test_bombs_cost_no_memory(source: Path, tmp_path: Path) -> None:
    import struct

    images = tmp_path / "src"
    images.mkdir()
    whole = next(source.rglob("*.jpg")).read_bytes()
    at = whole.index(b"\xff\xc0") + 5
    bomb = whole[:at] + struct.pack(">HH", 20_000, 20_000) + whole[at + 4 :]
    for number in range(4):
        (images / f"bomb{number}.jpg").write_bytes(bomb)
        (images / f"fine{number}.jpg").write_bytes(whole)
    # Not ru_maxrss: a child starts with its parent's, which is larger than all that is measured
    # here.
    peak = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    run = "from pipeline.convert.__main__ import main; code = main()"
    script = f"{run}; {peak}; raise SystemExit(code)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            str(images),
            str(tmp_path / "dst"),
            "--resize",
            "32",
            "--workers",
            "1",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    assert "4 rejected" in done.stderr
    assert (
        int(done.stdout.split()[-1]) < 500 * 1024
    )  # in KiB; a decoded bomb alone takes 1,200 MiB
