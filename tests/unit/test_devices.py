"""What is known of a machine's GPUs before torch is imported, and what settings then say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from train.settings import devices
from train.settings.command_line import parse_run
from train.settings.devices import Device, Gpu, find_device, list_gpus

GIB = 2**30
ANSWERS = {
    "81559, 9.0": [Gpu(81559 * 2**20, 9)],
    "16384, 7.0\n40960, 8.0": [Gpu(16 * GIB, 7), Gpu(40 * GIB, 8)],
    "16384, [N/A]": [Gpu(16 * GIB, None)],
    "[N/A], 8.7": [],
    "No devices were found": [],
}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a program that answers as nvidia-smi, on a machine with a driver's file."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_DEVICE_FILES", (str(tmp_path),))
    return program


def answer(program: Path, text: str, *, code: int = 0) -> None:
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("text", ANSWERS)
def test_the_drivers_answer_is_read(driver: Path, text: str) -> None:
    answer(driver, text)
    assert list_gpus() == ANSWERS[text]


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("81559, 9.0\n81559, 9.0", Device("cuda", has_bf16=True)),
        ("16384, 7.5", Device("cuda", has_bf16=False)),
        ("16384, 7.0\n40960, 8.0", Device("cuda", has_bf16=None)),
        ("16384, [N/A]", Device("cuda", has_bf16=None)),
        ("No devices were found", None),
    ],
)
def test_only_what_is_certain_is_said(
    driver: Path, text: str, device: Device | None
) -> None:
    answer(driver, text)
    assert find_device({}) == device
    answer(driver, text, code=9)
    assert find_device({}) is None


def test_a_machine_without_a_gpu_and_one_whose_gpus_are_hidden(
    driver: Path, monkeypatch
) -> None:
    answer(driver, "81559, 9.0")
    for hidden in ("", "-1"):
        assert find_device({"CUDA_VISIBLE_DEVICES": hidden}) == Device(
            "cpu", has_bf16=True
        )
    monkeypatch.setattr(devices, "_DEVICE_FILES", ())
    assert find_device({}) == Device("cpu", has_bf16=True)


def test_what_a_gpu_cannot_do_is_told_with_all_other_mistakes(driver: Path) -> None:
    answer(driver, "16384, 7.0")
    words = (
        "demo",
        "--data.train",
        "x",
        "--engine.precision",
        "bf16",
        "--optim.base-lr",
        "-1",
    )
    with pytest.raises(ConfigError) as caught:
        parse_run(words, env={})
    assert "2 mistakes in the settings" in str(caught.value)
    assert "engine.precision bf16 computes in bf16, which this GPU cannot" in str(
        caught.value
    )
    # A dry run may be of a run for another machine.
    with pytest.raises(ConfigError) as caught:
        parse_run((*words, "--dry-run"), env={})
    assert "which this GPU cannot" not in str(caught.value)
