"""Bad and changed data under a real run: one report of all ranks, shards named, an explicit way to
go on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.images.refused import Reason, Refused
from pipeline.loader.data_report import DataReport, merge_reports
from tests import launch
from train.process.outcome import read_status
from train.report.metrics_file import read_metrics

TINY = {
    "model.image-size": "32",
    "model.embed-dim": "32",
    "model.depth": "1",
    "model.num-heads": "2",
    "model.decoder-embed-dim": "32",
    "model.decoder-depth": "1",
    "model.decoder-num-heads": "2",
    "train.global-batch-size": "16",
    "train.micro-batch-size": "4",
    "optim.warmup-steps": "1",
    "order.lanes": "4",
    "loader.decoder": "turbo",
    "loader.max-bad-share": "1",
    "engine.precision": "fp32",
    "log.num-pictures": "0",
    "log.every-steps": "1",
}


def words(data: str, run_dir: Path, **changes: str) -> list[str]:
    settings = {**TINY, "data.train": data, "data.val": "", "run.dir": str(run_dir)}
    settings |= {
        name.replace("__", ".").replace("_", "-"): value
        for name, value in changes.items()
    }
    return [
        "demo",
        *(word for name, value in settings.items() for word in (f"--{name}", value)),
    ]


def alone(*args: str) -> subprocess.CompletedProcess[str]:
    return launch.run(["-m", "train.pretrain", *args])


def test_reports_are_added_up_and_no_rank_hides_another():
    first, second = (
        DataReport(max_bad_share=1.0, max_bad_in_a_row=1000),
        DataReport(max_bad_share=1.0),
    )
    for number in range(150):
        first.bad(Refused(Reason.TOO_MANY_PIXELS), "a.tar", f"{number}")
        first.good()
    second.good(10)
    second.bad(Refused(Reason.NOT_AN_IMAGE), "b.tar", "x")
    merged = merge_reports([first.to_json(), second.to_json()])
    assert (merged["num_seen"], merged["num_bad"]) == (311, 151)
    assert merged["reasons"] == {"too many pixels": 150, "not an image": 1}
    assert merged["shards"] == {"a.tar": 150, "b.tar": 1}
    assert len(merged["first"]) == 100
    assert {"shard": "b.tar", "key": "x", "reason": "not an image"} in merged["first"]
    assert merge_reports([merged]) == merged


@pytest.mark.slow
def test_all_ranks_and_all_starts_of_a_run_are_in_one_report(
    make_dataset, tmp_path: Path
):
    bad = {5: b"junk" * 30, 21: b"", 40: b"x"}
    data, run_dir = make_dataset(replace=bad), tmp_path / "run"
    for steps in (4, 8):  # 60 samples are an epoch of 3.75 steps
        args = words(data, run_dir, train__steps=str(steps))
        done = launch.run(["-m", "train.pretrain", *args], ranks=2)
        assert done.returncode == 0, done.stderr
        report = json.loads((run_dir / "data_report.json").read_text())
        assert report["num_bad"] >= steps // 4 * len(bad)
        assert {(entry["shard"], entry["key"]) for entry in report["first"]} == {
            ("train-000000.tar", "000005"),
            ("train-000001.tar", "000021"),
            ("train-000002.tar", "000040"),
        }
        assert report["num_seen"] >= 16 * steps


@pytest.mark.slow
def test_too_much_that_is_bad_ends_the_run_and_leaves_the_report(
    make_dataset, tmp_path: Path
):
    data = make_dataset(replace=dict.fromkeys(range(0, 60, 2), b"junk"))
    done = alone(
        *words(data, tmp_path / "run", train__steps="8", loader__max_bad_share="0.0005")
    )
    assert done.returncode == 3, done.stderr
    assert "bad samples among the last 10,000" in done.stderr
    assert "not an image" in done.stderr
    report = json.loads((tmp_path / "run" / "data_report-rank-0.json").read_text())
    assert report["num_bad"] > 5
    assert read_status(tmp_path / "run")["exit_code"] == 3


@pytest.mark.slow
def test_a_dataset_that_changed_between_starts_is_named_and_may_be_accepted(
    make_dataset, tmp_path: Path
):
    data, run_dir = make_dataset(), tmp_path / "run"
    done = alone(*words(data, run_dir, train__steps="2"))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(data)
    assert make_dataset((13, 16, 12, 19)) == data
    done = alone(*words(data, run_dir, train__steps="6"))
    assert done.returncode == 3, done.stderr
    assert "in 2 of 4 shards: train-000001.tar, train-000002.tar" in done.stderr
    assert "data.on_change next-epoch" in done.stderr
    done = alone(*words(data, run_dir, train__steps="6", data__on_change="next-epoch"))
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, 7))
    assert len(list((run_dir / "checkpoints").glob("dataset-*.json"))) == 2


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_run_writes(
    make_dataset, s3_bucket, tmp_path: Path
):
    """Data and checkpoints in object storage, with a secret in the environment and one in a URL
    that fails."""
    secret = "hush-8f41c7"
    data = make_dataset(uri=f"{s3_bucket}/data")
    args = words(
        data,
        tmp_path / "run",
        train__steps="2",
        checkpoint__dir=f"{s3_bucket}/run",
        log__every_steps="1",
    )
    env = launch.environment() | {"AWS_SECRET_ACCESS_KEY": secret}
    env |= {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "MAELSTROM_STORAGE_BUDGET_S": "1",
    }
    said = ""
    for extra in (
        [],
        ["--data.train", f"https://me:{secret}@127.0.0.1:9/x?sig={secret}"],
    ):
        run_dir = str(tmp_path / f"run{len(extra)}")
        done = launch.run(
            ["-m", "train.pretrain", *args, "--run.dir", run_dir, *extra], env=env
        )
        assert done.returncode == (76 if extra else 0), done.stderr
        said += done.stdout + done.stderr
    assert secret not in said
    import boto3

    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    bucket = boto3.resource("s3").Bucket(s3_bucket.removeprefix("s3://"))
    written += [item.get()["Body"].read() for item in bucket.objects.all()]
    assert len(written) > 20
    assert not any(secret.encode() in content for content in written)
