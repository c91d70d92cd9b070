"""The same bytes from one process, a pool, Ray, and the jobs of an array; killed and run
again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.convert.conversion import convert, convert_job
from pipeline.convert.ray_tasks import overdue
from pipeline.convert.settings import ConvertSettings
from pipeline.convert.target import Job, parse_job
from pipeline.dataset import DatasetInfo, open_dataset
from pipeline.errors import ConfigError
from tests.limits import HANG_S, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent.parent
OPTIONS = ("--samples-per-shard", "4", "--resize", "32")
SETTINGS = ConvertSettings(samples_per_shard=4, resize=32)


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


@pytest.fixture(scope="module")
def undisturbed(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    target = tmp_path_factory.mktemp("undisturbed") / "dst"
    convert(str(source), str(target), SETTINGS, workers=1)
    return hashes(target)


# --------------------------------------------------------------------------------------------- jobs


def test_the_last_job_commits(
    source: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    dst = str(tmp_path / "dst")
    jobs = [Job(2, 3), Job(0, 3), Job(1, 3)]
    found = [convert_job(str(source), dst, SETTINGS, job=job) for job in jobs]
    assert found[:2] == [None, None]
    assert isinstance(found[2], DatasetInfo)
    assert hashes(tmp_path / "dst") == undisturbed
    assert convert_job(str(source), dst, SETTINGS, job=Job(0, 3)) == found[2]


def test_readers_wait_for_the_commit(source: Path, tmp_path: Path) -> None:
    from pipeline.errors import DataError

    convert_job(str(source), str(tmp_path / "dst"), SETTINGS, job=Job(0, 2))
    with pytest.raises(DataError, match=r"unfinished|not finished"):
        open_dataset(str(tmp_path / "dst"))


def test_jobs_that_run_together_commit_one_dataset(
    source: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    for attempt in range(5):
        dst = tmp_path / f"dst{attempt}"
        found: list[DatasetInfo | None] = []
        failed: list[BaseException] = []

        def run(
            number: int, dst: Path = dst, found: list = found, failed: list = failed
        ) -> None:
            try:
                found.append(
                    convert_job(str(source), str(dst), SETTINGS, job=Job(number, 4))
                )
            except BaseException as error:  # noqa: BLE001 - reported below
                failed.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert any(found)
        assert hashes(dst) == undisturbed


def test_any_job_commits_what_nobody_did(
    source: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    dst = str(tmp_path / "dst")
    convert_job(str(source), dst, SETTINGS, job=Job(0, 2))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.convert.commit.write_dataset", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_job(str(source), dst, SETTINGS, job=Job(1, 2))
    (tmp_path / "dst" / ".train-000002.tar.tmp-1-abcdef").write_bytes(b"half a shard")
    assert convert_job(str(source), dst, SETTINGS, job=Job(0, 2)) is not None
    assert hashes(tmp_path / "dst") == undisturbed


def test_one_that_makes_everything_and_jobs_keep_apart(
    source: Path, tmp_path: Path
) -> None:
    from filelock import FileLock

    dst = tmp_path / "dst"
    dst.mkdir()
    with FileLock(dst / "_lock-1-of-2"):
        with pytest.raises(ConfigError, match="another conversion"):
            convert(str(source), str(dst), SETTINGS, workers=1)
        with pytest.raises(ConfigError, match="another conversion"):
            convert_job(str(source), str(dst), SETTINGS, job=Job(1, 2))
        assert convert_job(str(source), str(dst), SETTINGS, job=Job(0, 2)) is None


@pytest.mark.parametrize("text", ["", "1", "3/3", "-1/3", "1/0", "a/b"])
def test_what_is_not_a_job_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected I/N"):
        parse_job(text)


# ---------------------------------------------------------------------------------------------- Ray


def test_only_stragglers_get_a_second_copy() -> None:
    running = [(7, 0.0), (8, 80.0), (9, 10.0), (9, 50.0)]
    assert overdue(running, [5.0, 6.0, 7.0], now_s=100.0, slots=8) == [7]
    assert overdue(running, [5.0, 6.0, 7.0], now_s=29.0, slots=8) == []
    assert overdue(running, [60.0], now_s=100.0, slots=8) == []
    assert overdue(running, [5.0], now_s=100.0, slots=4) == []
    assert overdue(running, [], now_s=1e9, slots=8) == []


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "pipeline.convert",
        str(source),
        str(target),
        *OPTIONS,
    ]
    return subprocess.Popen(
        [*command, "--engine", "ray", "--workers", "2"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_parts(target: Path, count: int, process: subprocess.Popen[str]) -> None:
    wait_until(
        lambda: len(list(target.glob("_parts/train-*.parquet"))) >= count,
        what=f"{count} shards",
        still_possible=lambda: process.poll() is None,
        poll_s=0.001,
    )


def kill(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kill a process, and return the workers it has started that are still there a while later.

    Ray's agents, which do nothing without it, stay: they are ended here.
    """
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [
        child
        for child in children
        if "Agent" not in child.name() and "Dashboard" not in child.name()
    ]
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=HANG_S)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=HANG_S)
    return alive


@pytest.mark.slow
def test_ray_makes_the_same_bytes_though_a_worker_is_killed(
    source: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    process = start(source, tmp_path / "dst")
    try:
        wait_for_parts(tmp_path / "dst", 2, process)
        workers = [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if "make_shard" in p.name()
        ]
        for worker in workers[:1]:
            worker.kill()
        _, errors = process.communicate(timeout=HANG_S)
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 0, errors
    assert hashes(tmp_path / "dst") == undisturbed


@pytest.mark.slow
def test_what_ray_left_is_finished_by_processes(
    source: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    process = start(source, tmp_path / "dst")
    try:
        wait_for_parts(tmp_path / "dst", 3, process)
    finally:
        alive = kill(process)
    assert not alive, "Ray outlived the converter"
    assert not (tmp_path / "dst" / "dataset.json").exists()
    convert(str(source), str(tmp_path / "dst"), SETTINGS, workers=2)
    assert hashes(tmp_path / "dst") == undisturbed


@pytest.fixture
def ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a cluster of one node with a token, from another folder than the repository's; give its
    address."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={port}",
    ]
    command += [
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--include-dashboard=false",
    ]
    head = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert head.stdout is not None
        seen = []
        for line in head.stdout:
            seen.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(seen))
        yield f"127.0.0.1:{port}"
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.kill()
        head.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=HANG_S)


@pytest.mark.slow
def test_a_cluster_that_runs_already_makes_the_same_bytes(
    source: Path, tmp_path: Path, undisturbed: dict[str, str], ray_cluster: str
) -> None:
    """With its token, and with a relative path, which means nothing in a worker's folder."""
    command = [
        sys.executable,
        "-m",
        "pipeline.convert",
        os.path.relpath(source, REPOSITORY),
        str(tmp_path / "dst"),
    ]
    command += [*OPTIONS, "--engine", "ray", "--ray-address", ray_cluster]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "dst") == undisturbed


@pytest.mark.slow
def test_a_failure_in_ray_is_said_as_it_is(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    (tmp_path / "src").symlink_to(source)
    (tmp_path / "bad").mkdir()
    for number in range(8):
        (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"junk")
    command = [
        sys.executable,
        "-m",
        "pipeline.convert",
        str(tmp_path / "bad"),
        str(tmp_path / "dst"),
        "--strict",
    ]
    command += ["--samples-per-shard", "4", "--engine", "ray", "--workers", "1"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode == 3, done.stderr
    assert "not an image" in done.stderr
    assert "Traceback" not in done.stderr
