"""Other displays of a run: what they get, and that neither their failure nor their slowness is the
run's."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import ConfigError
from train.config import RunConfig
from train.report.metrics_file import read_metrics
from train.report.reporter import Reporter
from train.report.trackers import Background, Tracker, check_trackers, start_trackers

SECRET = "https://name:hunter2@host/data?sig=abc"


def config(**log: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "recipe": "demo",
            "data": {"train": SECRET},
            "train": {"steps": 9},
            "log": {"tensorboard": "off", **log},
        }
    )


def train_a_little(
    folder: Path,
    trackers: Callable[[Reporter], list[Background]],
    *,
    first: int,
    last: int,
) -> None:
    with Reporter(
        folder, rank=0, total_steps=9, resumed_step=first - 1, tensorboard="off"
    ) as reporter:
        reporter.show_on(trackers(reporter))
        for step in range(first, last + 1):
            reporter.log(
                {
                    "step": step,
                    "loss": 1 / step,
                    "images_per_s": 5.0,
                    "grad_norm": None,
                    "lr": float("nan"),
                }
            )
        Image.new("RGB", (8, 8)).save(folder / "reconstruction.png")
        reporter.picture("reconstruction", folder / "reconstruction.png", last)


def leveldb_records(content: bytes, *, block: int) -> list[bytes]:
    """Read the log format of LevelDB: blocks of 32 KiB of pieces, each with checksum, length and
    kind (whole, first, middle, last)."""
    records, pending, start = [], b"", 0
    while start + 7 <= len(content):
        left = (block - start) % 2**15
        if left < 7:  # the rest of a block is too short for a piece
            start += left
            continue
        length, kind = (
            int.from_bytes(content[start + 4 : start + 6], "little"),
            content[start + 6],
        )
        pending += content[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):
            records.append(pending)
            pending = b""
    return records


class Faulty(Tracker):
    """Fails where it is told to."""

    name = "Faulty"

    def __init__(self, moment: str) -> None:
        self.moment, self.seen, self.go_on = moment, [], threading.Event()

    def _at(self, moment: str) -> None:
        self.seen.append(moment)
        if moment == self.moment:
            raise SystemExit(f"no network to {SECRET}")
        if self.moment == f"hang in {moment}":
            self.go_on.wait()

    def open(self) -> None:
        self._at("open")

    def log(self, step, values) -> None:
        self._at("log")

    def picture(self, step, name, path) -> None:
        self._at("picture")

    def close(self) -> None:
        self._at("close")


@pytest.mark.parametrize("moment", ["open", "log", "picture", "close"])
def test_a_tracker_that_fails_is_told_of_once_and_left_alone(
    tmp_path: Path, capsys, moment: str
):
    faulty = Faulty(moment)
    train_a_little(
        tmp_path,
        lambda reporter: [Background(faulty, warn=reporter.say)],
        first=1,
        last=9,
    )
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 10))
    out = capsys.readouterr().out
    assert out.count("warning: Faulty shows nothing more of this run: no network") == 1
    assert "hunter2" not in out
    assert faulty.seen.count(moment) == 1


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_tracker_that_hangs_does_not_hold_the_run(tmp_path: Path, moment: str):
    faulty = Faulty(f"hang in {moment}")
    train_a_little(
        tmp_path,
        lambda reporter: [Background(faulty, warn=reporter.say, closing_limit_s=0.05)],
        first=1,
        last=9,
    )
    assert len(read_metrics(tmp_path)) == 9
    faulty.go_on.set()


def test_a_queue_that_is_full_drops_lines(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("train.report.trackers.QUEUE_LENGTH", 3)
    faulty = Faulty("hang in open")
    background = Background(faulty, warn=print, closing_limit_s=0.05)
    for step in range(50):
        background.log(step, {"loss": 1.0})  # would wait for ever if it waited
    background.close()
    faulty.go_on.set()
    assert faulty.seen.count("log") <= 3


def test_what_is_not_installed_is_said_before_the_start(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(config())
    with pytest.raises(
        ConfigError,
        match=r"log.wandb is on, but wandb is not installed.*log.mlflow.*\[tracking\]",
    ):
        check_trackers(config(wandb="on", mlflow="on"))


@pytest.mark.slow
def test_mlflow_shows_a_run_and_its_resume_as_one(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = config(mlflow="on", mlflow_experiment="tries")
    for first, last in ((1, 4), (3, 6)):
        train_a_little(
            tmp_path,
            lambda reporter: list(start_trackers(run, tmp_path, warn=reporter.say)),
            first=first,
            last=last,
        )
    assert "warning" not in capsys.readouterr().out
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tries")
    assert experiment is not None
    (shown,) = client.search_runs([experiment.experiment_id])
    assert shown.info.status == "FINISHED"
    points = {
        point.step: point.value
        for point in client.get_metric_history(shown.info.run_id, "loss")
    }
    assert points == {step: pytest.approx(1 / step) for step in range(1, 7)}
    assert "lr" not in shown.data.metrics
    assert {file.path for file in client.list_artifacts(shown.info.run_id)} == {
        "config.json",
        "reconstruction.png",
    }
    assert "hunter2" not in "".join(
        path.read_text("utf-8", "replace") for path in tmp_path.rglob("*.json")
    )


@pytest.mark.slow
def test_wandb_shows_a_run_offline(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = config(wandb="on", wandb_project="tries")
    for first, last in ((1, 4), (3, 6)):
        train_a_little(
            tmp_path,
            lambda reporter: list(start_trackers(run, tmp_path, warn=reporter.say)),
            first=first,
            last=last,
        )
    assert "warning" not in capsys.readouterr().out
    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    losses = {}
    for path in files:
        for data in leveldb_records(path.read_bytes()[7:], block=2**15 - 7):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {
                (item.key or ".".join(item.nested_key)): item.value_json
                for item in record.history.item
            }
            if "train/loss" in items:
                losses[int(items["step"])] = float(items["train/loss"])
        assert b"hunter2" not in path.read_bytes()
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 7)}
