"""Real runs of `train.pretrain` under real launchers: stopping, resuming, failing, finishing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from pipeline import storage
from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from tests import launch
from tests.limits import HANG_S, wait_until
from train.demo.launching import deepspeed_command, run_training
from train.process.outcome import read_status
from train.report.metrics_file import read_metrics

pytestmark = pytest.mark.slow

TINY = {
    "model.image-size": "32",
    "model.embed-dim": "32",
    "model.depth": "2",
    "model.num-heads": "2",
    "model.decoder-embed-dim": "32",
    "model.decoder-depth": "1",
    "model.decoder-num-heads": "2",
    "train.global-batch-size": "16",
    "train.micro-batch-size": "4",
    "train.steps": "40",
    "optim.warmup-steps": "4",
    "order.lanes": "4",
    "loader.decoder": "turbo",
    "engine.precision": "fp32",
    "checkpoint.every-steps": "20",
    "log.every-steps": "1",
    "log.num-pictures": "4",
}


class Data(NamedTuple):
    train: str
    val: str


@pytest.fixture(scope="module")
def data(
    make_class_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Data:
    folder = tmp_path_factory.mktemp("shards")
    source = make_class_folder(num_classes=4, per_class=20, size_px=48)
    for name, count in (("train", 16), ("val", 40)):
        convert(
            str(source),
            str(folder / name),
            ConvertSettings(samples_per_shard=count, split=name),
            workers=1,
        )
    return Data(str(folder / "train"), str(folder / "val"))


def words(data: Data, run_dir: Path, **changes: str) -> list[str]:
    settings = {
        **TINY,
        "data.train": data.train,
        "data.val": data.val,
        "run.dir": str(run_dir),
    }
    settings |= {
        name.replace("__", ".").replace("_", "-"): value
        for name, value in changes.items()
    }
    return [
        "demo",
        *(word for name, value in settings.items() for word in (f"--{name}", value)),
    ]


def alone(
    data: Data, run_dir: Path, **changes: str
) -> subprocess.CompletedProcess[str]:
    return launch.run(["-m", "train.pretrain", *words(data, run_dir, **changes)])


def together(
    data: Data, run_dir: Path, **changes: str
) -> subprocess.CompletedProcess[str]:
    return launch.run(
        ["-m", "train.pretrain", *words(data, run_dir, **changes)], ranks=2
    )


def losses(run_dir: Path) -> dict[int, float]:
    lines = read_metrics(run_dir)
    steps = [line["step"] for line in lines]
    assert len(steps) == len(set(steps)), "a step was written twice"
    return {line["step"]: line["loss"] for line in lines}


def at_step(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: (
        read_status(run_dir).get("state") == "running"
        and read_status(run_dir)["step"] >= step
    )


# ----------------------------------------------------------------------------------- stop and go on


def test_two_ranks_stopped_and_resumed_lose_what_an_unbroken_run_loses(
    data: Data, tmp_path: Path
):
    """Stopped by SIGTERM under the deepspeed launcher; resumed; then longer, alone, from the same
    folder."""
    done = together(data, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    whole = losses(tmp_path / "whole")
    assert list(whole) == list(range(1, 41))
    assert whole[40] < whole[1]

    broken = tmp_path / "broken"
    command = deepspeed_command("demo", words(data, broken)[1:], ranks=2)
    run_training(command, run_dir=broken, stop_at=5, env=launch.environment())
    status = read_status(broken)
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    stopped = status["step"]
    assert 5 <= stopped < 40
    assert list(losses(broken)) == list(range(1, stopped + 1))
    assert [path.name for path in (broken / "checkpoints").glob(f"step-*{stopped}")]

    resumed = together(data, broken)
    assert resumed.returncode == 0, resumed.stderr
    text = resumed.stdout
    assert (
        text.count(f"resumed from step {stopped} (images_seen {16 * stopped:,})") == 1
    )
    assert losses(broken) == whole, "a resumed run does not see or compute the same"
    status = read_status(broken)
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 40)

    again = alone(data, broken)
    assert again.returncode == 0, again.stderr
    assert "finished: step 40 of 40" in again.stdout
    assert losses(broken) == whole

    longer = alone(data, broken, train__steps="44", engine__zero_stage="0")
    assert longer.returncode == 0, longer.stderr
    assert "resumed from step 40" in longer.stdout
    assert list(losses(broken)) == list(range(1, 45))


def test_a_finished_run_leaves_what_the_contract_names(data: Data, tmp_path: Path):
    run_dir = tmp_path / "run"
    done = alone(
        data,
        run_dir,
        train__steps="6",
        log__every_steps="4",
        engine__device_tflops="0.5",
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(run_dir)] == [4, 6]
    line = read_metrics(run_dir)[-1]
    assert {
        "step",
        "epoch",
        "images_seen",
        "loss",
        "lr",
        "images_per_s",
        "data_wait_share",
    } <= set(line)
    assert line["tflops_per_device"] > 0
    assert line["mfu"] == pytest.approx(line["tflops_per_device"] / 0.5)
    assert line["bad_samples"] == 0
    assert "MFU" in done.stdout
    assert (line["images_seen"], line["epoch"]) == (96, pytest.approx(96 / 80))
    for name in (
        "status.json",
        "summary.json",
        "config.toml",
        "ds_config.json",
        "loss.png",
        "reconstruction.png",
    ):
        assert (run_dir / name).is_file(), name
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["stages"]["decode"]["items"] >= 96
    assert "waiting for data" in done.stdout
    assert not (run_dir / "lease.json").exists()


def test_sigterm_saves_and_ends_with_75(data: Data, tmp_path: Path):
    run_dir = tmp_path / "run"
    command = ["-m", "train.pretrain", *words(data, run_dir, train__steps="4000")]
    with launch.start(command) as process:
        wait_until(
            at_step(run_dir, 3),
            what="the third step",
            still_possible=process.is_running,
        )
        process.send_signal(signal.SIGTERM)
        code, stderr = process.wait(), process.stderr
    assert code == 75, stderr
    status = read_status(run_dir)
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert stderr.count("the same command line goes on from there") == 1
    assert "Traceback" not in stderr
    assert (
        run_dir / "checkpoints" / f"step-{status['step']:06d}" / "MANIFEST.json"
    ).exists()


def test_ctrl_c_under_the_deepspeed_launcher_saves(data: Data, tmp_path: Path):
    """The terminal signals launcher and ranks at once, and the launcher signals the ranks a second
    time."""
    run_dir = tmp_path / "run"
    command = deepspeed_command(
        "demo", words(data, run_dir, train__steps="4000")[1:], ranks=2
    )
    process = subprocess.Popen(
        command,
        env=launch.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_until(
        at_step(run_dir, 3),
        what="the third step",
        still_possible=lambda: process.poll() is None,
    )
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if not child.children()
    ]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=HANG_S)
    psutil.wait_procs(ranks, timeout=HANG_S)
    status = read_status(run_dir)
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (
        run_dir / "checkpoints" / f"step-{status['step']:06d}" / "MANIFEST.json"
    ).exists()


# ------------------------------------------------------------------------------------------ failing


def torchrun(
    data: Data, run_dir: Path, **changes: str
) -> subprocess.CompletedProcess[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*launcher, "-m", "train.pretrain", *words(data, run_dir, **changes)]
    return subprocess.run(
        command,
        env=launch.environment(),
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def test_a_dataset_that_is_not_there_is_said_once(data: Data, tmp_path: Path):
    done = torchrun(data, tmp_path / "run", data__train=str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "nowhere" in done.stderr
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 3)


def test_damaged_images_end_both_ranks_with_code_3(data: Data, tmp_path: Path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in Path(data.train).iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".tar":  # every image becomes zeros; sizes and index stay
            content = bytearray(len(content))
        (damaged / path.name).write_bytes(content)
    changes = {"data__train": str(damaged), "loader__max_bad_in_a_row": "8"}
    done = together(data, tmp_path / "run", **changes)
    assert done.returncode != 0
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 3), done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "train-0000" in status["reason"]


def test_a_loss_that_is_not_finite_ends_with_code_5_and_names_the_batch(
    data: Data, tmp_path: Path
):
    run_dir = tmp_path / "run"
    done = alone(data, run_dir, optim__base_lr="1e30", optim__grad_clip="0")
    assert done.returncode == 5, done.stderr
    names = list(run_dir.glob("nonfinite-step-*-rank-0.json"))
    assert len(names) == 5, "one for each step that was skipped"
    assert all(len(json.loads(path.read_text())["sample_ids"]) == 16 for path in names)
    assert "no checkpoint from before" in done.stderr


@pytest.mark.remote
def test_shards_and_checkpoints_may_live_in_object_storage(
    data: Data, tmp_path: Path, s3_bucket: str
):
    train, checkpoints = f"{s3_bucket}/train", f"{s3_bucket}/checkpoints"
    for path in Path(data.train).iterdir():
        storage.put_file(path, f"{train}/{path.name}")
    changes = {
        "data__train": train,
        "checkpoint__dir": checkpoints,
        "loader__cache_dir": str(tmp_path / "cache"),
    }
    first = alone(data, tmp_path / "run", train__steps="5", **changes)
    assert first.returncode == 0, first.stderr
    second = alone(data, tmp_path / "run", train__steps="6", **changes)
    assert second.returncode == 0, second.stderr
    assert (
        f"resumed from step 5 (images_seen 80) of {checkpoints}/step-000005"
        in second.stdout
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    drawn = launch.run(
        ["-m", "train.reconstruct", checkpoints, "--out", str(tmp_path / "r.png")]
    )
    assert drawn.returncode == 0, drawn.stderr
    assert "step 6" in drawn.stdout


# ------------------------------------------------------------------------------- nobody reads along


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["dead", "full", "closed"])
def test_a_run_goes_on_when_nobody_reads_its_output(
    data: Data, tmp_path: Path, kind: str, ranks: int
) -> None:
    """Its lines are lost; its steps, files and exit code are not."""
    script = tmp_path / "start.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import io, os, runpy, sys
            for descriptor in (1, 2):
                if {kind!r} == "closed":
                    os.close(descriptor)
                    continue
                reader, writer = os.pipe()
                if {kind!r} == "full":
                    writer = os.open("/dev/full", os.O_WRONLY)
                os.dup2(writer, descriptor)
                os.close(reader)
            if {kind!r} == "closed":
                sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = None
            sys.argv = ["train.pretrain", *sys.argv[1:]]
            runpy.run_module("train.pretrain", run_name="__main__", alter_sys=True)
            """
        )
    )
    run_dir = tmp_path / "run"
    given = words(data, run_dir, train__steps="6", checkpoint__every_steps="3")
    done = launch.run([str(script), *given], ranks=ranks)
    assert done.returncode == 0, read_status(run_dir)
    assert read_status(run_dir)["exit_code"] == 0
    assert list(losses(run_dir)) == [1, 2, 3, 4, 5, 6]
    assert (run_dir / "checkpoints").is_dir()
