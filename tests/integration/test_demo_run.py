"""The demo end to end on a folder of one's own: interrupted at any time, gone on with, finished,
run once more."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from tests.limits import HANG_S
from train.process.outcome import read_status
from train.report.metrics_file import read_metrics

STEPS = 16
MARK = "MAELSTROM_DEMO_TEST"
"""Variable of the environment that a demo and all its children share: an orphan is found by it."""


@dataclass
class RunningDemo:
    """A demo that runs, with what it has written so far."""

    process: subprocess.Popen[str]
    mark: str
    log: Path

    def text(self) -> str:
        return self.log.read_text()

    def family(self) -> list[psutil.Process]:
        """Find the demo and all that it has started, orphans too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_alive and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def runs(self, *words: str) -> bool:
        """Tell whether a child has all these words in its command line."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if process.pid != self.process.pid and all(
                    word in line for word in words
                ):
                    return True
        return False

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + HANG_S
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline_s, self.text()
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(timeout=HANG_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningDemo]]:
    started: list[RunningDemo] = []

    def demo(source: Path, run_dir: Path, *options: str) -> RunningDemo:
        mark = uuid.uuid4().hex
        log = tmp_path / f"{mark}.log"
        command = [sys.executable, "-m", "train.demo", "--src", str(source)]
        command += ["--run-dir", str(run_dir), *(options or ("--steps", str(STEPS)))]
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: mark},
            )
        started.append(RunningDemo(process, mark, log))
        return started[-1]

    yield demo
    for demo_ in started:
        for process in demo_.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        demo_.process.wait()


@pytest.fixture(scope="module")
def source(make_class_folder: Callable[..., Path]) -> Path:
    return make_class_folder(num_classes=3, per_class=20, size_px=48)


def assert_interrupted(demo: RunningDemo, before: str) -> None:
    assert demo.end() == 130, demo.text()
    said = demo.text().removeprefix(before)
    assert said.rstrip().endswith(
        "demo: stopped. The same command goes on from here."
    ), said
    assert "Traceback" not in said
    left = [
        (process.pid, process.ppid(), process.cmdline()) for process in demo.family()
    ]
    assert not left, "left behind"


# ------------------------------------------------------------------------------------ interruptions


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_the_machine_is_timed(
    start: Callable[..., RunningDemo],
    source: Path,
    tmp_path: Path,
    number: signal.Signals,
):
    demo = start(source, tmp_path / "demo")
    demo.wait_until(lambda: demo.runs("train.demo.speed"))  # which now imports torch
    demo.process.send_signal(number)
    assert_interrupted(demo, demo.text())


@pytest.mark.slow
def test_interrupted_while_the_launcher_imports_torch(
    start: Callable[..., RunningDemo], source: Path, tmp_path: Path
):
    """No rank is there to be told, and the launcher would go on to start them."""
    demo = start(source, tmp_path / "demo")
    demo.wait_until(lambda: demo.runs("deepspeed", "train.pretrain"))
    demo.process.send_signal(signal.SIGINT)
    assert_interrupted(demo, demo.text())
    assert read_status(tmp_path / "demo") == {}, "it went on to train"


@pytest.mark.slow
def test_interrupted_while_pictures_are_converted(
    start: Callable[..., RunningDemo], source: Path, tmp_path: Path
):
    demo = start(source, tmp_path / "demo")
    demo.wait_until(lambda: demo.runs("pipeline.convert"))
    demo.process.send_signal(signal.SIGINT)
    assert_interrupted(demo, demo.text())


# ---------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_the_demo_goes_on_where_it_was(
    start: Callable[..., RunningDemo], source: Path, tmp_path: Path
):
    run_dir = tmp_path / "demo"
    first = start(source, run_dir)
    # status.json says "running" before the processes meet; a signal then finds no step to save.
    first.wait_until(lambda: "starting demo" in first.text())
    first.process.send_signal(signal.SIGINT)
    assert_interrupted(first, "")
    assert "of training, about" in first.text(), "the time was not said"
    interrupted = read_status(run_dir)
    assert interrupted["state"] == "preempted", first.text()

    second = start(
        source, run_dir, "--ranks", "0"
    )  # without --steps: the run keeps its number
    assert second.end() == 0, second.text()
    text = second.text()
    assert f"{STEPS} steps in" in text
    assert f"resumed from step {interrupted['step']} " in text
    for part in (
        "$ ",
        "pipeline.convert",
        "--num_gpus",
        "mean colour",
        "nearest neighbours",
        "reconstruction.png",
    ):
        assert part in text, part
    steps = [line["step"] for line in read_metrics(run_dir)]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    num_val = len(list((run_dir / "pictures" / "val").rglob("*.jp*g")))
    num_train = len(list((run_dir / "pictures" / "train").rglob("*.jp*g")))
    assert evaluation["num_images"] == evaluation["knn"]["num_classified"] == num_val
    assert evaluation["knn"]["num_known"] == num_train
    assert f"{num_val} held-out images among {num_train}" in text
    assert 0 <= evaluation["knn"]["trained"] <= 1
    with safe_open(run_dir / "export" / "timm.safetensors", framework="pt") as file:
        assert "blocks.0.attn.qkv.weight" in file.keys()  # noqa: SIM118 - not a dictionary

    third = start(source, run_dir)
    assert third.end() == 0, third.text()
    assert f"finished: step {STEPS} of {STEPS}" in third.text()
    assert [line["step"] for line in read_metrics(run_dir)] == steps


def test_a_stage_that_fails_keeps_its_exit_code(
    start: Callable[..., RunningDemo], tmp_path: Path
):
    demo = start(tmp_path / "nowhere", tmp_path / "run")
    assert demo.end() == 2, demo.text()
    assert "no such folder" in demo.text()
    assert "Traceback" not in demo.text()
