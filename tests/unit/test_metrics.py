"""What a run writes: metrics.jsonl, events, status.json, the summary."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError, InfrastructureError
from train.errors import Preempted
from train.loop.reporting import MeanLoss
from train.process.outcome import Outcome, read_status, write_json
from train.report.meter import (
    Meter,
    Window,
    format_duration,
    summary_table,
    throughput_summary,
)
from train.report.metrics_file import METRICS_FILE, read_metrics, truncate_after
from train.report.reporter import Reporter


def line(step: int, loss: float = 1.0) -> dict[str, float]:
    return {
        "step": step,
        "epoch": 0.5,
        "loss": loss,
        "lr": 1e-3,
        "images_per_s": 10.0,
        "data_wait_share": 0.0,
    }


def reporter(
    folder: Path,
    *,
    resumed_step: int = 0,
    rank: int = 0,
    out: io.StringIO | None = None,
) -> Reporter:
    return Reporter(
        folder,
        rank=rank,
        total_steps=10,
        resumed_step=resumed_step,
        tensorboard="off",
        out=out or io.StringIO(),
    )


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path):
    with reporter(tmp_path) as first:
        for step in (2, 4, 6, 8):
            first.log(line(step))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    with reporter(tmp_path, resumed_step=4) as second:
        for step in (6, 8, 10):
            second.log(line(step, loss=0.5))
    lines = read_metrics(tmp_path)
    assert [entry["step"] for entry in lines] == [2, 4, 6, 8, 10]
    assert [entry["loss"] for entry in lines] == [1, 1, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_goes_back_writes_no_step_twice(tmp_path: Path, rank: int):
    with reporter(tmp_path, rank=rank) as run:
        for step in (2, 4, 6):
            run.log(line(step))
        run.rewind(3)
        for step in (4, 6):
            run.log(line(step, loss=0.5))
    expected = [(2, 1), (4, 0.5), (6, 0.5)] if rank == 0 else []
    assert [
        (entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)
    ] == expected


def test_a_fresh_start_drops_an_older_runs_lines(tmp_path: Path):
    (tmp_path / METRICS_FILE).write_text(json.dumps(line(5)) + "\n")
    assert truncate_after(tmp_path / METRICS_FILE, 0) == 1
    assert truncate_after(tmp_path / "none.jsonl", 0) == 0


def test_what_is_not_finite_stays_json(tmp_path: Path):
    with reporter(tmp_path) as run:
        run.log(line(1, loss=float("nan")) | {"grad_norm": float("inf")})
    text = (tmp_path / METRICS_FILE).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_metrics(tmp_path)[0]["loss"] is None


def test_only_rank_0_writes(tmp_path: Path):
    out = io.StringIO()
    with reporter(tmp_path, rank=1, out=out) as run:
        run.log(line(1))
        run.say("hello")
    assert list(tmp_path.iterdir()) == []
    assert out.getvalue() == ""


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path):
    out = io.StringIO()
    with reporter(tmp_path, out=out) as run:
        run.log(line(5))
    assert "step 5/10" in out.getvalue()
    assert "ETA" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_events_are_written_for_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((0, (1, 2, 3)), (1, (2,))):
        with Reporter(
            tmp_path, rank=0, total_steps=3, resumed_step=resumed, out=io.StringIO()
        ) as run:
            for step in steps:
                run.log(line(step, loss=float(step + resumed)))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 3.0),
    ]


def test_the_clock_leaves_out_what_is_not_training(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("train.report.meter.time.perf_counter", lambda: now[0])
    meter = Meter(global_batch_size=32)
    for _ in range(4):
        now[0] += 1.0
        meter.step()
    meter.pause()
    now[0] += 100.0
    meter.go_on()
    window = meter.close_window(wait_s=1.0)
    assert window == Window(steps=4, images=128, elapsed_s=4.0, wait_s=1.0)
    assert window.rates() == {
        "images_per_s": 32.0,
        "data_wait_share": 0.25,
        "step_s": 1.0,
    }
    now[0] += 2.0
    meter.step()
    assert meter.close_window(wait_s=1.5) == Window(
        steps=1, images=32, elapsed_s=2.0, wait_s=0.5
    )
    assert meter.total == Window(steps=5, images=160, elapsed_s=6.0, wait_s=1.5)


def test_the_summary_says_where_the_time_went():
    stages = {
        "decode": {"items": 200, "busy_s": 2.0, "wait_s": 0.5, "bytes": 1},
        "read": {"items": 0, "busy_s": 0.0},
    }
    summary = throughput_summary(Window(10, 400, 20.0, 5.0), stages, world_size=2)
    assert summary["stages"]["decode"]["busy_ms_per_item"] == 10.0
    assert summary["stages"]["read"]["busy_ms_per_item"] == 0.0
    assert summary["stages"]["train step"] == {
        "items": 200,
        "busy_s": 15.0,
        "wait_s": 5.0,
        "busy_ms_per_item": 75.0,
    }
    assert "25.0% of the time waiting for data" in summary_table(summary)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (185.2, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_read_as_people_write_them(seconds: float, text: str):
    assert format_duration(seconds) == text


# ------------------------------------------------------------------------------------------- status


def under_launcher(
    monkeypatch: pytest.MonkeyPatch, *, rank: int, port: str = "29500"
) -> None:
    for name, value in (
        ("RANK", str(rank)),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ):
        monkeypatch.setenv(name, value)


def test_several_failing_ranks_give_one_message_and_one_code(
    tmp_path: Path, monkeypatch, capsys
):
    under_launcher(monkeypatch, rank=0)
    zero = Outcome(tmp_path)
    zero.step = 7
    zero.write("running", exit_code=None)
    under_launcher(monkeypatch, rank=1)
    assert Outcome(tmp_path).conclude(DataError("train-000003.tar is cut")) == 3
    assert zero.conclude(RuntimeError("connection closed by peer")) == 3
    text = capsys.readouterr().err
    assert text.count("train-000003.tar is cut") == 1
    assert "connection" not in text
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 3, 1)


def test_the_next_start_reports_its_own_failure(tmp_path: Path, monkeypatch, capsys):
    for port, message in (("1", "first"), ("2", "second")):
        under_launcher(monkeypatch, rank=0, port=port)
        Outcome(tmp_path).conclude(DataError(message))
    assert "second" in capsys.readouterr().err
    assert read_status(tmp_path)["reason"] == "second"


def test_every_ending_has_its_state_and_code(tmp_path: Path, capsys):
    assert Outcome(tmp_path).conclude(Preempted("stopped")) == 75
    assert read_status(tmp_path)["state"] == "preempted"
    assert Outcome(tmp_path).conclude(ZeroDivisionError("a defect")) == 1
    assert read_status(tmp_path)["state"] == "failed"
    assert read_status(tmp_path)["reason"] == "a defect"
    assert "ZeroDivisionError: a defect" in capsys.readouterr().err
    assert Outcome(tmp_path).conclude(KeyboardInterrupt()) == 130
    text = capsys.readouterr().err
    assert text == "\nstopped before training began. The same command starts again.\n"


def test_no_secret_of_an_error_is_shown_or_kept(tmp_path: Path, capsys):
    uri = "s3://key:secret@bucket/data?X-Amz-Signature=secret"
    assert Outcome(tmp_path).conclude(DataError(f"{uri}: gone")) == 3
    assert "secret" not in capsys.readouterr().err
    assert "secret" not in (tmp_path / "status.json").read_text()


def test_a_folder_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, capsys
):
    (tmp_path / "file").write_text("")
    assert (
        Outcome(tmp_path / "file" / "run").conclude(DataError("the real reason")) == 3
    )
    assert "the real reason" in capsys.readouterr().err
    with pytest.raises(InfrastructureError, match="cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_line_without_a_taken_step_has_no_loss_and_says_so(tmp_path: Path):
    """0 / 0 would be NaN, which trackers draw and a mean over the ranks spreads."""
    mean = MeanLoss(torch.device("cpu"))
    assert mean.read() is None
    mean.add([torch.tensor(1.0), torch.tensor(2.0)])
    mean.add([torch.tensor(3.0), torch.tensor(6.0)])
    assert mean.read() == 3.0
    assert mean.read() is None
    mean.add([torch.tensor(5.0)])
    mean.clear()
    assert mean.read() is None

    out = io.StringIO()
    with reporter(tmp_path, out=out) as run:
        run.log({**line(1), "loss": None})
    assert read_metrics(tmp_path)[0]["loss"] is None
    assert "no step taken  10 images/s" in out.getvalue()
