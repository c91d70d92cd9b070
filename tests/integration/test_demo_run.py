"""The demo end to end on a folder of one's own: interrupted, gone on with, finished, run once
more."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from train.process.outcome import read_status
from train.report.metrics_file import read_metrics

LIMIT_S = 280.0


def demo(source: Path, run_dir: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "train.demo",
        "--src",
        str(source),
        "--run-dir",
        str(run_dir),
        "--minutes",
        "0.08",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_goes_on_where_it_was(make_class_folder: Callable[..., Path], tmp_path: Path):
    source = make_class_folder(num_classes=3, per_class=20, size_px=48)
    run_dir = tmp_path / "demo"

    first = demo(source, run_dir)
    deadline = time.monotonic() + LIMIT_S
    while read_status(run_dir).get("state") != "running":
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    text, _ = first.communicate(timeout=LIMIT_S)
    assert first.returncode == 75, text
    assert "the same command goes on from here" in text
    assert "Traceback" not in text
    interrupted = read_status(run_dir)
    assert interrupted["state"] == "preempted", text

    second = demo(source, run_dir)
    text, _ = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 0, text
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
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["num_images"] == len(list((run_dir / "pictures" / "val").rglob("*.jp*g")))
    assert 0 <= evaluation["knn"]["trained"] <= 1
    with safe_open(run_dir / "export" / "timm.safetensors", framework="pt") as file:
        assert "blocks.0.attn.qkv.weight" in file.keys()  # noqa: SIM118 - not a dictionary

    third = demo(source, run_dir)
    text, _ = third.communicate(timeout=LIMIT_S)
    assert third.returncode == 0, text
    assert f"finished: step {steps[-1]} of {steps[-1]}" in text
    assert [line["step"] for line in read_metrics(run_dir)] == steps


def test_a_stage_that_fails_keeps_its_exit_code(tmp_path: Path):
    process = demo(tmp_path / "nowhere", tmp_path / "run")
    text, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2, text
    assert "no such folder" in text
    assert "Traceback" not in text
